//! What a table holds in the kernel, read back: at start, after a failure, and for `dump`.
//!
//! In: dumps. Out: [`Found`], from which every element that is asked for again is taken; what is left over is to go.
//!
//! The maps of slots hold an element for each endpoint of each frontend, and are not dumped: the kernel starts each
//! message of a dump at the set's first element again (`nf_tables_dump_set`), so that reading 250,000 elements takes it
//! ten seconds. Which slots there are follows from the frontends, which lead to pickers that say how many they reach.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    io,
    ops::Range,
};

use rustc_hash::FxBuildHasher;

use super::{
    element,
    netlink::{self, Bytes, ChainSpec, Dump, Element, Hooked, ReadChain, SetSpec, Value},
    object::Object,
    ruleset::{self, Map},
    socket::Netlink,
};
use crate::{model::Family, plan::PortPlan};

/// Elements of one map by key and end of range.
pub(super) type Elements = HashMap<(Bytes, Option<Bytes>), Value, FxBuildHasher>;

pub(super) struct Found {
    family: Family,
    /// Names of sets and maps.
    pub(super) sets: HashSet<String>,
    /// Names of counters.
    pub(super) counters: HashSet<String>,
    /// Names of chains.
    pub(super) chains: HashSet<String>,
    /// Name of a picker → its bucket.
    pub(super) buckets: HashMap<String, u32>,
    /// What each bucket's picker reaches.
    reach: HashMap<Bytes, Vec<Range<u32>>>,
    /// The elements of the maps that always exist; of slots only those that are left over, without their values.
    pub(super) elements: BTreeMap<Map, Elements>,
    /// How those of the chains are hooked that are.
    hooked: HashMap<String, Hooked>,
    /// Whether every set, map and chain is of the shape this version writes, or can be replaced alone.
    pub(super) fits: bool,
    /// Whether a table that was built in place of this one is there.
    pub(super) has_stand_in: bool,
}

impl Found {
    pub(super) fn nothing(family: Family) -> Self {
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

    /// Which sets, maps and chains there are, and whether they are of the right shape.
    pub(super) fn outlines(netlink: &mut Netlink, table: &nftnl::Table, family: Family) -> io::Result<Self> {
        let mut found = Self::nothing(family);
        let sets = Self::sets(netlink, table)?;
        let chains = Self::chains(netlink, table)?;
        found.has_stand_in = chains.iter().any(|chain| chain.table == ruleset::STAND_IN);
        let name = table.get_name().to_string_lossy();
        for chain in chains.into_iter().filter(|chain| chain.table == name) {
            found.hooked.extend(chain.hooked.map(|hooked| (chain.name.clone(), hooked)));
            found.chains.insert(chain.name);
        }
        let like = |set: &SetSpec| ruleset::set_of(&set.name, family).is_none_or(|spec| set.is_like(&spec));
        found.fits = sets.iter().all(like) && !found.hooked.keys().any(|name| ruleset::is_led_to(name));
        found.sets = sets.into_iter().map(|set| set.name).collect();
        Ok(found)
    }

    pub(super) fn read(netlink: &mut Netlink, table: &nftnl::Table, family: Family) -> io::Result<Self> {
        let mut found = Self::outlines(netlink, table, family)?;
        found.counters = Self::counters(netlink, table)?.into_iter().map(|(name, _)| name).collect();
        for map in Map::ALL.into_iter().filter(|map| found.sets.contains(map.name())) {
            if map.is_adopted_whole() {
                let elements = Self::elements(netlink, table, map.name())?;
                found.elements.insert(map, elements.into_iter().map(by_key).collect());
            }
        }
        // Which numbers clients may remember is not known then.
        found.fits &= !found.sets.contains(Map::Numbered.name()) || super::table::given_by(&found).is_some();
        let buckets = Map::BUCKETS.iter().filter_map(|map| found.elements.get(map)).flatten();
        found.buckets = buckets.filter_map(|((key, _), value)| bucket(key, value)).collect();
        let buckets = found.elements.get(&Map::Buckets).into_iter().flatten();
        found.reach = buckets.filter_map(|((key, _), value)| Some((key.clone(), reach(value)?))).collect();
        Ok(found)
    }

    /// Leaves over what a frontend found here reaches and will not when it leads to `object`.
    pub(super) fn leave_slots(&mut self, frontends: Map, frontend: &Bytes, object: Option<&Object>) {
        let Some(slots) = frontends.slots() else { return };
        let Some(Value::Data(bucket)) = self.get(frontends, frontend, None) else { return };
        let before = self.reach.get(bucket).map(Vec::as_slice).unwrap_or_default();
        let after = object.map(Object::reach).unwrap_or_default();
        let left =
            before.iter().cloned().flatten().filter(|slot| !after.iter().any(|range| range.contains(slot)));
        let left: Vec<_> =
            left.map(|slot| ((element::slot_key(frontend, slot), None), Value::None)).collect();
        self.elements.entry(slots).or_default().extend(left);
    }

    /// Leaves over also what is reached by the frontends that are left.
    pub(super) fn leave_slots_of_the_rest(&mut self) {
        for frontends in [Map::Services, Map::NodePorts] {
            let left = self.elements.get(&frontends).into_iter().flatten();
            let left: Vec<_> = left.map(|((key, _), _)| key.clone()).collect();
            left.iter().for_each(|frontend| self.leave_slots(frontends, frontend, None));
        }
    }

    /// Takes out what the frontends of these service ports have, with the chains and memories it leads to. Which local
    /// backends are theirs is not known, so all of them are.
    pub(super) fn keep(&mut self, ports: &[&PortPlan]) -> Self {
        let mut kept = Self::nothing(self.family);
        let planned = ports.iter().flat_map(|port| &port.frontends);
        let frontends: HashSet<Bytes> =
            planned.map(|planned| element::frontend_key(&planned.frontend)).collect();
        if frontends.is_empty() {
            return kept;
        }
        let mut names = HashSet::new();
        let chain_of = self.chains_by_bucket();
        for (map, elements) in &mut self.elements {
            let Some(len) = map.frontend_len(self.family) else { continue };
            let theirs = |key: &Bytes| {
                *map == Map::Hairpin || key.get(..len).is_some_and(|frontend| frontends.contains(frontend))
            };
            let theirs: Elements = elements.extract_if(|(key, _), _| theirs(key)).collect();
            names.extend(theirs.values().filter_map(|value| match value {
                Value::Goto(name) => Some(name.clone()),
                Value::Data(bucket) => chain_of.get(bucket).cloned(),
                Value::None | Value::Accept(_) => None,
            }));
            kept.elements.insert(*map, theirs);
        }
        let objects = names.iter().filter_map(|name| Object::parse(name));
        let needed: HashSet<String> =
            objects.flat_map(|object| object.needed()).map(|object| object.name()).collect();
        let is_needed = |name: &String| needed.contains(name);
        kept.sets = self.sets.extract_if(is_needed).collect();
        kept.chains = self.chains.extract_if(is_needed).collect();
        kept.buckets = self.buckets.extract_if(|name, _| needed.contains(name)).collect();
        for map in Map::BUCKETS {
            let Some(buckets) = self.elements.get_mut(&map) else { continue };
            let is_needed = |_: &(Bytes, Option<Bytes>), value: &mut Value| matches!(value, Value::Goto(name) if needed.contains(name));
            kept.elements.insert(map, buckets.extract_if(is_needed).collect());
        }
        kept.reach = self.reach.clone();
        kept
    }

    /// Forgets an object that is there no longer.
    pub(super) fn forget(&mut self, name: &str) {
        self.sets.remove(name);
        self.chains.remove(name);
        self.buckets.remove(name);
    }

    fn chains_by_bucket(&self) -> HashMap<Bytes, String> {
        let buckets = Map::BUCKETS.iter().filter_map(|map| self.elements.get(map)).flatten();
        let chains = buckets.filter_map(|((key, _), value)| match value {
            Value::Goto(name) => Some((key.clone(), name.clone())),
            _ => None,
        });
        chains.collect()
    }

    /// Reads also the maps of slots, for those who want to see everything.
    pub(super) fn read_slots(&mut self, netlink: &mut Netlink, table: &nftnl::Table) -> io::Result<()> {
        for map in Map::ALL.into_iter().filter(|map| !map.is_adopted_whole()) {
            let elements = Self::elements(netlink, table, map.name())?;
            self.elements.insert(map, elements.into_iter().map(by_key).collect());
        }
        Ok(())
    }

    /// Whether the chain is there and hooked as this one.
    pub(super) fn is_hooked_as(&self, chain: &ChainSpec) -> bool {
        self.hooked.get(&chain.name) == chain.hooked().as_ref()
    }

    fn sets(netlink: &mut Netlink, table: &nftnl::Table) -> io::Result<Vec<SetSpec>> {
        retried(|| {
            let mut sets = Vec::new();
            let request = |seq| netlink::dump_request(table, Dump::Sets, seq);
            netlink.ask(request, |message| sets.extend(netlink::parse_set(table, message)))?;
            Ok(sets)
        })
    }

    fn chains(netlink: &mut Netlink, table: &nftnl::Table) -> io::Result<Vec<ReadChain>> {
        retried(|| {
            let mut chains = Vec::new();
            let request = |seq| netlink::dump_request(table, Dump::Chains, seq);
            netlink.ask(request, |message| chains.extend(netlink::parse_chain(message)))?;
            Ok(chains)
        })
    }

    /// Name of each counter, and how many packets it has seen.
    pub(super) fn counters(netlink: &mut Netlink, table: &nftnl::Table) -> io::Result<Vec<(String, u64)>> {
        retried(|| {
            let mut counters = Vec::new();
            let request = |seq| netlink::dump_request(table, Dump::Counters, seq);
            netlink.ask(request, |message| counters.extend(netlink::parse_counter(table, message)))?;
            Ok(counters)
        })
    }

    /// Every element of one set; none when there is no such set.
    pub(super) fn elements(
        netlink: &mut Netlink,
        table: &nftnl::Table,
        set: &str,
    ) -> io::Result<Vec<Element>> {
        retried(|| {
            let mut elements = Vec::new();
            let request = |seq| netlink::dump_request(table, Dump::Elements(set), seq);
            netlink.ask(request, |message| {
                netlink::parse_elements(table, message, |element| elements.push(element));
            })?;
            Ok(elements)
        })
    }

    /// What one set holds under `key`, if anything.
    pub(super) fn element(
        netlink: &mut Netlink,
        table: &nftnl::Table,
        set: &str,
        key: &Bytes,
    ) -> io::Result<Option<Value>> {
        retried(|| {
            let mut value = None;
            netlink.ask(
                |seq| netlink::get_request(table, set, key, seq),
                |message| {
                    netlink::parse_elements(table, message, |element| value = Some(element.value));
                },
            )?;
            Ok(value)
        })
    }

    pub(super) fn get(&self, map: Map, key: &Bytes, key_end: Option<&Bytes>) -> Option<&Value> {
        let elements = self.elements.get(&map).filter(|elements| !elements.is_empty())?;
        elements.get(&(key.clone(), key_end.cloned()))
    }

    pub(super) fn take(&mut self, map: Map, key: &Bytes, key_end: Option<&Bytes>) -> Option<Value> {
        self.elements.get_mut(&map)?.remove(&(key.clone(), key_end.cloned()))
    }
}

fn by_key(Element { key, key_end, value }: Element) -> ((Bytes, Option<Bytes>), Value) {
    ((key, key_end), value)
}

fn bucket(key: &Bytes, value: &Value) -> Option<(String, u32)> {
    let Value::Goto(name) = value else { return None };
    let bucket = key.first_chunk::<4>()?;
    Some((name.clone(), u32::from_ne_bytes(*bucket)))
}

fn reach(value: &Value) -> Option<Vec<Range<u32>>> {
    let Value::Goto(name) = value else { return None };
    Some(Object::parse(name)?.reach())
}

/// Dumps again while others change the tables; what does not exist is empty.
fn retried<T: Default>(mut dump: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    const TRIES: usize = 20;
    for attempt in 1.. {
        match dump() {
            Err(error) if error.raw_os_error() == Some(libc::EINTR) && attempt < TRIES => {}
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => break,
            result => return result,
        }
    }
    Ok(T::default())
}
