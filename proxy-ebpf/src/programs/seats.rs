//! Where connected sockets are remembered.
//!
//! In: a socket and what it was told. Out: the same when somebody asks for it, until the socket is closed.
//!
//! To allocate an element of a hash, and to free it, costs more than all the rest of a connect, so most sockets sit in an
//! array, at the place their cookie leads to. Who finds that taken, by a socket that lives long, is in the hash.

use aya_ebpf::{
    EbpfContext,
    bindings::{BPF_EXIST, BPF_NOEXIST},
};
use proxy_ebpf::{Endpoint, Origin, SEATS as MOST, Seat, account, trouble};

use super::{
    account as accounts, made,
    maps::{self, ORIGINS, SEATS},
    socket::{self, Client},
};

/// Whether what this socket is told will be forgotten when it is closed: a process made it, or it is remembered already.
#[inline(always)]
pub(super) fn is_forgotten_in_time(cookie: u64) -> bool {
    if made::is_known(cookie) {
        return true;
    }
    let Some(seat) = seat(cookie) else { return false };
    // SAFETY: an element of the map. Whether it is this socket's does not change while the socket connects.
    unsafe { (*seat).cookie == cookie || (has_others(seat) && element(cookie).is_some()) }
}

/// Remembers what a socket is told now. False where there is no room.
#[inline(always)]
pub(super) fn remember(origin: &mut Origin, client: Client) -> bool {
    let cookie = origin.cookie;
    let Some(seat) = seat(cookie) else { return false };
    if take(seat, cookie) {
        // One that connects again may have found its seat taken before.
        forget_element(seat, cookie);
        write(seat, cookie, origin);
        return true;
    }
    let kept = if let Some(known) = element(cookie) {
        // It connects again.
        origin.group = known.group;
        let origin: &Origin = origin;
        ORIGINS.insert(cookie, origin, BPF_EXIST.into()).is_ok()
    } else {
        origin.group = accounts::group(client.namespace);
        let origin: &Origin = origin;
        let is_new = accounts::may_take(account::ORIGINS, origin.group, account::MOST_ORIGINS)
            && ORIGINS.insert(cookie, origin, BPF_NOEXIST.into()).is_ok();
        if is_new {
            accounts::add(account::ORIGINS, origin.group, 1);
            // SAFETY: an element of the map, whose `claims` changes by additions only.
            unsafe { maps::add(&raw mut (*seat).claims, Seat::OTHER) };
        }
        is_new
    };
    if !kept {
        maps::count(trouble::ORIGINS);
    }
    kept
}

/// What a socket was told.
pub(super) struct Told {
    /// The backend that it got.
    pub(super) backend: Endpoint,
    /// What it asked for.
    pub(super) service: Endpoint,
    /// When, in nanoseconds of CLOCK_MONOTONIC.
    pub(super) since: u64,
}

/// What a socket was told, if it was.
#[inline(always)]
pub(super) fn recall(context: &impl EbpfContext) -> Option<Told> {
    let cookie = socket::cookie(context);
    // SAFETY: an element of the map. Whether it is this socket's does not change while the socket is not closed.
    let seat = unsafe { &*seat(cookie)? };
    if seat.cookie == cookie {
        let service = Endpoint { address: seat.address, port: seat.port, zero: 0 };
        return Some(Told { backend: seat.backend, service, since: seat.since });
    }
    let Origin { backend, service, since, .. } = element(cookie)?;
    Some(Told { backend, service, since })
}

/// Forgets a socket that is closed, or is connected elsewhere. Most were told nothing.
#[inline(always)]
pub(super) fn forget(context: &impl EbpfContext) {
    let cookie = socket::cookie(context);
    let Some(seat) = seat(cookie) else { return };
    // SAFETY: as in `recall`. Volatile, so that the seat is this socket's until its claim goes, and not after.
    unsafe {
        if (*seat).cookie == cookie {
            (&raw mut (*seat).since).write_volatile(0);
            (&raw mut (*seat).cookie).write_volatile(0);
            maps::add(&raw mut (*seat).claims, -Seat::CLAIM);
        } else {
            forget_element(seat, cookie);
        }
    }
}

#[inline(always)]
fn forget_element(seat: *mut Seat, cookie: u64) {
    if !has_others(seat) {
        return;
    }
    let Some(known) = element(cookie) else { return };
    if ORIGINS.remove(cookie).is_ok() {
        accounts::add(account::ORIGINS, known.group, -1);
        // SAFETY: an element of the map, whose `claims` changes by additions only.
        unsafe { maps::add(&raw mut (*seat).claims, -Seat::OTHER) };
    }
}

/// Whether sockets that have their place here are in the hash.
#[inline(always)]
fn has_others(seat: *const Seat) -> bool {
    // SAFETY: an element of the map.
    unsafe { claims(seat) >= Seat::OTHER as u64 }
}

/// What the hash has for a socket. The element may be another socket's by the time it is read, so the cookie in it is read
/// last.
#[inline(always)]
fn element(cookie: u64) -> Option<Origin> {
    let found = ORIGINS.get_ptr(cookie)?;
    // SAFETY: an element of the map, whose memory stays what it is for as long as a program runs. Volatile, so that it is
    // done in this order.
    unsafe {
        let known = Origin {
            cookie,
            since: (&raw const (*found).since).read_volatile(),
            service: socket::read(&raw const (*found).service),
            backend: socket::read(&raw const (*found).backend),
            protocol: 0,
            group: (&raw const (*found).group).read_volatile(),
        };
        ((&raw const (*found).cookie).read_volatile() == cookie).then_some(known)
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
        if Seat::is_taken(claims(seat)) {
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
