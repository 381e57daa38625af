//! What processes are told: the address they asked for, where the kernel would tell them the backend's.
//!
//! In: an address the kernel is about to hand out. Out: the Service's in its place, if this socket asked for that.

use aya_ebpf::programs::SockAddrContext;

use super::{
    ALLOW, flows, seats,
    socket::{self, Family},
    translate,
};

/// getpeername: only a connected socket has a peer. One that has been connected to something else since has another.
#[inline(always)]
pub(super) fn peer(context: &SockAddrContext, family: Family) -> i32 {
    let Some(told) = seats::recall(context) else { return ALLOW };
    if socket::same(&told.backend, &socket::address(context, family)) {
        socket::set_address(context, family, &told.service);
    }
    ALLOW
}

/// A datagram came: whom is it from? A socket with a peer hears that alone, so what it sent to before says nothing. Another one
/// that sent to two Services that have this backend hears it from the one it sent to last.
#[inline(always)]
pub(super) fn receive(context: &SockAddrContext, family: Family) -> i32 {
    // A socket that has lost its peer by a connect to no address is still remembered as if it had one.
    if socket::is_connected(context) {
        return peer(context, family);
    }
    let from = socket::address(context, family);
    match flows::service_of(context, &from) {
        Some(service) => socket::set_address(context, family, &service),
        None => translate::expect_answer(context, &from),
    }
    ALLOW
}
