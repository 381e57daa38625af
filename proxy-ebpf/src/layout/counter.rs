//! `tallies` and `troubles`: counters of the programs.
//!
//! In: nothing. Out: the maps' values and indices.

/// Value of `tallies`: new flows of a service port.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Flows that a program translated to a backend.
    pub served: u64,
    /// Flows that a program refused because there are no endpoints.
    pub refused: u64,
}

/// Indices of `troubles`, which counts failures inside the programs.
pub mod trouble {
    /// A new client of a Service with session affinity was not stored, because the map is full or the client's group of
    /// processes has used up its share.
    pub const AFFINITY_FULL: u32 = 0;
    /// An unconnected socket was left to nftables, because the kernel has no memory for its entry or the socket's group of
    /// processes has used up its share.
    pub const STORAGE: u32 = 1;
    /// An unconnected socket sent to more Service addresses at a time than there is room for, and the entry that was idle
    /// longest was replaced.
    pub const FLOWS: u32 = 2;
    /// A slot was out of range or empty: another program changed a map.
    pub const SLOT: u32 = 3;
    /// A pod's socket that is bound to a Service's address was not counted, so the pod's clients are translated to the
    /// Service.
    pub const HOMES: u32 = 4;
    /// A connected socket was left to nftables, because the map is full or the socket's group of processes has used up its
    /// share.
    pub const ORIGINS: u32 = 5;
    /// The number of indices.
    pub const COUNT: u32 = 6;
}

const _: () = assert!(size_of::<Tally>() == 16);
