//! Which sockets processes made.
//!
//! In: a socket that is made. Out: whether a socket is one of those, for as long as no other has its place.
//!
//! The kernel makes sockets for itself too, in the midst of what a process asks for: the TCP connections below an MPTCP or
//! SMC socket, those of CIFS and NVMe. It connects them past the hook of their making, and closes them past the hook of
//! their release. What such a socket was told would be kept for as long as the machine runs, so it is told nothing: its
//! packets are led.

use aya_ebpf::programs::SockContext;
use proxy_ebpf::MADE as MOST;

use super::{
    maps::MADE,
    socket::{self, TCP, UDP},
};

/// A process made a socket.
#[inline(always)]
pub(super) fn note(context: &SockContext) {
    // SAFETY: the kernel hands every program of this kind a valid context; the verifier checks each access.
    let protocol = unsafe { (*context.sock).protocol };
    if protocol != TCP && protocol != UDP {
        return;
    }
    let cookie = socket::cookie(context);
    if let Some(place) = MADE.get_ptr_mut(cookie as u32 & (MOST - 1)) {
        // SAFETY: an aligned word of the map.
        unsafe { place.write_volatile(cookie) };
    }
}

/// Whether a process made the socket, so that there is a release to forget it at. Of one that [`MOST`] others came after
/// nothing is known.
#[inline(always)]
pub(super) fn is_known(cookie: u64) -> bool {
    // SAFETY: an aligned word of the map. Volatile, because others change it.
    MADE.get_ptr(cookie as u32 & (MOST - 1)).is_some_and(|place| unsafe { place.read_volatile() } == cookie)
}
