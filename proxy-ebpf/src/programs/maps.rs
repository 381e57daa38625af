//! The maps, and the one constant the agent sets.
//!
//! Sizes are the agent's business: it creates the maps as large as the Services need and makes larger ones when they
//! grow. Hash maps allocate their elements one by one, so that size costs little until it is used.

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC},
    btf_maps::SkStorage,
    macros::{btf_map, map},
    maps::{Array, HashMap, PerCpuArray},
};
use core::arch::asm;
use proxy_ebpf::{
    Affinity, AffinityKey, Crowd, Endpoint, Flows, FrontendKey, FrontendValue, Member, MemberKey, Origin,
    Record, Seat, Settings, Tally, account, trouble,
};

#[map(name = "frontends")]
pub(super) static FRONTENDS: HashMap<FrontendKey, FrontendValue> =
    HashMap::with_max_entries(1, BPF_F_NO_PREALLOC);

/// Of whole pages, so that the agent switches a service port by one store.
#[map(name = "ports")]
pub(super) static PORTS: Array<u64> = Array::with_max_entries(1, BPF_F_MMAPABLE);

#[map(name = "records")]
pub(super) static RECORDS: Array<Record> = Array::with_max_entries(1, 0);

#[map(name = "slots")]
pub(super) static SLOTS: Array<Endpoint> = Array::with_max_entries(1, 0);

#[map(name = "members")]
pub(super) static MEMBERS: HashMap<MemberKey, Member> = HashMap::with_max_entries(1, BPF_F_NO_PREALLOC);

#[map(name = "affinities")]
pub(super) static AFFINITIES: HashMap<AffinityKey, Affinity> =
    HashMap::with_max_entries(1, BPF_F_NO_PREALLOC);

#[map(name = "tallies")]
pub(super) static TALLIES: Array<Tally> = Array::with_max_entries(1, 0);

#[map(name = "bypassed")]
pub(super) static BYPASSED: HashMap<u64, u32> = HashMap::with_max_entries(8192, BPF_F_NO_PREALLOC);

/// How many sockets in the network namespaces that lead to a place are bound to a Service's address.
#[map(name = "homes")]
pub(super) static HOMES: Array<u64> = Array::with_max_entries(proxy_ebpf::HOMES, 0);

/// Whether sockets in the network namespaces that lead to a place were bound to a Service's address before weir knew it.
/// The agent finds and writes this; programs only read it.
#[map(name = "early_homes")]
pub(super) static EARLY_HOMES: Array<u64> = Array::with_max_entries(proxy_ebpf::HOMES, 0);

/// Sockets that `homes` counts.
#[btf_map(name = "bound")]
pub(super) static BOUND: SkStorage<u64> = SkStorage::new();

#[map(name = "settings")]
pub(super) static SETTINGS: Array<Settings> = Array::with_max_entries(2, 0);

#[map(name = "troubles")]
pub(super) static TROUBLES: PerCpuArray<u64> = PerCpuArray::with_max_entries(trouble::COUNT, 0);

#[map(name = "origins")]
pub(super) static ORIGINS: HashMap<u64, Origin> =
    HashMap::with_max_entries(account::MOST_ORIGINS, BPF_F_NO_PREALLOC);

/// Of whole pages, so that a seat is one line of a cache.
#[map(name = "seats")]
pub(super) static SEATS: Array<Seat> = Array::with_max_entries(proxy_ebpf::SEATS, BPF_F_MMAPABLE);

/// Cookies of sockets, each at the place it leads to.
#[map(name = "made")]
pub(super) static MADE: Array<u64> = Array::with_max_entries(proxy_ebpf::MADE, 0);

#[btf_map(name = "flows")]
pub(super) static FLOWS: SkStorage<Flows> = SkStorage::new();

#[btf_map(name = "crowds")]
pub(super) static CROWDS: SkStorage<Crowd> = SkStorage::new();

#[map(name = "accounts")]
pub(super) static ACCOUNTS: Array<u64> = Array::with_max_entries(account::COUNT, 0);

/// How many elements `affinities` has room for, which is the agent's business.
#[unsafe(no_mangle)]
static CLIENTS_ROOM: u32 = 0;

/// How many elements `affinities` has room for.
#[inline(always)]
pub(super) fn room_for_clients() -> u32 {
    // SAFETY: as in `can_refuse`.
    unsafe { core::ptr::read_volatile(&raw const CLIENTS_ROOM) }
}

/// Whether this kernel has `bpf_set_retval` (5.18). Where it has not, a refusal could only be EPERM, so it is left to
/// the packets.
#[unsafe(no_mangle)]
static SET_RETVAL: u32 = 0;

/// Whether a hook can say why it refuses.
#[inline(always)]
pub(super) fn can_refuse() -> bool {
    // SAFETY: a static of this program, which nobody writes once it is loaded. Volatile, because the agent sets it
    // after the compiler is done.
    unsafe { core::ptr::read_volatile(&raw const SET_RETVAL) != 0 }
}

/// Counts something that should not happen.
#[inline(always)]
pub(super) fn count(trouble: u32) {
    if let Some(counter) = TROUBLES.get_ptr_mut(trouble) {
        // SAFETY: this CPU's own element of a per-CPU array, and a program is not interrupted by itself there.
        unsafe { *counter += 1 };
    }
}

/// Adds to a word atomically. The instruction is written out, because the compiler offers atomic addition only for targets
/// that have it with its result, which BPF has since version 3 of its instructions (Linux 5.12).
///
/// # Safety
///
/// The word is aligned and can be written.
#[inline(always)]
pub(super) unsafe fn add(word: *mut u64, number: i64) {
    // SAFETY: the caller's.
    unsafe { asm!("lock *(u64 *)({word} + 0) += {number}", word = in(reg) word, number = in(reg) number) };
}
