//! The nftables data plane against the kernel: what is applied is what is read back, and `nft` can list it.

#![expect(clippy::unwrap_used, reason = "what goes wrong in a helper of a test is to end the test")]

use std::{
    io::Write as _,
    net::{IpAddr, Ipv4Addr, UdpSocket},
    process::{Child, Command, Stdio},
    sync::Arc,
};

use weir::{
    dataplane::{
        Dataplane as _, Error, Outcome,
        nftables::{Nftables, Seen},
    },
    model::{DetectLocal, Family, NameClients, ObjectName, PerFamily, Protocol},
    plan::{
        Backend, ClusterIpDelta, Delta, Destination, Frontend, FrontendPlan, LocalTraffic, NodePlan,
        NodePortAddresses, PortDelta, PortId, PortPlan, Removal, Route, Target, Treatment,
    },
};

mod affinity;
mod chains;
mod many;
mod names;
mod outage;
mod refusals;
mod shapes;
mod slots;
mod sources;

/// Runs `test` in a network namespace of its own, which goes with the thread.
fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("these tests need root");
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn nft(arguments: &[&str]) -> String {
    let output =
        Command::new("nft").args(arguments).output().expect("nft is not installed: run cargo xtask setup");
    assert!(output.status.success(), "nft {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Another program that owns a table: the kernel lets nothing else change it while this lives.
struct Owner(Child);

impl Owner {
    /// Owns the table `weir` of a family, as `nft` calls it.
    fn of(family: &str) -> Self {
        let mut owner =
            Command::new("nft").arg("-i").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let table = format!("add table {family} weir {{ flags owner; }}\n");
        owner.stdin.as_mut().unwrap().write_all(table.as_bytes()).unwrap();
        while !nft(&["list", "tables"]).contains("weir") {
            std::thread::yield_now();
        }
        Self(owner)
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        // One that ended by itself is what a test is about to see.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn node() -> NodePlan {
    let any = NodePortAddresses::AnyLocal;
    NodePlan {
        local_traffic: PerFamily {
            v4: Some(LocalTraffic::Source("10.244.0.0/16".parse().unwrap())),
            v6: Some(LocalTraffic::Source("fd00:10:244::/48".parse().unwrap())),
        },
        node_port_addresses: PerFamily { v4: any.clone(), v6: any },
        loopback_node_ports: PerFamily::default(),
        host_addresses: vec!["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()],
        masquerade_mark: 0x4000,
        service_cidrs: vec!["10.96.0.0/16".parse().unwrap(), "fd00:10:96::/112".parse().unwrap()],
        answers_names: false,
        name_clients: None,
        drops_out_of_window: true,
    }
}

fn treatment(target: Target, masquerade: bool) -> Treatment {
    Treatment { target, masquerade }
}

fn cluster_ip_route() -> Route {
    Route {
        pod: treatment(Target::Cluster, false),
        host: treatment(Target::Cluster, true),
        outside: treatment(Target::Cluster, true),
    }
}

fn local_route() -> Route {
    Route {
        pod: treatment(Target::Cluster, false),
        host: treatment(Target::Cluster, true),
        outside: treatment(Target::Local, false),
    }
}

fn address(family: Family, number: u8) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(10, 96, 0, number).into(),
        Family::V6 => format!("fd00:10:96::{number:x}").parse().unwrap(),
    }
}

fn backend(family: Family, number: u8, local: bool) -> Backend {
    let address = match family {
        Family::V4 => Ipv4Addr::new(10, 244, 0, number).into(),
        Family::V6 => format!("fd00:10:244::{number:x}").parse().unwrap(),
    };
    Backend { address, port: 8080, local }
}

fn port(family: Family, number: u8, backends: &[u8], affinity: Option<u32>) -> PortPlan {
    let cluster: Vec<_> = backends.iter().map(|&number| backend(family, number, number % 2 == 0)).collect();
    let local: Vec<_> = cluster.iter().copied().filter(|backend| backend.local).collect();
    let frontend = |destination, port| Frontend { destination, protocol: Protocol::Tcp, port };
    let plan =
        |frontend, route| FrontendPlan { frontend, route, allowed_sources: None, answered_here: false };
    let external = match (local.is_empty(), cluster.is_empty()) {
        (false, _) => local_route(),
        (true, false) => Route { outside: treatment(Target::Drop, false), ..local_route() },
        (true, true) => Route::uniform(treatment(Target::Reject, false)),
    };
    let cluster_ip = if cluster.is_empty() { external } else { cluster_ip_route() };
    let mut guarded = plan(frontend(Destination::Address(address(family, number + 100)), 80), external);
    let sources = match family {
        Family::V4 => ["198.51.100.0/24", "203.0.113.7/32"],
        Family::V6 => ["2001:db8:1::/48", "2001:db8:2::7/128"],
    };
    guarded.allowed_sources = Some(sources.map(|net| net.parse().unwrap()).into());
    PortPlan {
        id: PortId {
            service: ObjectName::new("default", &format!("svc-{number}")),
            port: "http".into(),
            protocol: Protocol::Tcp,
            family,
        },
        cluster,
        local,
        frontends: vec![
            plan(frontend(Destination::Address(address(family, number)), 80), cluster_ip),
            plan(frontend(Destination::NodePort(family), 30000 + u16::from(number)), external),
            guarded,
        ],
        affinity,
        on_removal: Removal::Keep,
        serving: Vec::new(),
    }
}

/// Asserts that every frontend of `port` reads back as planned, in the order of the plan.
fn assert_installed(plane: &mut Nftables, port: &PortPlan) {
    let state = plane.dump().unwrap();
    for plan in &port.frontends {
        let installed =
            state.frontends.get(&plan.frontend).unwrap_or_else(|| panic!("{} is missing", plan.frontend));
        for (got, want) in [
            (&installed.pod, plan.route.pod),
            (&installed.host, plan.route.host),
            (&installed.outside, plan.route.outside),
        ] {
            let sorted = |backends: &[Backend]| {
                let mut backends = backends.to_vec();
                backends.sort_unstable();
                Outcome::Backends(backends)
            };
            let outcome = match want.target {
                Target::Cluster => sorted(&port.cluster),
                Target::Local => sorted(&port.local),
                Target::Reject => Outcome::Reject,
                Target::Drop => Outcome::Drop,
            };
            assert_eq!(got.outcome, outcome, "{}", plan.frontend);
            assert_eq!(got.masquerade, want.masquerade, "{} {want:?}", plan.frontend);
        }
        let backends = !port.cluster.is_empty();
        assert_eq!(installed.affinity, port.affinity.filter(|_| backends), "{}", plan.frontend);
        assert_eq!(
            installed.allowed_sources.as_deref(),
            plan.allowed_sources.as_deref(),
            "{}",
            plan.frontend
        );
    }
}

fn change(before: Option<&Arc<PortPlan>>, after: Option<&Arc<PortPlan>>) -> PortDelta {
    PortDelta { before: before.cloned(), after: after.cloned() }
}

/// The delta of a start.
fn start(ports: &[&Arc<PortPlan>]) -> Delta {
    Delta {
        node: Some(Arc::new(node())),
        ports: ports.iter().map(|plan| change(None, Some(plan))).collect(),
        complete: true,
        ..Delta::default()
    }
}

/// One change of a service port.
fn step(before: Option<&Arc<PortPlan>>, after: Option<&Arc<PortPlan>>) -> Delta {
    Delta { ports: vec![change(before, after)], ..Delta::default() }
}

fn both() -> PerFamily<bool> {
    PerFamily { v4: true, v6: true }
}

#[test]
fn applied_rules_are_read_back_listed_and_adopted() {
    in_namespace(|| {
        let mut plane = Nftables::open(both()).unwrap();
        let plans = |backends: &[u8]| -> Vec<Arc<PortPlan>> {
            Family::ALL
                .into_iter()
                .flat_map(|family| {
                    [
                        Arc::new(port(family, 1, backends, None)),
                        Arc::new(port(family, 2, backends, Some(10800))),
                        Arc::new(port(family, 3, &[], None)),
                        Arc::new(port(family, 4, &[1, 3], None)),
                    ]
                })
                .collect()
        };
        let first = plans(&[1, 2, 3]);
        let cluster_ips: Vec<_> =
            Family::ALL.into_iter().flat_map(|family| (1..=4).map(move |n| address(family, n))).collect();
        let mut delta = Delta {
            node: Some(Arc::new(node())),
            cluster_ips: cluster_ips.iter().map(|&address| ClusterIpDelta::Add(address)).collect(),
            ports: first.iter().map(|plan| change(None, Some(plan))).collect(),
            complete: true,
        };
        plane.apply(&delta).unwrap();
        for plan in &first {
            assert_installed(&mut plane, plan);
        }
        let listed = nft(&["list", "ruleset"]);
        assert!(listed.contains("table ip weir") && listed.contains("table ip6 weir"), "{listed}");

        // Endpoints come and go.
        let second = plans(&[2, 3, 4, 5]);
        let ports =
            first.iter().zip(&second).map(|(before, after)| change(Some(before), Some(after))).collect();
        plane.apply(&Delta { ports, ..Delta::default() }).unwrap();
        for plan in &second {
            assert_installed(&mut plane, plan);
        }

        // A new agent finds the table as it is and changes nothing of what Services need; a third one finds nothing
        // to change at all.
        drop(plane);
        delta.ports = second.iter().map(|plan| change(None, Some(plan))).collect();
        let elements = |text: &str| text.lines().filter(|line| line.contains(" : 10.")).count();
        let before = elements(&nft(&["list", "ruleset"]));
        let adopt = || {
            let mut plane = Nftables::open(both()).unwrap();
            plane.apply(&delta).unwrap();
            let listed = nft(&["list", "ruleset"]);
            let mut lines: Vec<_> = listed.split(['\n', ',']).map(|line| line.trim().to_owned()).collect();
            lines.sort();
            (plane, elements(&listed), lines)
        };
        let (second_agent, found, once) = adopt();
        assert_eq!(found, before);
        drop(second_agent);
        let (mut plane, _, twice) = adopt();
        assert!(once == twice, "a restart without a change changed the rule set");
        for plan in &second {
            assert_installed(&mut plane, plan);
        }

        // Services go, and with them everything that was only theirs.
        let ports = second.iter().map(|plan| change(Some(plan), None)).collect();
        let cluster_ips = cluster_ips.iter().map(|&address| ClusterIpDelta::Remove(address)).collect();
        plane.apply(&Delta { ports, cluster_ips, ..Delta::default() }).unwrap();
        assert_eq!(plane.dump().unwrap(), weir::dataplane::State::default());
        let listed = nft(&["list", "ruleset"]);
        assert!(!listed.contains("svc-"), "{listed}");

        plane.remove().unwrap();
        assert_eq!(nft(&["list", "ruleset"]), "");
    });
}

#[test]
fn chains_for_answers_to_names_are_there_only_while_names_are_answered() {
    in_namespace(|| {
        let chains = || nft(&["list", "chains"]).matches("chain answered-").count();
        let pods = |network: &str| {
            NameClients::new(&DetectLocal::ClusterCidr(vec![network.parse().unwrap()]), &[], &[])
        };
        let cases = [
            (false, None, 0),
            (true, None, 4),
            (true, pods("10.244.0.0/16"), 10),
            (true, pods("fd00::/64"), 10),
            (true, None, 4),
            (true, pods("10.244.0.0/16"), 10),
            (false, None, 0),
        ];
        let plan = |(answers_names, name_clients, _): &(bool, Option<NameClients>, usize)| {
            Arc::new(NodePlan { answers_names: *answers_names, name_clients: name_clients.clone(), ..node() })
        };
        // Each by an agent of its own.
        for case in &cases {
            let mut plane = Nftables::open(both()).unwrap();
            for complete in [true, false] {
                plane.apply(&Delta { node: Some(plan(case)), complete, ..Delta::default() }).unwrap();
                assert_eq!(chains(), case.2, "{case:?}");
            }
        }
        // And all of them by one.
        let mut plane = Nftables::open(both()).unwrap();
        for (case, complete) in cases.iter().zip([true, false, false, false, false, false, false]) {
            plane.apply(&Delta { node: Some(plan(case)), complete, ..Delta::default() }).unwrap();
            assert_eq!(chains(), case.2, "{case:?}");
        }
    });
}

/// Every packet passes a base chain, so those that only some Services need go with the last of them; but not before all
/// Services are known after a restart, or F7 would not hold meanwhile.
#[test]
fn chains_for_source_ranges_are_there_only_while_a_service_needs_them() {
    in_namespace(|| {
        let there = || {
            let listed = nft(&["list", "chains"]);
            ["chain guard-prerouting", "chain guard-output"].map(|chain| listed.matches(chain).count())
        };
        let plain = |number| {
            let mut plan = port(Family::V4, number, &[1, 2, 3], None);
            plan.frontends.truncate(2);
            Arc::new(plan)
        };
        let guarded = Arc::new(port(Family::V4, 1, &[1, 2, 3], None));
        let (unguarded, other) = (plain(1), plain(2));
        let mut plane = Nftables::open(both()).unwrap();
        plane.apply(&start(&[&unguarded])).unwrap();
        assert_eq!(there(), [0; 2]);
        plane.apply(&step(Some(&unguarded), Some(&guarded))).unwrap();
        assert_eq!(there(), [1; 2]);

        drop(plane);
        let mut plane = Nftables::open(both()).unwrap();
        plane.apply(&Delta { complete: false, ..start(&[]) }).unwrap();
        assert_eq!(there(), [1; 2], "it is not known yet that there is no such Service");
        let ports = vec![change(None, Some(&other))];
        plane.apply(&Delta { ports, complete: true, ..Delta::default() }).unwrap();
        assert_eq!(there(), [0; 2], "now it is known");
        assert_installed(&mut plane, &other);

        drop(plane);
        let mut plane = Nftables::open(both()).unwrap();
        plane.apply(&start(&[&guarded, &other])).unwrap();
        assert_eq!(there(), [1; 2]);
        plane.apply(&step(Some(&guarded), Some(&unguarded))).unwrap();
        assert_eq!(there(), [0; 2]);
        assert_installed(&mut plane, &unguarded);
    });
}

/// R6: only traffic from outside is translated differently, and where weir cannot recognise it, the source is not checked.
#[test]
fn only_frontends_that_treat_outsiders_differently_ask_where_a_packet_comes_from() {
    in_namespace(|| {
        let mut plane = Nftables::open(both()).unwrap();
        let plans = [(1, &[1, 2, 3][..]), (2, &[1, 3])];
        let plans = plans.map(|(number, backends)| Arc::new(port(Family::V4, number, backends, None)));
        plane.apply(&start(&plans.each_ref())).unwrap();
        let listed = nft(&["list", "table", "ip", "weir"]);
        let asking = listed.lines().filter(|line| line.contains("fib saddr"));
        let mut asking: Vec<_> = asking.map(|line| line.rsplit_once("goto ").unwrap().1).collect();
        asking.sort_unstable();
        let local = ["no-local-endpoints", "no-local-endpoints", "node-port-local-1", "service-local-1"];
        assert_eq!(asking, local, "{listed}");
    });
}

/// The same for datagrams, which are sent once and no more.
fn by_udp(mut plan: PortPlan, route: Option<Route>) -> Arc<PortPlan> {
    plan.id.protocol = Protocol::Udp;
    for planned in &mut plan.frontends {
        planned.frontend.protocol = Protocol::Udp;
        planned.route = route.unwrap_or(planned.route);
    }
    Arc::new(plan)
}

/// A link that takes everything, so that whatever this host sends passes its rules.
fn link_up() {
    for arguments in [
        "link set lo up",
        "link add out type veth peer name far",
        "link set far up",
        "link set out up",
        "address add 192.0.2.1/24 dev out",
        "address add 2001:db8::1/64 dev out nodad",
        "route add default dev out",
        "-6 route add default dev out",
    ] {
        let status = Command::new("ip").args(arguments.split(' ')).status().unwrap();
        assert!(status.success(), "ip {arguments}");
    }
}

/// Sends datagrams. Where they are dropped, sending may fail.
fn send(to: (IpAddr, u16), times: u64) {
    let any = if to.0.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any).unwrap();
    for _ in 0..times {
        let _ = socket.send_to(b"x", to);
    }
}

fn counted(plane: &Nftables) -> Vec<(Family, &'static str, u64)> {
    let counted = plane.drops().unwrap().read().unwrap().into_iter();
    let mut counted: Vec<_> = counted.map(|it| (it.family, it.reason, it.packets)).collect();
    counted.sort_unstable();
    counted
}

/// F1, F2, F4, F5 and F7, with packets that this host sends.
#[test]
fn packets_that_go_nowhere_are_counted_by_reason_and_go_on_being_after_a_restart() {
    in_namespace(|| {
        link_up();
        let nowhere = Route::uniform(treatment(Target::Drop, false));
        let plans = Family::ALL.into_iter().flat_map(|family| {
            [
                by_udp(port(family, 1, &[1, 2], None), None),
                by_udp(port(family, 2, &[], None), None),
                by_udp(port(family, 3, &[1], None), Some(nowhere)),
            ]
        });
        let plans: Vec<_> = plans.collect();
        let cluster_ips = Family::ALL.into_iter().map(|family| ClusterIpDelta::Add(address(family, 1)));
        let delta = Delta {
            node: Some(Arc::new(node())),
            cluster_ips: cluster_ips.collect(),
            ports: plans.iter().map(|plan| change(None, Some(plan))).collect(),
            complete: true,
        };
        let mut plane = Nftables::open(both()).unwrap();
        plane.apply(&delta).unwrap();
        assert!(counted(&plane).iter().all(|(.., packets)| *packets == 0));

        let mut expected = Vec::new();
        for family in Family::ALL {
            for (times, number, port, reason) in [
                (1, 2, 80, "no-endpoints"),
                (2, 3, 80, "no-local-endpoints"),
                (3, 101, 80, "source-not-allowed"),
                (4, 1, 81, "unknown-port"),
                (5, 77, 80, "unallocated-address"),
                // No datagram is out of a window.
                (0, 1, 80, "out-of-window"),
            ] {
                send((address(family, number), port), times);
                expected.push((family, reason, times));
            }
        }
        expected.sort_unstable();
        assert_eq!(counted(&plane), expected);

        drop(plane);
        let mut plane = Nftables::open(both()).unwrap();
        plane.apply(&delta).unwrap();
        assert_eq!(counted(&plane), expected, "a new agent finds what the old one counted");
    });
}

#[test]
fn a_port_that_cannot_be_programmed_is_named_and_the_others_work() {
    in_namespace(|| {
        let mut plane = Nftables::open(both()).unwrap();
        let good = Arc::new(port(Family::V4, 1, &[1, 2], None));
        let twin = Arc::new(PortPlan {
            id: PortId { port: "twin".into(), ..good.id.clone() },
            ..port(Family::V4, 1, &[3], None)
        });
        let other = Arc::new(port(Family::V4, 2, &[1, 2], None));
        let error = plane.apply(&start(&[&good, &twin, &other])).unwrap_err();
        let Error::Partly(short) = error else { panic!("{error}") };
        let failed = short.refused;
        assert_eq!(failed.len(), 1, "{failed:?}");
        assert_eq!(failed[0].0, twin.id);
        assert_installed(&mut plane, &good);
        assert_installed(&mut plane, &other);
    });
}

#[test]
fn foreign_changes_are_seen_and_repaired_and_our_own_are_not() {
    in_namespace(|| {
        let (mut plane, mut watch) = Nftables::open_watched(both()).unwrap();
        let plan = Arc::new(port(Family::V6, 1, &[1, 2], None));
        let delta = start(&[&plan]);
        plane.apply(&delta).unwrap();
        // Our own change left no event behind, so the next one is the flush.
        nft(&["add", "table", "ip", "foreign"]);
        nft(&["flush", "ruleset"]);
        let seen = watch.wait().unwrap();
        let Seen::Foreign { families, generation } = seen else { panic!("{seen:?}") };
        assert_eq!(families, both(), "one notice of the whole commit");
        assert!(!plane.has_read(Family::V4, generation));
        plane.reread().unwrap();
        assert!(plane.has_read(Family::V4, generation), "what is read back is no news");
        plane.apply(&delta).unwrap();
        assert_installed(&mut plane, &plan);
    });
}

#[test]
fn a_foreign_change_right_after_the_tables_were_read_is_seen() {
    in_namespace(|| {
        drop(Nftables::open(both()).unwrap().apply(&start(&[])));
        let (mut plane, mut watch) = Nftables::open_watched(both()).unwrap();
        // Nothing was listened to yet when this happens, as far as the reader of the watch can see.
        nft(&["delete", "table", "ip6", "weir"]);
        let Seen::Foreign { families, generation } = watch.wait().unwrap() else { panic!("lost") };
        assert_eq!(families, PerFamily { v4: false, v6: true });
        assert!(!plane.has_read(Family::V6, generation));
        plane.reread_family(Family::V6).unwrap();
        assert!(plane.has_read(Family::V6, generation));
    });
}

#[test]
fn a_quick_look_finds_a_table_a_chain_and_a_map_that_are_gone() {
    in_namespace(|| {
        let mut plane = Nftables::open(both()).unwrap();
        let sticky = Arc::new(port(Family::V4, 1, &[1, 2], Some(60)));
        plane.apply(&start(&[&sticky])).unwrap();
        assert!(plane.looks_intact(Family::V4) && plane.looks_intact(Family::V6));
        nft(&["add", "table", "ip", "another"]);
        assert!(plane.looks_intact(Family::V4));
        nft(&["delete", "table", "ip6", "weir"]);
        assert!(plane.looks_intact(Family::V4) && !plane.looks_intact(Family::V6));
        nft(&["flush", "ruleset"]);
        assert!(!plane.looks_intact(Family::V4));
    });
}

#[test]
fn a_family_whose_table_another_program_owns_costs_the_other_family_nothing() {
    in_namespace(|| {
        let owner = Owner::of("ip6");
        let mut plane = Nftables::open(both()).unwrap();
        let four = |number| Arc::new(port(Family::V4, number, &[1, 2], None));
        let six = Arc::new(port(Family::V6, 1, &[1, 2], None));
        let (first, second) = (four(1), four(2));
        let Err(Error::Partly(short)) = plane.apply(&start(&[&first, &six])) else {
            panic!("nothing failed")
        };
        let failed: Vec<Family> = short.failed.iter().map(|(family, _)| *family).collect();
        assert_eq!((failed, short.refused.len()), (vec![Family::V6], 0));
        assert_installed(&mut plane, &first);
        plane.apply(&step(None, Some(&second))).unwrap();
        assert_installed(&mut plane, &second);

        drop(owner);
        plane.reread_family(Family::V6).unwrap();
        plane.apply(&start(&[&first, &second, &six])).unwrap();
        [&first, &second, &six].into_iter().for_each(|plan| assert_installed(&mut plane, plan));
    });
}
