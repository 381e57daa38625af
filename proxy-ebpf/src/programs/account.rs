//! Shares of the room in maps, for each group of processes.
//!
//! In: a group that needs an entry. Out: whether it may have one: at most an eighth of what all groups leave
//! free.

use aya_ebpf::helpers::generated::{bpf_get_current_ancestor_cgroup_id, bpf_get_current_cgroup_id};
use proxy_ebpf::account;

use super::maps::{self, ACCOUNTS};

/// The group of the current process: its cgroup. A process that is in no cgroup below the root counts for its
/// network namespace instead.
#[inline(always)]
pub(super) fn group(namespace: u64) -> u32 {
    let group = if is_in_root() {
        namespace
    } else {
        // SAFETY: the helper takes no arguments and writes no memory.
        unsafe { bpf_get_current_cgroup_id() }
    };
    group as u32 & (account::GROUPS - 1)
}

/// Threads of the kernel are in the root cgroup, too.
#[inline(always)]
fn is_in_root() -> bool {
    // SAFETY: the helper takes any level, and returns 0 beyond the last one.
    unsafe { bpf_get_current_ancestor_cgroup_id(1) == 0 }
}

/// Whether a group may have one more entry of a kind. `room` is the size of the kind's map.
#[inline(always)]
pub(super) fn may_take(kind: u32, group: u32, room: u32) -> bool {
    account::may_take(read(account::of(kind, group)), read(account::of_all(kind)), room)
}

/// Adds to the entries of one kind that a group and all groups have.
#[inline(always)]
pub(super) fn add(kind: u32, group: u32, number: i64) {
    for index in [account::of(kind, group), account::of_all(kind)] {
        if let Some(word) = ACCOUNTS.get_ptr_mut(index) {
            // SAFETY: an aligned word of the map, which programs change only by this addition.
            unsafe { maps::add(word, number) };
        }
    }
}

#[inline(always)]
fn read(index: u32) -> u64 {
    // SAFETY: an aligned word of the map. Volatile, because other CPUs change it.
    ACCOUNTS.get_ptr(index).map_or(u64::MAX >> 4, |word| unsafe { word.read_volatile() })
}
