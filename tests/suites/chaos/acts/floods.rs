//! Clients that want more than their share: of memories, sockets, connections and names.

use std::{
    io::Write as _,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket},
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow};
use hickory_proto::rr::RecordType;
use nix::{
    sched::{CloneFlags, unshare},
    sys::resource::{Resource, getrlimit, setrlimit},
};
use socket2::{Domain, Socket, Type};
use weir::model::Family;
use weir_tests::{
    names::query,
    netns::Namespace,
    node::{Location, node_address},
};

use super::{Act, Held, nothing};
use crate::suites::chaos::{
    cluster::{CLIENT, EACH, PORT, SERVICES, Service},
    fixture::{DNS, Fixture},
    random::Random,
};

/// How long one client of a flood waits.
const PATIENCE: Duration = Duration::from_millis(300);
/// The Service with affinity that clients flood by its NodePort, and the one at its ClusterIP.
const STICKY: Service = Service(1);

pub(crate) const ACTS: &[Act] = &[
    Act::new("many clients of a sticky Service", sticky_clients),
    Act::new("throw-away namespaces", throw_away_namespaces),
    Act::new("many UDP sockets", |fixture, random| {
        let to = SocketAddr::new(pick(random).cluster_ip(Family::V4), PORT);
        let sockets = fixture.topology.at(CLIENT).run(|| -> Result<Vec<UdpSocket>> {
            (0..3_000)
                .map(|_| {
                    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
                    socket.send_to(b"one\n", to)?;
                    Ok(socket)
                })
                .collect()
        })?;
        Ok(vec![Box::new(sockets)])
    }),
    Act::new("half requests to health ports", |fixture, _| {
        let checked =
            Service::all().find_map(Service::health_port).context("no Service has a health check")?;
        let held = [10_256, checked].map(|port| {
            let to = SocketAddr::new(node_address(Family::V4, 1), port);
            opened(fixture.topology.at(Location::Outside(0)), to, 800, b"GET /healthz HTTP/1.1\r\nHost: ")
        });
        Ok(held.into_iter().map(|streams| Box::new(streams) as Box<dyn std::any::Any>).collect())
    }),
    Act::new("idle connections to the names' port", |fixture, _| {
        let to = SocketAddr::new(DNS[0].parse()?, 53);
        Ok(vec![Box::new(opened(fixture.topology.at(CLIENT), to, 1_000, &[0]))])
    }),
    Act::new("a flood of names", flood_of_names),
    Act::new("interfaces come and go", |fixture, _| {
        let node = fixture.topology.at(Location::Host(1));
        for number in 0..10 {
            let name = format!("flap{number}");
            node.ip(&[
                format!("link add {name} type veth peer name {name}p"),
                format!("link set {name} up"),
                format!("link set {name}p up"),
                format!("link del {name}"),
            ])?;
        }
        nothing()
    }),
];

fn pick(random: &mut Random) -> Service {
    // Those of the first kind take TCP and UDP at their ClusterIP.
    Service(random.below(usize::from(SERVICES / EACH)) as u16 * EACH)
}

/// As many file descriptors as a process may have.
pub(crate) fn raise_limits() -> Result<()> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(setrlimit(Resource::RLIMIT_NOFILE, most, most)?)
}

/// Connections with the beginning of a request, as many of them as are taken.
fn opened(from: &Namespace, to: SocketAddr, count: usize, request: &[u8]) -> Vec<TcpStream> {
    from.run(|| {
        let mut open = Vec::new();
        for _ in 0..count {
            // One that is not taken is what a share for each client looks like.
            let Ok(mut stream) = TcpStream::connect_timeout(&to, PATIENCE) else { break };
            let _ = stream.write_all(request);
            open.push(stream);
        }
        open
    })
}

/// Each with an address of its own, from outside by packets.
fn sticky_clients(fixture: &mut Fixture, random: &mut Random) -> Result<Held> {
    let (outside, node) = (fixture.topology.at(Location::Outside(0)), fixture.topology.at(Location::Host(1)));
    let back = Location::Outside(0).client_address(Family::V4);
    outside.ip(&["route replace local 10.78.0.0/16 dev lo".to_owned()])?;
    node.ip(&[format!("route replace 10.78.0.0/16 via {back}")])?;
    let port = Service(3).node_port().context("the Service has a NodePort")?;
    let to = SocketAddr::new(node_address(Family::V4, 1), port);
    let first = random.below(200) as u8;
    outside.run(|| {
        for number in 0..4_000_u16 {
            let [high, low] = number.to_be_bytes();
            let from = SocketAddr::from((Ipv4Addr::new(10, 78, first + high, low), 0));
            // A client that is not answered is no worry of the others'.
            let _ = client(from, to);
        }
    });
    nothing()
}

fn client(from: SocketAddr, to: SocketAddr) -> std::io::Result<()> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
    socket.bind(&from.into())?;
    socket.set_linger(Some(Duration::ZERO))?;
    socket.connect_timeout(&to.into(), PATIENCE)
}

/// Each asks for a sticky Service and binds to a ClusterIP, and is gone: nothing of it leaves the namespace.
fn throw_away_namespaces(fixture: &mut Fixture, random: &mut Random) -> Result<Held> {
    let services: Vec<Service> = (0..4).map(|_| Service(pick(random).0 + STICKY.0)).collect();
    let threads = (0..4).map(|_| {
        let services = services.clone();
        fixture.topology.at(CLIENT).thread(move || -> Result<()> {
            for number in 0..100 {
                unshare(CloneFlags::CLONE_NEWNET)?;
                let service = services[number % services.len()];
                for family in Family::ALL {
                    let to = SocketAddr::new(service.cluster_ip(family), PORT);
                    // There is no way out of the namespace; what counts is that programs at sockets saw the attempt.
                    let _ = client(SocketAddr::new(any(family), 0), to);
                    let listener = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
                    if family == Family::V4 {
                        listener.set_freebind_v4(true)?;
                    } else {
                        listener.set_freebind_v6(true)?;
                    }
                    let _ = listener.bind(&to.into());
                }
            }
            Ok(())
        })
    });
    for thread in threads.collect::<Result<Vec<_>>>()? {
        thread.join().map_err(|_| anyhow!("a client panicked"))??;
    }
    nothing()
}

fn any(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => std::net::Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// Names that are there and names that are not, without waiting for answers.
fn flood_of_names(fixture: &mut Fixture, random: &mut Random) -> Result<Held> {
    let mut questions = Vec::new();
    for number in 0..20 {
        let (name, _) = Fixture::name_of(pick(random));
        questions.push(query(&name, RecordType::A, true)?.to_vec()?);
        questions
            .push(query(&format!("nothing-{number}.elsewhere.example."), RecordType::A, true)?.to_vec()?);
    }
    let to = SocketAddr::new(DNS[0].parse()?, 53);
    fixture.topology.at(CLIENT).run(|| -> Result<()> {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        for question in questions.iter().cycle().take(20_000) {
            // A full queue is one answer of the kernel's.
            let _ = socket.send_to(question, to);
        }
        Ok(())
    })?;
    nothing()
}
