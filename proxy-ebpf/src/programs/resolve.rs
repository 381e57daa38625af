//! From what a client asks for to the backend it gets.
//!
//! In: an address, a port, a protocol and who asks. Out: the frontend, and one of its backends: the one the client is
//! to stay with, or one by chance.

use aya_ebpf::{
    bindings::BPF_NOEXIST,
    helpers::generated::{bpf_get_prandom_u32, bpf_ktime_get_ns},
};
use proxy_ebpf::{
    Affinity, AffinityKey, Choice, Endpoint, FrontendKey, FrontendValue, MemberKey, flag, select, trouble,
    verdict,
};

use super::{
    maps::{self, AFFINITIES, FRONTENDS, MEMBERS, SLOTS, TALLIES},
    socket::{self, Client, MAPPED, is_v4},
};

const SECOND: u64 = 1_000_000_000;

/// What an address and port is to a client.
pub(super) enum Found {
    /// No Service's.
    Nothing,
    /// A port the Service of this ClusterIP does not have (F4).
    UnknownPort,
    /// A frontend.
    Frontend(&'static FrontendValue),
}

/// Looks a destination up: exactly (R1), then as a port of its address, then as a NodePort (R13).
#[inline(always)]
pub(super) fn find(to: &Endpoint, protocol: u32, client: Client) -> Found {
    let exact = FrontendKey { address: to.address, port: to.port, protocol: protocol as u8, zero: 0 };
    if let Some(frontend) = get(exact) {
        return Found::Frontend(frontend);
    }
    let Some(whole) = get(FrontendKey { port: 0, protocol: 0, ..exact }) else { return Found::Nothing };
    if whole.flags & flag::CLUSTER_IP != 0 {
        return Found::UnknownPort;
    }
    if whole.flags & flag::LOOPBACK != 0 && !client.host {
        return Found::Nothing;
    }
    node_port(is_v4(&to.address), to.port, protocol).map_or(Found::Nothing, Found::Frontend)
}

/// The NodePort of a family.
#[inline(always)]
pub(super) fn node_port(v4: bool, port: u16, protocol: u32) -> Option<&'static FrontendValue> {
    let address = if v4 { [0, 0, MAPPED, 0] } else { [0; 4] };
    get(FrontendKey { address, port, protocol: protocol as u8, zero: 0 })
}

/// An element of `frontends`.
#[inline(always)]
pub(super) fn get(key: FrontendKey) -> Option<&'static FrontendValue> {
    // SAFETY: elements of this map are allocated one by one and freed after a grace period, which a program's run is
    // within; a changed frontend is another element.
    unsafe { FRONTENDS.get(key) }
}

/// What a frontend does for a client.
#[inline(always)]
pub(super) fn choice(frontend: &FrontendValue, client: Client) -> &Choice {
    if client.host { &frontend.host } else { &frontend.pod }
}

/// The time, in nanoseconds of CLOCK_MONOTONIC.
#[inline(always)]
pub(super) fn now() -> u64 {
    // SAFETY: takes nothing and touches nothing.
    unsafe { bpf_ktime_get_ns() }
}

/// Whether a backend has been in a set since before `chosen`, without a break (A4, A5).
#[inline(always)]
pub(super) fn is_member(set: u32, backend: &Endpoint, chosen: u64) -> bool {
    // SAFETY: as in `get`; the value is a word.
    let joined = unsafe { MEMBERS.get(MemberKey { set, backend: *backend }) };
    joined.is_some_and(|joined| *joined <= chosen)
}

/// The backend for a new flow.
#[inline(always)]
pub(super) fn pick(frontend: &FrontendValue, choice: &Choice, client: Client, now: u64) -> Option<Endpoint> {
    if frontend.affinity == 0 {
        return draw(choice);
    }
    let key = AffinityKey { client: client.namespace, port: frontend.port, zero: 0 };
    let until = now.wrapping_add(u64::from(frontend.affinity) * SECOND);
    if let Some(known) = AFFINITIES.get_ptr_mut(key) {
        // SAFETY: elements of this map are allocated one by one and freed after a grace period. Several processors may
        // write one at a time, and each writes a backend of the set.
        let (known, backend) = unsafe { (&mut *known, socket::read(&raw const (*known).backend)) };
        let stays = now <= known.until && is_member(choice.set, &backend, known.chosen);
        let backend = if stays { backend } else { draw(choice)? };
        *known = Affinity { chosen: now, until, backend, zero: 0 };
        return Some(backend);
    }
    let backend = draw(choice)?;
    let affinity = Affinity { chosen: now, until, backend, zero: 0 };
    if AFFINITIES.insert(key, affinity, BPF_NOEXIST.into()).is_ok() {
        return Some(backend);
    }
    // Another socket of the client was faster: both stay with its backend.
    if let Some(known) = AFFINITIES.get_ptr(key) {
        // SAFETY: as above.
        return Some(unsafe { socket::read(&raw const (*known).backend) });
    }
    maps::count(trouble::AFFINITY_FULL);
    Some(backend)
}

/// One of the backends, each as likely as the other (R4).
#[inline(always)]
fn draw(choice: &Choice) -> Option<Endpoint> {
    // SAFETY: takes nothing and touches nothing but the generator.
    let random = unsafe { bpf_get_prandom_u32() };
    let slot = select(random, choice.count).and_then(|slot| SLOTS.get(choice.first.wrapping_add(slot)));
    match slot {
        // SAFETY: an element of the map.
        Some(backend) if backend.port != 0 => Some(unsafe { socket::read(backend) }),
        _ => {
            maps::count(trouble::SLOT);
            None
        }
    }
}

/// Counts a flow that was led to a backend.
#[inline(always)]
pub(super) fn served(frontend: &FrontendValue) {
    if let Some(tally) = TALLIES.get_ptr_mut(frontend.port) {
        // SAFETY: an aligned word of the map, which programs change by this addition only.
        unsafe { maps::add(&raw mut (*tally).served, 1) };
    }
}

/// Counts a flow that was refused for want of endpoints.
#[inline(always)]
pub(super) fn refused(frontend: &FrontendValue) {
    if let Some(tally) = TALLIES.get_ptr_mut(frontend.port) {
        // SAFETY: as in `served`.
        unsafe { maps::add(&raw mut (*tally).refused, 1) };
    }
}

/// Whether a frontend leads somewhere.
#[inline(always)]
pub(super) fn serves(choice: &Choice) -> bool {
    choice.verdict == verdict::SERVE
}

/// Whether a frontend's backends can be asked for by [`is_member`].
#[inline(always)]
pub(super) fn has_members(frontend: &FrontendValue) -> bool {
    frontend.flags & flag::MEMBERS != 0
}
