//! `affinities`: which backend a client of a Service with session affinity has.
//!
//! In: clients. Out: the map's keys and values.

use super::address::{Address, Endpoint};

/// Key of `affinities`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AffinityKey {
    /// An address, or a network namespace in the form of [`namespace`].
    pub client: Address,
    /// [`super::FrontendValue::port`].
    pub port: u32,
}

/// A network namespace in the place of a client's address: its cookie after the prefix ff00::, which is multicast and
/// therefore no client's address. A pod has a namespace of its own, and all processes of the host share one.
#[must_use]
#[inline(always)]
pub const fn namespace(cookie: u64) -> Address {
    [0xff00_0000_u32.to_be(), 0, (cookie >> 32) as u32, cookie as u32]
}

/// Value of `affinities`. A value never changes: a program that updates a client inserts another one.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Affinity {
    /// A copy of the key. The kernel reuses a removed entry for the next client at once, so a program that read a value
    /// reads this last, to see whether the value was still its client's.
    pub key: AffinityKey,
    /// The client's backend.
    pub backend: Endpoint,
    /// When the backend was last chosen, in nanoseconds of CLOCK_MONOTONIC.
    pub chosen: u64,
    /// When the entry expires, by the timeout that was in force at `chosen` (A5).
    pub until: u64,
    /// The group of processes that `accounts` charges for the entry.
    pub group: u32,
    /// Always zero.
    pub zero: u32,
}

const _: () = {
    assert!(size_of::<AffinityKey>() == 20);
    assert!(size_of::<Affinity>() == 64);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_is_no_address_that_a_client_has() {
        for cookie in [0, 1, u64::from(u32::MAX) + 1, u64::MAX] {
            let client = Endpoint { address: namespace(cookie), ..Endpoint::default() };
            assert!(client.ip().is_multicast(), "{}", client.ip());
        }
        assert_ne!(namespace(1), namespace(1 << 32));
    }
}
