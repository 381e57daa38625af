//! Clients: one question on a new flow, or a flow that is kept.
//!
//! Everything here uses the network namespace of the calling thread.

use std::{
    collections::BTreeMap,
    io::{self, Read as _, Write as _},
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use nix::sys::socket::{
    setsockopt,
    sockopt::{Ipv4RecvErr, Ipv6RecvErr},
};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use weir::model::Family;

use super::{Answer, Call, Outcome, Transport, sctp};

/// Makes a socket of the transport.
fn socket(transport: Transport, family: Family) -> io::Result<Socket> {
    let domain = match family {
        Family::V4 => Domain::IPV4,
        Family::V6 => Domain::IPV6,
    };
    let (kind, protocol) = match (transport, family) {
        (Transport::Tcp, _) => (Type::STREAM, Protocol::TCP),
        (Transport::Udp | Transport::Datagram, _) => (Type::DGRAM, Protocol::UDP),
        (Transport::Sctp, _) => (Type::RAW, Protocol::SCTP),
        (Transport::Ping, Family::V4) => (Type::DGRAM, Protocol::ICMPV4),
        (Transport::Ping, Family::V6) => (Type::DGRAM, Protocol::ICMPV6),
    };
    Socket::new(domain, kind, Some(protocol))
}

/// A socket to serve on that never waits.
///
/// # Errors
///
/// When the address cannot be had.
pub fn bound(transport: Transport, address: SocketAddr) -> io::Result<Socket> {
    let family = Family::of(address.ip());
    let socket = socket(transport, family)?;
    if family == Family::V6 && transport != Transport::Sctp {
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

/// Binds to a source port that no client with this address has used for long: connection tracking remembers flows after
/// their sockets are gone, and the kernel is quick to hand out a port again.
fn bind(socket: &Socket, call: &Call) -> io::Result<()> {
    static NEXT: Mutex<BTreeMap<IpAddr, u16>> = Mutex::new(BTreeMap::new());
    if matches!(call.transport, Transport::Sctp | Transport::Ping) {
        return socket.bind(&SockAddr::from(SocketAddr::new(call.from, 0)));
    }
    loop {
        let number = {
            let mut next = NEXT.lock().unwrap_or_else(PoisonError::into_inner);
            let number = next.entry(call.from).or_default();
            *number = (*number + 1) % 55_000;
            *number
        };
        match socket.bind(&SockAddr::from(SocketAddr::new(call.from, 10_000 + number))) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            bound => return bound,
        }
    }
}

const QUESTION: &[u8] = b"who\n";

/// The next datagram: its sender and its answer.
fn receive(socket: &UdpSocket) -> io::Result<(SocketAddr, Answer)> {
    let mut answer = [0; 512];
    let (length, from) = socket.recv_from(&mut answer)?;
    Ok((from, serde_json::from_slice(&answer[..length]).map_err(io::Error::other)?))
}

/// One unconnected socket that asks several at a time.
#[derive(Debug)]
pub struct Datagrams(UdpSocket);

impl Datagrams {
    /// A socket for calls like this one, to anywhere.
    ///
    /// # Errors
    ///
    /// As the socket calls do.
    pub fn open(call: &Call) -> io::Result<Self> {
        let Flow { socket, .. } = Flow::connect(&Call { transport: Transport::Datagram, ..*call })?;
        socket.set_read_timeout(Some(call.patience))?;
        Ok(Self(socket.into()))
    }

    /// Asks, without waiting for the answer.
    ///
    /// # Errors
    ///
    /// As the socket call does.
    pub fn ask(&self, to: SocketAddr) -> io::Result<()> {
        self.0.send_to(QUESTION, to).map(drop)
    }

    /// The next answer and its sender.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn next(&self) -> io::Result<(SocketAddr, Answer)> {
        receive(&self.0)
    }
}

/// Asks once, on a flow of its own.
#[must_use]
pub fn ask(call: &Call) -> Outcome {
    match Flow::open(call) {
        Ok((_, answer)) => Outcome::Answer(answer),
        Err(outcome) => outcome,
    }
}

/// A flow that stays open: one source port, one conntrack entry.
#[derive(Debug)]
pub struct Flow {
    socket: Socket,
    transport: Transport,
    to: SocketAddr,
}

impl Flow {
    /// Opens a flow and asks once on it.
    ///
    /// # Errors
    ///
    /// The outcome of the call, where it is no answer.
    pub fn open(call: &Call) -> Result<(Self, Answer), Outcome> {
        let flow = Self::connect(call).map_err(|error| Outcome::of(&error))?;
        match flow.ask(call.patience) {
            Outcome::Answer(answer) => Ok((flow, answer)),
            other => Err(other),
        }
    }

    /// Opens a flow without asking anything: for datagrams, whether or not the target has a server.
    ///
    /// # Errors
    ///
    /// As the socket calls do.
    pub fn connect(call: &Call) -> io::Result<Self> {
        let family = Family::of(call.to.ip());
        let socket = socket(call.transport, family)?;
        // Without these an ICMP error that arrives before connect() has returned is lost, and TCP only learns of it from
        // the answer to the next SYN, a second later.
        match family {
            Family::V4 => setsockopt(&socket, Ipv4RecvErr, &true)?,
            Family::V6 => setsockopt(&socket, Ipv6RecvErr, &true)?,
        }
        bind(&socket, call)?;
        let mut to = call.to;
        if call.transport == Transport::Sctp {
            // Raw sockets have no ports.
            to.set_port(0);
        }
        if call.transport != Transport::Datagram {
            socket.connect_timeout(&to.into(), call.patience)?;
        }
        Ok(Self { socket, transport: call.transport, to: call.to })
    }

    /// Ends the flow with a reset where there is such a thing, so that its port is free at once; passes the answer on.
    #[must_use]
    pub fn abort(self, answer: Answer) -> Answer {
        // Without it the port rests a minute, which only a client in a great hurry would notice.
        let _ = self.socket.set_linger(Some(Duration::ZERO));
        answer
    }

    /// Asks again on the same flow.
    #[must_use]
    pub fn ask(&self, patience: Duration) -> Outcome {
        match self.exchange(patience) {
            Ok(answer) => Outcome::Answer(answer),
            Err(error) => Outcome::of(&error),
        }
    }

    fn exchange(&self, patience: Duration) -> io::Result<Answer> {
        self.socket.set_read_timeout(Some(patience))?;
        let mut socket = &self.socket;
        match self.transport {
            Transport::Ping => return self.echo(),
            Transport::Sctp => {
                let cookie = sctp::exchange(&self.socket, self.to)?;
                return serde_json::from_slice(&cookie).map_err(io::Error::other);
            }
            Transport::Tcp => self.is_peer(self.socket.peer_addr()?.as_socket())?,
            Transport::Udp => {
                self.is_peer(self.socket.peer_addr()?.as_socket())?;
                self.socket.send(QUESTION)?;
                return self.received();
            }
            Transport::Datagram => {
                self.socket.send_to(QUESTION, &self.to.into())?;
                return self.received();
            }
        }
        socket.write_all(QUESTION)?;
        let mut line = Vec::new();
        let mut chunk = [0; 512];
        while !line.ends_with(b"\n") {
            match socket.read(&mut chunk)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => line.extend_from_slice(&chunk[..read]),
            }
        }
        serde_json::from_slice(&line).map_err(io::Error::other)
    }

    fn received(&self) -> io::Result<Answer> {
        let (from, answer) = receive(&self.socket.try_clone()?.into())?;
        self.is_peer(Some(from))?;
        Ok(answer)
    }

    /// A client of a Service sees no other address: neither as peer of a connection nor as sender of an answer.
    fn is_peer(&self, seen: Option<SocketAddr>) -> io::Result<()> {
        match seen {
            Some(seen) if (seen.ip(), seen.port()) == (self.to.ip(), self.to.port()) => Ok(()),
            other => Err(io::Error::other(format!("the peer of a call to {} is {other:?}", self.to))),
        }
    }

    /// An echo request; the kernel fills in identifier and checksum of such sockets.
    fn echo(&self) -> io::Result<Answer> {
        let kind = if self.to.is_ipv4() { 8 } else { 128 };
        self.socket.send(&[kind, 0, 0, 0, 0, 0, 0, 1])?;
        let _length = (&mut &self.socket).read(&mut [0; 64])?;
        let client = self.socket.local_addr()?.as_socket().map_or(IpAddr::from([0; 4]), |local| local.ip());
        Ok(Answer { backend: "echo".to_owned(), client: SocketAddr::new(client, 0) })
    }
}
