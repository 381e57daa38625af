//! Entries for one Service do not affect clients of another, and a client that asks for itself gets itself.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use aya::maps::{HashMap, Map, MapData};
use proxy_ebpf::{FrontendKey, FrontendValue};
use socket2::{Domain, Socket, Type};
use weir::{
    dataplane::{Dataplane as _, Error, ebpf::Place},
    model::{Family, ObjectName, Protocol},
    plan::{Delta, PortDelta, PortPlan},
};
use weir_tests::{bpffs::BpfFs, cgroup::Cgroup, netns::Namespace};

use super::{Fixture, complete, crowd, loopback, open, open_on_host, port, service_ip};

/// Connects of each family: as many as take some seconds.
const CONNECTS: u32 = 600_000;

/// The port of the second Service, and of no other.
const OTHER: u16 = 81;

/// The address of a backend, on the loopback device, so that a socket that connects there has it as its own address.
fn backend(family: Family, number: u8) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(10, 244, 0, number).into(),
        Family::V6 => Ipv6Addr::new(0xfd00, 0x10, 0x244, 0, 0, 0, 0, number.into()).into(),
    }
}

/// A Service of datagrams with this backend.
fn service(family: Family, at: u16, number: u8) -> Arc<PortPlan> {
    let mut plan = PortPlan::clone(&port(family, Protocol::Udp, &[(backend(family, number), 53).into()]));
    plan.id.service = ObjectName::new("default", &format!("service-{at}"));
    plan.frontends.truncate(1);
    plan.frontends[0].frontend.port = at;
    Arc::new(plan)
}

/// Writes the elements of both frontends in turn, with what is in them, so that each gets the memory of the other.
fn rewrite(place: &Place, keys: [FrontendKey; 2], stop: &AtomicBool) -> Result<u64> {
    let map = Map::HashMap(MapData::from_pin(place.services().join("frontends"))?);
    let mut map: HashMap<_, FrontendKey, FrontendValue> = map.try_into()?;
    let values = [map.get(&keys[0], 0)?, map.get(&keys[1], 0)?];
    let mut rounds = 0;
    while !stop.load(Relaxed) {
        for (key, value) in keys.iter().zip(values) {
            map.insert(key, value, 0)?;
        }
        rounds += 1;
    }
    Ok(rounds)
}

/// The address that a socket has once it has connected: that of the backend on the loopback device.
fn led_to(family: Family) -> Result<IpAddr> {
    let domain = match family {
        Family::V4 => Domain::IPV4,
        Family::V6 => Domain::IPV6,
    };
    let socket = Socket::new(domain, Type::DGRAM, None)?;
    socket.connect(&SocketAddr::new(service_ip(family), 80).into())?;
    Ok(socket.local_addr()?.as_socket().context("an address")?.ip())
}

/// Whether a socket was not translated, because the element was another's at each lookup. Packets would serve it, and have no route here.
fn is_left_to_the_packets(error: &anyhow::Error) -> bool {
    let cause = error.downcast_ref::<std::io::Error>();
    cause.is_some_and(|error| error.raw_os_error() == Some(nix::libc::ENETUNREACH))
}

#[test]
fn no_connect_reaches_a_backend_of_another_service_while_both_are_written() -> Result<()> {
    let fixture = Fixture::new()?;
    for family in Family::ALL {
        for number in [1, 2] {
            fixture.inside.ip(&[format!("addr add {} dev lo", backend(family, number))])?;
        }
    }
    fixture.inside.run(|| -> Result<()> {
        let mut plane = open(&fixture.place)?;
        for family in Family::ALL {
            let services = vec![service(family, 80, 1), service(family, OTHER, 2)];
            plane.reread()?;
            plane.apply(&complete(services))?;
            let keys = [80, OTHER].map(|port| FrontendKey::new(service_ip(family), port, 17));
            let stop = AtomicBool::new(false);
            thread::scope(|scope| -> Result<()> {
                let writing = scope.spawn(|| rewrite(&fixture.place, keys, &stop));
                let mut left = 0;
                let wrong = (0..CONNECTS).find_map(|_| match led_to(family) {
                    Ok(address) if address == backend(family, 1) => None,
                    Err(error) if is_left_to_the_packets(&error) => {
                        left += 1;
                        None
                    }
                    other => Some(other),
                });
                stop.store(true, Relaxed);
                let rounds = writing.join().map_err(|_| anyhow!("the writer died"))??;
                println!("{CONNECTS} connects, {left} to packets, while both were written {rounds} times");
                ensure!(left < CONNECTS / 100, "{left} of {CONNECTS} connects were left to the packets");
                match wrong {
                    None => Ok(()),
                    Some(Ok(address)) => bail!("a client got to {address}, which is another Service's"),
                    Some(Err(error)) => Err(error),
                }
            })?;
        }
        plane.remove()?;
        Ok(())
    })
}

/// Addresses that a client writes to mean itself.
fn unspecified(family: Family) -> Vec<IpAddr> {
    match family {
        Family::V4 => vec![Ipv4Addr::UNSPECIFIED.into(), Ipv4Addr::UNSPECIFIED.to_ipv6_mapped().into()],
        Family::V6 => vec![Ipv6Addr::UNSPECIFIED.into()],
    }
}

/// Whether a connection to an address gets to a listener.
fn gets_to(to: SocketAddr, listener: &TcpListener) -> Result<()> {
    let mut client = TcpStream::connect(to).with_context(|| format!("connecting to {to}"))?;
    let (mut server, _) = listener.accept()?;
    server.write_all(b"here")?;
    let mut answer = [0; 4];
    client.read_exact(&mut answer)?;
    ensure!(client.local_addr()?.ip().to_canonical().is_loopback());
    Ok(())
}

/// Whether a datagram to an address, with and without a connection, gets to a socket.
fn arrives(to: SocketAddr, server: &UdpSocket) -> Result<()> {
    let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    server.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut buffer = [0; 8];
    let client = UdpSocket::bind((any, 0))?;
    client.send_to(b"one", to)?;
    server.recv_from(&mut buffer).with_context(|| format!("a datagram to {to}"))?;
    let client = UdpSocket::bind((any, 0))?;
    client.connect(to)?;
    client.send(b"two")?;
    server.recv_from(&mut buffer).with_context(|| format!("a datagram by a connection to {to}"))?;
    Ok(())
}

#[test]
fn a_client_that_asks_for_no_address_in_particular_asks_for_itself() -> Result<()> {
    let cgroup = Cgroup::new("itself")?;
    let (host, pod) = (Namespace::within(&cgroup, "host")?, Namespace::within(&cgroup, "pod")?);
    let files = BpfFs::new()?;
    let place = Place { bpf_root: files.directory("weir")?, cgroup_root: cgroup.path().to_owned() };
    let mut plane = host.run(|| open_on_host(&place))?;
    for family in Family::ALL {
        // Servers of both on the host, and in the pod one of its own with the number of the NodePort.
        let (listener, datagrams) = host.run(|| -> Result<_> {
            Ok((TcpListener::bind((loopback(family), 0))?, UdpSocket::bind((loopback(family), 0))?))
        })?;
        let backends = [listener.local_addr()?, datagrams.local_addr()?];
        let ports = [Protocol::Tcp, Protocol::Udp].into_iter().zip(backends);
        let ports = ports.map(|(protocol, backend)| port(family, protocol, &[backend])).collect();
        plane.reread()?;
        plane.apply(&complete(ports))?;
        for to in unspecified(family).into_iter().map(|ip| SocketAddr::new(ip, 30080)) {
            pod.run(|| -> Result<()> {
                gets_to(to, &TcpListener::bind((loopback(family), 30080))?)?;
                arrives(to, &UdpSocket::bind((loopback(family), 30080))?)
            })
            .with_context(|| format!("in a pod, to {to}"))?;
            host.run(|| gets_to(to, &listener).and_then(|()| arrives(to, &datagrams)))
                .with_context(|| format!("on the host, where NodePorts serve at loopback, to {to}"))?;
        }
    }
    plane.remove()?;
    Ok(())
}

#[test]
fn a_port_that_cannot_be_written_is_left_to_the_packets_and_the_others_change() -> Result<()> {
    let fixture = Fixture::new()?;
    fixture.inside.run(|| -> Result<()> {
        let (before, after) = (TcpListener::bind("127.0.0.1:0")?, TcpListener::bind("127.0.0.1:0")?);
        let web = |listener: &TcpListener| {
            Ok::<_, anyhow::Error>(port(Family::V4, Protocol::Tcp, &[listener.local_addr()?]))
        };
        let (old, new) = (web(&before)?, web(&after)?);
        let neighbour = crowd(1, 1).next().context("one of a crowd")?;
        for map in ["records", "slots", "ports"] {
            let mut plane = open(&fixture.place)?;
            plane.apply(&complete(vec![Arc::clone(&old), Arc::clone(&neighbour)]))?;
            TcpStream::connect((service_ip(Family::V4), 80)).context("it is served")?;
            let mut writes = 0;
            plane.fail_writes(Some(Box::new(move |written| {
                writes += u32::from(written == map);
                written == map && writes == 1
            })));
            let change = |before: &Arc<PortPlan>, after: &Arc<PortPlan>| PortDelta {
                before: Some(Arc::clone(before)),
                after: Some(Arc::clone(after)),
            };
            let more = PortPlan {
                cluster: [&neighbour.cluster[..], &new.cluster[..]].concat(),
                ..PortPlan::clone(&neighbour)
            };
            let ports = vec![change(&old, &new), change(&neighbour, &Arc::new(more))];
            let Err(Error::Partly(short)) = plane.apply(&Delta { ports, ..Delta::default() }) else {
                bail!("nothing failed for the map {map}")
            };
            let left: Vec<String> = short.left.iter().map(|(id, _)| id.service.to_string()).collect();
            assert_eq!((left, short.refused.len()), (vec!["default/web".to_owned()], 0));
            let state = plane.dump()?;
            assert_eq!(state.frontends.len(), 1, "its frontends are gone, and the neighbour has his");
            assert!(
                !state.cluster_ips.contains(&service_ip(Family::V4)),
                "sockets do not refuse what packets serve"
            );
            assert!(
                format!("{state:?}").contains(&after.local_addr()?.port().to_string()),
                "the neighbour has changed"
            );
            let error =
                TcpStream::connect((service_ip(Family::V4), 80)).map(drop).map_err(|error| error.kind());
            assert_eq!(
                error,
                Err(std::io::ErrorKind::NetworkUnreachable),
                "no program led it, and no packet can leave here"
            );
            // And as soon as it can be written it is there again.
            plane.fail_writes(None);
            plane.apply(&Delta { ports: vec![change(&old, &new)], ..Delta::default() })?;
            TcpStream::connect((service_ip(Family::V4), 80)).context("it is served again")?;
            after.set_nonblocking(true)?;
            after.accept().context("by the backend that it has now")?;
            plane.remove()?;
        }
        Ok(())
    })
}
