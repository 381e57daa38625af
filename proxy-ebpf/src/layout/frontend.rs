//! `frontends`: from an address, a port and a protocol to a service port.
//!
//! In: frontends of plans. Out: the map's keys and values.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::address::{Address, Endpoint, mix, wire};

/// Key of `frontends`: the destination that a client asks for.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FrontendKey {
    /// For a NodePort the unspecified address of its family.
    pub address: Address,
    /// In the byte order of the wire.
    pub port: u16,
    /// The IP protocol number.
    pub protocol: u8,
    /// A [`kind`]. It keeps a NodePort's key apart from every destination: a client that connects to the unspecified
    /// address means itself.
    pub kind: u8,
}

/// Values of [`FrontendKey::kind`].
pub mod kind {
    /// A port of one address.
    pub const FRONTEND: u8 = 0;
    /// A NodePort, on all addresses of the node that serve NodePorts.
    pub const NODE_PORT: u8 = 1;
    /// An address without port and protocol. Its entry decides about all ports that have no entry of their own.
    pub const ADDRESS: u8 = 2;
}

impl FrontendKey {
    /// The key of a port of one address; `protocol` is the IP protocol number.
    #[must_use]
    pub const fn new(address: IpAddr, port: u16, protocol: u8) -> Self {
        Self { address: wire(address), port: port.to_be(), protocol, kind: kind::FRONTEND }
    }

    /// The key of a NodePort of the family that `of` belongs to.
    #[must_use]
    pub const fn node_port(of: IpAddr, port: u16, protocol: u8) -> Self {
        let unspecified = match of {
            IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        };
        Self { kind: kind::NODE_PORT, ..Self::new(unspecified, port, protocol) }
    }

    /// The key for all ports of an address that have no entry of their own.
    #[must_use]
    pub const fn address(address: IpAddr) -> Self {
        Self { kind: kind::ADDRESS, ..Self::new(address, 0, 0) }
    }

    /// Drops protocol and kind.
    #[must_use]
    pub const fn endpoint(&self) -> Endpoint {
        Endpoint { address: self.address, port: self.port, zero: 0 }
    }

    /// A hash of the key, of which [`FrontendValue`] stores as many bits as it has room for.
    #[inline(always)]
    const fn check(&self) -> u64 {
        let rest = self.port as u64 | (self.protocol as u64) << 16 | (self.kind as u64) << 24;
        mix(&self.address, rest)
    }
}

/// Value of `frontends`: one word, so that a program reads it with one instruction.
///
/// The kernel reuses the entry of a removed or replaced frontend for the next one that is written (since Linux 6.1 at
/// once). A program that looked an entry up may therefore read another frontend's value there. So the value contains a
/// check of its key, and no pointer into this map leads to anything else.
///
/// ```text
/// bits   0 to 23: the index of the service port; for an address without port its flags
/// bits 24 and 25: the column of the service port's record
/// bit         26: sockets are left untranslated, and nftables decides
/// bits  28 to 63: a check of the key
/// ```
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FrontendValue(pub u64);

impl FrontendValue {
    /// How many service ports there can be: indices are below this.
    pub const PORTS: u32 = 1 << 24;
    const PACKETS: u64 = 1 << 26;
    const CHECK: u64 = u64::MAX << 28;

    /// The value of a frontend of a service port. `packets` leaves the frontend to nftables.
    #[must_use]
    pub const fn new(key: &FrontendKey, port: u32, column: u32, packets: bool) -> Self {
        let packets = if packets { Self::PACKETS } else { 0 };
        let port = port & (Self::PORTS - 1);
        Self(key.check() & Self::CHECK | packets | ((column as u64) & 3) << 24 | port as u64)
    }

    /// The value of an address without port.
    #[must_use]
    pub const fn address(key: &FrontendKey, flags: u32) -> Self {
        Self::new(key, flags, 0, false)
    }

    /// Whether this value belongs to the key, and not to a frontend that has the entry by now.
    #[must_use]
    #[inline(always)]
    pub const fn is_of(self, key: &FrontendKey) -> bool {
        (self.0 ^ key.check()) & Self::CHECK == 0
    }

    /// The service port's index in `ports` and `tallies`, and its number in keys of `affinities` and `members`.
    #[must_use]
    #[inline(always)]
    pub const fn port(self) -> u32 {
        self.0 as u32 & (Self::PORTS - 1)
    }

    /// The [`super::flag`]s of an address without port.
    #[must_use]
    #[inline(always)]
    pub const fn flags(self) -> u32 {
        self.port()
    }

    /// The index in [`super::Record::columns`].
    #[must_use]
    #[inline(always)]
    pub const fn column(self) -> u32 {
        (self.0 >> 24) as u32 & 3
    }

    /// Whether sockets are left to nftables, whatever the record says: because of source ranges, or because the host has
    /// the address itself.
    #[must_use]
    #[inline(always)]
    pub const fn is_for_packets(self) -> bool {
        self.0 & Self::PACKETS != 0
    }
}

const _: () = {
    assert!(size_of::<FrontendKey>() == 20);
    assert!(size_of::<FrontendValue>() == 8);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_contains_its_fields_and_a_check_of_its_key() {
        let key = FrontendKey::new("10.96.0.10".parse().unwrap(), 80, 6);
        let value = FrontendValue::new(&key, FrontendValue::PORTS - 1, 3, false);
        assert!(value.is_of(&key) && !value.is_for_packets());
        assert_eq!((value.port(), value.column()), (FrontendValue::PORTS - 1, 3));
        let value = FrontendValue::new(&key, 0, 1, true);
        assert!(value.is_of(&key) && value.is_for_packets());
        assert_eq!((value.port(), value.column()), (0, 1));
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
}
