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

/// Where a socket that connects goes.
enum Way {
    /// To a backend, which is remembered.
    Led(Endpoint),
    /// Where it asked to go.
    AsAsked,
    /// Nowhere.
    Refused,
}

/// A socket connects. For TCP this is every connection; a UDP socket gets a peer. What the socket was told before is over:
/// it has another peer now.
#[inline(always)]
pub(super) fn connect(context: &SockAddrContext, family: Family) -> i32 {
    let protocol = socket::protocol(context);
    if protocol != TCP && protocol != UDP {
        return ALLOW;
    }
    let to = socket::address(context, family);
    let Some(client) = socket::client(context) else { return ALLOW };
    match way(context, family, protocol, &to, client) {
        Way::Led(backend) => {
            socket::set_address(context, family, &backend);
            tell::led(context, &to, &backend);
            ALLOW
        }
        Way::AsAsked => {
            // Most sockets are new: to look for what they were told would cost each of them 80 ns.
            if socket::has_port(context) {
                seats::forget(context);
            }
            ALLOW
        }
        Way::Refused => refuse(context, &to),
    }
}

#[inline(always)]
fn way(context: &SockAddrContext, family: Family, protocol: u32, to: &Endpoint, client: Client) -> Way {
    let frontend = match resolve::find(to, protocol, client) {
        Found::Nothing => return Way::AsAsked,
        // A UDP socket may live to see the Service come: its packets are refused instead.
        Found::UnknownPort if protocol == TCP => return Way::Refused,
        Found::UnknownPort => return Way::AsAsked,
        Found::Frontend(frontend) => frontend,
    };
    let choice = resolve::choice(frontend, client);
    if choice.is_for_packets() || socket::is_at_home(context, client, protocol, to) {
        return Way::AsAsked;
    }
    if !resolve::serves(choice) {
        if protocol != TCP {
            return Way::AsAsked;
        }
        resolve::refused(frontend);
        return Way::Refused;
    }
    let cookie = socket::cookie(context);
    if !seats::is_forgotten_in_time(cookie) {
        return Way::AsAsked;
    }
    let known = if protocol == UDP { goes_on(context, to, frontend) } else { None };
    let backend = match known {
        Some(backend) => Some(backend),
        None => resolve::pick(frontend, choice, client),
    };
    let Some(backend) = backend else { return Way::AsAsked };
    if socket::cannot_reach(context, family, &backend) {
        return Way::AsAsked;
    }
    let mut origin = Origin { cookie, since: frontend.at, service: *to, backend, protocol, group: 0 };
    if !seats::remember(&mut origin, client) {
        return Way::AsAsked;
    }
    resolve::served(frontend);
    Way::Led(backend)
}

/// The backend that a socket speaks to already for this Service: connection tracking would have the one flow go on.
#[inline(always)]
fn goes_on(context: &SockAddrContext, to: &Endpoint, frontend: Frontend) -> Option<Endpoint> {
    // One without a port is new, or lost it together with its peer: then the flow is another.
    if !socket::has_port(context) {
        return None;
    }
    let mut backend = *to;
    (begun(context, to, resolve::serving(frontend)?, frontend.at, &mut backend) != 0).then_some(backend)
}

/// Whether a socket speaks to a backend for this Service, by address or because it is connected, that is in this set still; and to
/// which.
///
/// A function of its own, for the reason of [`peer`].
#[inline(never)]
fn begun(context: &SockAddrContext, to: &Endpoint, serving: u32, now: u64, backend: &mut Endpoint) -> u32 {
    // When a socket that is connected sent last is not known.
    let (known, since, rested) = match flows::find(context, to) {
        Some(flow) => (flows::backend(flow), flows::since(flow), now.wrapping_sub(flows::since(flow))),
        None => match seats::recall(context) {
            Some(told) if socket::same(&told.service, to) => (told.backend, told.since, 0),
            _ => return 0,
        },
    };
    if rested > flows::REST || !resolve::is_member(serving, &known, since) {
        return 0;
    }
    *backend = known;
    1
}

/// Where a datagram goes: a number, because functions of the kernel's programs return no more.
mod goes {
    pub(super) const AS_ASKED: u32 = 0;
    pub(super) const REFUSED: u32 = 1;
    /// To a backend.
    pub(super) const LED: u32 = 2;
    /// The same, for the first time.
    pub(super) const MET: u32 = 3;
}

/// A UDP socket sends to an address, which it may do with a peer and without one.
#[inline(always)]
pub(super) fn send(context: &SockAddrContext, family: Family) -> i32 {
    if socket::protocol(context) != UDP {
        return ALLOW;
    }
    let to = socket::address(context, family);
    let mut backend = to;
    let relation = match peer(context, &to, &mut backend) {
        is::ANY if socket::sends_to_itself(context, family) => is::ITSELF,
        relation => relation,
    };
    match datagram(context, &to, relation, &mut backend) {
        goes::REFUSED => return refuse(context, &to),
        way @ (goes::LED | goes::MET) if !socket::cannot_send(context, family, &backend) => {
            socket::set_address(context, family, &backend);
            if way == goes::MET {
                tell::led(context, &to, &backend);
            }
        }
        _ => {}
    }
    ALLOW
}

/// Where a datagram goes, and to which backend.
///
/// A function of its own, because what logs is called beside it then and not from it: the kernel adds up the stacks of functions
/// that call each other ("combined stack size of 2 calls is 528", Linux 6.18).
#[inline(never)]
fn datagram(context: &SockAddrContext, to: &Endpoint, relation: u32, backend: &mut Endpoint) -> u32 {
    let Some(client) = socket::client(context) else { return goes::AS_ASKED };
    let frontend = match resolve::find(to, UDP, client) {
        Found::Nothing => {
            if relation != is::BACKEND {
                flows::ask_backend(context, to);
            }
            return goes::AS_ASKED;
        }
        // It is connected to that address, or hears nothing from there.
        _ if relation == is::LEFT => return goes::AS_ASKED,
        // An answer to a process of the host by the one who answers at the ClusterIP in the Service's place.
        Found::UnknownPort if relation == is::ITSELF => return goes::AS_ASKED,
        Found::UnknownPort => return goes::REFUSED,
        Found::Frontend(frontend) => frontend,
    };
    let choice = resolve::choice(frontend, client);
    if choice.is_for_packets() {
        return goes::AS_ASKED;
    }
    if relation == is::SERVICE {
        return goes::LED;
    }
    let way = flow(context, to, frontend, client, backend);
    if way == goes::AS_ASKED && !resolve::serves(choice) && !socket::is_at_home(context, client, UDP, to) {
        resolve::refused(frontend);
        return goes::REFUSED;
    }
    way
}

/// What an address is to a socket: a number, as for [`goes`].
mod is {
    /// Nothing.
    pub(super) const ANY: u32 = 0;
    /// The Service that it is connected to.
    pub(super) const SERVICE: u32 = 1;
    /// The backend that it is connected to. An IPv6 socket with an IPv4-mapped peer sends there by address, whether or not the
    /// process names one (`udpv6_sendmsg`).
    pub(super) const BACKEND: u32 = 2;
    /// The address that the socket itself has.
    pub(super) const ITSELF: u32 = 3;
    /// Anything, to a socket that is connected as it asked, with no backend in between: it would not hear a backend.
    pub(super) const LEFT: u32 = 4;
}

/// What an address is to a connected socket, and the backend if it is the Service.
///
/// A function of its own, because the verifier forgets after a call which way led to its result, and follows what comes behind
/// once for each result only: with it in place the kernel looked at `sendmsg4` for 66 ms instead of 26 (Linux 6.18).
#[inline(never)]
fn peer(context: &SockAddrContext, to: &Endpoint, backend: &mut Endpoint) -> u32 {
    if !socket::is_connected(context) {
        return is::ANY;
    }
    let Some(told) = seats::recall(context) else { return is::LEFT };
    if socket::same(&told.service, to) {
        *backend = told.backend;
        return is::SERVICE;
    }
    if socket::same(&told.backend, to) { is::BACKEND } else { is::ANY }
}

/// The backend this socket's datagrams to a Service go to: the same one for as long as it serves, as connection tracking
/// would have it (K2). As asked when there is none, or none can be remembered.
#[inline(always)]
fn flow(
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
        if now.wrapping_sub(since) <= flows::REST
            && (socket::same(backend, to) || resolve::still_serves(frontend, backend, since))
        {
            if let Some(flow) = known {
                flows::touch(flow, now);
            }
            return goes::LED;
        }
    }
    if !resolve::serves(choice) || socket::is_at_home(context, client, UDP, to) {
        return goes::AS_ASKED;
    }
    let Some(picked) = resolve::pick(frontend, choice, client) else { return goes::AS_ASKED };
    *backend = picked;
    let Some(flow) = known.or_else(|| flows::place(context, client, now)) else {
        maps::count(trouble::STORAGE);
        return goes::AS_ASKED;
    };
    flows::begin(flow, to, backend, now);
    resolve::served(frontend);
    goes::MET
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
    let now = frontend.at;
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
