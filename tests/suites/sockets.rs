//! Sockets of backends that stopped serving (K2): closed by the kernel, or moved, in a host's and in a pod's network namespace.
//!
//! The clients connect directly to their backends, and the test writes the maps in place of the kernel programs.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    io,
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::unix::fs::symlink,
    path::Path,
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
    dataplane::ebpf::PROGRAMS,
    model::{Family, ObjectName, Protocol},
    plan::{
        Backend, Delta, Destination, Frontend, FrontendPlan, PortDelta, PortId, PortPlan, Removal, Route,
        Target, Treatment,
    },
    stale::sockets::{Sockets, Suspects, Swept, supported},
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

/// The suspects of a delta with these changes once it is in force.
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
    /// The maps twice: for the test, and for the code that closes sockets.
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

    /// The socket is closed.
    fn forget(&mut self, cookie: u64) {
        if cookie % 2 == 1 {
            return self.origins.remove(&cookie).unwrap();
        }
        self.seats.set(u32::try_from(cookie % u64::from(SEATS)).unwrap(), Seat::default(), 0).unwrap();
    }

    /// Every second socket is to find its seat taken.
    fn remember(&mut self, cookie: u64, origin: &Origin) {
        let number = u32::try_from(cookie % u64::from(SEATS)).unwrap();
        if cookie % 2 == 1 || self.seats.get(&number, 0).unwrap().cookie != 0 {
            return self.origins.insert(cookie, origin, 0).unwrap();
        }
        let Endpoint { address, port, .. } = origin.service;
        let (since, protocol) = (origin.since, u16::try_from(origin.protocol).unwrap());
        let seat = Seat { cookie, claims: 1, since, address, port, protocol, backend: origin.backend };
        assert_eq!(seat.origin(), *origin);
        self.seats.set(number, seat, 0).unwrap();
    }
}

fn sockets([origins, seats]: [MapData; 2], names: &Path) -> Sockets {
    // A directory that is not there is one without names.
    Sockets::new(origins, seats, &[Path::new("/nowhere"), names]).unwrap()
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

/// The result for a client.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    Stays,
    Closed,
    Moved,
}

use Fate::{Closed, Moved, Stays};

/// Clients of both kinds of namespace, each with what becomes of it.
fn clients<'a>(places: &[&'a Place], origins: &mut Origins) -> Vec<(Client<'a>, Fate)> {
    let mut clients = Vec::new();
    for place in places {
        for protocol in [Tcp, Udp] {
            let lost = if protocol == Udp { Moved } else { Closed };
            for (service, backend, mapped, fate) in [
                (Some(VIP), A, false, lost),
                (Some(VIP), A, true, lost),
                (Some("192.0.2.1:30053"), A, false, if protocol == Udp { Moved } else { Stays }),
                (Some("127.0.0.1:30053"), A, true, Closed),
                (Some(VIP6), A6, false, lost),
                (Some("[::1]:30053"), A6, false, Closed),
                (Some(VIP), B, false, Stays),
                (Some(VIP), B, true, Stays),
                (Some(VIP6), B6, false, Stays),
                (None, A, false, Stays),
                (None, A, true, Stays),
                (None, A6, false, Stays),
            ] {
                let client = place.client(protocol, backend, mapped);
                let client = match service {
                    Some(service) => client.led(origins, service),
                    None => client,
                };
                clients.push((client, fate));
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
fn sockets_of_a_removed_backend_are_closed_or_moved_and_all_others_live_on() {
    let (host, pod) = (Place::new("host"), Place::new("pod"));
    let (mut origins, maps) = Origins::new();
    let names = named(&[&pod]);
    let mut sockets = host.namespace.run(|| sockets(maps, names.path()));
    let clients = clients(&[&host, &pod], &mut origins);
    let (before, after) = (plans(&[A, B], &[A6, B6]), plans(&[B], &[B6]));

    sockets.take_in(in_force(true, before.iter().map(|plan| (None, plan.clone()))));
    assert_eq!(host.namespace.run(|| sockets.sweep()), Swept::default());
    clients.iter().for_each(|(client, _)| client.works().unwrap());

    thread::scope(|scope| {
        let waiting: Vec<_> = clients
            .iter()
            .filter(|(_, fate)| *fate == Closed)
            .map(|(client, _)| scope.spawn(|| (client.protocol, client.backend, client.waits())))
            .collect();
        sockets.take_in(in_force(false, before.into_iter().zip(after)));
        assert_eq!(host.namespace.run(|| sockets.sweep()), Swept { tcp: 10, udp: 4, moved: 8 });
        for client in waiting {
            let (protocol, backend, result) = client.join().unwrap();
            assert!(aborted(result), "{protocol} {backend}");
        }
    });
    for (client, _) in clients.iter().filter(|(_, fate)| *fate == Stays) {
        client.works().unwrap();
    }
}

/// Binds a server at a Service's address, which the namespace gets for that: a datagram that is sent there and that no table
/// translates comes to it.
fn server_at(place: &Place, service: &str) -> UdpSocket {
    let service = at(service);
    place.namespace.ip(&[format!("addr add {} dev lo nodad", service.ip())]).unwrap();
    let server = place.namespace.run(|| UdpSocket::bind(service).unwrap());
    server.set_read_timeout(Some(DEADLINE)).unwrap();
    server
}

/// Sends a word. Whether it comes to this server.
fn comes_to(server: &UdpSocket, client: &Socket, word: &[u8]) -> bool {
    let mut read = [0; 16];
    client.send(word).unwrap();
    let (len, from) = server.recv_from(&mut read).unwrap();
    from == client.local_addr().unwrap().as_socket().unwrap() && &read[..len] == word
}

/// Sends a word. Whether it has come to none of these servers when a word that is sent later has come to `witness`.
fn is_dropped(client: &Socket, servers: [&UdpSocket; 2], witness: (&UdpSocket, &Socket)) -> bool {
    // The host's own filters report it to the sender.
    let told = client.send(b"dropped").is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied);
    let (server, sender) = witness;
    assert!(comes_to(server, sender, b"later"));
    let mut read = [0; 16];
    let nothing = |server: &UdpSocket| {
        server.set_nonblocking(true).unwrap();
        let heard = server.recv(&mut read).is_ok();
        server.set_nonblocking(false).unwrap();
        !heard
    };
    told && servers.into_iter().all(nothing)
}

#[test]
fn datagrams_of_udp_sockets_go_to_their_service_while_it_is_there_and_to_their_backend_while_that_serves() {
    let host = Place::new("host");
    for (vip, backend, number) in [(VIP, A, 0), (VIP6, A6, 2)] {
        let (at_service, at_backend) = (server_at(&host, vip), &host.udp[number]);
        let (mut origins, maps) = Origins::new();
        let names = named(&[]);
        let mut sockets = host.namespace.run(|| sockets(maps, names.path()));
        let plan = |serving: &[&str]| Some(port(Udp, AT_ONCE, vip, serving));
        let lost = host.client(Udp, backend, false).led(&mut origins, vip);
        let not_led = host.client(Udp, backend, false);
        let elsewhere = host.client(Udp, backend, false).led(&mut origins, vip);
        let other = if vip == VIP { B } else { B6 };
        elsewhere.socket.connect(&at(other).into()).unwrap();

        sockets.take_in(in_force(true, [(None, plan(&[backend]))]));
        assert_eq!(host.namespace.run(|| sockets.sweep()), Swept::default());
        lost.works().unwrap();
        sockets.take_in(in_force(false, [(plan(&[backend]), plan(&[]))]));
        assert_eq!(host.namespace.run(|| sockets.sweep()), Swept { moved: 1, ..Swept::default() });
        assert!(comes_to(&at_service, &lost.socket, b"lost"));
        assert_eq!(elsewhere.socket.peer_addr().unwrap().as_socket(), Some(at(other)));
        not_led.works().unwrap();

        // It serves again: at once, whatever flow there is.
        sockets.take_in(in_force(false, [(plan(&[]), plan(&[backend]))]));
        assert_eq!(sockets.wait(), Some(Duration::ZERO));
        host.namespace.run(|| sockets.sweep());
        lost.works().unwrap();

        // Without the Service, nothing goes anywhere, however often it is tried.
        sockets.take_in(in_force(false, [(plan(&[backend]), None)]));
        assert_eq!(host.namespace.run(|| sockets.sweep()), Swept { moved: 1, ..Swept::default() });
        for _ in 0..3 {
            assert!(is_dropped(&lost.socket, [&at_service, at_backend], (at_backend, &not_led.socket)));
        }
        sockets.take_in(in_force(false, [(None, plan(&[]))]));
        host.namespace.run(|| sockets.sweep());
        assert!(comes_to(&at_service, &lost.socket, b"back"));

        // Another program removes the table: the next look puts it there again.
        let table = if vip == VIP { "ip" } else { "ip6" };
        let removed = host.namespace.stdout("nft", &["delete", "table", table, "weir-moved"]);
        removed.unwrap();
        await_that("the table is there again", || {
            host.namespace.run(|| sockets.sweep());
            host.namespace.stdout("nft", &["list", "table", table, "weir-moved"]).is_ok()
        });
    }
}

#[test]
fn the_address_of_a_moved_socket_that_is_closed_is_its_next_users() {
    let host = Place::new("host");
    let (mut origins, maps) = Origins::new();
    let names = named(&[]);
    let mut sockets = host.namespace.run(|| sockets(maps, names.path()));
    let lost = host.client(Udp, A, false).led(&mut origins, VIP);
    sockets.take_in(in_force(true, []));
    assert_eq!(host.namespace.run(|| sockets.sweep()), Swept { moved: 1, ..Swept::default() });

    let own = lost.socket.local_addr().unwrap();
    origins.forget(lost.socket.cookie().unwrap());
    drop(lost);
    sockets.take_in(in_force(true, []));
    assert_eq!(host.namespace.run(|| sockets.sweep()), Swept::default());
    assert_eq!(sockets.wait().map(|wait| wait <= Duration::from_secs(1)), Some(true), "only the second look");
    let next = host.namespace.run(|| {
        let socket = Socket::new(Domain::IPV4, Type::DGRAM, None).unwrap();
        socket.bind(&own).unwrap();
        socket.connect(&at(A).into()).unwrap();
        socket
    });
    assert!(comes_to(host.udp.first().unwrap(), &next, b"next"));
}

#[test]
fn sockets_of_one_pod_beyond_its_share_are_closed_and_leave_room_for_those_of_others() {
    const SHARE: usize = 4096;
    const BEYOND: usize = 3;
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
    let (host, greedy, modest) = (Place::new("host"), Place::new("greedy"), Place::new("modest"));
    let (mut origins, maps) = Origins::new();
    let names = named(&[&greedy, &modest]);
    let mut sockets = host.namespace.run(|| sockets(maps, names.path()));
    let of = |place: &Place, origins: &mut Origins, count| -> Vec<_> {
        (0..count).map(|_| place.client(Udp, A, false).led(origins, VIP).socket).collect()
    };
    let _many = of(&greedy, &mut origins, SHARE + BEYOND);
    let _few = of(&modest, &mut origins, BEYOND);
    sockets.take_in(in_force(true, []));
    let taken = Swept { tcp: 0, udp: BEYOND as u64, moved: (SHARE + BEYOND) as u64 };
    assert_eq!(host.namespace.run(|| sockets.sweep()), taken);
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
    assert_eq!(host.namespace.run(|| sockets.sweep()), Swept::default());
    let client = client.led_at(late, &mut origins, VIP);
    await_that("the late one is closed", || {
        host.namespace.run(|| sockets.sweep()) == Swept { tcp: 1, ..Swept::default() }
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
        let sockets = sockets(maps, &directory);
        sockets.run(&receiver, |closed| report.send((Instant::now(), closed)).unwrap());
    });
    let room = room.unwrap();

    sender.send(in_force(true, [(None, plan(&[A, B]))])).unwrap();
    let lost = Instant::now();
    sender.send(in_force(false, [(plan(&[A, B]), plan(&[]))])).unwrap();
    sender.send(in_force(false, [(plan(&[]), plan(&[B]))])).unwrap();
    let (at, closed) = reports.recv_timeout(DEADLINE).unwrap();
    assert_eq!(closed, Swept { tcp: 1, ..Swept::default() });
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
    assert_eq!(host.namespace.run(|| sockets.sweep()), Swept::default(), "no process names the namespace");

    let mut process = pod
        .namespace
        .spawn(Path::new("sleep"), |sleep| {
            sleep.arg("60");
        })
        .unwrap();
    sockets.take_in(in_force(true, []));
    await_that("the socket is found", || {
        sockets.take_in(in_force(true, []));
        host.namespace.run(|| sockets.sweep()) == Swept { moved: 1, ..Swept::default() }
    });
    weir_tests::process::end(&mut process);
    drop(client);
    drop(pod);
    sockets.take_in(in_force(true, []));
    assert_eq!(host.namespace.run(|| sockets.sweep()), Swept::default());
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
            let error = Sockets::open(root.path(), root.path(), &[Path::new("/run/netns")])
                .err()
                .unwrap()
                .to_string();
            assert!(error.contains(pin.to_str().unwrap()), "{error}");
            ebpf.map_mut(name).unwrap().pin(&pin).unwrap();
        }
        let sockets = Sockets::open(root.path(), root.path(), &[Path::new("/run/netns")]).unwrap();
        assert_eq!(sockets.wait(), None);
        nix::mount::umount(root.path()).unwrap();
    };
    thread::spawn(inside).join().unwrap();
}

#[test]
fn this_kernel_can_close_sockets() {
    supported().unwrap();
}
