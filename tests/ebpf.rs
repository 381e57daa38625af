//! The kernel programs that weir carries load into this kernel and do their work there.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd as _,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow};
use proxy_ebpf::system;
use weir::{
    dataplane::{
        Dataplane as _,
        ebpf::{Ebpf, Place},
    },
    model::{Family, ObjectName, PerFamily, Protocol},
    plan::{
        Backend, ClusterIpDelta, Delta, Destination, Frontend, FrontendPlan, NodePlan, NodePortAddresses,
        PortDelta, PortId, PortPlan, Removal, Route, Target, Treatment,
    },
};
use weir_tests::{bpffs::BpfFs, cgroup::Cgroup, netns::Namespace, wait::await_that};

fn node() -> Arc<NodePlan> {
    Arc::new(NodePlan {
        local_traffic: PerFamily { v4: None, v6: None },
        node_port_addresses: PerFamily { v4: NodePortAddresses::AnyLocal, v6: NodePortAddresses::AnyLocal },
        loopback_node_ports: PerFamily { v4: true, v6: true },
        host_addresses: Vec::new(),
        masquerade_mark: 0x4000,
        service_cidrs: Vec::new(),
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
        let mut plane = Ebpf::open(place, true)?;
        for family in Family::ALL {
            let listener = TcpListener::bind((loopback(family), 0))?;
            let datagrams = UdpSocket::bind((loopback(family), 0))?;
            let tcp = port(family, Protocol::Tcp, &[listener.local_addr()?]);
            let udp = port(family, Protocol::Udp, &[datagrams.local_addr()?]);
            plane.reread()?;
            plane.apply(&complete(vec![tcp, udp]))?;
            for to in [SocketAddr::new(service_ip(family), 80), SocketAddr::new(loopback(family), 30080)] {
                let mut client = TcpStream::connect(to).with_context(|| format!("connecting to {to}"))?;
                assert_eq!(client.peer_addr()?, to, "the peer is who was asked for");
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
            let taken = TcpListener::bind((loopback(family), 30080)).map(drop).map_err(|error| error.kind());
            assert_eq!(taken, Err(io::ErrorKind::AddrInUse));
            let apart = elsewhere.run(|| TcpStream::connect((service_ip(family), 80)).map(drop));
            assert!(apart.is_err(), "a process outside is none of the hooks' business");
        }
        assert_eq!(plane.troubles()?, vec![0; 4]);
        plane.remove()?;
        Ok(())
    })
}

/// Sends from a socket without a peer and from one with, and sees who answers.
fn exchange(family: Family, to: SocketAddr, server: &UdpSocket) -> Result<()> {
    let mut buffer = [0; 16];
    server.set_read_timeout(Some(Duration::from_secs(5)))?;
    let unconnected = UdpSocket::bind((loopback(family), 0))?;
    unconnected.set_read_timeout(Some(Duration::from_secs(5)))?;
    unconnected.send_to(b"one", to)?;
    let (_, from) = server.recv_from(&mut buffer)?;
    server.send_to(b"two", from)?;
    assert_eq!(unconnected.recv_from(&mut buffer)?, (3, to), "the answer is from who was asked");
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
            let link = system::open_pinned(&place.bpf_root.join(&name))?;
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
        let mut old = Ebpf::open(place.clone(), true)?;
        old.apply(&complete(vec![Arc::clone(&plan)]))?;
        let before = links(&place)?;
        let (stop, connects) = (AtomicBool::new(false), AtomicU32::new(0));
        let client = || -> Result<Vec<io::Error>> {
            group.enter()?;
            let mut failures = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                failures.extend(TcpStream::connect((service_ip(Family::V4), 80)).err());
                connects.fetch_add(1, Ordering::Relaxed);
                // No faster, so that there are ports enough.
                thread::sleep(Duration::from_millis(1));
            }
            Ok(failures)
        };
        thread::scope(|scope| -> Result<()> {
            scope.spawn(|| listener.incoming().take_while(|_| !stop.load(Ordering::Relaxed)).for_each(drop));
            let client = scope.spawn(client);
            let upgraded = upgrade(old, &place, &plan, &connects);
            stop.store(true, Ordering::Relaxed);
            let failures = client.join().map_err(|_| anyhow!("the client died"))??;
            assert!(failures.is_empty(), "of {} connections: {failures:?}", connects.load(Ordering::Relaxed));
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
    for set_retval in [false, true, false] {
        let more = connects.load(Ordering::Relaxed) + 20;
        await_that("clients connect before the switch", || connects.load(Ordering::Relaxed) >= more);
        Ebpf::open(place.clone(), set_retval)?.apply(&complete(vec![Arc::clone(plan)]))?;
        let more = connects.load(Ordering::Relaxed) + 20;
        await_that("clients connect after it", || connects.load(Ordering::Relaxed) >= more);
    }
    links(place)
}
