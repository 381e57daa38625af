//! Forward translation: the hooks of connect and sendmsg.
//!
//! In: the destination that a process gave. Out: a backend in its place, stored for the socket so that
//! `reverse` can show the process the Service. A destination that is no Service's, or that nftables decides
//! about, stays unchanged: nftables has every Service.

use aya_ebpf::{helpers::generated::bpf_set_retval, programs::SockAddrContext};
use proxy_ebpf::{Endpoint, Origin, trouble};

use super::{
    ALLOW, flows, maps,
    resolve::{self, Frontend, Lookup},
    seats,
    socket::{self, Client, Family, TCP, UDP},
    trace,
};

const REFUSE: i32 = 0;
const ECONNREFUSED: i32 = 111;

/// The result of a connect.
enum Destination {
    /// To a backend, and the translation is stored.
    Backend(Endpoint),
    /// To the address that the process gave.
    Unchanged,
    Refused,
}

/// The hooks of connect. Every TCP connection passes here; a UDP socket gets a peer. The socket's earlier
/// translation ends, because it has another peer now.
#[inline(always)]
pub(super) fn connect(context: &SockAddrContext, family: Family) -> i32 {
    let protocol = socket::protocol(context);
    if protocol != TCP && protocol != UDP {
        return ALLOW;
    }
    let to = socket::address(context, family);
    let Some(client) = socket::client(context) else { return ALLOW };
    match destination(context, family, protocol, &to, client) {
        Destination::Backend(backend) => {
            socket::set_address(context, family, &backend);
            trace::translated(context, &to, &backend);
            ALLOW
        }
        Destination::Unchanged => {
            // Most sockets are new, and to look for the entry of each would cost it 80 ns.
            if socket::has_port(context) {
                seats::remove(context);
            }
            ALLOW
        }
        Destination::Refused => refuse(context, &to),
    }
}

#[inline(always)]
fn destination(
    context: &SockAddrContext,
    family: Family,
    protocol: u32,
    to: &Endpoint,
    client: Client,
) -> Destination {
    let frontend = match resolve::find(to, protocol, client) {
        Lookup::NoService => return Destination::Unchanged,
        // A UDP socket may live until the Service has the port, so nftables refuses its packets instead.
        Lookup::UnknownPort if protocol == TCP => return Destination::Refused,
        Lookup::UnknownPort => return Destination::Unchanged,
        Lookup::Frontend(frontend) => frontend,
    };
    let choice = resolve::choice(frontend, client);
    if choice.is_for_packets() || socket::pod_listens_on(context, client, protocol, to) {
        return Destination::Unchanged;
    }
    if !resolve::has_backend(choice) {
        if protocol != TCP {
            return Destination::Unchanged;
        }
        resolve::count_refused(frontend);
        return Destination::Refused;
    }
    let cookie = socket::cookie(context);
    if !seats::will_be_released(cookie) {
        return Destination::Unchanged;
    }
    let known = if protocol == UDP { current_backend(context, to, frontend) } else { None };
    let backend = match known {
        Some(backend) => Some(backend),
        None => resolve::pick(frontend, choice, client),
    };
    let Some(backend) = backend else { return Destination::Unchanged };
    if socket::cannot_reach(context, family, &backend) {
        return Destination::Unchanged;
    }
    let mut origin = Origin { cookie, since: frontend.at, service: *to, backend, protocol, group: 0 };
    if !seats::store(&mut origin, client) {
        return Destination::Unchanged;
    }
    resolve::count_served(frontend);
    Destination::Backend(backend)
}

/// The backend of the flow that a socket has with this Service: connection tracking would continue it.
#[inline(always)]
fn current_backend(context: &SockAddrContext, to: &Endpoint, frontend: Frontend) -> Option<Endpoint> {
    // A socket without a port is new, or a disconnect has taken its port: then the flow is another.
    if !socket::has_port(context) {
        return None;
    }
    let mut backend = *to;
    (find_current_backend(context, to, resolve::serving_set(frontend)?, frontend.at, &mut backend) != 0)
        .then_some(backend)
}

/// Finds the socket's backend for this Service, of an entry in `flows` or of its connection, if the backend
/// is still in the set.
///
/// A function of its own, for the reason of [`relation_to`].
#[inline(never)]
fn find_current_backend(
    context: &SockAddrContext,
    to: &Endpoint,
    serving: u32,
    now: u64,
    backend: &mut Endpoint,
) -> u32 {
    // There is no time of the last datagram for a connected socket.
    let (known, since, idle) = match flows::find(context, to) {
        Some(flow) => (flows::backend(flow), flows::since(flow), now.wrapping_sub(flows::since(flow))),
        None => match seats::find(context) {
            Some(translation) if socket::same(&translation.service, to) => {
                (translation.backend, translation.since, 0)
            }
            _ => return 0,
        },
    };
    if idle > flows::IDLE || !resolve::is_member(serving, &known, since) {
        return 0;
    }
    *backend = known;
    1
}

/// The result of a datagram: a number, because functions of kernel programs return nothing else.
mod outcome {
    pub(super) const UNCHANGED: u32 = 0;
    pub(super) const REFUSED: u32 = 1;
    /// To the backend of its flow.
    pub(super) const TRANSLATED: u32 = 2;
    /// To a backend, as the first datagram of a flow.
    pub(super) const NEW_FLOW: u32 = 3;
}

/// The hooks of sendmsg, for a datagram with an address. The socket may be connected too.
#[inline(always)]
pub(super) fn send(context: &SockAddrContext, family: Family) -> i32 {
    if socket::protocol(context) != UDP {
        return ALLOW;
    }
    let to = socket::address(context, family);
    let mut backend = to;
    let relation = match relation_to(context, &to, &mut backend) {
        relation::NONE if socket::sends_to_itself(context, family) => relation::ITSELF,
        relation => relation,
    };
    match datagram(context, &to, relation, &mut backend) {
        outcome::REFUSED => return refuse(context, &to),
        result @ (outcome::TRANSLATED | outcome::NEW_FLOW)
            if !socket::cannot_send(context, family, &backend) =>
        {
            socket::set_address(context, family, &backend);
            if result == outcome::NEW_FLOW {
                trace::translated(context, &to, &backend);
            }
        }
        _ => {}
    }
    ALLOW
}

/// Decides about a datagram, and finds its backend.
///
/// A function of its own, so that `send` calls both this and the trace messages, and this does not call them:
/// the kernel adds up the stacks of functions that call each other ("combined stack size of 2 calls is 528",
/// Linux 6.18).
#[inline(never)]
fn datagram(context: &SockAddrContext, to: &Endpoint, relation: u32, backend: &mut Endpoint) -> u32 {
    let Some(client) = socket::client(context) else { return outcome::UNCHANGED };
    let frontend = match resolve::find(to, UDP, client) {
        Lookup::NoService => {
            if relation != relation::BACKEND {
                flows::note_backend_address(context, to);
            }
            return outcome::UNCHANGED;
        }
        // The socket is connected to that address, or does not receive from there.
        _ if relation == relation::UNTRANSLATED => return outcome::UNCHANGED,
        // An answer to a process of the host, from a server that has the ClusterIP as its own address.
        Lookup::UnknownPort if relation == relation::ITSELF => return outcome::UNCHANGED,
        Lookup::UnknownPort => return outcome::REFUSED,
        Lookup::Frontend(frontend) => frontend,
    };
    let choice = resolve::choice(frontend, client);
    if choice.is_for_packets() {
        return outcome::UNCHANGED;
    }
    if relation == relation::SERVICE {
        return outcome::TRANSLATED;
    }
    let result = translate_flow(context, to, frontend, client, backend);
    if result == outcome::UNCHANGED
        && !resolve::has_backend(choice)
        && !socket::pod_listens_on(context, client, UDP, to)
    {
        resolve::count_refused(frontend);
        return outcome::REFUSED;
    }
    result
}

/// The relation of a destination to a socket: a number, as in [`outcome`].
mod relation {
    /// None of the others.
    pub(super) const NONE: u32 = 0;
    /// The Service that the socket is connected to.
    pub(super) const SERVICE: u32 = 1;
    /// The backend that the socket is connected to. The kernel sends each datagram of an IPv6 socket with an
    /// IPv4-mapped peer by address, whether or not the process gives one (`udpv6_sendmsg`).
    pub(super) const BACKEND: u32 = 2;
    /// The socket's own address.
    pub(super) const ITSELF: u32 = 3;
    /// Any destination of a socket that is connected without translation: it would not receive from a
    /// backend.
    pub(super) const UNTRANSLATED: u32 = 4;
}

/// Finds the relation of a destination to a connected socket, and the backend if it is the Service.
///
/// A function of its own, because the verifier forgets after a call which path led to its result, and follows
/// the code behind it only once for each result. Inlined, the kernel verified `sendmsg4` for 66 ms instead of
/// 26 (Linux 6.18).
#[inline(never)]
fn relation_to(context: &SockAddrContext, to: &Endpoint, backend: &mut Endpoint) -> u32 {
    if !socket::is_connected(context) {
        return relation::NONE;
    }
    let Some(translation) = seats::find(context) else { return relation::UNTRANSLATED };
    if socket::same(&translation.service, to) {
        *backend = translation.backend;
        return relation::SERVICE;
    }
    if socket::same(&translation.backend, to) { relation::BACKEND } else { relation::NONE }
}

/// Finds or picks the backend for this socket's datagrams to a Service: the same one for as long as it
/// serves, as with connection tracking (K2). The datagram stays unchanged if there is no backend, or no room
/// for the flow.
#[inline(always)]
fn translate_flow(
    context: &SockAddrContext,
    to: &Endpoint,
    frontend: Frontend,
    client: Client,
    backend: &mut Endpoint,
) -> u32 {
    let choice = resolve::choice(frontend, client);
    let now = frontend.at;
    let known = flows::find(context, to);
    if let Some(flow) = &known {
        let since = flows::since(flow);
        *backend = flows::backend(flow);
        if now.wrapping_sub(since) <= flows::IDLE
            && (socket::same(backend, to) || resolve::still_serves(frontend, backend, since))
        {
            if let Some(flow) = known {
                flows::touch(flow, now);
            }
            return outcome::TRANSLATED;
        }
    }
    if !resolve::has_backend(choice) || socket::pod_listens_on(context, client, UDP, to) {
        return outcome::UNCHANGED;
    }
    let Some(picked) = resolve::pick(frontend, choice, client) else { return outcome::UNCHANGED };
    *backend = picked;
    let Some(flow) = known.or_else(|| flows::entry_for(context, client, now)) else {
        maps::count_trouble(trouble::STORAGE);
        return outcome::UNCHANGED;
    };
    flows::begin(flow, to, backend, now);
    resolve::count_served(frontend);
    outcome::NEW_FLOW
}

/// Handles a datagram from an address and port that are a frontend's too. Its sender has the number of a
/// NodePort as its own port: a client behind a masquerade, or a process that chose it. A datagram of the
/// socket to that address is an answer and must reach the sender, so this stores a flow to the Service's
/// address itself as backend. A connected socket sends to its peer, and a frontend that is left to nftables
/// needs no such flow.
#[inline(always)]
pub(super) fn expect_answer(context: &SockAddrContext, from: &Endpoint) {
    if socket::protocol(context) != UDP || socket::is_connected(context) {
        return;
    }
    let Some(client) = socket::client(context) else { return };
    let Lookup::Frontend(frontend) = resolve::find(from, UDP, client) else { return };
    if resolve::choice(frontend, client).is_for_packets() {
        return;
    }
    let now = frontend.at;
    match flows::find(context, from).or_else(|| flows::entry_for(context, client, now)) {
        Some(flow) => flows::begin(flow, from, from, now),
        None => maps::count_trouble(trouble::STORAGE),
    }
}

/// Refuses with ECONNREFUSED; where the kernel cannot, nftables refuses the packets instead.
#[inline(always)]
fn refuse(context: &SockAddrContext, to: &Endpoint) -> i32 {
    if !maps::can_refuse() {
        return ALLOW;
    }
    trace::refused(context, to);
    // SAFETY: the helper sets the return value of the system call, and writes no memory.
    unsafe { bpf_set_retval(-ECONNREFUSED) };
    REFUSE
}
