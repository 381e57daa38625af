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
    if let Some(service) = flows::service_of(context, &from) {
        socket::set_address(context, family, &service);
        return ALLOW;
    }
    // A socket that has lost its peer by a connect to no address is still remembered as if it had one.
    if socket::is_connected(context) {
        peer(context, family)
    } else {
        translate::expect_answer(context, &from);
        ALLOW
    }
}
