//! `made`: the sockets that processes made.
//!
//! In: a new socket. Out: whether a process made a socket, as long as no other socket has taken its entry.
//!
//! The kernel also makes sockets for itself while it handles a call of a process: the TCP connections below
//! an MPTCP or SMC socket, those of CIFS and NVMe. For these it runs the connect hook, but neither
//! `sock_create` nor `sock_release`. An entry for such a socket would stay until the machine restarts, so the
//! programs leave it untranslated, and nftables translates its packets.

use aya_ebpf::programs::SockContext;
use proxy_ebpf::MADE as MOST;

use super::{
    maps::MADE,
    socket::{self, TCP, UDP},
};

/// The hook `sock_create`.
#[inline(always)]
pub(super) fn record(context: &SockContext) {
    // SAFETY: the kernel gives every program of this type a valid context; the verifier checks each access.
    let protocol = unsafe { (*context.sock).protocol };
    if protocol != TCP && protocol != UDP {
        return;
    }
    let cookie = socket::cookie(context);
    if let Some(entry) = MADE.get_ptr_mut(cookie as u32 & (MOST - 1)) {
        // SAFETY: an aligned word of the map.
        unsafe { entry.write_volatile(cookie) };
    }
}

/// Whether a process made the socket, so that `sock_release` will run for it. False for a socket after which
/// [`MOST`] others were made.
#[inline(always)]
pub(super) fn is_known(cookie: u64) -> bool {
    // SAFETY: an aligned word of the map. Volatile, because other CPUs change it.
    MADE.get_ptr(cookie as u32 & (MOST - 1)).is_some_and(|entry| unsafe { entry.read_volatile() } == cookie)
}
