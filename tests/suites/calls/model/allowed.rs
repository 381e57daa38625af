//! Where eBPF may answer otherwise than packets do: each is a row of docs/differences.md.

use super::Model;
use crate::suites::calls::world::Plane;

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
    /// The sender that a socket sees follows from its state when it reads.
    ReadLate,
    /// A socket that asks a Service before it comes, and reads the answer after, takes the Service for a client of its own: what it
    /// sends there is left to the packets, which draw for themselves.
    LateServices,
    /// A socket that comes back to a Service after it was connected elsewhere, loses its peer and asks the
    /// Service by address, or asked it while it was connected elsewhere, gets another backend. One that loses
    /// its peer and with it its port, and connects to no Service next, is remembered with its former peer.
    LostPeers,
    /// A connected socket whose backend is gone hears nothing from its Service's own address: neither an answer, where nothing
    /// translates what it sends, nor the ICMP error of a refusal.
    Moved,
}

impl Row {
    pub(crate) const ALL: [Self; 9] = [
        Self::ClientsApart,
        Self::Refused,
        Self::OneBackend,
        Self::SharedPort,
        Self::OnePort,
        Self::ReadLate,
        Self::LateServices,
        Self::LostPeers,
        Self::Moved,
    ];

    /// The text at the start of the row.
    pub(crate) const fn begins(self) -> &'static str {
        match self {
            Self::ClientsApart => "A2",
            Self::Refused => "F1, F4",
            Self::OneBackend => "two Services, one backend",
            Self::SharedPort => "`SO_REUSEPORT`",
            Self::OnePort => "one local port",
            Self::ReadLate => "read late",
            Self::LateServices => "late Services",
            Self::LostPeers => "lost peers",
            Self::Moved => "K2",
        }
    }
}

impl Model {
    /// Whether this run may also answer by a row of docs/differences.md.
    pub(super) fn also(&self, _row: Row) -> bool {
        self.plane == Plane::Sockets
    }
}
