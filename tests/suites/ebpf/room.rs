//! The shared maps have room for each process, and room that is no longer used is given back.

use std::{
    collections::BTreeSet,
    io,
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::Arc,
    thread,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use aya::maps::{Array, Map, MapData};
use nix::{
    sched::{CloneFlags, unshare},
    sys::resource::{Resource, setrlimit},
};
use proxy_ebpf::{FEW, account, trouble};
use socket2::{Domain, Protocol as Number, Socket, Type};
use weir::{
    dataplane::{
        Dataplane as _,
        ebpf::{Ebpf, Place, forget_clients, usage},
    },
    model::{Family, ObjectName, Protocol},
    plan::{Destination, PortId, PortPlan},
};
use weir_tests::{cgroup::Cgroup, netns::Namespace};

use super::{Fixture, complete, exchange, loopback, open, open_on_host, port, service_ip, sticky};

const MPTCP: i32 = 262;

/// More descriptors than any test here needs.
const DESCRIPTORS: u64 = 1 << 14;

/// How many elements a map has that counts them.
fn elements(place: &Place, map: &str) -> Result<u32> {
    let all = usage(place)?;
    let found = all.iter().find(|usage| usage.map == map).and_then(|usage| usage.elements);
    found.map(|(elements, _)| elements).with_context(|| format!("{map} does not tell"))
}

/// The same port of the Service of another name, at another port number.
pub(super) fn numbered(plan: &PortPlan, number: u16) -> Arc<PortPlan> {
    let mut plan = plan.clone();
    let service = ObjectName::new("default", &format!("web-{number}"));
    plan.id = PortId { service, ..plan.id };
    plan.frontends.retain(|planned| matches!(planned.frontend.destination, Destination::Address(_)));
    plan.frontends.iter_mut().for_each(|planned| planned.frontend.port = number);
    Arc::new(plan)
}

/// Runs `work` in a group of processes below the fixture's, in the network namespace of the caller.
fn within<T: Send>(group: &Cgroup, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let inside = || {
        group.enter()?;
        work()
    };
    thread::scope(|scope| scope.spawn(inside).join()).map_err(|_| anyhow!("the thread panicked"))?
}

#[test]
fn sockets_that_the_kernel_makes_for_itself_are_left_to_packets_and_leave_nothing_behind() -> Result<()> {
    let fixture = Fixture::new()?;
    fixture.inside.run(|| -> Result<()> {
        let mut plane = open(&fixture.place)?;
        for family in Family::ALL {
            let listener = TcpListener::bind((loopback(family), 0))?;
            plane.reread()?;
            plane.apply(&complete(vec![port(family, Protocol::Tcp, &[listener.local_addr()?])]))?;
            let to = SocketAddr::new(service_ip(family), 80);
            let ordinary = TcpStream::connect(to)?;
            let accepted = listener.accept()?;
            for _ in 0..100 {
                let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Number::from(MPTCP)))?;
                // Nothing is behind these programs here that would serve its packets.
                assert!(socket.connect(&to.into()).is_err());
            }
            assert_eq!((elements(&fixture.place, "seats")?, elements(&fixture.place, "origins")?), (1, 0));
            assert_eq!(ordinary.peer_addr()?, to);
            assert_eq!(TcpStream::connect(to)?.peer_addr()?, to, "processes' own sockets are led");
            drop((ordinary, accepted));
            assert_eq!(elements(&fixture.place, "seats")?, 0);
        }
        plane.remove()?;
        Ok(())
    })
}

#[test]
fn unconnected_sockets_of_a_greedy_group_have_their_share_and_those_of_others_are_led() -> Result<()> {
    setrlimit(Resource::RLIMIT_NOFILE, DESCRIPTORS, DESCRIPTORS)?;
    let fixture = Fixture::new()?;
    let [greedy, modest] = ["greedy", "modest"].map(|label| fixture.cgroup.child(label));
    let (greedy, modest) = (greedy?, modest?);
    let share = account::MOST_FLOWS / 9;
    fixture.inside.run(|| -> Result<()> {
        let mut plane = open(&fixture.place)?;
        for family in Family::ALL {
            let server = UdpSocket::bind((loopback(family), 0))?;
            plane.reread()?;
            plane.apply(&complete(vec![port(family, Protocol::Udp, &[server.local_addr()?])]))?;
            let to = SocketAddr::new(service_ip(family), 80);
            let before = plane.troubles()?[trouble::STORAGE as usize];
            let mut sockets = within(&greedy, || {
                let sockets: io::Result<Vec<_>> =
                    (0..share + 100).map(|_| UdpSocket::bind((loopback(family), 0))).collect();
                let sockets = sockets?;
                let led = sockets.iter().filter(|socket| socket.send_to(b"one", to).is_ok()).count();
                ensure!(led < sockets.len(), "all {led} were led");
                Ok(sockets)
            })?;
            let taken = elements(&fixture.place, "flows")?;
            assert!((share..=share + 1).contains(&taken), "{taken} of {share}");
            assert!(plane.troubles()?[trouble::STORAGE as usize] > before);
            let server = fresh(server, &mut plane, family)?;
            within(&modest, || exchange(family, to, &server))?;
            assert_eq!(elements(&fixture.place, "flows")?, taken, "closed and given back");
            // The greedy group can use the room again that it gives back.
            sockets.truncate(sockets.len() / 2);
            within(&greedy, || exchange(family, to, &server))?;
            drop(sockets);
            assert_eq!(elements(&fixture.place, "flows")?, 0);
        }
        plane.remove()?;
        Ok(())
    })
}

/// Another server in place of one with a full buffer.
fn fresh(full: UdpSocket, plane: &mut Ebpf, family: Family) -> Result<UdpSocket> {
    drop(full);
    let server = UdpSocket::bind((loopback(family), 0))?;
    plane.reread()?;
    plane.apply(&complete(vec![port(family, Protocol::Udp, &[server.local_addr()?])]))?;
    Ok(server)
}

#[test]
fn a_socket_takes_memory_for_what_it_speaks_to_and_none_without_need() -> Result<()> {
    let fixture = Fixture::new()?;
    fixture.inside.run(|| -> Result<()> {
        let mut plane = open(&fixture.place)?;
        let used = || {
            Ok::<_, anyhow::Error>((elements(&fixture.place, "flows")?, elements(&fixture.place, "crowds")?))
        };
        for family in Family::ALL {
            let server = UdpSocket::bind((loopback(family), 0))?;
            let served = port(family, Protocol::Udp, &[server.local_addr()?]);
            let passed = UdpSocket::bind((loopback(family), 0))?;
            let mut guarded = PortPlan::clone(&numbered(&served, passed.local_addr()?.port()));
            let sources = "203.0.113.0/24".parse()?;
            for planned in &mut guarded.frontends {
                planned.frontend.destination = Destination::Address(loopback(family));
                planned.allowed_sources = Some(Arc::new([sources]));
            }
            let refused = numbered(&port(family, Protocol::Udp, &[]), 79);
            let many = (81..=80 + 2 * FEW as u16).map(|number| numbered(&served, number));
            plane.reread()?;
            plane.apply(&complete(many.chain([refused, Arc::new(guarded)]).collect()))?;

            let socket = UdpSocket::bind((loopback(family), 0))?;
            let service = service_ip(family);
            assert!(socket.send_to(b"one", (service, 79)).is_err());
            assert_eq!(used()?, (0, 0), "a Service without endpoints");
            passed.send_to(b"one", socket.local_addr()?)?;
            socket.recv_from(&mut [0; 16])?;
            assert_eq!(used()?, (0, 0), "an address that is left to packets");
            for number in 81..=80 + 2 * FEW as u16 {
                talk(&socket, &server, SocketAddr::new(service, number))?;
                let crowds = u32::from(number > 80 + FEW as u16);
                assert_eq!(used()?, (1, crowds), "{number}");
            }
            for number in (81..=80 + 2 * FEW as u16).rev() {
                talk(&socket, &server, SocketAddr::new(service, number))?;
            }
            assert_eq!(used()?, (1, 1));
            drop(socket);
            assert_eq!(used()?, (0, 0), "closed and given back");
        }
        plane.remove()?;
        Ok(())
    })
}

/// A word to a Service, and an answer that comes from where it was sent.
fn talk(socket: &UdpSocket, server: &UdpSocket, to: SocketAddr) -> Result<()> {
    let mut buffer = [0; 16];
    socket.send_to(b"one", to)?;
    let (_, from) = server.recv_from(&mut buffer)?;
    server.send_to(b"two", from)?;
    assert_eq!(socket.recv_from(&mut buffer)?, (3, to));
    Ok(())
}

#[test]
fn pods_that_listen_on_a_service_address_count_until_they_are_gone_however_many_there_are() -> Result<()> {
    const NAMESPACES: usize = 100;
    let fixture = Fixture::new()?;
    let pod = Namespace::within(&fixture.cgroup, "pod")?;
    fixture.inside.run(|| -> Result<()> {
        let mut plane = open_on_host(&fixture.place)?;
        let homes = || -> Result<u64> {
            let map = MapData::from_pin(fixture.place.sockets().join("homes"))?;
            let homes: Array<_, u64> = Map::Array(map).try_into()?;
            Ok(homes.iter().collect::<Result<Vec<_>, _>>()?.into_iter().sum())
        };
        for family in Family::ALL {
            let elsewhere = TcpListener::bind((loopback(family), 0))?;
            plane.reread()?;
            plane.apply(&complete(vec![port(family, Protocol::Tcp, &[elsewhere.local_addr()?])]))?;
            let service = SocketAddr::new(service_ip(family), 80);
            let throw_away = || -> Result<()> {
                unshare(CloneFlags::CLONE_NEWNET)?;
                let socket = Socket::new(Domain::for_address(service), Type::STREAM, None)?;
                match family {
                    Family::V4 => socket.set_freebind_v4(true)?,
                    Family::V6 => socket.set_freebind_v6(true)?,
                }
                socket.bind(&service.into())?;
                ensure!(homes()? == 1, "bound and counted");
                Ok(())
            };
            for _ in 0..NAMESPACES {
                within(&fixture.cgroup, throw_away)?;
            }
            assert_eq!(homes()?, 0, "closed and given back");

            pod.ip(&[format!("addr add {} dev lo nodad", service.ip())])?;
            pod.run(|| -> Result<()> {
                let at_home = TcpListener::bind(service)?;
                let client = TcpStream::connect(service)?;
                ensure!(at_home.accept()?.1 == client.local_addr()?, "another answered");
                Ok(())
            })?;
            assert_eq!(homes()?, 0);
        }
        plane.remove()?;
        Ok(())
    })
}

#[test]
fn throw_away_namespaces_take_no_room_from_clients_of_other_groups() -> Result<()> {
    const PORTS: u16 = 32;
    let fixture = Fixture::new()?;
    let [greedy, modest] = ["greedy", "modest"].map(|label| fixture.cgroup.child(label));
    let (greedy, modest) = (greedy?, modest?);
    fixture.inside.run(|| -> Result<()> {
        for family in Family::ALL {
            let mut plane = open(&fixture.place)?;
            let servers: Vec<UdpSocket> =
                (0..4).map(|_| UdpSocket::bind((loopback(family), 0))).collect::<Result<_, _>>()?;
            let backends: Vec<SocketAddr> =
                servers.iter().map(UdpSocket::local_addr).collect::<Result<_, _>>()?;
            servers.iter().try_for_each(|server| server.set_nonblocking(true))?;
            let plan = sticky(port(family, Protocol::Udp, &backends));
            let ports = 100..100 + PORTS;
            plane.apply(&complete(ports.clone().map(|number| numbered(&plan, number)).collect()))?;
            let room = usage(&fixture.place)?.into_iter().find(|usage| usage.map == "affinities");
            let (_, room) = room.and_then(|usage| usage.elements).context("affinities do not tell")?;
            let namespaces = room / 9 / u32::from(PORTS) + 2;
            let throw_away = || {
                unshare(CloneFlags::CLONE_NEWNET)?;
                ports.clone().try_for_each(|number| come_and_go(family, number))
            };
            within(&greedy, || (0..namespaces).try_for_each(|_| within(&greedy, throw_away)))?;
            let refused = || Ok::<_, anyhow::Error>(plane.troubles()?[trouble::AFFINITY_FULL as usize]);
            let taken = elements(&fixture.place, "affinities")?;
            assert!(taken <= room / 9 + 1 && refused()? > 0, "{taken} of {room}");

            let before = refused()?;
            let stays = || {
                let asked: Result<BTreeSet<usize>> = (0..20).map(|_| ask(family, 100, &servers)).collect();
                asked.map(|backends| backends.len() == 1)
            };
            assert!(within(&modest, stays)?, "a client of another group is remembered");
            assert_eq!((elements(&fixture.place, "affinities")?, refused()?), (taken + 1, before));
            let forgotten = u32::try_from(forget_clients(&fixture.place)?)?;
            assert!((taken / 5..taken / 3).contains(&forgotten), "{forgotten} of {taken}");
            assert_eq!(elements(&fixture.place, "affinities")?, taken + 1 - forgotten);
            assert!(within(&modest, stays)?);
            let next = || {
                unshare(CloneFlags::CLONE_NEWNET)?;
                come_and_go(family, 100)
            };
            within(&greedy, next)?;
            assert_eq!(
                refused()?,
                before,
                "the greedy group's next client is remembered in an older one's place"
            );
            plane.remove()?;
        }
        Ok(())
    })
}

/// A client that nothing answers, because its namespace has no addresses: its socket is translated all the same.
fn come_and_go(family: Family, number: u16) -> Result<()> {
    let to = SocketAddr::new(service_ip(family), number);
    let socket = Socket::new(Domain::for_address(to), Type::DGRAM, None)?;
    assert!(socket.connect(&to.into()).is_err());
    Ok(())
}

/// Which server a client gets.
fn ask(family: Family, number: u16, servers: &[UdpSocket]) -> Result<usize> {
    let socket = UdpSocket::bind((loopback(family), 0))?;
    socket.connect((service_ip(family), number))?;
    socket.send(b"one")?;
    let asked = servers.iter().position(|server| server.recv(&mut [0; 16]).is_ok());
    asked.context("no server was asked")
}
