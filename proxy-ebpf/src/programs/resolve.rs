//! From a destination to a backend.
//!
//! In: an address, a port, a protocol and the client. Out: the frontend, and one of its backends: the
//! client's own by session affinity, or a random one.
//!
//! The kernel may reuse an entry of a hash map before a program has read it, so each value contains a check
//! or a copy of its key. The agent reuses indices of ports, records and slots only after all programs that
//! could have read them have ended.

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
/// The most lookups of an entry when a program reads another key's value there.
const TRIES: u32 = 2;

/// The result of a lookup for one client.
pub(super) enum Lookup {
    /// The address and port belong to no Service.
    NoService,
    /// A ClusterIP, whose Service does not have this port (F4).
    UnknownPort,
    Frontend(Frontend),
}

/// A frontend, as it was at one instant.
#[derive(Clone, Copy)]
pub(super) struct Frontend {
    value: FrontendValue,
    record: &'static Record,
    /// The time before the record was looked up, in nanoseconds of CLOCK_MONOTONIC. A socket that is
    /// translated by this record must not count as newer than a change that the record does not contain.
    pub(super) at: u64,
}

/// The outcome of a frontend for one class of clients.
#[derive(Clone, Copy)]
pub(super) struct Choice {
    verdict: u8,
    slots: Slots,
    /// A [`set::number`].
    set: u32,
}

/// The result of reading an entry of `frontends`.
enum Entry {
    Absent,
    /// Each time it was found, the kernel reused it before it was read.
    Reused,
    Present(FrontendValue),
}

/// Looks a destination up: address and port (R1), then the address alone, then the port as a NodePort (R13).
#[inline(always)]
pub(super) fn find(to: &Endpoint, protocol: u32, client: Client) -> Lookup {
    let exact =
        FrontendKey { address: to.address, port: to.port, protocol: protocol as u8, kind: kind::FRONTEND };
    match get(&exact) {
        Entry::Present(value) => return frontend(value),
        // Left to nftables, which decides by its own state.
        Entry::Reused => return Lookup::NoService,
        Entry::Absent => {}
    }
    let address = FrontendKey { port: 0, protocol: 0, kind: kind::ADDRESS, ..exact };
    let Entry::Present(address) = get(&address) else { return Lookup::NoService };
    if address.flags() & flag::CLUSTER_IP != 0 {
        return Lookup::UnknownPort;
    }
    if address.flags() & flag::LOOPBACK != 0 && !client.host {
        return Lookup::NoService;
    }
    match get(&node_port(is_v4(&to.address), to.port, protocol)) {
        Entry::Present(value) => frontend(value),
        _ => Lookup::NoService,
    }
}

#[inline(always)]
fn node_port(v4: bool, port: u16, protocol: u32) -> FrontendKey {
    let address = if v4 { [0, 0, MAPPED, 0] } else { [0; 4] };
    FrontendKey { address, port, protocol: protocol as u8, kind: kind::NODE_PORT }
}

#[inline(always)]
pub(super) fn is_frontend(address: &Address, port: u16, protocol: u32) -> bool {
    let key = FrontendKey { address: *address, port, protocol: protocol as u8, kind: kind::FRONTEND };
    matches!(get(&key), Entry::Present(_))
}

/// Reads an entry of `frontends`.
#[inline(always)]
fn get(key: &FrontendKey) -> Entry {
    for _ in 0..TRIES {
        let Some(value) = FRONTENDS.get_ptr(key) else { return Entry::Absent };
        // SAFETY: an aligned word of the map. Volatile, so that it is read once.
        let value = unsafe { value.read_volatile() };
        if value.is_of(key) {
            return Entry::Present(value);
        }
    }
    Entry::Reused
}

/// Reads the record that the port refers to now.
#[inline(always)]
fn frontend(value: FrontendValue) -> Lookup {
    let at = now();
    let Some(port) = PORTS.get_ptr(value.port()) else { return Lookup::NoService };
    // SAFETY: an aligned word of the map. Volatile, so that it is read once.
    let record = unsafe { port.read_volatile() };
    match RECORDS.get(record as u32) {
        Some(record) => Lookup::Frontend(Frontend { value, record, at }),
        None => Lookup::NoService,
    }
}

/// Selects the outcome for the client's class.
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
        set: set::number(frontend.value.port(), kind),
    }
}

impl Choice {
    /// Whether the socket is left to nftables.
    #[inline(always)]
    pub(super) fn is_for_packets(self) -> bool {
        self.verdict == verdict::PASS || self.verdict == verdict::DROP
    }
}

#[inline(always)]
fn now() -> u64 {
    // SAFETY: the helper takes no arguments and writes no memory.
    unsafe { bpf_ktime_get_ns() }
}

/// Whether a backend has been in a set since before `chosen`, without a break (A4, A5).
#[inline(always)]
pub(super) fn is_member(set: u32, backend: &Endpoint, chosen: u64) -> bool {
    let key = MemberKey { set, backend: *backend };
    for _ in 0..TRIES {
        let Some(member) = MEMBERS.get_ptr(key) else { return false };
        // SAFETY: an aligned word of the map. Volatile, so that it is read once.
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
        return pick_random(choice);
    }
    let key = AffinityKey { client: namespace(client.namespace), port: frontend.value.port() };
    let life = u64::from(frontend.record.affinity) * SECOND;
    let Some(known) = known_client(&key) else {
        return pick_for_new_client(key, choice, client, [now, life]);
    };
    let stays = now <= known.until && is_member(choice.set, &known.backend, known.chosen);
    // An insert costs as much as the rest of the lookup, so the entry of a busy client is updated only now
    // and then.
    if stays && now.wrapping_sub(known.chosen) < (life >> 8).min(SECOND) {
        return Some(known.backend);
    }
    let backend = if stays { known.backend } else { pick_random(choice)? };
    let affinity =
        Affinity { key, backend, chosen: now, until: now.wrapping_add(life), group: known.group, zero: 0 };
    // The agent may have removed an expired client meanwhile. Then its next connection is a new client's.
    let _ = AFFINITIES.insert(key, affinity, BPF_EXIST.into());
    Some(backend)
}

/// Picks a backend and stores it.
#[inline(always)]
fn pick_for_new_client(
    key: AffinityKey,
    choice: Choice,
    client: Client,
    [now, life]: [u64; 2],
) -> Option<Endpoint> {
    let backend = pick_random(choice)?;
    let group = accounts::group(client.namespace);
    if accounts::may_take(account::CLIENTS, group, maps::room_for_clients()) {
        let affinity = Affinity { key, backend, chosen: now, until: now.wrapping_add(life), group, zero: 0 };
        if AFFINITIES.insert(key, affinity, BPF_NOEXIST.into()).is_ok() {
            accounts::add(account::CLIENTS, group, 1);
            return Some(backend);
        }
        // Another socket of the client was faster; both get its backend.
        if let Some(known) = known_client(&key)
            && is_member(choice.set, &known.backend, known.chosen)
        {
            return Some(known.backend);
        }
    }
    maps::count_trouble(trouble::AFFINITY_FULL);
    Some(backend)
}

/// Reads a client's entry. The kernel may reuse the entry for another client meanwhile, so the copy of the
/// key is read last.
#[inline(always)]
fn known_client(key: &AffinityKey) -> Option<Affinity> {
    let found = AFFINITIES.get_ptr(key)?;
    // SAFETY: an entry of the map, whose memory is not freed while a program runs. Volatile, to keep this
    // order.
    unsafe {
        let known = Affinity {
            key: *key,
            backend: socket::read_endpoint(&raw const (*found).backend),
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

/// A random backend, each with the same probability (R4).
#[inline(always)]
fn pick_random(choice: Choice) -> Option<Endpoint> {
    // SAFETY: the helper takes no arguments and writes only the generator's state.
    let random = unsafe { bpf_get_prandom_u32() };
    let slot = select(random, choice.slots.count);
    let slot = slot.and_then(|slot| SLOTS.get(choice.slots.first.wrapping_add(slot)));
    match slot {
        // SAFETY: an entry of the map.
        Some(backend) if backend.port != 0 => Some(unsafe { socket::read_endpoint(backend) }),
        _ => {
            maps::count_trouble(trouble::SLOT);
            None
        }
    }
}

/// Counts a flow that gets a backend.
#[inline(always)]
pub(super) fn count_served(frontend: Frontend) {
    if let Some(tally) = TALLIES.get_ptr_mut(frontend.value.port()) {
        // SAFETY: an aligned word of the map, which programs change only by this addition.
        unsafe { maps::add(&raw mut (*tally).served, 1) };
    }
}

/// Counts a flow that is refused because there are no endpoints.
#[inline(always)]
pub(super) fn count_refused(frontend: Frontend) {
    if let Some(tally) = TALLIES.get_ptr_mut(frontend.value.port()) {
        // SAFETY: as in `count_served`.
        unsafe { maps::add(&raw mut (*tally).refused, 1) };
    }
}

/// Whether a client of this class gets a backend.
#[inline(always)]
pub(super) fn has_backend(choice: Choice) -> bool {
    verdict::set(choice.verdict).is_some()
}

/// Whether a backend still serves a flow that it has had since `since` (K2).
#[inline(always)]
pub(super) fn still_serves(frontend: Frontend, backend: &Endpoint, since: u64) -> bool {
    serving_set(frontend).is_some_and(|serving_set| is_member(serving_set, backend, since))
}

/// The number of the set of backends that serve their flows; `None` if the port has no members.
#[inline(always)]
pub(super) fn serving_set(frontend: Frontend) -> Option<u32> {
    (frontend.record.flags & flag::MEMBERS != 0).then(|| set::number(frontend.value.port(), set::SERVING))
}
