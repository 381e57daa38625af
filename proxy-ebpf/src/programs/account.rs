//! What each group of processes has of what all share.
//!
//! In: a group that needs room. Out: whether it gets some: an eighth of what the others leave.

use aya_ebpf::helpers::generated::{bpf_get_current_ancestor_cgroup_id, bpf_get_current_cgroup_id};
use proxy_ebpf::account;

use super::maps::{self, ACCOUNTS};

/// The group that the current process is in: its cgroup. Where cgroups tell nothing, because the process is in none, the
/// network namespace is one.
#[inline(always)]
pub(super) fn group(namespace: u64) -> u32 {
    let group = if is_in_root() {
        namespace
    } else {
        // SAFETY: takes nothing and touches nothing.
        unsafe { bpf_get_current_cgroup_id() }
    };
    group as u32 & (account::GROUPS - 1)
}

/// Whether the current process is in no cgroup below the root, as threads of the kernel are.
#[inline(always)]
fn is_in_root() -> bool {
    // SAFETY: the helper takes any level, and answers 0 beyond the last.
    unsafe { bpf_get_current_ancestor_cgroup_id(1) == 0 }
}

/// Whether a group may have one more of a thing.
#[inline(always)]
pub(super) fn may_take(thing: u32, group: u32, room: u32) -> bool {
    account::may_take(read(account::of(thing, group)), read(account::of_all(thing)), room)
}

/// A group has more of a thing, or less.
#[inline(always)]
pub(super) fn add(thing: u32, group: u32, number: i64) {
    for place in [account::of(thing, group), account::of_all(thing)] {
        if let Some(word) = ACCOUNTS.get_ptr_mut(place) {
            // SAFETY: an aligned word of the map, which programs change by this addition only.
            unsafe { maps::add(word, number) };
        }
    }
}

#[inline(always)]
fn read(place: u32) -> u64 {
    // SAFETY: an aligned word of the map. Volatile, because others change it.
    ACCOUNTS.get_ptr(place).map_or(u64::MAX >> 4, |word| unsafe { word.read_volatile() })
}
