//! `homes`, `early_homes` and `bound`: network namespaces with sockets that are bound to a Service's address.
//!
//! In: bound sockets, until they are closed; those that were bound before weir knew the Service, which the
//! agent finds. Out: whether a network namespace may have such a socket.
//!
//! Namespaces whose cookies have the same index share a count. So there is room for any number of namespaces,
//! and a namespace that shares its index with such sockets costs a needless socket lookup.

use aya_ebpf::{
    EbpfContext as _,
    bindings::BPF_SK_STORAGE_GET_F_CREATE,
    helpers::generated::{bpf_get_netns_cookie, bpf_sk_storage_get},
    programs::SockContext,
};
use proxy_ebpf::{home_index, trouble};

use super::{
    made,
    maps::{self, BOUND, EARLY_HOMES, HOMES},
    socket,
};

/// Counts a socket of this namespace. A socket whose release runs no program is not counted, because its
/// count would never go down.
#[inline(always)]
pub(super) fn count(context: &SockContext, namespace: u64) {
    if !made::is_known(socket::cookie(context)) {
        return;
    }
    let Some(bound) = bound(context, BPF_SK_STORAGE_GET_F_CREATE.into()) else {
        return maps::count_trouble(trouble::HOMES);
    };
    // SAFETY: the value of this socket, which one process at a time binds.
    unsafe {
        if *bound == 0 {
            *bound = 1;
            add(namespace, 1);
        }
    }
}

/// Handles the release of a socket.
#[inline(always)]
pub(super) fn uncount(context: &SockContext) {
    // SAFETY: the context is valid, and the helper only reads it.
    let namespace = unsafe { bpf_get_netns_cookie(context.as_ptr()) };
    if may_have_any(namespace) && bound(context, 0).is_some() {
        add(namespace, -1);
    }
}

#[inline(always)]
pub(super) fn may_have_any(namespace: u64) -> bool {
    let index = home_index(namespace);
    // SAFETY: aligned words of the maps. Volatile, because other CPUs and the agent change them.
    let is_set = |word: *const u64| unsafe { word.read_volatile() } != 0;
    HOMES.get_ptr(index).is_some_and(is_set) || EARLY_HOMES.get_ptr(index).is_some_and(is_set)
}

#[inline(always)]
fn add(namespace: u64, number: i64) {
    if let Some(count) = HOMES.get_ptr_mut(home_index(namespace)) {
        // SAFETY: an aligned word of the map, which programs change only by this addition.
        unsafe { maps::add(count, number) };
    }
}

#[inline(always)]
fn bound(context: &SockContext, flags: u64) -> Option<*mut u64> {
    let map = (&raw const BOUND).cast_mut().cast();
    // SAFETY: the context of these hooks is the socket, and without an initial value the kernel zeroes a new
    // one.
    let found = unsafe { bpf_sk_storage_get(map, context.as_ptr(), core::ptr::null_mut(), flags) };
    (!found.is_null()).then_some(found.cast())
}
