//! Where sockets go: the hooks of connect and of sending without a connection.
//!
//! In: the destination a process gave. Out: a backend in its place, written down with the socket so that `told` can
//! show the process what it asked for. A destination that is no Service's, or one the packets are to decide about, stays
//! as it is: the packet rules beside these programs have every Service.

use aya_ebpf::{helpers::generated::bpf_set_retval, programs::SockAddrContext};
use proxy_ebpf::{Endpoint, FLOWS as MOST_FLOWS, Flows, Origin, trouble};

use super::{
    ALLOW,
    maps::{self, FLOWS},
    resolve::{self, Found, Frontend},
    search::Search,
    seats,
    socket::{self, Client, Family, TCP, UDP},
    tell,
};

const REFUSE: i32 = 0;
const ECONNREFUSED: i32 = 111;
/// A flow that rested this long may go to another backend: what connection tracking grants a UDP stream.
const REST: u64 = 120_000_000_000;

/// A socket connects. For TCP this is every connection; a UDP socket gets a peer.
#[inline(always)]
pub(super) fn connect(context: &SockAddrContext, family: Family) -> i32 {
    let protocol = socket::protocol(context);
    if protocol != TCP && protocol != UDP {
        return ALLOW;
    }
    let to = socket::address(context, family);
    let Some(client) = socket::client(context) else { return ALLOW };
    let frontend = match resolve::find(&to, protocol, client) {
        Found::Nothing => return ALLOW,
        // A UDP socket may live to see the Service come: its packets are refused instead.
        Found::UnknownPort if protocol == TCP => return refuse(context, &to),
        Found::UnknownPort => return ALLOW,
        Found::Frontend(frontend) => frontend,
    };
    let choice = resolve::choice(frontend, client);
    if choice.is_for_packets() || socket::is_at_home(context, client, protocol, &to) {
        return ALLOW;
    }
    if !resolve::serves(choice) {
        if protocol != TCP {
            return ALLOW;
        }
        resolve::refused(frontend);
        return refuse(context, &to);
    }
    let now = resolve::now();
    let Some(backend) = resolve::pick(frontend, choice, client, now) else { return ALLOW };
    let origin = Origin { since: now, service: to, backend, protocol, zero: 0 };
    if !seats::remember(context, &origin) {
        return ALLOW;
    }
    socket::set_address(context, family, &backend);
    resolve::served(frontend);
    tell::led(context, &to, &backend);
    ALLOW
}

/// A UDP socket without a peer sends.
#[inline(always)]
pub(super) fn send(context: &SockAddrContext, family: Family) -> i32 {
    if socket::protocol(context) != UDP {
        return ALLOW;
    }
    let to = socket::address(context, family);
    let Some(client) = socket::client(context) else { return ALLOW };
    let frontend = match resolve::find(&to, UDP, client) {
        Found::Nothing => return ALLOW,
        // An answer to a process of the host by the one who answers at the ClusterIP in the Service's place.
        Found::UnknownPort if socket::sends_to_itself(context, family) => return ALLOW,
        Found::UnknownPort => return refuse(context, &to),
        Found::Frontend(frontend) => frontend,
    };
    let choice = resolve::choice(frontend, client);
    if choice.is_for_packets() {
        return ALLOW;
    }
    match flow(context, &to, frontend, client) {
        Some(backend) => socket::set_address(context, family, &backend),
        None if !resolve::serves(choice) && !socket::is_at_home(context, client, UDP, &to) => {
            resolve::refused(frontend);
            return refuse(context, &to);
        }
        None => {}
    }
    ALLOW
}

/// The backend this socket's datagrams to a Service go to: the same one for as long as it serves, as connection tracking
/// would have it (K2). `None` when there is none, or none can be remembered.
#[inline(always)]
fn flow(context: &SockAddrContext, to: &Endpoint, frontend: Frontend, client: Client) -> Option<Endpoint> {
    // SAFETY: the socket is the hook's own, which holds its lock.
    let flows = unsafe { FLOWS.get_or_insert_ptr_mut(context, None) };
    if flows.is_null() {
        maps::count(trouble::STORAGE);
        return None;
    }
    // SAFETY: not null, of this socket, and nobody else writes it while the socket is locked.
    let flows = unsafe { &mut *flows };
    let choice = resolve::choice(frontend, client);
    let now = resolve::now();
    let known = &mut flows.origins[place(flows, to)];
    // SAFETY: an element of the array.
    let backend = unsafe { socket::read(&raw const known.backend) };
    if socket::same(&known.service, to)
        && now.wrapping_sub(known.since) <= REST
        && (socket::same(&backend, to) || resolve::still_serves(frontend, &backend, known.since))
    {
        known.since = now;
        return Some(backend);
    }
    if !resolve::serves(choice) || socket::is_at_home(context, client, UDP, to) {
        return None;
    }
    let backend = resolve::pick(frontend, choice, client, now)?;
    *known = Origin { since: now, service: *to, backend, protocol: UDP, zero: 0 };
    resolve::served(frontend);
    tell::led(context, to, &backend);
    Some(backend)
}

/// Somebody sent to this socket from an address and port that are a frontend's too: he has the number of a NodePort for
/// his own, as a client behind a masquerade or a process that chose it may. What the socket sends there is an answer to
/// him, so it is to go where it is sent: a flow whose backend is its own Service.
#[inline(always)]
pub(super) fn expect_answer(context: &SockAddrContext, from: &Endpoint) {
    if socket::protocol(context) != UDP {
        return;
    }
    let Some(client) = socket::client(context) else { return };
    let Found::Frontend(_) = resolve::find(from, UDP, client) else { return };
    // SAFETY: the socket is the hook's own, which holds its lock.
    let flows = unsafe { FLOWS.get_or_insert_ptr_mut(context, None) };
    if flows.is_null() {
        maps::count(trouble::STORAGE);
        return;
    }
    // SAFETY: not null, of this socket, and nobody else writes it while the socket is locked.
    let flows = unsafe { &mut *flows };
    let place = place(flows, from);
    flows.origins[place] =
        Origin { since: resolve::now(), service: *from, backend: *from, protocol: UDP, zero: 0 };
}

/// Where a Service's flow is among a socket's, or is to be: a free place, else the one that rested longest.
#[inline(always)]
fn place(flows: &mut Flows, to: &Endpoint) -> usize {
    let mut search = Search::new(flows);
    for place in 0..MOST_FLOWS {
        let flow = search.flow(place);
        if flow.since == 0 || socket::same(&flow.service, to) {
            search.take(place);
            return search.found();
        }
        if flow.since < search.since() {
            search.take(place);
        }
    }
    maps::count(trouble::FLOWS);
    search.found()
}

/// Refuses, and says so to the process; where the kernel cannot, the packets are refused instead.
#[inline(always)]
fn refuse(context: &SockAddrContext, to: &Endpoint) -> i32 {
    if !maps::can_refuse() {
        return ALLOW;
    }
    tell::refused(context, to);
    // SAFETY: sets what the system call is to return, nothing else.
    unsafe { bpf_set_retval(-ECONNREFUSED) };
    REFUSE
}
