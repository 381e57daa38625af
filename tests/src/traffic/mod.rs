//! Real connections: servers that answer with their own name and the client's address, and clients that ask them.
//!
//! In: a namespace and an address. Out: an [`Outcome`] for each attempt.

use std::{
    fmt, io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use weir::model::Family;

use crate::node::Location;

mod client;
mod load;
mod sctp;
mod server;

pub use client::{Datagrams, Flow, ask, bound};
pub use load::{Load, Tally, await_answers, every_way};
pub use server::{SERVER_PORTS, Server};

/// How long a client waits for an answer: longer than one takes even on a busy machine, and shorter than the second
/// after which TCP tries again, so that a lost packet shows.
pub const PATIENCE: Duration = Duration::from_millis(900);
/// How long a client waits where no answer should come.
pub const SILENCE: Duration = Duration::from_millis(400);

/// The protocol and the kind of socket of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Transport {
    Tcp,
    /// UDP on a connected socket.
    Udp,
    /// UDP on a socket that is not connected: every datagram names its destination.
    Datagram,
    /// SCTP, as far as the answer to an INIT. Every question is a new flow.
    Sctp,
    /// ICMP echo: no port, and no name in the answer.
    Ping,
}

impl Transport {
    /// The protocol's name in Kubernetes.
    #[must_use]
    pub fn protocol(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp | Self::Datagram => "UDP",
            Self::Sctp => "SCTP",
            Self::Ping => "ICMP",
        }
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Datagram => "unconnected UDP",
            Self::Sctp => "SCTP",
            Self::Ping => "ping",
        })
    }
}

/// One attempt to reach something.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// The source address; the port is the kernel's choice, so every call is a new flow.
    pub from: IpAddr,
    pub to: SocketAddr,
    pub transport: Transport,
    pub patience: Duration,
}

impl Call {
    /// A call with the usual patience from where a client is.
    #[must_use]
    pub fn new(from: Location, to: SocketAddr, transport: Transport) -> Self {
        let from = from.client_address(Family::of(to.ip()));
        Self { from, to, transport, patience: PATIENCE }
    }
}

/// The answer of a server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The server, as `NAME:PORT`.
    pub backend: String,
    /// The client as the server sees it.
    pub client: SocketAddr,
}

/// The result of a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Answer(Answer),
    Refused,
    /// This host's own filter would not send it (EPERM): how a local sender learns of a drop or a reject.
    Denied,
    Timeout,
    /// Another process closed the socket.
    Closed,
    /// Anything else, such as a network unreachable.
    Error(String),
}

impl Outcome {
    fn of(error: &io::Error) -> Self {
        use io::ErrorKind::{
            ConnectionAborted, ConnectionRefused, NotConnected, PermissionDenied, TimedOut, WouldBlock,
        };
        if error.raw_os_error() == Some(Errno::EDESTADDRREQ as i32) {
            return Self::Closed;
        }
        match error.kind() {
            // The first is reported once; after it a datagram socket is as if it had never been connected.
            ConnectionAborted | NotConnected => Self::Closed,
            ConnectionRefused => Self::Refused,
            PermissionDenied => Self::Denied,
            TimedOut | WouldBlock => Self::Timeout,
            _ => Self::Error(error.to_string()),
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Answer(answer) => write!(f, "{} answered, seeing {}", answer.backend, answer.client.ip()),
            Self::Refused => f.write_str("refused"),
            Self::Denied => f.write_str("not sent: permission denied"),
            Self::Timeout => f.write_str("no answer"),
            Self::Closed => f.write_str("closed"),
            Self::Error(error) => f.write_str(error),
        }
    }
}
