//! The maps, and the constants that the agent sets.
//!
//! The agent creates the maps of Services as large as the Services need, and makes larger ones when they
//! grow. The kernel allocates entries of hash maps one by one, so an unused size costs little.

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

/// It consists of whole pages, so that the agent can map it and switch a service port by one store.
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

/// The number of sockets in the network namespaces of an index that are bound to a Service's address.
#[map(name = "homes")]
pub(super) static HOMES: Array<u64> = Array::with_max_entries(proxy_ebpf::HOMES, 0);

/// Whether sockets in the network namespaces of an index were bound to a Service's address before weir knew
/// the Service. The agent finds these and writes the map; programs only read it.
#[map(name = "early_homes")]
pub(super) static EARLY_HOMES: Array<u64> = Array::with_max_entries(proxy_ebpf::HOMES, 0);

/// Not 0 for a socket that `homes` counts.
#[btf_map(name = "bound")]
pub(super) static BOUND: SkStorage<u64> = SkStorage::new();

#[map(name = "settings")]
pub(super) static SETTINGS: Array<Settings> = Array::with_max_entries(2, 0);

#[map(name = "troubles")]
pub(super) static TROUBLES: PerCpuArray<u64> = PerCpuArray::with_max_entries(trouble::COUNT, 0);

#[map(name = "origins")]
pub(super) static ORIGINS: HashMap<u64, Origin> =
    HashMap::with_max_entries(account::MOST_ORIGINS, BPF_F_NO_PREALLOC);

/// It consists of whole pages, so that an entry is one cache line.
#[map(name = "seats")]
pub(super) static SEATS: Array<Seat> = Array::with_max_entries(proxy_ebpf::SEATS, BPF_F_MMAPABLE);

/// Cookies of sockets, each at its index.
#[map(name = "made")]
pub(super) static MADE: Array<u64> = Array::with_max_entries(proxy_ebpf::MADE, 0);

#[btf_map(name = "flows")]
pub(super) static FLOWS: SkStorage<Flows> = SkStorage::new();

#[btf_map(name = "crowds")]
pub(super) static CROWDS: SkStorage<Crowd> = SkStorage::new();

#[map(name = "accounts")]
pub(super) static ACCOUNTS: Array<u64> = Array::with_max_entries(account::COUNT, 0);

/// The size of `affinities`, which the agent sets when it loads the programs.
#[unsafe(no_mangle)]
static CLIENTS_ROOM: u32 = 0;

#[inline(always)]
pub(super) fn room_for_clients() -> u32 {
    // SAFETY: as in `can_refuse`.
    unsafe { core::ptr::read_volatile(&raw const CLIENTS_ROOM) }
}

/// Whether this kernel has `bpf_set_retval` for these hooks. Where it does not, a program could refuse only
/// with EPERM, so it leaves the refusal to nftables.
#[unsafe(no_mangle)]
static SET_RETVAL: u32 = 0;

/// Whether a program can refuse with ECONNREFUSED.
#[inline(always)]
pub(super) fn can_refuse() -> bool {
    // SAFETY: a static of this program, which nothing writes after the load. Volatile, because the agent sets
    // it after the compiler has run.
    unsafe { core::ptr::read_volatile(&raw const SET_RETVAL) != 0 }
}

/// Counts a [`trouble`].
#[inline(always)]
pub(super) fn count_trouble(trouble: u32) {
    if let Some(counter) = TROUBLES.get_ptr_mut(trouble) {
        // SAFETY: this CPU's own entry of a per-CPU array, and no other program that writes it interrupts
        // this one.
        unsafe { *counter += 1 };
    }
}

/// Adds to a word atomically. The instruction is written as assembly, because the compiler offers an atomic
/// addition only for targets that have one with a result, and BPF has that only since version 3 of its
/// instruction set (Linux 5.12).
///
/// # Safety
///
/// The word must be aligned and writable.
#[inline(always)]
pub(super) unsafe fn add(word: *mut u64, number: i64) {
    // SAFETY: the caller's promise.
    unsafe { asm!("lock *(u64 *)({word} + 0) += {number}", word = in(reg) word, number = in(reg) number) };
}
