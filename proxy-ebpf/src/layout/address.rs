//! IP addresses and endpoints in the form that all maps and programs use.
//!
//! In: addresses. Out: words, in the byte order of the wire.

use core::net::{IpAddr, Ipv6Addr};

/// An IPv6 address, or an IPv4 address in its IPv4-mapped form (RFC 4291, 2.5.5.2): the bytes of the wire, as words because
/// the programs compare words.
pub type Address = [u32; 4];

/// An address and a port as on the wire.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Endpoint {
    /// In IPv4-mapped form if it is IPv4.
    pub address: Address,
    /// In the byte order of the wire; [`Endpoint::port`] returns the number.
    pub port: u16,
    /// Always zero.
    pub zero: u16,
}

impl Endpoint {
    /// Converts to the byte order of the wire.
    #[must_use]
    pub const fn new(address: IpAddr, port: u16) -> Self {
        Self { address: wire(address), port: port.to_be(), zero: 0 }
    }

    /// Returns an IPv4 address for an IPv4-mapped one.
    #[must_use]
    pub const fn ip(&self) -> IpAddr {
        let [a, b, c, d] = self.address;
        let bits = (u32::from_be(a) as u128) << 96
            | (u32::from_be(b) as u128) << 64
            | (u32::from_be(c) as u128) << 32
            | u32::from_be(d) as u128;
        Ipv6Addr::from_bits(bits).to_canonical()
    }

    /// Returns the port in the byte order of this machine.
    #[must_use]
    pub const fn port(&self) -> u16 {
        u16::from_be(self.port)
    }
}

/// Converts an address to the form that every map has.
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

/// A hash that every bit of the address and of `rest` changes. It costs three multiplications, which a program can afford.
#[inline(always)]
pub(super) const fn mix(address: &Address, rest: u64) -> u64 {
    let first = address[0] as u64 | (address[1] as u64) << 32;
    let last = address[2] as u64 | (address[3] as u64) << 32;
    let mut mixed = first.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed ^= mixed >> 32;
    mixed = (mixed ^ last).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed ^= mixed >> 29;
    mixed = (mixed ^ rest).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 32
}

const _: () = assert!(size_of::<Endpoint>() == 20);

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
