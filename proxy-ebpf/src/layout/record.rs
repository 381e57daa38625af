//! `records`: the outcome for each class of clients of a service port, and its slots.
//!
//! In: service ports of plans. Out: the map's values, and the constants in them.

/// Value of `records`. The agent never changes a record while a word of `ports` refers to it: a change of the port is
/// another record, and one store into `ports`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// [`flag::MEMBERS`] or nothing.
    pub flags: u32,
    /// How long a client stays with its backend, in seconds; 0 without session affinity.
    pub affinity: u32,
    /// For the tc plane: the list of allowed sources. Always zero, which means no list.
    pub sources: u32,
    /// Always zero.
    pub zero: u32,
    /// The slots of the sets [`set::CLUSTER`] and [`set::LOCAL`].
    pub sets: [Slots; 2],
    /// Frontends with the same outcomes share a column.
    pub columns: [Column; Record::COLUMNS],
}

impl Record {
    /// A Service needs one column for its ClusterIP and one for its external addresses and NodePorts.
    pub const COLUMNS: usize = 4;
    /// The index of the record that leaves every socket to nftables.
    pub const NOTHING: u32 = 0;
}

/// Consecutive slots.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slots {
    /// An index in `slots`; 0 if `count` is 0.
    pub first: u32,
    /// One slot for each backend.
    pub count: u32,
}

/// The outcome for each class of sources: a [`verdict`], possibly with [`verdict::MASQUERADE`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Column {
    /// For clients in other network namespaces than the host's.
    pub pod: u8,
    /// For clients in the host's network namespace.
    pub host: u8,
    /// For clients outside the node, which have no socket here.
    pub outside: u8,
    /// Always zero.
    pub zero: u8,
}

/// Numbers of a service port's backend sets in `members`: the port's index times four, plus one of these.
pub mod set {
    /// All backends that clients may be sent to.
    pub const CLUSTER: u32 = 0;
    /// The backends on this node.
    pub const LOCAL: u32 = 1;
    /// The backends that continue to serve flows they have (K2), on all nodes.
    pub const SERVING: u32 = 2;

    /// Combines a port's index and a set.
    #[must_use]
    #[inline(always)]
    pub const fn number(port: u32, kind: u32) -> u32 {
        port << 2 | kind
    }

    /// The index of the port that a set's number belongs to.
    #[must_use]
    #[inline(always)]
    pub const fn port(set: u32) -> u32 {
        set >> 2
    }
}

/// Outcomes of a new flow.
pub mod verdict {
    /// The socket is left untranslated, and nftables decides.
    pub const PASS: u8 = 0;
    /// The program refuses the call.
    pub const REFUSE: u8 = 1;
    /// nftables drops the packets: a program at a socket cannot.
    pub const DROP: u8 = 2;
    /// To a slot of the set [`super::set::CLUSTER`].
    pub const CLUSTER: u8 = 4;
    /// To a slot of the set [`super::set::LOCAL`].
    pub const LOCAL: u8 = 5;
    /// A bit beside the others, for packets: the source becomes an address of the node.
    pub const MASQUERADE: u8 = 8;

    /// The backend set of a verdict that has one.
    #[must_use]
    #[inline(always)]
    pub const fn set(verdict: u8) -> Option<u32> {
        match verdict & !MASQUERADE {
            CLUSTER => Some(super::set::CLUSTER),
            LOCAL => Some(super::set::LOCAL),
            _ => None,
        }
    }
}

/// Bits of [`super::FrontendValue::flags`] and [`Record::flags`].
pub mod flag {
    /// Of an address without port: a ClusterIP, whose other ports are refused (F4).
    pub const CLUSTER_IP: u32 = 1;
    /// Of an address without port: an address of this node that serves NodePorts.
    pub const NODE: u32 = 2;
    /// With [`NODE`]: for clients in the host's network namespace only, because every namespace has this address.
    pub const LOOPBACK: u32 = 4;
    /// Of a record: `members` has the backends, because unconnected sockets or sticky clients stay with them.
    pub const MEMBERS: u32 = 8;
}

const _: () = assert!(size_of::<Record>() == 48);
