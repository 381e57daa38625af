//! `seats`, `origins` and `made`: the Services that connected sockets asked for.
//!
//! In: translations of sockets. Out: the maps' values and sizes.

use super::address::{Address, Endpoint};

/// Value of `origins`, whose keys are sockets' cookies: a connected socket asked for `service` and was connected to
/// `backend`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Origin {
    /// A copy of the key, for the same reason as [`super::Affinity::key`].
    pub cookie: u64,
    /// When the Service was looked up, in nanoseconds of CLOCK_MONOTONIC.
    pub since: u64,
    /// The address and port that the process gave to `connect`.
    pub service: Endpoint,
    /// The address and port that the program put in their place.
    pub backend: Endpoint,
    /// The IP protocol number.
    pub protocol: u32,
    /// The group of processes that `accounts` charges for the entry.
    pub group: u32,
}

/// Entry of `seats`, an array indexed by socket cookie (a direct-mapped cache): the same as an [`Origin`]. If another
/// socket already occupies the entry, the new socket is stored in `origins`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seat {
    /// The socket; 0 after it was closed. Cookies are not reused.
    pub cookie: u64,
    /// Two counters. The lower half counts sockets that claim this entry, in units of [`Seat::CLAIM`]: the one that
    /// occupies it and, for an instant, others that are about to find it occupied. The upper half counts the sockets of
    /// this index that are in `origins`, in units of [`Seat::OTHER`].
    pub claims: u64,
    /// When the Service was looked up, in nanoseconds of CLOCK_MONOTONIC; 0 while a program writes the other fields.
    pub since: u64,
    /// The address of the Service.
    pub address: Address,
    /// The port of the Service, in the byte order of the wire.
    pub port: u16,
    /// The IP protocol number.
    pub protocol: u16,
    /// The address and port that the program put in the Service's place.
    pub backend: Endpoint,
}

impl Seat {
    /// One in the lower half of [`Seat::claims`].
    pub const CLAIM: i64 = 1;
    /// One in the upper half of [`Seat::claims`].
    pub const OTHER: i64 = 1 << 32;

    /// Whether a socket occupies the entry, or is about to.
    #[must_use]
    #[inline(always)]
    pub const fn is_taken(claims: u64) -> bool {
        claims as u32 != 0
    }

    /// The entry in the form of `origins`.
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

/// Entries of `seats`, a power of two. The kernel assigns cookies in sequence, so this many sockets in a row do not
/// collide. A larger array would not stay in the processor's caches.
pub const SEATS: u32 = 1 << 12;

/// Entries of `made`, a power of two.
pub const MADE: u32 = 1 << 14;

const _: () = {
    assert!(size_of::<Origin>() == 64);
    assert!(size_of::<Seat>() == 64);
    assert!(SEATS.is_power_of_two() && MADE.is_power_of_two());
};
