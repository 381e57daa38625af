//! Keys and values of the maps.
//!
//! In: nothing. Out: types without padding the compiler could leave unset, because the kernel compares keys by their
//! bytes.

use core::{
    mem::size_of,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
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
    /// What clients reach at an address of its own: an address, a port and the IP protocol number.
    #[must_use]
    pub const fn new(address: IpAddr, port: u16, protocol: u8) -> Self {
        Self { address: wire(address), port: port.to_be(), protocol, kind: kind::FRONTEND }
    }

    /// A NodePort of the family that an address is of.
    #[must_use]
    pub const fn node_port(of: IpAddr, port: u16, protocol: u8) -> Self {
        let unspecified = match of {
            IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        };
        Self { kind: kind::NODE_PORT, ..Self::new(unspecified, port, protocol) }
    }

    /// What holds for all ports of an address that no other entry names.
    #[must_use]
    pub const fn whole(address: IpAddr) -> Self {
        Self { kind: kind::ADDRESS, ..Self::new(address, 0, 0) }
    }

    /// The address and the port.
    #[must_use]
    pub const fn endpoint(&self) -> Endpoint {
        Endpoint { address: self.address, port: self.port, zero: 0 }
    }

    /// What tells this key from others, in as many bits as [`FrontendValue`] has room for.
    #[inline(always)]
    const fn check(&self) -> u64 {
        let rest = self.port as u64 | (self.protocol as u64) << 16 | (self.kind as u64) << 24;
        mix(&self.address, rest)
    }
}

/// A number that each bit of an address and of what goes with it changes. A program can afford it: three multiplications.
#[inline(always)]
const fn mix(address: &Address, rest: u64) -> u64 {
    let first = address[0] as u64 | (address[1] as u64) << 32;
    let last = address[2] as u64 | (address[3] as u64) << 32;
    let mut mixed = first.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed ^= mixed >> 32;
    mixed = (mixed ^ last).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed ^= mixed >> 29;
    mixed = (mixed ^ rest).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 32
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
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FrontendKey {
    /// The address; of a NodePort the unspecified one of its family.
    pub address: Address,
    /// The port, its bytes in the order of the wire.
    pub port: u16,
    /// The IP protocol number.
    pub protocol: u8,
    /// A [`kind`], because no destination is a NodePort's key: a client that connects to the unspecified address means
    /// itself.
    pub kind: u8,
}

/// [`FrontendKey::kind`].
pub mod kind {
    /// A port at an address.
    pub const FRONTEND: u8 = 0;
    /// A NodePort, at all addresses of the node that serve those.
    pub const NODE_PORT: u8 = 1;
    /// An address by itself, without port and protocol: what holds for its other ports.
    pub const ADDRESS: u8 = 2;
}

/// Value of `frontends`: one word, which a program reads at once.
///
/// The kernel hands the element of a frontend that is removed or replaced to the next one that is written (since
/// Linux 6.1 at once), so a program that has found an element may read another frontend's value there. Therefore the value
/// says which key it belongs to, and nothing else is behind a pointer into this map.
///
/// ```text
/// bits   0 to 23: the number of the service port; of an address by itself its flags
/// bits 24 and 25: the column of the record that the port leads to
/// bit         26: sockets leave the frontend to the packets
/// bits  28 to 63: a check of the key
/// ```
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FrontendValue(pub u64);

impl FrontendValue {
    /// One more than the largest number of a service port.
    pub const NUMBERS: u32 = 1 << 24;
    const PACKETS: u64 = 1 << 26;
    const CHECK: u64 = u64::MAX << 28;

    /// The value of a frontend of a service port.
    #[must_use]
    pub const fn new(key: &FrontendKey, number: u32, column: u32, packets: bool) -> Self {
        let packets = if packets { Self::PACKETS } else { 0 };
        let number = number & (Self::NUMBERS - 1);
        Self(key.check() & Self::CHECK | packets | ((column as u64) & 3) << 24 | number as u64)
    }

    /// The value of an address by itself.
    #[must_use]
    pub const fn whole(key: &FrontendKey, flags: u32) -> Self {
        Self::new(key, flags, 0, false)
    }

    /// Whether this is the value of a frontend, and not of one that has its element now.
    #[must_use]
    #[inline(always)]
    pub const fn is_of(self, key: &FrontendKey) -> bool {
        (self.0 ^ key.check()) & Self::CHECK == 0
    }

    /// The service port's number in `ports`, `affinities` and `tallies`.
    #[must_use]
    #[inline(always)]
    pub const fn number(self) -> u32 {
        self.0 as u32 & (Self::NUMBERS - 1)
    }

    /// [`flag`]s of an address by itself.
    #[must_use]
    #[inline(always)]
    pub const fn flags(self) -> u32 {
        self.number()
    }

    /// Which of [`Record::columns`] holds.
    #[must_use]
    #[inline(always)]
    pub const fn column(self) -> u32 {
        (self.0 >> 24) as u32 & 3
    }

    /// Whether sockets leave this to the packets, whatever the record says: because of the sources that are let in, or
    /// because of the address.
    #[must_use]
    #[inline(always)]
    pub const fn is_for_packets(self) -> bool {
        self.0 & Self::PACKETS != 0
    }
}

/// Element of `records`: what a service port does. It is not changed while `ports` leads to it; a change of the port is
/// another record, and one store into `ports`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// [`flag`]s.
    pub flags: u32,
    /// How long a client stays with its backend, in seconds; 0 without session affinity.
    pub affinity: u32,
    /// The list of the sources that are let in, for packets; always zero, which is none.
    pub sources: u32,
    /// Always zero.
    pub zero: u32,
    /// The slots of the sets [`set::CLUSTER`] and [`set::LOCAL`].
    pub sets: [Slots; 2],
    /// Where flows go: frontends that are treated alike have a column in common.
    pub columns: [Column; Record::COLUMNS],
}

impl Record {
    /// How many columns there are: a Service has one for its ClusterIP and one for what is reached from outside.
    pub const COLUMNS: usize = 4;
    /// The record that leaves everything to the packets.
    pub const NOTHING: u32 = 0;
}

/// Some slots in a row.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slots {
    /// The first of them; 0 where there are none.
    pub first: u32,
    /// How many.
    pub count: u32,
}

/// Where flows of each source class go: a [`verdict`] each, and [`verdict::MASQUERADE`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Column {
    /// From other network namespaces than the host's.
    pub pod: u8,
    /// From the host's network namespace.
    pub host: u8,
    /// From outside; no socket.
    pub outside: u8,
    /// Always zero.
    pub zero: u8,
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

/// What happens to a new flow.
pub mod verdict {
    /// Not for sockets: the packets decide.
    pub const PASS: u8 = 0;
    /// Refused.
    pub const REFUSE: u8 = 1;
    /// Dropped, which only packets can be.
    pub const DROP: u8 = 2;
    /// To a slot of the set [`super::set::CLUSTER`].
    pub const CLUSTER: u8 = 4;
    /// To a slot of the set [`super::set::LOCAL`].
    pub const LOCAL: u8 = 5;
    /// Added to the others: packets get the node's address for their source.
    pub const MASQUERADE: u8 = 8;

    /// The set that a flow goes to; nothing where it goes to none.
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

/// [`FrontendValue::flags`] and [`Record::flags`].
pub mod flag {
    /// An address by itself: a ClusterIP, whose other ports are refused (F4).
    pub const CLUSTER_IP: u32 = 1;
    /// An address by itself: one of this node's, which serves NodePorts.
    pub const NODE: u32 = 2;
    /// With [`NODE`]: only for sockets in the host's network namespace, because everybody has this address.
    pub const LOOPBACK: u32 = 4;
    /// A record: the backends are in `members`, because unconnected sockets or sticky clients have to remember them.
    pub const MEMBERS: u32 = 8;
}

/// Key of `members`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MemberKey {
    /// A [`set::number`].
    pub set: u32,
    /// The backend.
    pub backend: Endpoint,
}

/// Value of `members`: since when a backend is in a set, and, as in [`FrontendValue`], whose value this is.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Member(pub u64);

impl Member {
    /// The time is in units of so many bits of a nanosecond: 65 µs. It lasts for nine years of a machine that runs.
    const UNIT: u32 = 16;
    const CHECK: u64 = (1 << 22) - 1;

    /// The value of a member that joined at this time, in nanoseconds of CLOCK_MONOTONIC.
    #[must_use]
    pub const fn new(key: &MemberKey, joined: u64) -> Self {
        Self((joined >> Self::UNIT) << 22 | key.check() & Self::CHECK)
    }

    /// Whether this is the value of a member, and not of one that has its element now.
    #[must_use]
    #[inline(always)]
    pub const fn is_of(self, key: &MemberKey) -> bool {
        (self.0 ^ key.check()) & Self::CHECK == 0
    }

    /// Whether it joined before a time, or at about that.
    #[must_use]
    #[inline(always)]
    pub const fn joined_before(self, time: u64) -> bool {
        self.0 >> 22 <= time >> Self::UNIT
    }
}

impl MemberKey {
    #[inline(always)]
    const fn check(&self) -> u64 {
        mix(&self.backend.address, self.set as u64 | (self.backend.port as u64) << 32) >> 42
    }
}

/// Key of `affinities`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AffinityKey {
    /// The client: an address, or a network namespace as [`namespace`] has it.
    pub client: Address,
    /// [`FrontendValue::number`].
    pub port: u32,
}

/// What a network namespace is where a client is expected: its cookie behind ff00::, which is multicast and so no client's
/// address. A pod has a namespace of its own, and the host's processes share one.
#[must_use]
#[inline(always)]
pub const fn namespace(cookie: u64) -> Address {
    [0xff00_0000_u32.to_be(), 0, (cookie >> 32) as u32, cookie as u32]
}

/// Value of `affinities`. It never changes: a client that is remembered anew has another.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Affinity {
    /// Its key once more. The kernel hands a removed element to the next client at once, so a program that read one looks
    /// here last, whether it was still its own.
    pub key: AffinityKey,
    /// The backend.
    pub backend: Endpoint,
    /// When the backend was last chosen, in nanoseconds of CLOCK_MONOTONIC.
    pub chosen: u64,
    /// When the client is forgotten, by the timeout that held then (A5).
    pub until: u64,
    /// The group of processes that it counts for, in `accounts`.
    pub group: u32,
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

/// Value of `origins`, whose keys are sockets' cookies. What a connected socket was told: it asked for `service` and got
/// `backend`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Origin {
    /// The socket, as in [`Affinity::key`].
    pub cookie: u64,
    /// When, in nanoseconds of CLOCK_MONOTONIC.
    pub since: u64,
    /// What it asked for.
    pub service: Endpoint,
    /// What it got.
    pub backend: Endpoint,
    /// The IP protocol number.
    pub protocol: u32,
    /// The group of processes that it counts for, in `accounts`.
    pub group: u32,
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
            cookie: self.cookie,
            since: self.since,
            service: Endpoint { address: self.address, port: self.port, zero: 0 },
            backend: self.backend,
            protocol: self.protocol as u32,
            group: 0,
        }
    }
}

/// How many seats there are: a power of two. Cookies are dealt out in sequence, so as many sockets can be seated. A larger
/// table would be out of the processor's caches.
pub const SEATS: u32 = 1 << 12;

/// How many sockets `made` knows: a power of two.
pub const MADE: u32 = 1 << 14;

/// How many elements `homes` has: a power of two. Cookies of network namespaces are dealt out in sequence.
pub const HOMES: u32 = 1 << 12;

/// The place in `homes` and `early_homes` that the cookie of a network namespace leads to.
#[must_use]
#[inline(always)]
pub const fn place_of_home(namespace: u64) -> u32 {
    namespace as u32 & (HOMES - 1)
}

/// How many Service addresses an unconnected socket remembers before it needs a [`Crowd`].
pub const FEW: usize = 4;

/// How many more it remembers then: a power of two.
pub const MANY: usize = 64;

/// A Service that an unconnected socket sent to. Of words and half words, so that four with what belongs to them are 184
/// bytes: with what the kernel adds that is 256, the size it allocates.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flow {
    /// When the socket last sent there, in nanoseconds of CLOCK_MONOTONIC, the low half first; 0 in a free place. The lowest bit
    /// says that it has asked the backend itself since.
    pub since: [u32; 2],
    /// The address it asked for.
    pub service: Address,
    /// The address it got.
    pub backend: Address,
    /// The port it asked for, its bytes in the order of the wire.
    pub service_port: u16,
    /// The port it got, its bytes in the order of the wire.
    pub backend_port: u16,
}

/// Value of `flows`: what an unconnected socket was told.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flows {
    /// Those in use come first. One for each Service address.
    pub flows: [Flow; FEW],
    /// The group of processes that it counts for, in `accounts`.
    pub group: u32,
    /// Whether the socket has a [`Crowd`] too.
    pub crowded: u32,
}

/// Value of `crowds`: what an unconnected socket was told that speaks to more Services at a time than `flows` holds.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Crowd {
    /// What a search remembers while it is under way.
    pub since: u64,
    /// Which of `flows` was found last.
    pub place: u32,
    /// Always zero.
    pub zero: u32,
    /// As in [`Flows`].
    pub flows: [Flow; MANY],
}

/// Value of `settings`, which has an element for each of its two writers: [`Settings::PLANE`] and [`Settings::PODS`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// The cookie of the host's network namespace; 0 for the initial one.
    pub host: u64,
    /// [`super::SERVICES_VERSION`].
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
    /// A new client of a Service with session affinity could not be remembered, because there is no room or its group of
    /// processes has its share.
    pub const AFFINITY_FULL: u32 = 0;
    /// An unconnected socket could not be remembered, because there is no memory or its group of processes has its share,
    /// so it was not led to a backend; its packets are.
    pub const STORAGE: u32 = 1;
    /// An unconnected socket spoke to more Service addresses at a time than it may remember; the one it had not sent to for
    /// longest was forgotten.
    pub const FLOWS: u32 = 2;
    /// A slot was out of range or empty: a map was changed by others.
    pub const SLOT: u32 = 3;
    /// A pod that listens on a Service's address itself could not be remembered; it is led to the Service.
    pub const HOMES: u32 = 4;
    /// A connected socket could not be remembered, because there is no room or its group of processes has its share, so it
    /// was not led to a backend; its packets are.
    pub const ORIGINS: u32 = 5;
    /// How many there are.
    pub const COUNT: u32 = 6;
}

const _: () = {
    assert!(size_of::<Endpoint>() == 20);
    assert!(size_of::<FrontendKey>() == 20);
    assert!(size_of::<FrontendValue>() == 8);
    assert!(size_of::<Record>() == 48);
    assert!(size_of::<MemberKey>() == 24);
    assert!(size_of::<Member>() == 8);
    assert!(size_of::<AffinityKey>() == 20);
    assert!(size_of::<Affinity>() == 64);
    assert!(size_of::<Tally>() == 16);
    assert!(size_of::<Origin>() == 64);
    assert!(size_of::<Seat>() == 64);
    assert!(SEATS.is_power_of_two());
    assert!(MADE.is_power_of_two() && HOMES.is_power_of_two());
    assert!(size_of::<Flow>() == 44);
    assert!(size_of::<Flows>() == 184);
    assert!(size_of::<Crowd>() == 16 + 44 * MANY);
    assert!(size_of::<Settings>() == 24);
    assert!(MANY.is_power_of_two());
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
    fn a_namespace_is_no_address_that_a_client_has() {
        for cookie in [0, 1, u64::from(u32::MAX) + 1, u64::MAX] {
            let client = Endpoint { address: namespace(cookie), ..Endpoint::default() };
            assert!(client.ip().is_multicast(), "{}", client.ip());
        }
        assert_ne!(namespace(1), namespace(1 << 32));
    }

    #[test]
    fn the_unspecified_addresses_of_the_families_differ() {
        assert_ne!(wire("0.0.0.0".parse().unwrap()), wire("::".parse().unwrap()));
    }

    #[test]
    fn a_value_says_what_it_was_given_and_of_which_frontend_it_is() {
        let key = FrontendKey::new("10.96.0.10".parse().unwrap(), 80, 6);
        let value = FrontendValue::new(&key, FrontendValue::NUMBERS - 1, 3, false);
        assert!(value.is_of(&key) && !value.is_for_packets());
        assert_eq!((value.number(), value.column()), (FrontendValue::NUMBERS - 1, 3));
        let value = FrontendValue::new(&key, 0, 1, true);
        assert!(value.is_of(&key) && value.is_for_packets());
        assert_eq!((value.number(), value.column()), (0, 1));
    }

    #[test]
    fn no_two_frontends_nearby_have_one_check() {
        let mut seen = std::collections::HashSet::new();
        let addresses = ["10.96.0.0", "fd00:10:96::", "::", "0.0.0.0"];
        for (address, last) in
            addresses.into_iter().flat_map(|address| (0..64).map(move |last| (address, last)))
        {
            let mut key = FrontendKey::new(address.parse().unwrap(), 0, 0);
            key.address[3] = (u32::from_be(key.address[3]) + last).to_be();
            for port in 1..64_u16 {
                for (protocol, kind) in [(6, 0), (17, 0), (6, 1), (17, 1)] {
                    let key = FrontendKey { port: port.to_be(), protocol, kind, ..key };
                    assert!(seen.insert(FrontendValue::new(&key, 0, 0, false).0), "{key:?}");
                }
            }
        }
    }

    #[test]
    fn a_member_knows_its_key_and_since_when_it_is_there() {
        let backend = Endpoint::new("10.244.0.2".parse().unwrap(), 8080);
        let (key, other) = (MemberKey { set: 4, backend }, MemberKey { set: 5, backend });
        let member = Member::new(&key, 1_000_000_000);
        assert!(member.is_of(&key) && !member.is_of(&other));
        assert!(member.joined_before(1_000_000_000) && !member.joined_before(999_900_000));
    }
}
