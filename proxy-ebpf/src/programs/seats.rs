//! Where connected sockets are remembered.
//!
//! In: a socket and what it was told. Out: the same when somebody asks for it, until the socket is closed.
//!
//! To allocate an element of a hash, and to free it, costs more than all the rest of a connect, so most sockets sit in an
//! array, at the place their cookie leads to. Who finds that taken, by a socket that lives long, is in the hash.

use aya_ebpf::{
    EbpfContext,
    bindings::{BPF_EXIST, BPF_NOEXIST},
    helpers::generated::bpf_get_current_ancestor_cgroup_id,
};
use proxy_ebpf::{Endpoint, Origin, SEATS as MOST, Seat, trouble};

use super::{
    maps::{self, ORIGINS, SEATS},
    socket,
};

/// Remembers what a socket is told now. False where there is no room.
#[inline(always)]
pub(super) fn remember(context: &impl EbpfContext, origin: &Origin) -> bool {
    let cookie = socket::cookie(context);
    let Some(seat) = seat(cookie) else { return false };
    if take(seat, cookie) {
        // One that connects again may have found its seat taken before.
        forget_element(seat, cookie);
        write(seat, cookie, origin);
        return true;
    }
    if ORIGINS.insert(cookie, origin, BPF_NOEXIST.into()).is_ok() {
        // SAFETY: an element of the map, whose `claims` changes by additions only.
        unsafe { maps::add(&raw mut (*seat).claims, Seat::OTHER) };
        return true;
    }
    // It connects again, or there is no room.
    let kept = ORIGINS.insert(cookie, origin, BPF_EXIST.into()).is_ok();
    if !kept {
        maps::count(trouble::ORIGINS);
    }
    kept
}

/// What a socket was told: the backend it got, and what it asked for.
#[inline(always)]
pub(super) fn recall(context: &impl EbpfContext) -> Option<(Endpoint, Endpoint)> {
    let cookie = socket::cookie(context);
    // SAFETY: an element of the map. Whose it is does not change while this socket, which is not closed, has it.
    let seat = unsafe { &*seat(cookie)? };
    if seat.cookie == cookie {
        let service = Endpoint { address: seat.address, port: seat.port, zero: 0 };
        return Some((seat.backend, service));
    }
    // SAFETY: elements of this map are allocated one by one and freed after a grace period, which a program's run is
    // within; a socket that connects again gets another.
    let origin = unsafe { ORIGINS.get(cookie) }?;
    Some((origin.backend, origin.service))
}

/// Forgets a socket that is closed. Most were told nothing.
#[inline(always)]
pub(super) fn forget(context: &impl EbpfContext) {
    let cookie = socket::cookie(context);
    let Some(seat) = seat(cookie) else { return };
    // SAFETY: as in `recall`, and this socket is closed once.
    unsafe {
        if (*seat).cookie == cookie {
            maps::add(&raw mut (*seat).claims, -Seat::CLAIM);
        } else {
            forget_element(seat, cookie);
        }
    }
}

#[inline(always)]
fn forget_element(seat: *mut Seat, cookie: u64) {
    // SAFETY: an element of the map, whose `claims` changes by additions only.
    unsafe {
        if claims(seat) >= Seat::OTHER as u64 && ORIGINS.remove(cookie).is_ok() {
            maps::add(&raw mut (*seat).claims, -Seat::OTHER);
        }
    }
}

#[inline(always)]
fn seat(cookie: u64) -> Option<*mut Seat> {
    SEATS.get_ptr_mut(cookie as u32 & (MOST - 1))
}

/// # Safety
///
/// The seat is an element of the map.
#[inline(always)]
unsafe fn claims(seat: *const Seat) -> u64 {
    // SAFETY: the caller's. Volatile, because others change it.
    unsafe { (&raw const (*seat).claims).read_volatile() }
}

/// Whether a socket sits here from now on. Of several that try at the same time none may succeed, but never two: one that
/// reads its own claim alone, after it has added it, was alone, and while it stays everybody reads more. There is no
/// instruction that would add and tell the result before Linux 5.12.
#[inline(always)]
fn take(seat: *mut Seat, cookie: u64) -> bool {
    // SAFETY: an element of the map, whose `claims` changes by additions only.
    unsafe {
        // A socket that connects again sits here already.
        if (*seat).cookie == cookie {
            return true;
        }
        if Seat::is_taken(claims(seat)) || is_kernel() {
            return false;
        }
        maps::add(&raw mut (*seat).claims, Seat::CLAIM);
        if claims(seat) as u32 == 1 {
            return true;
        }
        maps::add(&raw mut (*seat).claims, -Seat::CLAIM);
        false
    }
}

/// Whether the kernel opened the socket for itself, as NFS does. No program runs when it closes that, so the seat would be
/// lost; elements of the hash are looked after by the agent. Its threads are in the root of all cgroups.
#[inline(always)]
fn is_kernel() -> bool {
    // SAFETY: the helper takes any level, and answers 0 beyond the last.
    unsafe { bpf_get_current_ancestor_cgroup_id(1) == 0 }
}

/// Writes what a socket is told. The agent, which reads while this is under way, finds no time there.
#[inline(always)]
fn write(seat: *mut Seat, cookie: u64, origin: &Origin) {
    // SAFETY: an element of the map, which belongs to this socket. Volatile, so that it is done in this order.
    unsafe {
        (&raw mut (*seat).since).write_volatile(0);
        (&raw mut (*seat).cookie).write_volatile(cookie);
        for word in 0..4 {
            (&raw mut (*seat).address[word]).write_volatile(origin.service.address[word]);
            (&raw mut (*seat).backend.address[word]).write_volatile(origin.backend.address[word]);
        }
        (&raw mut (*seat).port).write_volatile(origin.service.port);
        (&raw mut (*seat).backend.port).write_volatile(origin.backend.port);
        (&raw mut (*seat).protocol).write_volatile(origin.protocol as u16);
        (&raw mut (*seat).since).write_volatile(origin.since);
    }
}
