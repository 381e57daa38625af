//! What eBPF may answer otherwise than packets do: on purpose, each as a row of docs/differences.md says, and by mistake until it is
//! mended.

use super::Model;
use crate::world::Plane;

/// A row of the table "At sockets" in docs/differences.md.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Row {
    /// Sockets' clients and packets' clients are remembered apart.
    ClientsApart,
    /// ECONNREFUSED at once.
    Refused,
    /// One backend that a socket asks in two ways.
    OneBackend,
    /// Sockets that share a port ask each for itself.
    SharedPort,
    /// Connections from one port to one backend.
    OnePort,
    /// Senders are shown by what the socket knows when it reads.
    ReadLate,
}

impl Row {
    /// All of them.
    pub(crate) const ALL: [Self; 6] = [
        Self::ClientsApart,
        Self::Refused,
        Self::OneBackend,
        Self::SharedPort,
        Self::OnePort,
        Self::ReadLate,
    ];

    /// What the row begins with.
    pub(crate) const fn begins(self) -> &'static str {
        match self {
            Self::ClientsApart => "A2",
            Self::Refused => "F1, F4",
            Self::OneBackend => "two Services, one backend",
            Self::SharedPort => "`SO_REUSEPORT`",
            Self::OnePort => "one local port",
            Self::ReadLate => "read late",
        }
    }
}

/// What eBPF answers otherwise than it should. Each is to be mended, and then its excuse goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// A socket that asks a Service before it comes, and reads the answer after, takes the Service for a client of its own: what it
    /// sends there is left to the packets, which draw for themselves.
    TakenForClient,
    /// A socket that comes back to a Service after it was connected elsewhere, loses its peer and asks the Service by address, or asked it
    /// while it was connected elsewhere, gets another backend.
    DrawsAnew,
    /// A connected socket whose backend is gone hears nothing from its Service's own address: neither an answer, where nothing
    /// translates what it sends, nor the ICMP error of a refusal.
    NotTold,
    /// A socket that loses its peer and with it its port, and connects to no Service next, is remembered with what it was told before.
    Remembered,
}

impl Model {
    /// Whether this run may also answer as a row of docs/differences.md says.
    pub(super) fn also(&self, _row: Row) -> bool {
        self.plane == Plane::Sockets
    }

    /// Whether this run is excused for a fault.
    pub(super) fn excused(&self, _fault: Fault) -> bool {
        self.plane == Plane::Sockets
    }
}
