//! `homes` and `early_homes`: network namespaces with sockets that are bound to a Service's address.
//!
//! In: cookies of network namespaces. Out: the maps' indices and size.

/// Entries of each map, a power of two. The kernel assigns cookies of network namespaces in sequence.
pub const HOMES: u32 = 1 << 12;

/// The index of a network namespace's cookie in both maps. Several namespaces may share one.
#[must_use]
#[inline(always)]
pub const fn home_index(namespace: u64) -> u32 {
    namespace as u32 & (HOMES - 1)
}

const _: () = assert!(HOMES.is_power_of_two());
