//! `seats` and `origins`: the Services that connected sockets asked for.
//!
//! In: a socket and its translation. Out: the translation, until the socket is closed.
//!
//! To allocate and free an entry of a hash map costs more than all the rest of a connect. So most sockets
//! have an entry of `seats`, an array indexed by socket cookie. If another long-lived socket occupies that
//! entry, the new socket has one in the hash map `origins`.

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

/// Whether the entry of this socket will be removed when the socket is closed: a process made it, or it has
/// an entry already.
#[inline(always)]
pub(super) fn will_be_released(cookie: u64) -> bool {
    if made::is_known(cookie) {
        return true;
    }
    let Some(seat) = seat(cookie) else { return false };
    // SAFETY: an entry of the map. It does not become or cease to be this socket's while the socket connects.
    unsafe { (*seat).cookie == cookie || (has_others(seat) && find_in_hash(cookie).is_some()) }
}

/// Stores a translation. False if there is no room.
#[inline(always)]
pub(super) fn store(origin: &mut Origin, client: Client) -> bool {
    let cookie = origin.cookie;
    let Some(seat) = seat(cookie) else { return false };
    if try_claim(seat, cookie) {
        // A socket that connects again may have an entry in the hash map from before.
        remove_from_hash(seat, cookie);
        write(seat, cookie, origin);
        return true;
    }
    let kept = if let Some(known) = find_in_hash(cookie) {
        // The socket connects again.
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
            // SAFETY: an entry of the map, whose `claims` changes by additions only.
            unsafe { maps::add(&raw mut (*seat).claims, Seat::OTHER) };
        }
        is_new
    };
    if !kept {
        maps::count_trouble(trouble::ORIGINS);
    }
    kept
}

/// The translation of a connected socket.
pub(super) struct Translation {
    /// Its peer.
    pub(super) backend: Endpoint,
    /// The address and port that the process gave to `connect`.
    pub(super) service: Endpoint,
    /// When the Service was looked up, in nanoseconds of CLOCK_MONOTONIC.
    pub(super) since: u64,
}

/// Reads the translation of a socket.
#[inline(always)]
pub(super) fn find(context: &impl EbpfContext) -> Option<Translation> {
    let cookie = socket::cookie(context);
    // SAFETY: an entry of the map. It does not become or cease to be this socket's while the socket is open.
    let seat = unsafe { &*seat(cookie)? };
    if seat.cookie == cookie {
        let service = Endpoint { address: seat.address, port: seat.port, zero: 0 };
        return Some(Translation { backend: seat.backend, service, since: seat.since });
    }
    let Origin { backend, service, since, .. } = find_in_hash(cookie)?;
    Some(Translation { backend, service, since })
}

/// Removes a socket that is closed, or is connected to another address. Most sockets have no entry.
#[inline(always)]
pub(super) fn remove(context: &impl EbpfContext) {
    let cookie = socket::cookie(context);
    let Some(seat) = seat(cookie) else { return };
    // SAFETY: as in `find`. Volatile, so that the entry is this socket's until its claim is gone, and not
    // after.
    unsafe {
        if (*seat).cookie == cookie {
            (&raw mut (*seat).since).write_volatile(0);
            (&raw mut (*seat).cookie).write_volatile(0);
            maps::add(&raw mut (*seat).claims, -Seat::CLAIM);
        } else {
            remove_from_hash(seat, cookie);
        }
    }
}

#[inline(always)]
fn remove_from_hash(seat: *mut Seat, cookie: u64) {
    if !has_others(seat) {
        return;
    }
    let Some(known) = find_in_hash(cookie) else { return };
    if ORIGINS.remove(cookie).is_ok() {
        accounts::add(account::ORIGINS, known.group, -1);
        // SAFETY: an entry of the map, whose `claims` changes by additions only.
        unsafe { maps::add(&raw mut (*seat).claims, -Seat::OTHER) };
    }
}

/// Whether sockets with this index are in the hash map.
#[inline(always)]
fn has_others(seat: *const Seat) -> bool {
    // SAFETY: an entry of the map.
    unsafe { claims(seat) >= Seat::OTHER as u64 }
}

/// Reads a socket's entry of the hash map. The kernel may reuse the entry for another socket meanwhile, so
/// the copy of the cookie is read last.
#[inline(always)]
fn find_in_hash(cookie: u64) -> Option<Origin> {
    let found = ORIGINS.get_ptr(cookie)?;
    // SAFETY: an entry of the map, whose memory is not freed while a program runs. Volatile, to keep this
    // order.
    unsafe {
        let known = Origin {
            cookie,
            since: (&raw const (*found).since).read_volatile(),
            service: socket::read_endpoint(&raw const (*found).service),
            backend: socket::read_endpoint(&raw const (*found).backend),
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
/// The seat must be an entry of the map.
#[inline(always)]
unsafe fn claims(seat: *const Seat) -> u64 {
    // SAFETY: the caller's promise. Volatile, because other CPUs change it.
    unsafe { (&raw const (*seat).claims).read_volatile() }
}

/// Tries to occupy an entry, without a lock. Of several sockets that try at the same time none may succeed,
/// but never two: a program that adds its claim and then reads a count of one was alone, and as long as its
/// claim stays every other program reads more. Before Linux 5.12 there is no instruction that adds and
/// returns the result.
#[inline(always)]
fn try_claim(seat: *mut Seat, cookie: u64) -> bool {
    // SAFETY: an entry of the map, whose `claims` changes by additions only.
    unsafe {
        // A socket that connects again occupies the entry already.
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

/// Writes a translation. The agent may read the entry meanwhile, and ignores it while `since` is 0.
#[inline(always)]
fn write(seat: *mut Seat, cookie: u64, origin: &Origin) {
    // SAFETY: an entry of the map that belongs to this socket. Volatile, to keep this order.
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
