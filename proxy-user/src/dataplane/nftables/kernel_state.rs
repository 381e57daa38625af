//! The content of a table in the kernel that this agent has not written: read at a start, after a failure and for
//! `dump`.
//!
//! In: dumps. Out: a filter, which takes out of each transaction what the kernel has already; at the end what is left
//! over.
//!
//! weir does not dump the maps of slots, which have an element for each endpoint of each frontend: the kernel begins
//! each message of a dump at the set's first element (`nf_tables_dump_set`), so reading 250,000 elements takes it ten
//! seconds. weir derives slots from the frontends, which lead to chains with the number of endpoints in their names.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    io,
    ops::Range,
};

use nftnl::Table;
use rustc_hash::FxHashMap;

use super::{
    backend_numbers::{last_number_of, number_key},
    base_chains::{self, GUARD},
    schema::{Map, STAND_IN, frontend_key, slot_key},
    shared_chains::{self, SharedObject},
    socket::Netlink,
    transaction::{ElementKey, PortChanges, Transaction},
};
use crate::sys::libnftnl::{Bytes, ChainSpec, Element, Hooked, SetSpec, Value};
use crate::{model::Family, plan::PortPlan};

/// Elements of one map by key.
pub(super) type Elements = FxHashMap<Bytes, Value>;

pub(super) struct KernelState {
    family: Family,
    /// Names of sets and maps, counters and chains.
    pub(super) sets: HashSet<String>,
    pub(super) counters: HashSet<String>,
    pub(super) chains: HashSet<String>,
    /// Name of a chain → its bucket.
    buckets: HashMap<String, u32>,
    /// The slots to which each bucket's chain leads.
    reach: HashMap<Bytes, Vec<Range<u32>>>,
    /// The elements of the maps that always exist; of slots only those that are left over, without their values.
    pub(super) elements: BTreeMap<Map, Elements>,
    /// Type, hook and priority of the base chains.
    hooked: HashMap<String, Hooked>,
    /// Whether every set, map and chain has the shape that this version writes, or can be replaced alone.
    pub(super) fits: bool,
    /// Whether the table exists that served while this one was built anew.
    pub(super) has_stand_in: bool,
}

impl KernelState {
    /// The state of an empty table.
    pub(super) fn empty(family: Family) -> Self {
        Self {
            family,
            sets: HashSet::new(),
            counters: HashSet::new(),
            chains: HashSet::new(),
            buckets: HashMap::new(),
            reach: HashMap::new(),
            elements: BTreeMap::new(),
            hooked: HashMap::new(),
            fits: true,
            has_stand_in: false,
        }
    }

    /// Reads the names of sets, maps and chains, and compares their shapes.
    pub(super) fn read_names(netlink: &mut Netlink, table: &Table, family: Family) -> io::Result<Self> {
        let mut state = Self::empty(family);
        let sets = netlink.sets(table)?;
        let chains = netlink.chains(table)?;
        state.has_stand_in = chains.iter().any(|chain| chain.table == STAND_IN);
        let name = table.get_name().to_string_lossy();
        for chain in chains.into_iter().filter(|chain| chain.table == name) {
            state.hooked.extend(chain.hooked.map(|hooked| (chain.name.clone(), hooked)));
            state.chains.insert(chain.name);
        }
        let fits =
            |set: &SetSpec| shared_chains::set_of(&set.name, family).is_none_or(|spec| set.is_like(&spec));
        state.fits = sets.iter().all(fits) && !state.hooked.keys().any(|name| base_chains::has_no_hook(name));
        state.sets = sets.into_iter().map(|set| set.name).collect();
        Ok(state)
    }

    pub(super) fn read(netlink: &mut Netlink, table: &Table, family: Family) -> io::Result<Self> {
        let mut state = Self::read_names(netlink, table, family)?;
        state.counters = netlink.counters(table)?.into_iter().map(|(name, _)| name).collect();
        for map in Map::ALL.into_iter().filter(|map| map.is_read_whole()) {
            if state.sets.contains(map.name()) {
                state.read_elements(netlink, table, map)?;
            }
        }
        // Without the last number it is unknown which numbers clients may remember.
        state.fits &= !state.sets.contains(Map::Numbered.name()) || state.last_number().is_some();
        let buckets = Map::BUCKETS.iter().filter_map(|map| state.elements.get(map)).flatten();
        state.buckets = buckets.filter_map(|(key, value)| bucket(key, value)).collect();
        let buckets = state.elements.get(&Map::Buckets).into_iter().flatten();
        state.reach = buckets.filter_map(|(key, value)| Some((key.clone(), reach(value)?))).collect();
        Ok(state)
    }

    /// Reads also the maps that [`KernelState::read`] leaves out.
    pub(super) fn read_the_rest(&mut self, netlink: &mut Netlink, table: &Table) -> io::Result<()> {
        let mut maps = Map::ALL.into_iter().filter(|map| !map.is_read_whole());
        maps.try_for_each(|map| self.read_elements(netlink, table, map))
    }

    fn read_elements(&mut self, netlink: &mut Netlink, table: &Table, map: Map) -> io::Result<()> {
        let elements = netlink.elements(table, map.name())?.into_iter();
        self.elements.insert(map, elements.map(|Element { key, value, .. }| (key, value)).collect());
        Ok(())
    }

    /// Takes out of a transaction what the kernel has already, and replaces elements that have another value. Returns
    /// the elements of the transaction that it found.
    pub(super) fn reduce(&self, transaction: &mut Transaction) -> Vec<ElementKey> {
        let Transaction { objects, gone, come, .. } = transaction;
        for new in objects {
            let name = new.object.name();
            new.exists = if new.object.is_set() {
                self.sets.contains(&name)
            } else {
                self.buckets.contains_key(&name)
            };
        }
        let mut found = Vec::new();
        for (map, elements) in come {
            elements.retain(|element| {
                let Some(value) = self.get(*map, &element.key) else { return true };
                found.push((*map, element.key.clone()));
                let is_same = *value == element.value;
                // A slot that is left over may be gone, and its value was not read.
                if !is_same && !map.holds_slots() {
                    gone.entry(*map).or_default().push(element.clone());
                }
                !is_same
            });
        }
        found
    }

    /// Takes over a transaction that is in force: the elements that [`KernelState::reduce`] found are no leftovers, and
    /// the slots that their frontends leave are.
    pub(super) fn claim(&mut self, changes: &PortChanges<'_>, found: Vec<ElementKey>) {
        for (map, elements) in &changes.come {
            for (element, object) in elements {
                self.leave_slots(*map, &element.key, object.as_ref());
            }
        }
        for (map, key) in found {
            self.take(map, &key);
        }
    }

    /// Leaves over the slots that a frontend found here reaches and will not reach when it leads to `object`.
    fn leave_slots(&mut self, frontends: Map, frontend: &Bytes, object: Option<&SharedObject>) {
        let Some(slots) = frontends.slots() else { return };
        let Some(Value::Data(bucket)) = self.get(frontends, frontend) else { return };
        let before = self.reach.get(bucket).map(Vec::as_slice).unwrap_or_default();
        let after = object.map(SharedObject::reach).unwrap_or_default();
        let left =
            before.iter().cloned().flatten().filter(|slot| !after.iter().any(|range| range.contains(slot)));
        let left: Vec<_> = left.map(|slot| (slot_key(frontend, slot), Value::None)).collect();
        self.elements.entry(slots).or_default().extend(left);
    }

    /// Leaves over also the slots of the frontends that are left over.
    pub(super) fn leave_slots_of_the_rest(&mut self) {
        for frontends in [Map::Services, Map::NodePorts] {
            let left = self.elements.get(&frontends).into_iter().flatten();
            let left: Vec<_> = left.map(|(key, _)| key.clone()).collect();
            left.iter().for_each(|frontend| self.leave_slots(frontends, frontend, None));
        }
    }

    /// Leaves over slots that this agent vacated or that an earlier state left over.
    pub(super) fn add_slots(&mut self, map: Map, slots: impl Iterator<Item = Bytes>) {
        self.elements.entry(map).or_default().extend(slots.map(|key| (key, Value::None)));
    }

    /// Splits off the elements of these service ports' frontends, with the chains and maps that they lead to. All local
    /// backends are among them, because their ports are unknown.
    pub(super) fn split_off(&mut self, ports: &[&PortPlan]) -> Self {
        let mut kept = Self::empty(self.family);
        let planned = ports.iter().flat_map(|port| &port.frontends);
        let frontends: HashSet<Bytes> = planned.map(|planned| frontend_key(&planned.frontend)).collect();
        if frontends.is_empty() {
            return kept;
        }
        let mut names = HashSet::new();
        let chain_of = self.chains_by_bucket();
        for (map, elements) in &mut self.elements {
            let Some(len) = map.frontend_len(self.family) else { continue };
            let is_theirs = |key: &Bytes| {
                *map == Map::Hairpin || key.get(..len).is_some_and(|frontend| frontends.contains(frontend))
            };
            let theirs: Elements = elements.extract_if(|key, _| is_theirs(key)).collect();
            names.extend(theirs.values().filter_map(|value| match value {
                Value::Goto(name) => Some(name.clone()),
                Value::Data(bucket) => chain_of.get(bucket).cloned(),
                Value::None | Value::Accept(_) => None,
            }));
            kept.elements.insert(*map, theirs);
        }
        let objects = names.iter().filter_map(|name| SharedObject::parse(name));
        let needed: HashSet<String> =
            objects.flat_map(|object| object.with_needed()).map(|object| object.name()).collect();
        let is_needed = |name: &String| needed.contains(name);
        kept.sets = self.sets.extract_if(is_needed).collect();
        kept.chains = self.chains.extract_if(is_needed).collect();
        kept.buckets = self.buckets.extract_if(|name, _| needed.contains(name)).collect();
        for map in Map::BUCKETS {
            let Some(buckets) = self.elements.get_mut(&map) else { continue };
            let is_needed =
                |_: &Bytes, value: &mut Value| matches!(value, Value::Goto(name) if needed.contains(name));
            kept.elements.insert(map, buckets.extract_if(is_needed).collect());
        }
        kept.reach = self.reach.clone();
        kept
    }

    /// Forgets an object that weir has removed.
    pub(super) fn forget(&mut self, name: &str) {
        self.sets.remove(name);
        self.chains.remove(name);
        self.buckets.remove(name);
    }

    fn chains_by_bucket(&self) -> HashMap<Bytes, String> {
        let buckets = Map::BUCKETS.iter().filter_map(|map| self.elements.get(map)).flatten();
        let chains = buckets.filter_map(|(key, value)| match value {
            Value::Goto(name) => Some((key.clone(), name.clone())),
            _ => None,
        });
        chains.collect()
    }

    /// The bucket that leads to the chain of this name.
    pub(super) fn bucket(&self, name: &str) -> Option<u32> {
        self.buckets.get(name).copied()
    }

    pub(super) fn highest_bucket(&self) -> Option<u32> {
        self.buckets.values().max().copied()
    }

    /// Whether the chains that check sources exist, or a frontend with source ranges.
    pub(super) fn needs_guards(&self) -> bool {
        GUARD.iter().any(|name| self.chains.contains(*name))
            || self.elements.get(&Map::SourceRanges).is_some_and(|elements| !elements.is_empty())
    }

    /// The highest number that an earlier agent may have given to a backend.
    pub(super) fn last_number(&self) -> Option<u32> {
        last_number_of(self.get(Map::LastNumber, &number_key(0))?)
    }

    /// Whether the chain has type, hook and priority of `chain`, or none as it.
    pub(super) fn is_hooked_as(&self, chain: &ChainSpec) -> bool {
        self.hooked.get(&chain.name) == chain.hooked().as_ref()
    }

    pub(super) fn get(&self, map: Map, key: &Bytes) -> Option<&Value> {
        self.elements.get(&map)?.get(key)
    }

    pub(super) fn take(&mut self, map: Map, key: &Bytes) -> Option<Value> {
        self.elements.get_mut(&map)?.remove(key)
    }
}

fn bucket(key: &Bytes, value: &Value) -> Option<(String, u32)> {
    let Value::Goto(name) = value else { return None };
    let bucket = key.first_chunk::<4>()?;
    Some((name.clone(), u32::from_ne_bytes(*bucket)))
}

fn reach(value: &Value) -> Option<Vec<Range<u32>>> {
    let Value::Goto(name) = value else { return None };
    Some(SharedObject::parse(name)?.reach())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        dataplane::nftables::{
            backend_numbers::BackendNumbers,
            base_chains::Needs,
            schema::{bucket_element, bucket_value},
            shared_chains::{FrontendKind, Masquerade},
            transaction::NewObject,
        },
        plan::BackendSet,
    };

    fn transaction(come: Vec<(Map, Element)>) -> Transaction {
        let mut transaction = Transaction {
            objects: Vec::new(),
            numbers: BackendNumbers::default().no_changes(),
            gone: BTreeMap::new(),
            come: BTreeMap::new(),
            needs: Needs::default(),
        };
        for (map, element) in come {
            transaction.come.entry(map).or_default().push(element);
        }
        transaction
    }

    fn state(held: Vec<(Map, Element)>) -> KernelState {
        let mut state = KernelState::empty(Family::V4);
        for (map, Element { key, value, .. }) in held {
            state.elements.entry(map).or_default().insert(key, value);
        }
        state
    }

    fn picker(count: u32) -> SharedObject {
        let (kind, set, masquerade) = (FrontendKind::Service, BackendSet::Cluster, Masquerade::Never);
        SharedObject::Picker { kind, set, count, masquerade }
    }

    #[test]
    fn a_transaction_is_reduced_to_the_elements_that_the_kernel_does_not_have() {
        let [same, changed, new] = [1, 2, 3].map(|key| bucket_element(key, bucket_value(16)));
        let old = bucket_element(2, bucket_value(17));
        let state = state(vec![(Map::Services, same.clone()), (Map::Services, old)]);
        let come = [&same, &changed, &new].map(|element| (Map::Services, element.clone()));
        let mut transaction = transaction(come.to_vec());
        let found = state.reduce(&mut transaction);
        assert_eq!(transaction.come[&Map::Services], [changed.clone(), new]);
        assert_eq!(transaction.gone[&Map::Services], std::slice::from_ref(&changed), "replaced");
        assert_eq!(found, [(Map::Services, same.key), (Map::Services, changed.key)]);
    }

    #[test]
    fn a_slot_that_may_be_left_over_is_written_and_not_deleted() {
        let slot = bucket_element(1, bucket_value(7));
        let state = state(vec![(Map::Backends, Element::member(slot.key.clone()))]);
        let mut transaction = transaction(vec![(Map::Backends, slot.clone())]);
        let found = state.reduce(&mut transaction);
        assert_eq!(transaction.come[&Map::Backends], std::slice::from_ref(&slot));
        assert!(transaction.gone.is_empty());
        assert_eq!(found, [(Map::Backends, slot.key)]);
    }

    #[test]
    fn objects_that_exist_are_not_made_again() {
        let mut state = KernelState::empty(Family::V4);
        state.buckets.insert(picker(1).name(), 16);
        state.chains.insert(picker(2).name());
        let mut transaction = transaction(Vec::new());
        let new = |count| NewObject { object: picker(count), bucket: 16, exists: false };
        transaction.objects = vec![new(1), new(2)];
        state.reduce(&mut transaction);
        let exist: Vec<_> = transaction.objects.iter().map(|new| new.exists).collect();
        assert_eq!(exist, [true, false], "a chain without its bucket does not count");
    }

    #[test]
    fn a_frontend_with_fewer_endpoints_leaves_slots_over() {
        let frontend = bucket_element(1, bucket_value(16));
        let mut state = state(vec![(Map::Services, frontend.clone())]);
        state.reach.insert(Bytes::from_slice(&16_u32.to_ne_bytes()), picker(3).reach());
        let mut changes = PortChanges::default();
        changes.come.insert(Map::Services, vec![(frontend.clone(), Some(picker(1)))]);
        state.claim(&changes, vec![(Map::Services, frontend.key.clone())]);
        assert!(state.elements[&Map::Services].is_empty(), "the frontend is no leftover");
        let mut left: Vec<_> = state.elements[&Map::Backends].keys().cloned().collect();
        left.sort_unstable();
        let mut expected = [1, 2].map(|slot| slot_key(&frontend.key, slot));
        expected.sort_unstable();
        assert_eq!(left, expected);
    }
}
