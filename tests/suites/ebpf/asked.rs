//! Every address that a datagram socket asks for, in any order, gets one backend of its Service, and the
//! socket sees that address as the sender.

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use weir::{
    dataplane::Dataplane as _,
    model::{Family, Protocol},
};

use super::{Fixture, complete, loopback, open, port, service_ip};

/// So often each order is tried: with two backends, by chance alone two of these in a million would come out right.
const TIMES: usize = 20;

/// Servers that answer each datagram with the port they have.
struct Servers {
    addresses: Vec<SocketAddr>,
    end: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Servers {
    fn start(family: Family) -> Result<Self> {
        let end = Arc::new(AtomicBool::new(false));
        let (mut addresses, mut threads) = (Vec::new(), Vec::new());
        for _ in 0..2 {
            let socket = UdpSocket::bind((loopback(family), 0))?;
            socket.set_read_timeout(Some(Duration::from_millis(20)))?;
            let own = socket.local_addr()?;
            let ended = Arc::clone(&end);
            addresses.push(own);
            threads.push(thread::spawn(move || {
                let mut question = [0; 16];
                while !ended.load(Relaxed) {
                    if let Ok((_, from)) = socket.recv_from(&mut question) {
                        // A client that is gone hears nothing.
                        let _ = socket.send_to(&own.port().to_be_bytes(), from);
                    }
                }
            }));
        }
        Ok(Self { addresses, end, threads })
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        self.end.store(true, Relaxed);
        for thread in self.threads.drain(..) {
            assert!(thread.join().is_ok() || thread::panicking());
        }
    }
}

/// A client's socket, and how it writes addresses.
struct Client {
    socket: UdpSocket,
    mapped: bool,
}

impl Client {
    fn new(service: SocketAddr, mapped: bool) -> Result<Self> {
        let any = if mapped || service.is_ipv6() { "[::]:0" } else { "0.0.0.0:0" };
        let socket = UdpSocket::bind(any)?;
        socket.set_read_timeout(Some(Duration::from_secs(5)))?;
        Ok(Self { socket, mapped })
    }

    fn written(&self, address: SocketAddr) -> SocketAddr {
        match address.ip() {
            IpAddr::V4(ip) if self.mapped => SocketAddr::new(ip.to_ipv6_mapped().into(), address.port()),
            _ => address,
        }
    }

    /// Sends to an address, or to the peer; the port of the server that answered, which is to be shown as `shown`.
    fn ask(&self, to: Option<SocketAddr>, shown: SocketAddr) -> Result<u16> {
        match to {
            Some(to) => self.socket.send_to(b"?", self.written(to)),
            None => self.socket.send(b"?"),
        }?;
        let mut answer = [0; 2];
        let (_, from) = self.socket.recv_from(&mut answer).context("waiting for an answer")?;
        ensure!(from == self.written(shown), "{from} answered {to:?}, not {shown}");
        Ok(u16::from_be_bytes(answer))
    }

    fn connect(&self, to: SocketAddr) -> Result<()> {
        self.socket.connect(self.written(to))?;
        let peer = self.socket.peer_addr()?;
        ensure!(peer == self.written(to), "the peer is {peer}, not {to}");
        Ok(())
    }
}

type Order = fn(&Client, SocketAddr, &[SocketAddr]) -> Result<()>;

fn same(a: u16, b: u16) -> Result<()> {
    ensure!(a == b, "{a} answered first, then {b}");
    Ok(())
}

fn of_port(servers: &[SocketAddr], port: u16) -> Result<SocketAddr> {
    servers
        .iter()
        .copied()
        .find(|server| server.port() == port)
        .ok_or_else(|| anyhow!("no server has {port}"))
}

const ORDERS: [(&str, Order); 7] = [
    ("connects, then sends with an address too", |client, service, _| {
        client.connect(service)?;
        let first = client.ask(None, service)?;
        same(first, client.ask(Some(service), service)?)?;
        same(first, client.ask(None, service)?)
    }),
    ("connects, and sends with an address first", |client, service, _| {
        client.connect(service)?;
        let first = client.ask(Some(service), service)?;
        same(first, client.ask(None, service)?)
    }),
    ("sends, then connects", |client, service, _| {
        let first = client.ask(Some(service), service)?;
        client.connect(service)?;
        same(first, client.ask(None, service)?)?;
        same(first, client.ask(Some(service), service)?)
    }),
    ("sends to the Service, to its backend, and to the Service again", |client, service, servers| {
        let first = client.ask(Some(service), service)?;
        let server = of_port(servers, first)?;
        same(first, client.ask(Some(server), server)?)?;
        same(first, client.ask(Some(server), server)?)?;
        same(first, client.ask(Some(service), service)?)
    }),
    ("sends to the Service, then connects to its backend", |client, service, servers| {
        let first = client.ask(Some(service), service)?;
        let server = of_port(servers, first)?;
        client.connect(server)?;
        same(first, client.ask(None, server)?)
    }),
    ("connects to the Service, then to its backend", |client, service, servers| {
        client.connect(service)?;
        let first = client.ask(None, service)?;
        let server = of_port(servers, first)?;
        client.connect(server)?;
        same(first, client.ask(None, server)?)
    }),
    ("connects, connects to nothing, and sends to the backend", |client, service, servers| {
        client.connect(service)?;
        let first = client.ask(None, service)?;
        let server = of_port(servers, first)?;
        rustix::net::connect_unspec(&client.socket)?;
        ensure!(client.socket.peer_addr().is_err());
        same(first, client.ask(Some(server), server)?)
    }),
];

#[test]
fn a_socket_and_a_service_have_one_backend_and_the_socket_sees_the_address_it_asked() -> Result<()> {
    let fixture = Fixture::new()?;
    fixture.inside.run(|| -> Result<()> {
        let mut plane = open(&fixture.place)?;
        for family in Family::ALL {
            let servers = Servers::start(family)?;
            plane.reread()?;
            plane.apply(&complete(vec![port(family, Protocol::Udp, &servers.addresses)]))?;
            let service = SocketAddr::new(service_ip(family), 80);
            let mapped = [false, true].into_iter().filter(|mapped| !mapped || family == Family::V4);
            for (mapped, (order, act)) in mapped.flat_map(|mapped| ORDERS.map(|order| (mapped, order))) {
                for time in 0..TIMES {
                    let client = Client::new(service, mapped)?;
                    act(&client, service, &servers.addresses).with_context(|| {
                        format!("{family}, mapped: {mapped}: a socket {order}, time {time}")
                    })?;
                }
            }
        }
        plane.remove()?;
        Ok(())
    })
}
