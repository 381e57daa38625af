//! From what a client asks for to the backend it gets.
//!
//! In: an address, a port, a protocol and who asks. Out: the frontend, and one of its backends: the one the client is
//! to stay with, or one by chance.
//!
//! An element of a hash may be another's by the time it is read, so its value says which key it belongs to. Numbers of ports, records
//! and slots are given to others only when no program runs any more that could have read them.

use aya_ebpf::{
    bindings::{BPF_EXIST, BPF_NOEXIST},
    helpers::generated::{bpf_get_prandom_u32, bpf_ktime_get_ns},
};
use proxy_ebpf::{
    Address, Affinity, AffinityKey, Endpoint, FrontendKey, FrontendValue, Member, MemberKey, Record, Slots,
    account, flag, kind, namespace, select, set, trouble, verdict,
};

use super::{
    account as accounts,
    maps::{self, AFFINITIES, FRONTENDS, MEMBERS, PORTS, RECORDS, SLOTS, TALLIES},
    socket::{self, Client, MAPPED, is_v4},
};

const SECOND: u64 = 1_000_000_000;
/// How often an element is looked for that was another's when it was read.
const TRIES: u32 = 2;

/// What an address and port is to a client.
pub(super) enum Found {
    /// No Service's.
    Nothing,
    /// A port the Service of this ClusterIP does not have (F4).
    UnknownPort,
    /// A frontend.
    Frontend(Frontend),
}

/// A frontend, as it was at one instant.
#[derive(Clone, Copy)]
pub(super) struct Frontend {
    value: FrontendValue,
    record: &'static Record,
    /// The time before it was looked up, in nanoseconds of CLOCK_MONOTONIC. A socket that is led by it must not count as one that
    /// was led later than a change that it does not know.
    pub(super) at: u64,
}

/// What a frontend does for a client.
#[derive(Clone, Copy)]
pub(super) struct Choice {
    verdict: u8,
    slots: Slots,
    /// The set's number in `members`.
    set: u32,
}

/// An element of `frontends`.
enum Element {
    Absent,
    /// It was there, and was removed or replaced again and again while it was read.
    Fleeting,
    There(FrontendValue),
}

/// Looks a destination up: exactly (R1), then as a port of its address, then as a NodePort (R13).
#[inline(always)]
pub(super) fn find(to: &Endpoint, protocol: u32, client: Client) -> Found {
    let exact =
        FrontendKey { address: to.address, port: to.port, protocol: protocol as u8, kind: kind::FRONTEND };
    match get(&exact) {
        Element::There(value) => return frontend(value),
        // Left to the packets, which decide by what is there when they come.
        Element::Fleeting => return Found::Nothing,
        Element::Absent => {}
    }
    let whole = FrontendKey { port: 0, protocol: 0, kind: kind::ADDRESS, ..exact };
    let Element::There(whole) = get(&whole) else { return Found::Nothing };
    if whole.flags() & flag::CLUSTER_IP != 0 {
        return Found::UnknownPort;
    }
    if whole.flags() & flag::LOOPBACK != 0 && !client.host {
        return Found::Nothing;
    }
    match get(&node_port(is_v4(&to.address), to.port, protocol)) {
        Element::There(value) => frontend(value),
        _ => Found::Nothing,
    }
}

/// The key of a NodePort of a family.
#[inline(always)]
fn node_port(v4: bool, port: u16, protocol: u32) -> FrontendKey {
    let address = if v4 { [0, 0, MAPPED, 0] } else { [0; 4] };
    FrontendKey { address, port, protocol: protocol as u8, kind: kind::NODE_PORT }
}

/// Whether there is a frontend at an address and a port.
#[inline(always)]
pub(super) fn is_frontend(address: &Address, port: u16, protocol: u32) -> bool {
    let key = FrontendKey { address: *address, port, protocol: protocol as u8, kind: kind::FRONTEND };
    matches!(get(&key), Element::There(_))
}

/// An element of `frontends`.
#[inline(always)]
fn get(key: &FrontendKey) -> Element {
    for _ in 0..TRIES {
        let Some(value) = FRONTENDS.get_ptr(key) else { return Element::Absent };
        // SAFETY: an aligned word of the map. Volatile, because it is to be read once.
        let value = unsafe { value.read_volatile() };
        if value.is_of(key) {
            return Element::There(value);
        }
    }
    Element::Fleeting
}

/// What a frontend leads to now.
#[inline(always)]
fn frontend(value: FrontendValue) -> Found {
    let at = now();
    let Some(port) = PORTS.get_ptr(value.number()) else { return Found::Nothing };
    // SAFETY: an aligned word of the map. Volatile, because it is to be read once.
    let record = unsafe { port.read_volatile() };
    match RECORDS.get(record as u32) {
        Some(record) => Found::Frontend(Frontend { value, record, at }),
        None => Found::Nothing,
    }
}

/// What a frontend does for a client.
#[inline(always)]
pub(super) fn choice(frontend: Frontend, client: Client) -> Choice {
    let column = &frontend.record.columns[frontend.value.column() as usize];
    let verdict = if client.host { column.host } else { column.pod };
    let verdict =
        if frontend.value.is_for_packets() { verdict::PASS } else { verdict & !verdict::MASQUERADE };
    let kind = u32::from(verdict == verdict::LOCAL);
    Choice {
        verdict,
        slots: frontend.record.sets[kind as usize],
        set: set::number(frontend.value.number(), kind),
    }
}

impl Choice {
    /// Whether packets decide about this client.
    #[inline(always)]
    pub(super) fn is_for_packets(self) -> bool {
        self.verdict == verdict::PASS || self.verdict == verdict::DROP
    }
}

#[inline(always)]
fn now() -> u64 {
    // SAFETY: takes nothing and touches nothing.
    unsafe { bpf_ktime_get_ns() }
}

/// Whether a backend has been in a set since before `chosen`, without a break (A4, A5).
#[inline(always)]
pub(super) fn is_member(set: u32, backend: &Endpoint, chosen: u64) -> bool {
    let key = MemberKey { set, backend: *backend };
    for _ in 0..TRIES {
        let Some(member) = MEMBERS.get_ptr(key) else { return false };
        // SAFETY: an aligned word of the map. Volatile, because it is to be read once.
        let member: Member = unsafe { member.read_volatile() };
        if member.is_of(&key) {
            return member.joined_before(chosen);
        }
    }
    false
}

/// The backend for a new flow.
#[inline(always)]
pub(super) fn pick(frontend: Frontend, choice: Choice, client: Client) -> Option<Endpoint> {
    let now = frontend.at;
    if frontend.record.affinity == 0 {
        return draw(choice);
    }
    let key = AffinityKey { client: namespace(client.namespace), port: frontend.value.number() };
    let life = u64::from(frontend.record.affinity) * SECOND;
    let Some(known) = remembered(&key) else { return meet(key, choice, client, [now, life]) };
    let stays = now <= known.until && is_member(choice.set, &known.backend, known.chosen);
    // To write it down costs as much as the rest, so a client that comes all the time has it done now and then.
    if stays && now.wrapping_sub(known.chosen) < (life >> 8).min(SECOND) {
        return Some(known.backend);
    }
    let backend = if stays { known.backend } else { draw(choice)? };
    let affinity =
        Affinity { key, backend, chosen: now, until: now.wrapping_add(life), group: known.group, zero: 0 };
    // A client whose time was over may have been removed meanwhile: then the next connection is its first.
    let _ = AFFINITIES.insert(key, affinity, BPF_EXIST.into());
    Some(backend)
}

/// The backend of a client that is not known yet.
#[inline(always)]
fn meet(key: AffinityKey, choice: Choice, client: Client, [now, life]: [u64; 2]) -> Option<Endpoint> {
    let backend = draw(choice)?;
    let group = accounts::group(client.namespace);
    if accounts::may_take(account::CLIENTS, group, maps::room_for_clients()) {
        let affinity = Affinity { key, backend, chosen: now, until: now.wrapping_add(life), group, zero: 0 };
        if AFFINITIES.insert(key, affinity, BPF_NOEXIST.into()).is_ok() {
            accounts::add(account::CLIENTS, group, 1);
            return Some(backend);
        }
        // Another socket of the client was faster: both stay with its backend.
        if let Some(known) = remembered(&key)
            && is_member(choice.set, &known.backend, known.chosen)
        {
            return Some(known.backend);
        }
    }
    maps::count(trouble::AFFINITY_FULL);
    Some(backend)
}

/// What is remembered for a client. The element may be another client's by the time it is read, so the key in it is read
/// last.
#[inline(always)]
fn remembered(key: &AffinityKey) -> Option<Affinity> {
    let found = AFFINITIES.get_ptr(key)?;
    // SAFETY: an element of the map, whose memory stays what it is for as long as a program runs. Volatile, so that it is
    // done in this order.
    unsafe {
        let known = Affinity {
            key: *key,
            backend: socket::read(&raw const (*found).backend),
            chosen: (&raw const (*found).chosen).read_volatile(),
            until: (&raw const (*found).until).read_volatile(),
            group: (&raw const (*found).group).read_volatile(),
            zero: 0,
        };
        let client = &raw const (*found).key.client;
        let is_own = (&raw const (*found).key.port).read_volatile() == key.port
            && (&raw const (*client)[2]).read_volatile() == key.client[2]
            && (&raw const (*client)[3]).read_volatile() == key.client[3]
            && (&raw const (*client)[0]).read_volatile() == key.client[0]
            && (&raw const (*client)[1]).read_volatile() == key.client[1];
        is_own.then_some(known)
    }
}

/// One of the backends, each as likely as the other (R4).
#[inline(always)]
fn draw(choice: Choice) -> Option<Endpoint> {
    // SAFETY: takes nothing and touches nothing but the generator.
    let random = unsafe { bpf_get_prandom_u32() };
    let slot = select(random, choice.slots.count);
    let slot = slot.and_then(|slot| SLOTS.get(choice.slots.first.wrapping_add(slot)));
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
pub(super) fn served(frontend: Frontend) {
    if let Some(tally) = TALLIES.get_ptr_mut(frontend.value.number()) {
        // SAFETY: an aligned word of the map, which programs change by this addition only.
        unsafe { maps::add(&raw mut (*tally).served, 1) };
    }
}

/// Counts a flow that was refused for want of endpoints.
#[inline(always)]
pub(super) fn refused(frontend: Frontend) {
    if let Some(tally) = TALLIES.get_ptr_mut(frontend.value.number()) {
        // SAFETY: as in `served`.
        unsafe { maps::add(&raw mut (*tally).refused, 1) };
    }
}

/// Whether a frontend leads somewhere.
#[inline(always)]
pub(super) fn serves(choice: Choice) -> bool {
    verdict::set(choice.verdict).is_some()
}

/// Whether a backend still serves what it began, in the set of those that do.
#[inline(always)]
pub(super) fn still_serves(frontend: Frontend, backend: &Endpoint, since: u64) -> bool {
    serving(frontend).is_some_and(|serving| is_member(serving, backend, since))
}

/// The set of those that serve, where its members are known.
#[inline(always)]
pub(super) fn serving(frontend: Frontend) -> Option<u32> {
    (frontend.record.flags & flag::MEMBERS != 0).then(|| set::number(frontend.value.number(), set::SERVING))
}
