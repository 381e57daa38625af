//! Keys and values of the maps.
//!
//! In: nothing. Out: types without padding the compiler could leave unset, because the kernel compares keys by their
//! bytes.

use core::{
    mem::size_of,
    net::{IpAddr, Ipv6Addr},
};

/// An IPv6 address, or an IPv4 one in its IPv4-mapped form (RFC 4291, 2.5.5.2): the bytes of the wire, in words because
/// the programs compare words.
pub type Address = [u32; 4];

/// An address and a port as on the wire.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Endpoint {
    /// The address.
    pub address: Address,
    /// The port, its bytes in the order of the wire; [`Endpoint::port`] has the number.
    pub port: u16,
    /// Always zero.
    pub zero: u16,
}

impl FrontendKey {
    /// A frontend: an address, a port and the IP protocol number.
    #[must_use]
    pub const fn new(address: IpAddr, port: u16, protocol: u8) -> Self {
        Self { address: wire(address), port: port.to_be(), protocol, zero: 0 }
    }

    /// What holds for all ports of an address that no other entry names.
    #[must_use]
    pub const fn whole(address: IpAddr) -> Self {
        Self::new(address, 0, 0)
    }
}

impl Endpoint {
    /// The endpoint at an address and port.
    #[must_use]
    pub const fn new(address: IpAddr, port: u16) -> Self {
        Self { address: wire(address), port: port.to_be(), zero: 0 }
    }

    /// The address; IPv4 where it is IPv4-mapped.
    #[must_use]
    pub const fn ip(&self) -> IpAddr {
        let [a, b, c, d] = self.address;
        let bits = (u32::from_be(a) as u128) << 96
            | (u32::from_be(b) as u128) << 64
            | (u32::from_be(c) as u128) << 32
            | u32::from_be(d) as u128;
        Ipv6Addr::from_bits(bits).to_canonical()
    }

    /// The port.
    #[must_use]
    pub const fn port(&self) -> u16 {
        u16::from_be(self.port)
    }
}

/// What an address is in every map.
#[must_use]
pub const fn wire(address: IpAddr) -> Address {
    let bits = match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().to_bits(),
        IpAddr::V6(address) => address.to_bits(),
    };
    [
        ((bits >> 96) as u32).to_be(),
        ((bits >> 64) as u32).to_be(),
        ((bits >> 32) as u32).to_be(),
        (bits as u32).to_be(),
    ]
}

/// Key of `frontends`: what a client asks for.
///
/// A NodePort has the unspecified address of its family. An address by itself, with port and protocol zero, says what
/// holds for its other ports.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FrontendKey {
    /// The address.
    pub address: Address,
    /// The port, its bytes in the order of the wire.
    pub port: u16,
    /// The IP protocol number.
    pub protocol: u8,
    /// Always zero.
    pub zero: u8,
}

/// Where one class of clients goes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Choice {
    /// The first slot of the backend set.
    pub first: u32,
    /// How many slots the set has.
    pub count: u32,
    /// The set's number in `members`.
    pub set: u32,
    /// A `Verdict`.
    pub verdict: u32,
}

/// Numbers of a service port's sets in `members`: the port's number times four, and one of these.
pub mod set {
    /// Those a client of any address may be sent to.
    pub const CLUSTER: u32 = 0;
    /// Those on this node.
    pub const LOCAL: u32 = 1;
    /// Those that serve what they have begun, wherever they are (K2).
    pub const SERVING: u32 = 2;

    /// The number of a set of a port.
    #[must_use]
    #[inline(always)]
    pub const fn number(port: u32, kind: u32) -> u32 {
        port << 2 | kind
    }

    /// The port of a set's number.
    #[must_use]
    #[inline(always)]
    pub const fn port(set: u32) -> u32 {
        set >> 2
    }
}

/// [`Choice::verdict`]: what happens to a new flow.
pub mod verdict {
    /// Not for sockets: the packets decide.
    pub const PASS: u32 = 0;
    /// To one of the slots.
    pub const SERVE: u32 = 1;
    /// Refused.
    pub const REFUSE: u32 = 2;
}

/// Value of `frontends`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FrontendValue {
    /// The service port's number in `affinities` and `tallies`.
    pub port: u32,
    /// [`flag`]s.
    pub flags: u32,
    /// How long a client stays with its backend, in seconds; 0 without session affinity.
    pub affinity: u32,
    /// Always zero.
    pub zero: u32,
    /// For sockets in other network namespaces than the host's.
    pub pod: Choice,
    /// For sockets in the host's network namespace.
    pub host: Choice,
}

/// [`FrontendValue::flags`].
pub mod flag {
    /// An address by itself: a ClusterIP, whose other ports are refused (F4).
    pub const CLUSTER_IP: u32 = 1;
    /// An address by itself: one of this node's, which serves NodePorts.
    pub const NODE: u32 = 2;
    /// With [`NODE`]: only for sockets in the host's network namespace, because everybody has this address.
    pub const LOOPBACK: u32 = 4;
    /// The backends are in `members`, because somebody has to remember them.
    pub const MEMBERS: u32 = 8;
}

/// Key of `members`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MemberKey {
    /// [`Choice::set`].
    pub set: u32,
    /// The backend.
    pub backend: Endpoint,
}

/// Key of `affinities`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AffinityKey {
    /// The cookie of the client's network namespace: a pod has one of its own, and the host's processes share one.
    pub client: u64,
    /// [`FrontendValue::port`].
    pub port: u32,
    /// Always zero.
    pub zero: u32,
}

/// Value of `affinities`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Affinity {
    /// When the backend was last chosen, in nanoseconds of CLOCK_MONOTONIC.
    pub chosen: u64,
    /// When the client is forgotten, by the timeout that held then (A5).
    pub until: u64,
    /// The backend.
    pub backend: Endpoint,
    /// Always zero.
    pub zero: u32,
}

/// Value of `tallies`: what was done for a service port, counted in new flows.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Led to a backend.
    pub served: u64,
    /// Refused for want of endpoints.
    pub refused: u64,
}

/// Value of `origins`, whose keys are sockets' cookies, and part of [`Flows`]. What a socket was told: it asked for
/// `service` and got `backend`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Origin {
    /// When, in nanoseconds of CLOCK_MONOTONIC; 0 where nothing was told.
    pub since: u64,
    /// What it asked for.
    pub service: Endpoint,
    /// What it got.
    pub backend: Endpoint,
    /// The IP protocol number.
    pub protocol: u32,
    /// Always zero.
    pub zero: u32,
}

/// Element of `seats`: what a connected socket was told, at the place its cookie leads to. Whoever finds that taken is in
/// `origins` instead.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seat {
    /// The socket. Stays when it leaves: no other will ever have this cookie.
    pub cookie: u64,
    /// How many sockets want to sit here, in units of [`Seat::CLAIM`]: one that sits, and for an instant those that find it
    /// does. And how many of this place are in `origins`, in units of [`Seat::OTHER`].
    pub claims: u64,
    /// When, in nanoseconds of CLOCK_MONOTONIC; 0 while the rest is being written.
    pub since: u64,
    /// The address it asked for.
    pub address: Address,
    /// The port it asked for, its bytes in the order of the wire.
    pub port: u16,
    /// The IP protocol number.
    pub protocol: u16,
    /// What it got.
    pub backend: Endpoint,
}

impl Seat {
    /// One in the lower half of [`Seat::claims`].
    pub const CLAIM: i64 = 1;
    /// One in the upper half of [`Seat::claims`].
    pub const OTHER: i64 = 1 << 32;

    /// Whether a socket sits here, or is about to.
    #[must_use]
    #[inline(always)]
    pub const fn is_taken(claims: u64) -> bool {
        claims as u32 != 0
    }

    /// What the socket was told.
    #[must_use]
    #[inline(always)]
    pub const fn origin(&self) -> Origin {
        Origin {
            since: self.since,
            service: Endpoint { address: self.address, port: self.port, zero: 0 },
            backend: self.backend,
            protocol: self.protocol as u32,
            zero: 0,
        }
    }
}

/// How many seats there are: a power of two. Cookies are dealt out in sequence, so as many sockets can be seated. A larger
/// table would be out of the processor's caches.
pub const SEATS: u32 = 1 << 12;

/// How many Service addresses an unconnected socket can be in conversation with at a time: a power of two.
pub const FLOWS: usize = 64;

/// Value of `flows`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flows {
    /// What a search remembers while it is under way.
    pub since: u64,
    /// Which of `origins` was found last.
    pub place: u32,
    /// Always zero.
    pub zero: u32,
    /// Those in use come first. One for each Service address, and [`Origin::since`] is when the socket last sent there.
    pub origins: [Origin; FLOWS],
}

/// Value of `settings`, which has an element for each of its two writers: [`Settings::PLANE`] and [`Settings::PODS`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// The cookie of the host's network namespace; 0 for the initial one.
    pub host: u64,
    /// [`super::LAYOUT_VERSION`].
    pub layout: u32,
    /// How many cgroups are bypassed; their map is not looked into while this is 0.
    pub bypassed: u32,
    /// The number of the cgroup the programs are attached to.
    pub cgroup: u64,
}

impl Settings {
    /// The element of whoever programs Services: everything but `bypassed`.
    pub const PLANE: u32 = 0;
    /// The element of whoever follows the pods: `bypassed`.
    pub const PODS: u32 = 1;
}

/// Elements of `troubles`: what went wrong inside the programs, counted.
pub mod trouble {
    /// A new client of a Service with session affinity could not be remembered.
    pub const AFFINITY_FULL: u32 = 0;
    /// An unconnected socket could not be remembered, so it was not led to a backend; its packets are.
    pub const STORAGE: u32 = 1;
    /// An unconnected socket spoke to more than [`super::FLOWS`] Service addresses at a time; the one it had not sent
    /// to for longest was forgotten.
    pub const FLOWS: u32 = 2;
    /// A slot was out of range or empty: a map was changed by others.
    pub const SLOT: u32 = 3;
    /// A pod that listens on a Service's address itself could not be remembered; it is led to the Service.
    pub const HOMES: u32 = 4;
    /// A connected socket could not be remembered, so it was not led to a backend; its packets are.
    pub const ORIGINS: u32 = 5;
    /// How many there are.
    pub const COUNT: u32 = 6;
}

const _: () = {
    assert!(size_of::<Endpoint>() == 20);
    assert!(size_of::<FrontendKey>() == 20);
    assert!(size_of::<Choice>() == 16);
    assert!(size_of::<FrontendValue>() == 48);
    assert!(size_of::<MemberKey>() == 24);
    assert!(size_of::<AffinityKey>() == 16);
    assert!(size_of::<Affinity>() == 40);
    assert!(size_of::<Tally>() == 16);
    assert!(size_of::<Origin>() == 56);
    assert!(size_of::<Seat>() == 64);
    assert!(SEATS.is_power_of_two());
    assert!(size_of::<Flows>() == 16 + 56 * FLOWS);
    assert!(size_of::<Settings>() == 24);
    assert!(FLOWS.is_power_of_two());
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_both_families_come_back_as_they_went_in() {
        for text in ["10.96.0.1", "fd00:10:96::1", "0.0.0.0", "::", "::1", "127.0.0.1"] {
            let address: IpAddr = text.parse().unwrap();
            let endpoint = Endpoint::new(address, 0x1234);
            assert_eq!((endpoint.ip(), endpoint.port()), (address, 0x1234));
            assert_eq!(endpoint.port.to_ne_bytes(), [0x12, 0x34]);
        }
    }

    #[test]
    fn the_unspecified_addresses_of_the_families_differ() {
        assert_ne!(wire("0.0.0.0".parse().unwrap()), wire("::".parse().unwrap()));
    }
}
