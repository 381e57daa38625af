//! Stale UDP flows (K1 to K7) on the kernel's own connection tracking, each case in a namespace of its own.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    collections::BTreeSet,
    net::{SocketAddr, UdpSocket},
    process::{Command, Stdio},
    sync::Arc,
    thread,
    time::Duration,
};

use nix::sched::{CloneFlags, unshare};
use weir::{
    model::{Family, ObjectName, PerFamily, Protocol},
    plan::{
        Backend, Destination, Frontend, FrontendPlan, NodePlan, NodePortAddresses, PortDelta, PortId,
        PortPlan, Removal, Route, Target, Treatment,
    },
    stale::flows::{Conntrack, Suspects},
};

fn run(program: &str, arguments: &str) -> String {
    let output = Command::new(program).args(arguments.split_whitespace()).output().unwrap();
    assert!(output.status.success(), "{program} {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn in_namespace(case: impl FnOnce() + Send + 'static) {
    let inside = || {
        unshare(CloneFlags::CLONE_NEWNET).expect("needs root");
        run("ip", "link set lo up");
        case();
    };
    thread::spawn(inside).join().unwrap();
}

fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn address(text: &str) -> Destination {
    Destination::Address(at(text).ip())
}

/// A new UDP port with these frontends and serving endpoints.
fn port(frontends: &[(Destination, u16)], serving: &[&str]) -> PortDelta {
    let treatment = Treatment { target: Target::Cluster, masquerade: false };
    let plan = |(destination, port): &(Destination, u16)| FrontendPlan {
        frontend: Frontend { destination: *destination, protocol: Protocol::Udp, port: *port },
        route: Route::uniform(treatment),
        allowed_sources: None,
        answered_here: false,
    };
    let backend = |text: &&str| Backend { address: at(text).ip(), port: at(text).port(), local: false };
    let mut serving: Vec<_> = serving.iter().map(backend).collect();
    serving.sort();
    let family = frontends[0].0.family();
    let mut frontends: Vec<_> = frontends.iter().map(plan).collect();
    frontends.sort_by_key(|planned| planned.frontend);
    let after = PortPlan {
        id: PortId {
            service: ObjectName::new("default", "dns"),
            port: "".into(),
            protocol: Protocol::Udp,
            family,
        },
        cluster: serving.clone(),
        local: Vec::new(),
        frontends,
        affinity: None,
        on_removal: Removal::Reset { after: Duration::ZERO },
        serving,
    };
    PortDelta { before: None, after: Some(Arc::new(after)) }
}

/// The suspects of `ports` on a node with the addresses of [`FLOWS`].
fn of(ports: &[PortDelta]) -> Suspects {
    let addresses = ["192.0.2.1", "192.0.2.2", "2001:db8::1"];
    let node = NodePlan {
        local_traffic: PerFamily::default(),
        node_port_addresses: PerFamily { v4: NodePortAddresses::AnyLocal, v6: NodePortAddresses::AnyLocal },
        loopback_node_ports: PerFamily::default(),
        host_addresses: addresses.map(|address| address.parse().unwrap()).to_vec(),
        masquerade_mark: 0x4000,
        service_cidrs: Vec::new(),
        answers_names: false,
        name_clients: None,
        drops_out_of_window: true,
    };
    Suspects::of(ports).on(Some(&Arc::new(node)), |_| false)
}

/// A flow for connection tracking: protocol, the address that its client sends to, the one that answers, and more arguments.
fn insert(flows: &[(&str, &str, &str, &str)]) {
    let mut lines = String::new();
    for (number, (protocol, to, from, more)) in flows.iter().enumerate() {
        let (to, from) = (at(to), at(from));
        let client = if to.is_ipv4() { "192.0.2.77" } else { "2001:db8::77" };
        lines.push_str(&format!(
            "-I -p {protocol} -t 600 -s {client} -d {} --sport {client_port} --dport {} -r {} -q {client} \
             --reply-port-src {} --reply-port-dst {client_port} {more}\n",
            to.ip(),
            to.port(),
            from.ip(),
            from.port(),
            client_port = 10_000 + number,
        ));
    }
    let mut child = Command::new("conntrack").args(["-R", "-"]).stdin(Stdio::piped()).spawn().unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), lines.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success());
}

/// Tracked flows, as `protocol destination answering`.
fn tracked() -> BTreeSet<String> {
    let mut flows = BTreeSet::new();
    for family in ["ipv4", "ipv6"] {
        for line in run("conntrack", &format!("-L -f {family}")).lines() {
            let values = |key: &str| -> Vec<_> {
                line.split_whitespace().filter_map(|word| word.strip_prefix(key)).map(str::to_owned).collect()
            };
            let (sources, destinations) = (values("src="), values("dst="));
            let (source_ports, destination_ports) = (values("sport="), values("dport="));
            let end =
                |address: &str, port: &str| SocketAddr::new(address.parse().unwrap(), port.parse().unwrap());
            let protocol = line.split_whitespace().next().unwrap();
            flows.insert(format!(
                "{protocol} {} {}",
                end(&destinations[0], &destination_ports[0]),
                end(&sources[1], &source_ports[1])
            ));
        }
    }
    flows
}

/// Cleans with `suspects`. Those of [`FLOWS`] that went.
fn gone(conntrack: &mut Conntrack, suspects: &Suspects) -> Vec<String> {
    insert(&FLOWS);
    let before = tracked();
    assert_eq!(before.len(), FLOWS.len(), "{before:#?}");
    let deleted = conntrack.clean(suspects).unwrap();
    let gone: Vec<_> = before.difference(&tracked()).cloned().collect();
    assert_eq!(deleted, gone.len() as u64);
    gone
}

const STATE: &str = "--state ESTABLISHED -u SEEN_REPLY,ASSURED";
const UDP: &str = "-u SEEN_REPLY";

const FLOWS: [(&str, &str, &str, &str); 18] = [
    ("udp", "10.96.0.10:53", "10.1.0.1:53", UDP),
    ("udp", "10.96.0.10:53", "10.1.0.2:53", UDP),
    ("udp", "10.96.0.10:53", "10.96.0.10:53", UDP),
    ("udp", "10.96.0.10:54", "10.1.0.2:53", UDP),
    ("udp", "10.96.0.11:53", "10.1.0.2:53", UDP),
    ("udp", "192.0.2.1:30053", "10.1.0.1:53", UDP),
    ("udp", "192.0.2.1:30053", "10.1.0.2:53", UDP),
    ("udp", "192.0.2.2:30053", "192.0.2.2:30053", UDP),
    // A port of that number on other machines is none of the node's.
    ("udp", "198.51.100.9:30053", "198.51.100.9:30053", UDP),
    ("udp", "[2001:db8:9::9]:30053", "[2001:db8:9::9]:30053", UDP),
    ("tcp", "10.96.0.10:53", "10.1.0.2:53", STATE),
    ("tcp", "192.0.2.1:30053", "10.1.0.2:53", STATE),
    ("udp", "[fd00::10]:53", "[fd01::1]:53", UDP),
    ("udp", "[fd00::10]:53", "[fd01::2]:53", UDP),
    ("udp", "[fd00::11]:53", "[fd01::2]:53", UDP),
    ("udp", "[2001:db8::1]:30053", "[fd01::2]:53", UDP),
    ("udp", "[2001:db8::1]:30053", "[fd01::1]:53", UDP),
    ("tcp", "[fd00::10]:53", "[fd01::2]:53", STATE),
];

const STALE: [&str; 6] = [
    "udp 10.96.0.10:53 10.1.0.2:53",
    "udp 10.96.0.10:53 10.96.0.10:53",
    "udp 192.0.2.1:30053 10.1.0.2:53",
    "udp 192.0.2.2:30053 192.0.2.2:30053",
    "udp [2001:db8::1]:30053 [fd01::2]:53",
    "udp [fd00::10]:53 [fd01::2]:53",
];

fn both_families() -> Vec<PortDelta> {
    vec![
        port(&[(address("10.96.0.10:53"), 53), (Destination::NodePort(Family::V4), 30053)], &["10.1.0.1:53"]),
        port(
            &[(address("[fd00::10]:53"), 53), (Destination::NodePort(Family::V6), 30053)],
            &["[fd01::1]:53"],
        ),
    ]
}

/// So many frontends that all UDP flows are read instead of each frontend's.
fn many_more() -> Vec<PortDelta> {
    let mut ports = both_families();
    for number in 1..=200 {
        ports.push(port(&[(address(&format!("10.97.0.{number}:53")), 53)], &["10.1.0.1:53"]));
    }
    ports
}

#[test]
fn only_stale_udp_flows_of_the_frontends_go_k2_k3_k4() {
    for ports in [both_families(), many_more()] {
        in_namespace(move || {
            let mut conntrack = Conntrack::open().unwrap();
            assert_eq!(gone(&mut conntrack, &of(&ports)), STALE);
            assert!(conntrack.kernel_filters(), "these tests want a kernel of 5.8 or later");
        });
    }
}

#[test]
fn the_same_flows_go_on_kernels_that_cannot_filter() {
    for ports in [both_families(), many_more()] {
        in_namespace(move || {
            let mut conntrack = Conntrack::open_unfiltered().unwrap();
            assert_eq!(gone(&mut conntrack, &of(&ports)), STALE);
        });
    }
}

/// The suspects when these ports are deleted.
fn deleted(ports: Vec<PortDelta>) -> Suspects {
    let deleted = |port: PortDelta| PortDelta { before: port.after, after: None };
    of(&ports.into_iter().map(deleted).collect::<Vec<_>>())
}

#[test]
fn with_a_service_its_own_flows_go_and_no_others_k6() {
    const OWN: [&str; 4] = [
        "udp 10.96.0.10:53 10.1.0.1:53",
        "udp 192.0.2.1:30053 10.1.0.1:53",
        "udp [2001:db8::1]:30053 [fd01::1]:53",
        "udp [fd00::10]:53 [fd01::1]:53",
    ];
    for ports in [both_families(), many_more()] {
        for open in [Conntrack::open, Conntrack::open_unfiltered] {
            let suspects = deleted(ports.clone());
            in_namespace(move || assert_eq!(gone(&mut open().unwrap(), &suspects), OWN));
        }
    }
}

#[test]
fn flows_in_a_zone_are_deleted_there_and_only_there_k5() {
    in_namespace(|| {
        let zone = "-u SEEN_REPLY -w 7";
        insert(&[
            ("udp", "10.96.0.10:53", "10.1.0.2:53", zone),
            ("udp", "10.96.0.10:54", "10.1.0.2:53", zone),
        ]);
        let suspects = of(&both_families());
        assert_eq!(Conntrack::open().unwrap().clean(&suspects).unwrap(), 1);
        assert_eq!(tracked(), BTreeSet::from(["udp 10.96.0.10:54 10.1.0.2:53".to_owned()]));
    });
}

#[test]
fn thousands_go_in_one_call_and_a_second_call_finds_nothing() {
    in_namespace(|| {
        let flow = |to, from| ("udp", to, from, UDP);
        let mut flows = vec![flow("10.96.0.10:53", "10.1.0.2:53"); 3000];
        flows.extend(vec![flow("10.96.0.10:53", "10.1.0.1:53"); 3000]);
        insert(&flows);
        let suspects = of(&both_families());
        let mut conntrack = Conntrack::open().unwrap();
        assert_eq!(conntrack.clean(&suspects).unwrap(), 3000);
        assert_eq!(conntrack.clean(&suspects).unwrap(), 0);
        assert_eq!(run("conntrack", "-C").trim(), "3000");
    });
}

/// A client that never stops sending: its flow leads to the old backend until it is taken away (pain of every UDP
/// client, K2), then to the new one, from the same socket, and to none once the Service is gone.
fn real_client_moves_and_ends(table: &'static str, vip: &'static str, old: &'static str, new: &'static str) {
    in_namespace(move || {
        let rule = |address: &str, backend: &str| {
            run("nft", &format!("flush chain {table} t out"));
            run(
                "nft",
                &format!(
                    "add rule {table} t out {table} daddr {} udp dport 53 dnat to {backend}",
                    at(address).ip()
                ),
            );
        };
        for own in [old, new] {
            let length = if at(own).is_ipv4() { 32 } else { 128 };
            run("ip", &format!("addr add {}/{length} dev lo nodad", at(own).ip()));
        }
        run("ip", &format!("{} route add default dev lo", if at(vip).is_ipv4() { "-4" } else { "-6" }));
        run("nft", &format!("add table {table} t"));
        run("nft", &format!("add chain {table} t out {{ type nat hook output priority -100 ; }}"));
        rule(vip, old);

        let servers: Vec<_> = [old, new].iter().map(|own| UdpSocket::bind(at(own)).unwrap()).collect();
        let client = UdpSocket::bind(if at(vip).is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }).unwrap();
        let reaches = |server: &UdpSocket| {
            server.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
            client.send_to(b"?", at(vip)).unwrap();
            server.recv(&mut [0; 8]).is_ok()
        };
        assert!(reaches(&servers[0]));
        rule(vip, new);
        assert!(reaches(&servers[0]), "the kernel moved the flow by itself: this case shows nothing");

        let suspects = of(&[port(&[(address(vip), 53)], &[new])]);
        assert_eq!(Conntrack::open().unwrap().clean(&suspects).unwrap(), 1);
        assert!(reaches(&servers[1]));
        assert_eq!(Conntrack::open().unwrap().clean(&suspects).unwrap(), 0);

        // Another Service's.
        rule(old, new);
        assert!(reaches(&servers[1]), "the kernel ended the flow by itself: this case shows nothing");
        let suspects = deleted(vec![port(&[(address(vip), 53)], &[new])]);
        assert_eq!(Conntrack::open().unwrap().clean(&suspects).unwrap(), 1);
        assert!(!reaches(&servers[1]));
    });
}

#[test]
fn a_client_that_keeps_sending_reaches_the_new_backend_until_the_service_goes_k2_k6() {
    real_client_moves_and_ends("ip", "10.96.0.10:53", "10.1.0.1:5353", "10.1.0.2:5353");
}

#[test]
fn a_client_that_keeps_sending_reaches_the_new_backend_until_the_service_goes_over_ipv6_k2_k6() {
    real_client_moves_and_ends("ip6", "[fd00::10]:53", "[fd01::1]:5353", "[fd01::2]:5353");
}
