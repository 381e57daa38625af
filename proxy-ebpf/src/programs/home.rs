//! Pods that listen on a Service's own address.
//!
//! In: sockets that are bound to one, until they are closed, and those that the agent found bound already. Out: whether a
//! network namespace may have some.
//!
//! A namespace counts at the place its cookie leads to, so there is room for any number, and those that share a place
//! with one that has such sockets pay for a look.

use aya_ebpf::{
    EbpfContext as _,
    bindings::BPF_SK_STORAGE_GET_F_CREATE,
    helpers::generated::{bpf_get_netns_cookie, bpf_sk_storage_get},
    programs::SockContext,
};
use proxy_ebpf::{place_of_home, trouble};

use super::{
    made,
    maps::{self, BOUND, EARLY_HOMES, HOMES},
    socket,
};

/// A socket in this namespace is bound to a Service's address. Of sockets that no program sees the release of nothing is
/// noted, because it would stay.
#[inline(always)]
pub(super) fn note(context: &SockContext, namespace: u64) {
    if !made::is_known(socket::cookie(context)) {
        return;
    }
    let Some(bound) = bound(context, BPF_SK_STORAGE_GET_F_CREATE.into()) else {
        return maps::count(trouble::HOMES);
    };
    // SAFETY: of this socket, which is bound by one process at a time.
    unsafe {
        if *bound == 0 {
            *bound = 1;
            add(namespace, 1);
        }
    }
}

/// A socket is closed.
#[inline(always)]
pub(super) fn forget(context: &SockContext) {
    // SAFETY: the context is valid, and the helper only reads it.
    let namespace = unsafe { bpf_get_netns_cookie(context.as_ptr()) };
    if is_any(namespace) && bound(context, 0).is_some() {
        add(namespace, -1);
    }
}

/// Whether there may be such a socket in this namespace.
#[inline(always)]
pub(super) fn is_any(namespace: u64) -> bool {
    let place = place_of_home(namespace);
    // SAFETY: aligned words of the maps. Volatile, because others change them.
    let is_set = |word: *const u64| unsafe { word.read_volatile() } != 0;
    HOMES.get_ptr(place).is_some_and(is_set) || EARLY_HOMES.get_ptr(place).is_some_and(is_set)
}

#[inline(always)]
fn add(namespace: u64, number: i64) {
    if let Some(count) = HOMES.get_ptr_mut(place_of_home(namespace)) {
        // SAFETY: an aligned word of the map, which programs change by this addition only.
        unsafe { maps::add(count, number) };
    }
}

#[inline(always)]
fn bound(context: &SockContext, flags: u64) -> Option<*mut u64> {
    let map = (&raw const BOUND).cast_mut().cast();
    // SAFETY: the context of these hooks is the socket, and without a value to begin with the kernel's is zero.
    let found = unsafe { bpf_sk_storage_get(map, context.as_ptr(), core::ptr::null_mut(), flags) };
    (!found.is_null()).then_some(found.cast())
}
