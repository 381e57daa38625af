//! Where unconnected sockets remember the Services they speak to.
//!
//! In: a socket and a Service's address. Out: the place of that flow.
//!
//! What the kernel allocates for this counts as the agent's memory, so it is little: room for a few flows, once a backend was
//! picked, and for many only while a socket has them. And each group of processes has its share.

use aya_ebpf::{
    EbpfContext as _,
    helpers::generated::bpf_sk_storage_get,
    programs::{SockAddrContext, SockContext},
};
use proxy_ebpf::{Crowd, Endpoint, FEW, Flow, Flows, MANY, account, trouble};

use super::{
    account as accounts,
    maps::{self, CROWDS, FLOWS},
    search::Search,
    socket::{self, Client, UDP},
};

/// A flow that rested this long may go to another backend: what connection tracking grants a UDP stream.
pub(super) const REST: u64 = 120_000_000_000;

/// When a socket last sent there; 0 where it never did.
#[inline(always)]
pub(super) fn since(flow: &Flow) -> u64 {
    u64::from(flow.since[1]) << 32 | u64::from(flow.since[0])
}

/// In the low half of `since`, which is a nanosecond less precise for it: the socket has asked the backend itself since.
const SET_ASIDE: u32 = 1;

/// A socket sends there now.
#[inline(always)]
pub(super) fn touch(flow: &mut Flow, now: u64) {
    flow.since = [now as u32 & !SET_ASIDE, (now >> 32) as u32];
}

/// Whether an answer from this backend belongs to the flow.
#[inline(always)]
fn is_from(flow: &Flow, from: &Endpoint) -> bool {
    flow.since[0] & SET_ASIDE == 0 && socket::same(&backend(flow), from)
}

/// Where it gets.
#[inline(always)]
pub(super) fn backend(flow: &Flow) -> Endpoint {
    Endpoint { address: flow.backend, port: flow.backend_port, zero: 0 }
}

/// Begins a flow.
#[inline(always)]
pub(super) fn begin(flow: &mut Flow, service: &Endpoint, backend: &Endpoint, now: u64) {
    // Word by word: the compiler would call a function for arrays.
    for word in 0..4 {
        flow.service[word] = service.address[word];
        flow.backend[word] = backend.address[word];
    }
    flow.service_port = service.port;
    flow.backend_port = backend.port;
    touch(flow, now);
}

#[inline(always)]
fn is_to(flow: &Flow, service: &Endpoint) -> bool {
    flow.service_port == service.port && socket::same_address(&flow.service, &service.address)
}

/// The flow to a Service that a socket has.
#[inline(always)]
pub(super) fn find(context: &SockAddrContext, to: &Endpoint) -> Option<&'static mut Flow> {
    let flows = of(context)?;
    for place in 0..FEW {
        if is_to(&flows.flows[place], to) {
            return Some(&mut flows.flows[place]);
        }
    }
    let crowd = crowd_of(context, flows)?;
    let mut search = Search::new(crowd);
    for place in 0..MANY {
        let flow = search.flow(place);
        if since(flow) == 0 {
            break;
        }
        if is_to(flow, to) {
            search.take(place);
            break;
        }
    }
    if search.is_over() { Some(search.found()) } else { None }
}

/// What an answer from this backend is shown as: the Service among those with this backend that the socket sent to last.
#[inline(always)]
pub(super) fn service_of(context: &SockAddrContext, from: &Endpoint) -> Option<Endpoint> {
    let flows = of(context)?;
    let (mut latest, mut found) = (0, None);
    for place in 0..FEW {
        let flow = &flows.flows[place];
        if since(flow) > latest && is_from(flow, from) {
            (latest, found) = (since(flow), Some(place));
        }
    }
    if let Some(crowd) = crowd_of(context, flows) {
        let mut search = Search::after(crowd, latest);
        for place in 0..MANY {
            let flow = search.flow(place);
            if since(flow) == 0 {
                break;
            }
            if since(flow) > search.since() && is_from(flow, from) {
                search.take(place);
            }
        }
        if search.is_over() {
            return Some(service(search.found()));
        }
    }
    found.map(|place| service(&flows.flows[place % FEW]))
}

/// A socket sends to an address that is no Service's. If that is a backend it knows, it means the backend itself from now
/// on: what comes from there is shown as what it is.
#[inline(always)]
pub(super) fn ask_backend(context: &SockAddrContext, to: &Endpoint) {
    let Some(flows) = of(context) else { return };
    for place in 0..FEW {
        set_aside(&mut flows.flows[place], to);
    }
    let Some(crowd) = crowd_of(context, flows) else { return };
    for place in 0..MANY {
        set_aside(&mut crowd.flows[place], to);
    }
}

#[inline(always)]
fn set_aside(flow: &mut Flow, to: &Endpoint) {
    if since(flow) != 0 && socket::same(&backend(flow), to) {
        flow.since[0] |= SET_ASIDE;
    }
}

#[inline(always)]
fn service(flow: &Flow) -> Endpoint {
    let [a, b, c, d] = flow.service;
    Endpoint { address: [a, b, c, d], port: flow.service_port, zero: 0 }
}

/// A place for a flow the socket does not have: a free one, or that of one that rests; else the one that rested longest.
/// `None` where nothing more can be remembered for this socket.
#[inline(always)]
pub(super) fn place(context: &SockAddrContext, client: Client, now: u64) -> Option<&'static mut Flow> {
    let flows = of_or_new(context, client)?;
    let mut oldest = 0;
    let mut oldest_since = u64::MAX;
    for place in 0..FEW {
        let since = since(&flows.flows[place]);
        if since == 0 || now.wrapping_sub(since) > REST {
            return Some(&mut flows.flows[place]);
        }
        if since < oldest_since {
            (oldest, oldest_since) = (place, since);
        }
    }
    let Some(crowd) = crowd_or_new(context, flows) else {
        maps::count(trouble::FLOWS);
        return Some(&mut flows.flows[oldest % FEW]);
    };
    let mut search = Search::new(crowd);
    for place in 0..MANY {
        let flow = search.flow(place);
        if since(flow) == 0 || now.wrapping_sub(since(flow)) > REST {
            search.take(place);
            return Some(search.found());
        }
        if since(flow) < search.since() {
            search.take(place);
        }
    }
    maps::count(trouble::FLOWS);
    Some(search.found())
}

#[inline(always)]
fn of(context: &SockAddrContext) -> Option<&'static mut Flows> {
    // SAFETY: the socket is the hook's own, which holds its lock: what is not null is written here alone.
    unsafe { FLOWS.get_ptr_mut(context).as_mut() }
}

#[inline(always)]
fn of_or_new(context: &SockAddrContext, client: Client) -> Option<&'static mut Flows> {
    if let Some(flows) = of(context) {
        return Some(flows);
    }
    let group = accounts::group(client.namespace);
    if !accounts::may_take(account::FLOWS, group, account::MOST_FLOWS) {
        return None;
    }
    // SAFETY: as in `of`.
    let flows = unsafe { FLOWS.get_or_insert_ptr_mut(context, None).as_mut() }?;
    flows.group = group;
    accounts::add(account::FLOWS, group, 1);
    Some(flows)
}

#[inline(always)]
fn crowd_of(context: &SockAddrContext, flows: &Flows) -> Option<&'static mut Crowd> {
    if flows.crowded == 0 {
        return None;
    }
    // SAFETY: as in `of`.
    unsafe { CROWDS.get_ptr_mut(context).as_mut() }
}

#[inline(always)]
fn crowd_or_new(context: &SockAddrContext, flows: &mut Flows) -> Option<&'static mut Crowd> {
    if flows.crowded != 0 {
        return crowd_of(context, flows);
    }
    if !accounts::may_take(account::CROWDS, flows.group, account::MOST_CROWDS) {
        return None;
    }
    // SAFETY: as in `of`.
    let crowd = unsafe { CROWDS.get_or_insert_ptr_mut(context, None).as_mut() }?;
    flows.crowded = 1;
    accounts::add(account::CROWDS, flows.group, 1);
    Some(crowd)
}

/// Gives back what a socket that is closed counted for. Its memory the kernel frees.
#[inline(always)]
pub(super) fn forget(context: &SockContext) {
    // SAFETY: the kernel hands every program of this kind a valid context; the verifier checks each access.
    if unsafe { (*context.sock).protocol } != UDP {
        return;
    }
    let map = (&raw const FLOWS).cast_mut().cast();
    // SAFETY: the context of this hook is the socket; what is found is of the map's type.
    let found = unsafe {
        bpf_sk_storage_get(map, context.as_ptr(), core::ptr::null_mut(), 0).cast::<Flows>().as_ref()
    };
    let Some(flows) = found else { return };
    accounts::add(account::FLOWS, flows.group, -1);
    if flows.crowded != 0 {
        accounts::add(account::CROWDS, flows.group, -1);
    }
}
