//! Reverse translation: a process sees the Service's address that it asked for in the place of the backend's.
//!
//! In: an address that the kernel is about to return to the process. Out: the Service's address instead, if
//! this socket asked for the Service.

use aya_ebpf::programs::SockAddrContext;

use super::{
    ALLOW, flows, seats,
    socket::{self, Family},
    translate,
};

/// The hooks of getpeername, which the kernel runs for connected sockets only. A socket that has been
/// connected to another address since has another peer.
#[inline(always)]
pub(super) fn peer(context: &SockAddrContext, family: Family) -> i32 {
    let Some(translation) = seats::find(context) else { return ALLOW };
    if socket::same(&translation.backend, &socket::address(context, family)) {
        socket::set_address(context, family, &translation.service);
    }
    ALLOW
}

/// The hooks of recvmsg. A connected socket receives from its peer only, so the flows of its time before the
/// connect do not matter. An unconnected socket that sent to two Services with this backend sees the one that
/// it sent to last.
#[inline(always)]
pub(super) fn receive(context: &SockAddrContext, family: Family) -> i32 {
    // A socket that a connect to AF_UNSPEC has disconnected still has its entry.
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
