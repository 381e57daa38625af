//! Sockets of backends that stopped serving (K2), closed by the kernel, in a host's and in a pod's network namespace.
//!
//! The clients connect straight to their backends; what the kernel programs would have written down for a socket, the
//! test writes into the programs' own maps.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    io,
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

use aya::{
    EbpfLoader,
    maps::{Array, HashMap, Map, MapData},
};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    time::{ClockId, clock_gettime},
};
use proxy_ebpf::{Endpoint, Origin, SEATS, Seat};
use socket2::{Domain, Socket, Type};
use tempfile::TempDir;
use weir::{
    dataplane::{
        ebpf::PROGRAMS,
        sockets::{Closed, Sockets, Suspects, supported},
    },
    model::{Family, ObjectName, Protocol},
    plan::{
        Backend, Delta, Destination, Frontend, FrontendPlan, PortDelta, PortId, PortPlan, Removal, Route,
        Target, Treatment,
    },
};
use weir_tests::{
    netns::Namespace,
    wait::{DEADLINE, await_that},
};

use Protocol::{Tcp, Udp};

const AT_ONCE: Removal = Removal::Reset { after: Duration::ZERO };

const NODE_PORT: u16 = 30053;
const VIP: &str = "10.96.0.10:53";
const VIP6: &str = "[fd00::10]:53";
const A: &str = "10.1.0.1:5353";
const B: &str = "10.1.0.2:5353";
const A6: &str = "[fd01::1]:5353";
const B6: &str = "[fd01::2]:5353";

fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn now() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap();
    u64::try_from(Duration::from(now).as_nanos()).unwrap()
}

/// The port of a Service at `vip` and the NodePort, with these serving endpoints.
fn port(protocol: Protocol, on_removal: Removal, vip: &str, serving: &[&str]) -> Arc<PortPlan> {
    let family = Family::of(at(vip).ip());
    let plan = |destination, port| FrontendPlan {
        frontend: Frontend { destination, protocol, port },
        route: Route::uniform(Treatment { target: Target::Cluster, masquerade: false }),
        allowed_sources: None,
        answered_here: false,
    };
    let backend = |text: &&str| Backend { address: at(text).ip(), port: at(text).port(), local: false };
    Arc::new(PortPlan {
        id: PortId { service: ObjectName::new("default", "dns"), port: "".into(), protocol, family },
        cluster: Vec::new(),
        local: Vec::new(),
        frontends: vec![
            plan(Destination::Address(at(vip).ip()), at(vip).port()),
            plan(Destination::NodePort(family), NODE_PORT),
        ],
        affinity: None,
        on_removal,
        serving: serving.iter().map(backend).collect(),
    })
}

/// What a delta with these changes comes to once it is in force.
fn in_force(
    complete: bool,
    ports: impl IntoIterator<Item = (Option<Arc<PortPlan>>, Option<Arc<PortPlan>>)>,
) -> Suspects {
    let ports = ports.into_iter().map(|(before, after)| PortDelta { before, after }).collect();
    Suspects::of(&Delta { ports, complete, ..Delta::default() })
}

/// A network namespace with four backends that serve over TCP and UDP.
struct Place {
    namespace: Namespace,
    tcp: Vec<TcpListener>,
    udp: Vec<UdpSocket>,
}

impl Place {
    fn new(label: &str) -> Self {
        let namespace = Namespace::new(label).unwrap();
        let addresses = [A, B, A6, B6].map(|backend| format!("addr add {} dev lo nodad", at(backend).ip()));
        namespace.ip(&addresses).unwrap();
        let (tcp, udp) = namespace.run(|| {
            let all = || [A, B, A6, B6].into_iter().map(at);
            let udp = all().map(|backend| UdpSocket::bind(backend).unwrap());
            (all().map(|backend| TcpListener::bind(backend).unwrap()).collect(), udp.collect())
        });
        Self { namespace, tcp, udp }
    }

    /// A client of `backend`; with an IPv6 socket even of an IPv4 one when `mapped`.
    fn client(&self, protocol: Protocol, backend: &str, mapped: bool) -> Client<'_> {
        let backend = at(backend);
        let listener = self.tcp.iter().find(|listener| listener.local_addr().unwrap() == backend);
        let server = self.udp.iter().find(|server| server.local_addr().unwrap() == backend).unwrap();
        let to = match backend {
            SocketAddr::V4(v4) if mapped => SocketAddr::new(v4.ip().to_ipv6_mapped().into(), v4.port()),
            _ => backend,
        };
        let kind = if protocol == Tcp { Type::STREAM } else { Type::DGRAM };
        let socket = self.namespace.run(|| {
            let socket = Socket::new(Domain::for_address(to), kind, None).unwrap();
            socket.set_read_timeout(Some(DEADLINE)).unwrap();
            socket.connect(&to.into()).unwrap();
            socket
        });
        let far = match protocol {
            Tcp => Far::Tcp(listener.unwrap().accept().unwrap().0),
            _ => Far::Udp(server),
        };
        Client { socket, protocol, backend, far }
    }
}

enum Far<'a> {
    Tcp(TcpStream),
    Udp(&'a UdpSocket),
}

struct Client<'a> {
    socket: Socket,
    protocol: Protocol,
    backend: SocketAddr,
    far: Far<'a>,
}

impl Client<'_> {
    /// Writes down that the socket asked for `service` just now.
    fn led(self, origins: &mut Origins, service: &str) -> Self {
        self.led_at(now(), origins, service)
    }

    fn led_at(self, since: u64, origins: &mut Origins, service: &str) -> Self {
        let cookie = self.socket.cookie().unwrap();
        let origin = Origin {
            cookie,
            since,
            service: Endpoint::new(at(service).ip(), at(service).port()),
            backend: Endpoint::new(self.backend.ip(), self.backend.port()),
            protocol: self.protocol.number().into(),
            group: 0,
        };
        origins.remember(cookie, &origin);
        self
    }

    /// A word to the server and one back.
    fn works(&self) -> io::Result<()> {
        let mut word = [0; 4];
        self.socket.send(b"ping")?;
        match &self.far {
            Far::Tcp(server) => {
                let server = socket2::SockRef::from(server);
                io::Read::read_exact(&mut &*server, &mut word)?;
                server.send(b"pong")?;
            }
            Far::Udp(server) => {
                let (_, client) = server.recv_from(&mut word)?;
                server.send_to(b"pong", client)?;
            }
        }
        assert_eq!(&word, b"ping");
        io::Read::read_exact(&mut &self.socket, &mut word)?;
        assert_eq!(&word, b"pong");
        Ok(())
    }

    /// Waits for the server's next word.
    fn waits(&self) -> io::Result<usize> {
        io::Read::read(&mut &self.socket, &mut [0; 4])
    }
}

fn aborted<T>(result: io::Result<T>) -> bool {
    result.is_err_and(|error| error.raw_os_error() == Some(nix::libc::ECONNABORTED))
}

/// The maps of the kernel programs.
struct Origins {
    origins: HashMap<MapData, u64, Origin>,
    seats: Array<MapData, Seat>,
}

impl Origins {
    /// The maps twice: for the test, and for who closes sockets.
    fn new() -> (Self, [MapData; 2]) {
        let mut ebpf = EbpfLoader::new().load(PROGRAMS).unwrap();
        let (Some(Map::HashMap(origins)), Some(Map::Array(seats))) =
            (ebpf.take_map("origins"), ebpf.take_map("seats"))
        else {
            panic!("a map is not there")
        };
        let again = [&origins, &seats].map(|map| MapData::from_id(map.info().unwrap().id()).unwrap());
        let origins = Map::HashMap(origins).try_into().unwrap();
        (Self { origins, seats: Map::Array(seats).try_into().unwrap() }, again)
    }

    /// Every second socket finds its seat taken.
    fn remember(&mut self, cookie: u64, origin: &Origin) {
        if cookie % 2 == 1 {
            return self.origins.insert(cookie, origin, 0).unwrap();
        }
        let Endpoint { address, port, .. } = origin.service;
        let (since, protocol) = (origin.since, u16::try_from(origin.protocol).unwrap());
        let seat = Seat { cookie, claims: 1, since, address, port, protocol, backend: origin.backend };
        assert_eq!(seat.origin(), *origin);
        self.seats.set(u32::try_from(cookie % u64::from(SEATS)).unwrap(), seat, 0).unwrap();
    }
}

fn sockets([origins, seats]: [MapData; 2], names: impl Into<PathBuf>) -> Sockets {
    Sockets::new(origins, seats, names).unwrap()
}

/// A directory in which these namespaces have names.
fn named(places: &[&Place]) -> TempDir {
    let names = TempDir::new().unwrap();
    std::fs::write(names.path().join("left-over"), "").unwrap();
    for place in places {
        symlink(place.namespace.path(), names.path().join(place.namespace.label())).unwrap();
    }
    names
}

/// Clients of both kinds of namespace, each with whether it is to go.
fn clients<'a>(places: &[&'a Place], origins: &mut Origins) -> Vec<(Client<'a>, bool)> {
    let mut clients = Vec::new();
    for place in places {
        for protocol in [Tcp, Udp] {
            for (service, backend, mapped, goes) in [
                (Some(VIP), A, false, true),
                (Some(VIP), A, true, true),
                (Some("192.0.2.1:30053"), A, false, protocol == Udp),
                (Some("127.0.0.1:30053"), A, true, true),
                (Some(VIP6), A6, false, true),
                (Some("[::1]:30053"), A6, false, true),
                (Some(VIP), B, false, false),
                (Some(VIP), B, true, false),
                (Some(VIP6), B6, false, false),
                (None, A, false, false),
                (None, A, true, false),
                (None, A6, false, false),
            ] {
                let client = place.client(protocol, backend, mapped);
                let client = match service {
                    Some(service) => client.led(origins, service),
                    None => client,
                };
                clients.push((client, goes));
            }
        }
    }
    clients
}

fn plans(v4: &[&str], v6: &[&str]) -> [Option<Arc<PortPlan>>; 4] {
    [
        port(Tcp, AT_ONCE, VIP, v4),
        port(Udp, AT_ONCE, VIP, v4),
        port(Tcp, AT_ONCE, VIP6, v6),
        port(Udp, AT_ONCE, VIP6, v6),
    ]
    .map(Some)
}

#[test]
fn sockets_of_a_removed_backend_are_closed_and_all_others_live_on() {
    let (host, pod) = (Place::new("host"), Place::new("pod"));
    let (mut origins, maps) = Origins::new();
    let names = named(&[&pod]);
    let mut sockets = host.namespace.run(|| sockets(maps, names.path()));
    let clients = clients(&[&host, &pod], &mut origins);
    let (before, after) = (plans(&[A, B], &[A6, B6]), plans(&[B], &[B6]));

    sockets.take_in(in_force(true, before.iter().map(|plan| (None, plan.clone()))));
    assert_eq!(host.namespace.run(|| sockets.sweep()), Closed::default());
    clients.iter().for_each(|(client, _)| client.works().unwrap());

    thread::scope(|scope| {
        let waiting: Vec<_> = clients
            .iter()
            .filter(|(_, goes)| *goes)
            .map(|(client, _)| scope.spawn(|| (client.protocol, client.backend, client.waits())))
            .collect();
        sockets.take_in(in_force(false, before.into_iter().zip(after)));
        assert_eq!(host.namespace.run(|| sockets.sweep()), Closed { tcp: 10, udp: 12 });
        for client in waiting {
            let (protocol, backend, result) = client.join().unwrap();
            assert!(aborted(result), "{protocol} {backend}");
        }
    });
    for (client, _) in clients.iter().filter(|(_, goes)| !goes) {
        client.works().unwrap();
    }
}

#[test]
fn udp_sockets_are_closed_when_nothing_serves_and_when_the_service_is_deleted() {
    let host = Place::new("host");
    let (mut origins, maps) = Origins::new();
    let names = named(&[]);
    let mut sockets = host.namespace.run(|| sockets(maps, names.path()));
    let plan = |serving: &[&str]| Some(port(Udp, AT_ONCE, VIP, serving));
    let v6 = Some(port(Udp, AT_ONCE, VIP6, &[A6]));
    let (lost, deleted) = (
        host.client(Udp, A, false).led(&mut origins, VIP),
        host.client(Udp, A6, false).led(&mut origins, VIP6),
    );
    let elsewhere = host.client(Udp, A, false).led(&mut origins, VIP);
    elsewhere.socket.connect(&at(B).into()).unwrap();

    sockets.take_in(in_force(true, [(None, plan(&[A])), (None, v6.clone())]));
    assert_eq!(host.namespace.run(|| sockets.sweep()), Closed::default());
    sockets.take_in(in_force(false, [(plan(&[A]), plan(&[])), (v6, None)]));
    assert_eq!(host.namespace.run(|| sockets.sweep()), Closed { tcp: 0, udp: 2 });
    assert!(aborted(lost.waits()) && aborted(deleted.waits()));
    assert_eq!(elsewhere.socket.peer_addr().unwrap().as_socket(), Some(at(B)));
}

#[test]
fn a_connect_that_was_under_way_is_found_a_second_later() {
    let host = Place::new("host");
    let (mut origins, maps) = Origins::new();
    let names = named(&[]);
    let mut sockets = host.namespace.run(|| sockets(maps, names.path()));
    sockets.take_in(in_force(true, [(None, Some(port(Tcp, AT_ONCE, VIP, &[A, B])))]));
    await_that("all looks are over", || {
        sockets.sweep();
        sockets.wait().is_none()
    });

    let client = host.client(Tcp, A, false);
    let late = now();
    let lost = (port(Tcp, AT_ONCE, VIP, &[A, B]), port(Tcp, AT_ONCE, VIP, &[B]));
    sockets.take_in(in_force(false, [(Some(lost.0), Some(lost.1))]));
    assert_eq!(host.namespace.run(|| sockets.sweep()), Closed::default());
    let client = client.led_at(late, &mut origins, VIP);
    await_that("the late one is closed", || {
        host.namespace.run(|| sockets.sweep()) == Closed { tcp: 1, udp: 0 }
    });
    assert!(aborted(client.waits()));
}

#[test]
fn connections_are_reset_after_the_time_that_the_service_says_and_not_before() {
    const WAIT: Duration = Duration::from_millis(1500);
    let host = Place::new("host");
    let (mut origins, maps) = Origins::new();
    let names = named(&[]);
    let later = Removal::Reset { after: WAIT };
    let plan = |serving: &[&str]| Some(port(Tcp, later, VIP, serving));
    let (gone, back) = (
        host.client(Tcp, A, false).led(&mut origins, VIP),
        host.client(Tcp, B, false).led(&mut origins, VIP),
    );
    let directory = names.path().to_owned();
    let (sender, receiver) = mpsc::channel();
    let (report, reports) = mpsc::channel();
    let room = host.namespace.thread(move || {
        let sockets = sockets(maps, directory);
        sockets.run(&receiver, |closed| report.send((Instant::now(), closed)).unwrap());
    });
    let room = room.unwrap();

    sender.send(in_force(true, [(None, plan(&[A, B]))])).unwrap();
    let lost = Instant::now();
    sender.send(in_force(false, [(plan(&[A, B]), plan(&[]))])).unwrap();
    sender.send(in_force(false, [(plan(&[]), plan(&[B]))])).unwrap();
    let (at, closed) = reports.recv_timeout(DEADLINE).unwrap();
    assert_eq!(closed, Closed { tcp: 1, udp: 0 });
    assert!(at - lost >= WAIT, "{:?}", at - lost);
    assert!(aborted(gone.waits()));
    back.works().unwrap();

    drop(sender);
    room.join().unwrap();
    assert!(reports.recv().is_err(), "nothing else was closed");
}

#[test]
fn namespaces_without_a_name_are_found_by_their_processes_and_come_and_go() {
    let (host, pod) = (Place::new("host"), Place::new("pod"));
    let (mut origins, maps) = Origins::new();
    let names = named(&[]);
    let mut sockets = host.namespace.run(|| sockets(maps, names.path()));
    let client = pod.client(Udp, A, false).led(&mut origins, VIP);
    sockets.take_in(in_force(true, []));
    assert_eq!(host.namespace.run(|| sockets.sweep()), Closed::default(), "nobody tells of the namespace");

    let mut process = pod
        .namespace
        .spawn(Path::new("sleep"), |sleep| {
            sleep.arg("60");
        })
        .unwrap();
    sockets.take_in(in_force(true, []));
    await_that("the socket is closed", || {
        sockets.take_in(in_force(true, []));
        host.namespace.run(|| sockets.sweep()) == Closed { tcp: 0, udp: 1 }
    });
    assert!(aborted(client.waits()));
    weir_tests::keeper::end(&mut process);
    drop(client);
    drop(pod);
    sockets.take_in(in_force(true, []));
    assert_eq!(host.namespace.run(|| sockets.sweep()), Closed::default());
}

#[test]
fn the_maps_are_opened_by_their_pins_and_a_missing_one_is_named() {
    let inside = || {
        // The mount goes with the thread.
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
        let root = TempDir::new().unwrap();
        mount(None::<&str>, root.path(), Some("bpf"), MsFlags::empty(), None::<&str>).unwrap();
        let mut ebpf = EbpfLoader::new().load(PROGRAMS).unwrap();
        for name in ["origins", "seats"] {
            let pin = root.path().join(name);
            let error = Sockets::open(root.path(), "/run/netns").err().unwrap().to_string();
            assert!(error.contains(pin.to_str().unwrap()), "{error}");
            ebpf.map_mut(name).unwrap().pin(&pin).unwrap();
        }
        let sockets = Sockets::open(root.path(), "/run/netns").unwrap();
        assert_eq!(sockets.wait(), None);
        nix::mount::umount(root.path()).unwrap();
    };
    thread::spawn(inside).join().unwrap();
}

#[test]
fn this_kernel_can_close_sockets() {
    supported().unwrap();
}
