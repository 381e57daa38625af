//! What processes are told: the address they asked for, where the kernel would tell them the backend's.
//!
//! In: an address the kernel is about to hand out. Out: the Service's in its place, if this socket asked for that.

use aya_ebpf::programs::SockAddrContext;
use proxy_ebpf::FLOWS as MOST_FLOWS;

use super::{
    ALLOW,
    maps::FLOWS,
    search::Search,
    seats,
    socket::{self, Family},
    translate,
};

/// getpeername: only a connected socket has a peer. One that has been connected to something else since has another.
#[inline(always)]
pub(super) fn peer(context: &SockAddrContext, family: Family) -> i32 {
    let Some((backend, service)) = seats::recall(context) else { return ALLOW };
    if socket::same(&backend, &socket::address(context, family)) {
        socket::set_address(context, family, &service);
    }
    ALLOW
}

/// A datagram came: whom is it from? If the socket sent to two Services that have this backend, from the one it sent to
/// last.
#[inline(always)]
pub(super) fn receive(context: &SockAddrContext, family: Family) -> i32 {
    let from = socket::address(context, family);
    // SAFETY: the socket is the hook's own, which holds its lock.
    let flows = unsafe { FLOWS.get_ptr_mut(context) };
    if !flows.is_null() {
        // SAFETY: not null, of this socket, and nobody else writes it while the socket is locked.
        let flows = unsafe { &mut *flows };
        let mut search = Search::after(flows, 0);
        for place in 0..MOST_FLOWS {
            let flow = search.flow(place);
            if flow.since == 0 {
                break;
            }
            if flow.since > search.since() && socket::same(&flow.backend, &from) {
                search.take(place);
            }
        }
        if search.is_over() {
            let found = search.found();
            socket::set_address(context, family, &flows.origins[found].service);
            return ALLOW;
        }
    }
    translate::expect_answer(context, &from);
    peer(context, family)
}
