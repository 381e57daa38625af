//! `flows` and `crowds`: the Services that an unconnected socket sends to.
//!
//! In: a socket and a Service's address. Out: the entry of that flow.
//!
//! The kernel charges this memory to the agent, so there is little of it: room for a few flows from the first
//! translation on, and room for many only while a socket has more. Each group of processes has its share.

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

/// An idle flow may get another backend after this many nanoseconds: connection tracking keeps a UDP stream
/// as long.
pub(super) const IDLE: u64 = 120_000_000_000;

/// When the socket last sent there; 0 if the entry is free.
#[inline(always)]
pub(super) fn since(flow: &Flow) -> u64 {
    u64::from(flow.since[1]) << 32 | u64::from(flow.since[0])
}

/// A bit in the low half of `since`, which loses a nanosecond of precision for it: the socket has sent to the
/// backend's own address since.
const SET_ASIDE: u32 = 1;

/// Stores the time, and clears [`SET_ASIDE`].
#[inline(always)]
pub(super) fn touch(flow: &mut Flow, now: u64) {
    flow.since = [now as u32 & !SET_ASIDE, (now >> 32) as u32];
}

/// Whether an answer from this backend is shown as the flow's Service.
#[inline(always)]
fn is_from(flow: &Flow, from: &Endpoint) -> bool {
    flow.since[0] & SET_ASIDE == 0 && socket::same(&backend(flow), from)
}

#[inline(always)]
pub(super) fn backend(flow: &Flow) -> Endpoint {
    Endpoint { address: flow.backend, port: flow.backend_port, zero: 0 }
}

/// Overwrites the entry with a new flow.
#[inline(always)]
pub(super) fn begin(flow: &mut Flow, service: &Endpoint, backend: &Endpoint, now: u64) {
    // Word by word, because the compiler would emit a function call for an array.
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

/// Finds the flow to a Service's address.
#[inline(always)]
pub(super) fn find(context: &SockAddrContext, to: &Endpoint) -> Option<&'static mut Flow> {
    let flows = of(context)?;
    for index in 0..FEW {
        if is_to(&flows.flows[index], to) {
            return Some(&mut flows.flows[index]);
        }
    }
    let crowd = crowd_of(context, flows)?;
    let mut search = Search::new(crowd);
    for index in 0..MANY {
        let flow = search.flow(index);
        if since(flow) == 0 {
            break;
        }
        if is_to(flow, to) {
            search.take(index);
            break;
        }
    }
    if search.has_found() { Some(search.found()) } else { None }
}

/// The source to show for an answer from this backend: of the Services that have this backend, the one that
/// the socket sent to last.
#[inline(always)]
pub(super) fn service_of(context: &SockAddrContext, from: &Endpoint) -> Option<Endpoint> {
    let flows = of(context)?;
    let (mut latest, mut found) = (0, None);
    for index in 0..FEW {
        let flow = &flows.flows[index];
        if since(flow) > latest && is_from(flow, from) {
            (latest, found) = (since(flow), Some(index));
        }
    }
    if let Some(crowd) = crowd_of(context, flows) {
        let mut search = Search::after(crowd, latest);
        for index in 0..MANY {
            let flow = search.flow(index);
            if since(flow) == 0 {
                break;
            }
            if since(flow) > search.since() && is_from(flow, from) {
                search.take(index);
            }
        }
        if search.has_found() {
            return Some(service(search.found()));
        }
    }
    found.map(|index| service(&flows.flows[index % FEW]))
}

/// Handles a datagram to an address that is no Service's. If it is the backend of a flow, the process means
/// the backend itself from now on, and [`service_of`] shows answers from there unchanged.
#[inline(always)]
pub(super) fn note_backend_address(context: &SockAddrContext, to: &Endpoint) {
    let Some(flows) = of(context) else { return };
    for index in 0..FEW {
        set_aside(&mut flows.flows[index], to);
    }
    let Some(crowd) = crowd_of(context, flows) else { return };
    for index in 0..MANY {
        set_aside(&mut crowd.flows[index], to);
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

/// The entry for a new flow: a free or an idle one, or else the one that has been idle longest. `None` if
/// there is no room for this socket.
#[inline(always)]
pub(super) fn entry_for(context: &SockAddrContext, client: Client, now: u64) -> Option<&'static mut Flow> {
    let flows = of_or_new(context, client)?;
    let mut oldest = 0;
    let mut oldest_since = u64::MAX;
    for index in 0..FEW {
        let since = since(&flows.flows[index]);
        if since == 0 || now.wrapping_sub(since) > IDLE {
            return Some(&mut flows.flows[index]);
        }
        if since < oldest_since {
            (oldest, oldest_since) = (index, since);
        }
    }
    let Some(crowd) = crowd_or_new(context, flows) else {
        maps::count_trouble(trouble::FLOWS);
        return Some(&mut flows.flows[oldest % FEW]);
    };
    let mut search = Search::new(crowd);
    for index in 0..MANY {
        let flow = search.flow(index);
        if since(flow) == 0 || now.wrapping_sub(since(flow)) > IDLE {
            search.take(index);
            return Some(search.found());
        }
        if since(flow) < search.since() {
            search.take(index);
        }
    }
    maps::count_trouble(trouble::FLOWS);
    Some(search.found())
}

#[inline(always)]
fn of(context: &SockAddrContext) -> Option<&'static mut Flows> {
    // SAFETY: the socket is the hook's own, and the hook holds its lock: nothing else writes a value that
    // exists.
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

/// Subtracts a closed socket from `accounts`. The kernel frees its memory.
#[inline(always)]
pub(super) fn release(context: &SockContext) {
    // SAFETY: the kernel gives every program of this type a valid context; the verifier checks each access.
    if unsafe { (*context.sock).protocol } != UDP {
        return;
    }
    let map = (&raw const FLOWS).cast_mut().cast();
    // SAFETY: the context of this hook is the socket, and a value of this map has this type.
    let found = unsafe {
        bpf_sk_storage_get(map, context.as_ptr(), core::ptr::null_mut(), 0).cast::<Flows>().as_ref()
    };
    let Some(flows) = found else { return };
    accounts::add(account::FLOWS, flows.group, -1);
    if flows.crowded != 0 {
        accounts::add(account::CROWDS, flows.group, -1);
    }
}
