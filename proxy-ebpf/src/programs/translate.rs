//! Where sockets go: the hooks of connect and of sending without a connection.
//!
//! In: the destination a process gave. Out: a backend in its place, written down with the socket so that `told` can
//! show the process what it asked for. A destination that is no Service's, or one the packets are to decide about, stays
//! as it is: the packet rules beside these programs have every Service.

use aya_ebpf::{helpers::generated::bpf_set_retval, programs::SockAddrContext};
use proxy_ebpf::{Endpoint, Origin, trouble};

use super::{
    ALLOW, flows, maps,
    resolve::{self, Found, Frontend},
    seats,
    socket::{self, Client, Family, TCP, UDP},
    tell,
};

const REFUSE: i32 = 0;
const ECONNREFUSED: i32 = 111;

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
    let cookie = socket::cookie(context);
    if !seats::is_forgotten_in_time(cookie) {
        return ALLOW;
    }
    let now = resolve::now();
    let Some(backend) = resolve::pick(frontend, choice, client, now) else { return ALLOW };
    let mut origin = Origin { cookie, since: now, service: to, backend, protocol, group: 0 };
    if !seats::remember(&mut origin, client) {
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
    let choice = resolve::choice(frontend, client);
    let now = resolve::now();
    let known = flows::find(context, to);
    if let Some(flow) = &known {
        let (since, backend) = (flows::since(flow), flows::backend(flow));
        if now.wrapping_sub(since) <= flows::REST
            && (socket::same(&backend, to) || resolve::still_serves(frontend, &backend, since))
        {
            if let Some(flow) = known {
                flows::touch(flow, now);
            }
            return Some(backend);
        }
    }
    if !resolve::serves(choice) || socket::is_at_home(context, client, UDP, to) {
        return None;
    }
    let backend = resolve::pick(frontend, choice, client, now)?;
    let Some(flow) = known.or_else(|| flows::place(context, client, now)) else {
        maps::count(trouble::STORAGE);
        return None;
    };
    flows::begin(flow, to, &backend, now);
    resolve::served(frontend);
    tell::led(context, to, &backend);
    Some(backend)
}

/// A datagram came to this socket from an address and port that are a frontend's too: its sender has the number of a
/// NodePort for its own, as a client behind a masquerade or a process that chose it may. What the socket sends there is an
/// answer, so it is to go where it is sent: a flow whose backend is its own Service. A socket with a peer sends to that, and
/// what is not led to a backend needs no such flow.
#[inline(always)]
pub(super) fn expect_answer(context: &SockAddrContext, from: &Endpoint) {
    if socket::protocol(context) != UDP || socket::is_connected(context) {
        return;
    }
    let Some(client) = socket::client(context) else { return };
    let Found::Frontend(frontend) = resolve::find(from, UDP, client) else { return };
    if resolve::choice(frontend, client).is_for_packets() {
        return;
    }
    let now = resolve::now();
    match flows::find(context, from).or_else(|| flows::place(context, client, now)) {
        Some(flow) => flows::begin(flow, from, from, now),
        None => maps::count(trouble::STORAGE),
    }
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
