//! `flows` and `crowds`: the Services that unconnected sockets send to.
//!
//! In: translations of datagrams. Out: the maps' values and sizes.

use super::address::Address;

/// How many Service addresses `flows` has room for; a socket that sends to more needs a [`Crowd`].
pub const FEW: usize = 4;

/// How many more a [`Crowd`] has room for, a power of two.
pub const MANY: usize = 64;

/// A Service that an unconnected socket sent to. It consists of words and half words, so that [`Flows`] has 184 bytes:
/// with the kernel's own fields these are 256, a size that the kernel allocates.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flow {
    /// When the socket last sent there, in nanoseconds of CLOCK_MONOTONIC, the low half first; 0 if the entry is free. The
    /// lowest bit is set after the socket has sent to the backend's own address.
    pub since: [u32; 2],
    /// The address that the process gave.
    pub service: Address,
    /// The address that the program put in its place.
    pub backend: Address,
    /// The port that the process gave, in the byte order of the wire.
    pub service_port: u16,
    /// The port that the program put in its place, in the byte order of the wire.
    pub backend_port: u16,
}

/// Value of `flows`, in an unconnected socket's storage.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flows {
    /// One entry for each Service address; those in use come first.
    pub flows: [Flow; FEW],
    /// The group of processes that `accounts` charges for this value and for the [`Crowd`].
    pub group: u32,
    /// Not 0 if the socket has a [`Crowd`] too.
    pub crowded: u32,
}

/// Value of `crowds`, in the storage of an unconnected socket that sends to more Services than `flows` has room for.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Crowd {
    /// State of a search in progress: the `since` of the best entry so far.
    pub since: u64,
    /// State of a search in progress: the index of the best entry so far.
    pub place: u32,
    /// Always zero.
    pub zero: u32,
    /// As in [`Flows`].
    pub flows: [Flow; MANY],
}

const _: () = {
    assert!(size_of::<Flow>() == 44);
    assert!(size_of::<Flows>() == 184);
    assert!(size_of::<Crowd>() == 16 + 44 * MANY);
    assert!(MANY.is_power_of_two());
};
