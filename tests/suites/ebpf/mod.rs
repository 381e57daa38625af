//! The kernel programs that weir carries load into this kernel and do their work there.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Read as _, Write as _},
    iter,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd as _,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use aya::maps::HashMap;
use weir::sys::bpf;
use weir::{
    dataplane::{
        Dataplane as _, Error,
        ebpf::{Ebpf, Place, Problem},
    },
    machine::probe::Probe,
    model::{Family, ObjectName, PerFamily, Protocol},
    plan::{
        Backend, ClusterIpDelta, Delta, Destination, Frontend, FrontendPlan, NodePlan, NodePortAddresses,
        PortDelta, PortId, PortPlan, Removal, Route, Target, Treatment,
    },
};
use weir_tests::{bpffs::BpfFs, cgroup::Cgroup, logged::Lines, netns::Namespace, wait::await_that};

mod apart;
mod asked;
mod homes;
mod killed;
mod room;
mod told;

fn node() -> Arc<NodePlan> {
    Arc::new(NodePlan {
        local_traffic: PerFamily { v4: None, v6: None },
        node_port_addresses: PerFamily { v4: NodePortAddresses::AnyLocal, v6: NodePortAddresses::AnyLocal },
        loopback_node_ports: PerFamily { v4: true, v6: true },
        host_addresses: Vec::new(),
        masquerade_mark: 0x4000,
        service_cidrs: Vec::new(),
        answers_names: false,
        name_clients: None,
        drops_out_of_window: true,
    })
}

fn service_ip(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(10, 96, 0, 10).into(),
        Family::V6 => Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0x10).into(),
    }
}

fn loopback(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::LOCALHOST.into(),
        Family::V6 => Ipv6Addr::LOCALHOST.into(),
    }
}

/// A service port at port 80 of [`service_ip`], and at NodePort 30080.
fn port(family: Family, protocol: Protocol, backends: &[SocketAddr]) -> Arc<PortPlan> {
    let name = ObjectName::new("default", "web");
    let cluster: Vec<Backend> = backends
        .iter()
        .map(|backend| Backend { address: backend.ip(), port: backend.port(), local: true })
        .collect();
    let target = if cluster.is_empty() { Target::Reject } else { Target::Cluster };
    let frontend = |destination, port| FrontendPlan {
        frontend: Frontend { destination, protocol, port },
        route: Route::uniform(Treatment { target, masquerade: false }),
        allowed_sources: None,
        answered_here: false,
    };
    Arc::new(PortPlan {
        id: PortId { service: name, port: "".into(), protocol, family },
        cluster: cluster.clone(),
        local: Vec::new(),
        frontends: vec![
            frontend(Destination::Address(service_ip(family)), 80),
            frontend(Destination::NodePort(family), 30080),
        ],
        affinity: None,
        on_removal: Removal::Keep,
        serving: if protocol == Protocol::Udp { cluster } else { Vec::new() },
    })
}

fn complete(ports: Vec<Arc<PortPlan>>) -> Delta {
    Delta {
        node: Some(node()),
        cluster_ips: Family::ALL.map(|family| ClusterIpDelta::Add(service_ip(family))).to_vec(),
        ports: ports.into_iter().map(|port| PortDelta { before: None, after: Some(port) }).collect(),
        complete: true,
    }
}

#[test]
fn the_programs_serve_the_sockets_of_their_cgroup_and_no_others() -> Result<()> {
    let [inside, outside] = [Cgroup::new("inside")?, Cgroup::new("outside")?];
    let here = Namespace::within(&inside, "inside")?;
    let elsewhere = Namespace::within(&outside, "outside")?;
    let files = BpfFs::new()?;
    let place = Place { bpf_root: files.directory("weir")?, cgroup_root: inside.path().to_owned() };
    here.run(|| -> Result<()> {
        let mut plane = open_on_host(&place)?;
        for family in Family::ALL {
            let listener = TcpListener::bind((loopback(family), 0))?;
            let datagrams = UdpSocket::bind((loopback(family), 0))?;
            let tcp = port(family, Protocol::Tcp, &[listener.local_addr()?]);
            let udp = port(family, Protocol::Udp, &[datagrams.local_addr()?]);
            plane.reread()?;
            plane.apply(&complete(vec![tcp, udp]))?;
            for to in [SocketAddr::new(service_ip(family), 80), SocketAddr::new(loopback(family), 30080)] {
                let mut client = TcpStream::connect(to).with_context(|| format!("connecting to {to}"))?;
                assert_eq!(client.peer_addr()?, to, "the peer is the address that the client asked for");
                let (mut server, _) = listener.accept()?;
                server.write_all(b"hello")?;
                let mut answer = [0; 5];
                client.read_exact(&mut answer)?;
                assert_eq!(&answer, b"hello");
                exchange(family, to, &datagrams).with_context(|| format!("datagrams to {to}"))?;
            }
            let refused = TcpStream::connect((service_ip(family), 81));
            assert_eq!(
                refused.map(drop).map_err(|error| error.kind()),
                Err(io::ErrorKind::ConnectionRefused),
                "F4"
            );
            // A process may have the number of a NodePort, as one has that serves it in the host's network.
            TcpListener::bind((loopback(family), 30080))?;
            let tallies = plane.counters().read()?;
            let counted = |protocol| {
                let mut ports =
                    tallies.iter().filter(|(id, _)| (id.family, id.protocol) == (family, protocol));
                ports.next().map(|(_, tally)| (tally.served, tally.refused))
            };
            assert_eq!(counted(Protocol::Tcp), Some((2, 0)), "two connections");
            assert_eq!(counted(Protocol::Udp), Some((4, 0)), "two flows and two connected sockets");
            let apart = elsewhere.run(|| TcpStream::connect((service_ip(family), 80)).map(drop));
            assert!(apart.is_err(), "a process outside is none of the hooks' business");
        }
        assert_eq!(plane.troubles()?.iter().sum::<u64>(), 0);
        plane.remove()?;
        Ok(())
    })
}

/// A number of Services without clients, numbered from `first` on.
fn crowd(first: u32, count: u32) -> impl Iterator<Item = Arc<PortPlan>> {
    (first..first + count).map(|number| {
        let backend =
            Backend { address: Ipv4Addr::from(0x0af4_0000 + number).into(), port: 80, local: false };
        Arc::new(PortPlan {
            id: PortId {
                service: ObjectName::new("crowd", &format!("service-{number:06}")),
                port: "".into(),
                protocol: Protocol::Tcp,
                family: Family::V4,
            },
            cluster: vec![backend],
            local: Vec::new(),
            frontends: vec![FrontendPlan {
                frontend: Frontend {
                    destination: Destination::Address(Ipv4Addr::from(0x0a61_0000 + number).into()),
                    protocol: Protocol::Tcp,
                    port: 80,
                },
                route: Route::uniform(Treatment { target: Target::Cluster, masquerade: false }),
                allowed_sources: None,
                answered_here: false,
            }],
            affinity: None,
            on_removal: Removal::Keep,
            serving: Vec::new(),
        })
    })
}

fn come(ports: impl Iterator<Item = Arc<PortPlan>>) -> Delta {
    let ports = ports.map(|port| PortDelta { before: None, after: Some(port) });
    Delta { ports: ports.collect(), ..Delta::default() }
}

/// The plane as an agent opens it on this kernel.
fn open(place: &Place) -> Result<Ebpf, Problem> {
    let probe = Probe::of(&place.cgroup_root, &place.bpf_root);
    Ebpf::open(place.clone(), probe.set_retval)
}

/// The plane in a namespace that it takes for the host's, which not every kernel can recognise.
fn open_on_host(place: &Place) -> Result<Ebpf> {
    let probe = Probe::of(&place.cgroup_root, &place.bpf_root);
    ensure!(probe.namespace_cookie, "this kernel lacks SO_NETNS_COOKIE (Linux 5.14), which this test needs");
    Ok(open(place)?)
}

/// A plane with programs that serve the sockets of a namespace, and what they need.
struct Fixture {
    inside: Namespace,
    place: Place,
    cgroup: Cgroup,
    _files: BpfFs,
}

impl Fixture {
    fn new() -> Result<Self> {
        let cgroup = Cgroup::new("fixture")?;
        let files = BpfFs::new()?;
        let place = Place { bpf_root: files.directory("weir")?, cgroup_root: cgroup.path().to_owned() };
        Ok(Self { inside: Namespace::within(&cgroup, "fixture")?, place, cgroup, _files: files })
    }
}

#[test]
fn maps_grow_while_sockets_go_on_being_served() -> Result<()> {
    let fixture = Fixture::new()?;
    fixture.inside.run(|| -> Result<()> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let server = listener.local_addr()?;
        let mut plane = open(&fixture.place)?;
        plane.apply(&complete(vec![sticky(port(Family::V4, Protocol::Tcp, &[server]))]))?;
        let room = |plane: &Ebpf| plane.fill().iter().map(|fill| (fill.map, fill.room)).collect::<Vec<_>>();
        let before = room(&plane);
        let stop = AtomicBool::new(false);
        thread::scope(|scope| -> Result<()> {
            let accepting = scope.spawn(|| {
                let mut accepted = 0;
                while !stop.load(Relaxed) {
                    accepted += u64::from(listener.accept().is_ok());
                }
                accepted
            });
            let connecting = scope.spawn(|| -> io::Result<u64> {
                fixture.inside.run(|| {
                    let mut connected = 0;
                    while !stop.load(Relaxed) {
                        TcpStream::connect((service_ip(Family::V4), 80))?;
                        connected += 1;
                    }
                    Ok(connected)
                })
            });
            let mut grown = Ok(());
            for step in 0..8 {
                grown = grown.and_then(|()| plane.apply(&come(crowd(step * 1000, 1000))));
            }
            stop.store(true, Relaxed);
            let connected = connecting.join().map_err(|_| anyhow!("the client died"))?;
            TcpStream::connect(server)?;
            let accepted = accepting.join().map_err(|_| anyhow!("the server died"))?;
            grown?;
            println!("{} connects while maps grew, {accepted} accepted", connected?);
            Ok(())
        })?;
        for ((map, before), (_, after)) in before.into_iter().zip(room(&plane)) {
            assert!(map == "members" || after > before, "{map} had room for {before} and has for {after}");
        }
        let state = plane.dump()?;
        assert_eq!(state.frontends.len(), 8002);
        // Another agent finds the large maps, and everything in them.
        drop(plane);
        let mut heir = open(&fixture.place)?;
        assert_eq!(heir.dump()?, state);
        let ports = iter::once(sticky(port(Family::V4, Protocol::Tcp, &[server]))).chain(crowd(0, 8000));
        heir.apply(&complete(ports.collect()))?;
        assert_eq!(heir.dump()?, state);
        heir.remove()?;
        Ok(())
    })
}

fn sticky(port: Arc<PortPlan>) -> Arc<PortPlan> {
    Arc::new(PortPlan { affinity: Some(3600), ..PortPlan::clone(&port) })
}

#[test]
fn a_plane_that_steps_aside_leaves_new_sockets_to_packets_and_old_ones_as_they_are() -> Result<()> {
    let fixture = Fixture::new()?;
    fixture.inside.run(|| -> Result<()> {
        let mut plane = open(&fixture.place)?;
        for family in Family::ALL {
            let listener = TcpListener::bind((loopback(family), 0))?;
            let web = port(family, Protocol::Tcp, &[listener.local_addr()?]);
            let service = SocketAddr::new(service_ip(family), 80);
            plane.reread()?;
            plane.apply(&complete(vec![Arc::clone(&web)]))?;
            let early = TcpStream::connect(service)?;
            plane.step_aside()?;
            // The kernel detaches programs some time after their links are gone. No packet can leave here.
            await_that("sockets are not led", || TcpStream::connect(service).is_err());
            assert_eq!(early.peer_addr()?, service, "{family}");
            plane.reread()?;
            plane.apply(&complete(vec![web]))?;
            assert_eq!(TcpStream::connect(service)?.peer_addr()?, service);
            assert_eq!(early.peer_addr()?, service, "{family}");
        }
        plane.remove()?;
        Ok(())
    })
}

#[test]
fn a_port_that_does_not_fit_is_named_and_the_others_are_served() -> Result<()> {
    let fixture = Fixture::new()?;
    fixture.inside.run(|| -> Result<()> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let mut plane = open(&fixture.place)?;
        plane.apply(&complete(crowd(0, 10).collect()))?;
        let mut writes = 0;
        plane.fail_writes(Some(Box::new(move |map| {
            writes += u32::from(map == "frontends");
            map == "frontends" && writes == 2
        })));
        let before = plane.dump()?;
        let served = port(Family::V4, Protocol::Tcp, &[listener.local_addr()?]);
        let delta = come(crowd(10, 3).chain([served]));
        let Err(Error::Partly(short)) = plane.apply(&delta) else { bail!("nothing failed") };
        let names: Vec<String> = short.left.iter().map(|(id, _)| id.service.to_string()).collect();
        assert_eq!(names, ["crowd/service-000011"]);
        let frontends = plane.dump()?.frontends;
        assert_eq!(frontends.len(), before.frontends.len() + 4);
        TcpStream::connect((service_ip(Family::V4), 80)).context("the port that fits is served")?;
        // And as soon as it fits it is there.
        plane.fail_writes(None);
        plane.apply(&come(crowd(11, 1)))?;
        assert_eq!(plane.dump()?.frontends.len(), before.frontends.len() + 5);
        plane.remove()?;
        Ok(())
    })
}

#[test]
fn maps_of_another_layout_are_left_behind_once_the_new_ones_serve() -> Result<()> {
    let fixture = Fixture::new()?;
    fixture.inside.run(|| -> Result<()> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let foreign = fixture.place.bpf_root.join("v4000000");
        fs::create_dir(&foreign)?;
        let map = HashMap::<_, u32, u32>::create(1, 0)?;
        map.pin(foreign.join("frontends"))?;
        let mut plane = open(&fixture.place)?;
        assert!(foreign.exists(), "programs of that layout may still use it");
        plane.apply(&complete(vec![port(Family::V4, Protocol::Tcp, &[listener.local_addr()?])]))?;
        assert!(!foreign.exists());
        TcpStream::connect((service_ip(Family::V4), 80))?;
        plane.remove()?;
        // The kernel detaches a program some time after its link is gone.
        let refused = || TcpStream::connect((service_ip(Family::V4), 80)).is_err();
        await_that("nothing serves any more", refused);
        Ok(())
    })
}

#[test]
fn programs_log_at_the_level_trace_also_after_growing() -> Result<()> {
    let fixture = Fixture::new()?;
    let lines = Lines::default();
    let writer = lines.clone();
    let log = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .finish();
    fixture.inside.run(|| -> Result<()> {
        tracing::subscriber::with_default(log, || -> Result<()> {
            let listener = TcpListener::bind("127.0.0.1:0")?;
            let server = listener.local_addr()?;
            let mut plane = open(&fixture.place)?;
            plane.apply(&complete(vec![port(Family::V4, Protocol::Tcp, &[server])]))?;
            TcpStream::connect((service_ip(Family::V4), 80))?;
            let translated =
                "TRACE weir::programs: ::ffff:10.96.0.10 port 80: translated to ::ffff:127.0.0.1 port";
            await_that("the connection is logged", || lines.text().matches(translated).count() == 1);
            plane.apply(&come(crowd(0, 5000)))?;
            TcpStream::connect((service_ip(Family::V4), 80))?;
            await_that("the next connection is logged too", || lines.text().matches(translated).count() == 2);
            plane.remove()?;
            Ok(())
        })
    })
}

#[test]
fn a_map_of_another_layout_under_our_name_is_refused_by_name() -> Result<()> {
    let fixture = Fixture::new()?;
    fs::create_dir(fixture.place.sockets())?;
    HashMap::<_, u32, u32>::create(1, 0)?.pin(fixture.place.sockets().join("origins"))?;
    let Err(problem) = open(&fixture.place) else { bail!("it was opened") };
    let text = problem.to_string();
    assert!(text.contains("sockets-5/origins has another layout"), "{text}");
    Ok(())
}

#[test]
fn a_cluster_ip_that_the_host_has_is_left_to_packets_until_it_leaves() -> Result<()> {
    let fixture = Fixture::new()?;
    fixture.inside.run(|| -> Result<()> {
        let backend = TcpListener::bind("127.0.0.1:0")?;
        let ip = service_ip(Family::V4);
        let port = port(Family::V4, Protocol::Tcp, &[backend.local_addr()?]);
        let mut plane = open_on_host(&fixture.place)?;
        plane.apply(&complete(vec![Arc::clone(&port)]))?;
        // A DNS cache, say, that answers on the Service's address on every node.
        fixture.inside.ip(&[format!("addr add {ip} dev lo")])?;
        let cache = TcpListener::bind((ip, 80))?;
        let with = |addresses: Vec<IpAddr>| {
            Arc::new(NodePlan { host_addresses: addresses, ..NodePlan::clone(&node()) })
        };
        let told = plane.apply(&Delta { node: Some(with(vec![ip])), ..Delta::default() });
        assert!(told.is_err_and(|error| error.to_string().contains("10.96.0.10")));
        let anew = |addresses| Delta { node: Some(with(addresses)), ..complete(vec![Arc::clone(&port)]) };
        plane.reread()?;
        plane.apply(&anew(vec![ip]))?;
        let reached = TcpStream::connect((ip, 80))?;
        assert_eq!(cache.accept()?.1, reached.local_addr()?);
        let told = plane.apply(&Delta { node: Some(with(Vec::new())), ..Delta::default() });
        assert!(told.is_err(), "its frontends have to be written again");
        plane.reread()?;
        plane.apply(&anew(Vec::new()))?;
        let reached = TcpStream::connect((ip, 80))?;
        assert_eq!(backend.accept()?.1, reached.local_addr()?);
        plane.remove()?;
        Ok(())
    })
}

/// Sends from a socket without a peer and from one with, and compares the addresses that answer.
fn exchange(family: Family, to: SocketAddr, server: &UdpSocket) -> Result<()> {
    let mut buffer = [0; 16];
    server.set_read_timeout(Some(Duration::from_secs(5)))?;
    let unconnected = UdpSocket::bind((loopback(family), 0))?;
    unconnected.set_read_timeout(Some(Duration::from_secs(5)))?;
    unconnected.send_to(b"one", to)?;
    let (_, from) = server.recv_from(&mut buffer)?;
    server.send_to(b"two", from)?;
    assert_eq!(unconnected.recv_from(&mut buffer)?, (3, to), "the answer is from the address that was asked");
    let connected = UdpSocket::bind((loopback(family), 0))?;
    connected.set_read_timeout(Some(Duration::from_secs(5)))?;
    connected.connect(to)?;
    assert_eq!(connected.peer_addr()?, to);
    connected.send(b"three")?;
    let (_, from) = server.recv_from(&mut buffer)?;
    server.send_to(b"four", from)?;
    assert_eq!(connected.recv_from(&mut buffer)?, (4, to));
    Ok(())
}

/// The link and the program behind each pinned link.
fn links(place: &Place) -> Result<BTreeMap<String, [u32; 2]>> {
    let mut links = BTreeMap::new();
    for entry in fs::read_dir(&place.bpf_root)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.starts_with("link-") {
            let link = bpf::open_pinned(&place.bpf_root.join(&name))?;
            let told = fs::read_to_string(format!("/proc/self/fdinfo/{}", link.as_raw_fd()))?;
            let field = |name: &str| {
                let line = told.lines().find_map(|line| line.strip_prefix(name));
                Ok::<_, anyhow::Error>(line.with_context(|| format!("no {name} in {told}"))?.trim().parse()?)
            };
            links.insert(name, [field("link_id:")?, field("prog_id:")?]);
        }
    }
    Ok(links)
}

#[test]
fn other_programs_take_the_place_of_those_attached_without_a_gap() -> Result<()> {
    let group = Cgroup::new("upgrade")?;
    let here = Namespace::within(&group, "upgrade")?;
    let files = BpfFs::new()?;
    let place = Place { bpf_root: files.directory("weir")?, cgroup_root: group.path().to_owned() };
    here.run(|| -> Result<()> {
        let listener = TcpListener::bind((loopback(Family::V4), 0))?;
        let plan = port(Family::V4, Protocol::Tcp, &[listener.local_addr()?]);
        let mut old = open(&place)?;
        old.apply(&complete(vec![Arc::clone(&plan)]))?;
        let before = links(&place)?;
        let (stop, connects) = (AtomicBool::new(false), AtomicU32::new(0));
        let client = || -> Result<Vec<io::Error>> {
            group.enter()?;
            let mut failures = Vec::new();
            while !stop.load(Relaxed) {
                failures.extend(TcpStream::connect((service_ip(Family::V4), 80)).err());
                connects.fetch_add(1, Relaxed);
                // No faster, so that there are ports enough.
                thread::sleep(Duration::from_millis(1));
            }
            Ok(failures)
        };
        thread::scope(|scope| -> Result<()> {
            scope.spawn(|| listener.incoming().take_while(|_| !stop.load(Relaxed)).for_each(drop));
            let client = scope.spawn(client);
            let upgraded = upgrade(old, &place, &plan, &connects);
            stop.store(true, Relaxed);
            let failures = client.join().map_err(|_| anyhow!("the client died"))??;
            assert!(failures.is_empty(), "of {} connections: {failures:?}", connects.load(Relaxed));
            // The listener waits for one more.
            TcpStream::connect(listener.local_addr()?)?;
            let after = upgraded?;
            assert!(before.keys().eq(after.keys()), "{before:?}, then {after:?}");
            for (name, [link, program]) in &after {
                let [link_before, program_before] = before[name];
                assert_eq!(*link, link_before, "{name} is another link");
                assert_ne!(*program, program_before, "{name} has the old program");
            }
            Ok(())
        })?;
        place.clear()?;
        Ok(())
    })
}

/// Opens planes one after another, each with other code than the one before, while connections are made.
fn upgrade(
    old: Ebpf,
    place: &Place,
    plan: &Arc<PortPlan>,
    connects: &AtomicU32,
) -> Result<BTreeMap<String, [u32; 2]>> {
    drop(old);
    let can_refuse = Probe::of(&place.cgroup_root, &place.bpf_root).set_retval;
    for set_retval in [false, can_refuse, false] {
        let more = connects.load(Relaxed) + 20;
        await_that("clients connect before the switch", || connects.load(Relaxed) >= more);
        Ebpf::open(place.clone(), set_retval)?.apply(&complete(vec![Arc::clone(plan)]))?;
        let more = connects.load(Relaxed) + 20;
        await_that("clients connect after it", || connects.load(Relaxed) >= more);
    }
    links(place)
}
