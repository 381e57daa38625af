//! What a table holds in the kernel, read back: at start, after a failure, and for `dump`.
//!
//! In: dumps. Out: [`Found`], from which every element that is asked for again is taken; what is left over is to go.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    io,
};

use rustc_hash::FxBuildHasher;

use super::{
    netlink::{self, Bytes, Dump, Element, Value},
    object::Object,
    ruleset::{self, Map},
    socket::Netlink,
};
use crate::model::Family;

/// Elements of one map by key and end of range.
pub(super) type Elements = HashMap<(Bytes, Option<Bytes>), Value, FxBuildHasher>;

pub(super) struct Found {
    /// Names of sets and maps.
    pub(super) sets: HashSet<String>,
    /// Names of counters.
    pub(super) counters: HashSet<String>,
    /// Names of chains.
    pub(super) chains: HashSet<String>,
    /// Name of a picker → its bucket.
    pub(super) buckets: HashMap<String, u32>,
    /// The elements of the maps that always exist.
    pub(super) elements: BTreeMap<Map, Elements>,
    /// Whether every map is of the shape this version writes.
    pub(super) fits: bool,
}

impl Found {
    pub(super) fn nothing() -> Self {
        Self {
            sets: HashSet::new(),
            counters: HashSet::new(),
            chains: HashSet::new(),
            buckets: HashMap::new(),
            elements: BTreeMap::new(),
            fits: true,
        }
    }

    pub(super) fn read(netlink: &mut Netlink, table: &nftnl::Table, family: Family) -> io::Result<Self> {
        let mut found = Self::nothing();
        let sets = Self::sets(netlink, table)?;
        found.fits = Map::ALL.iter().all(|map| {
            let spec = map.spec(family);
            let shape = sets.iter().find(|(name, ..)| *name == spec.name);
            shape.is_none_or(|(_, key_len, flags)| {
                *key_len == spec.key_len && flags & !MAP_FLAG == spec.flags & !MAP_FLAG
            })
        }) && sets
            .iter()
            .all(|(name, ..)| Map::ALL.iter().any(|map| map.name() == name) || Object::parse(name).is_some());
        found.sets = sets.into_iter().map(|(name, ..)| name).collect();
        found.chains = Self::chains(netlink, table)?;
        found.counters = Self::counters(netlink, table)?.into_iter().map(|(name, _)| name).collect();
        for map in Map::ALL.into_iter().filter(|map| found.sets.contains(map.name())) {
            let elements = Self::elements(netlink, table, map.name())?;
            if map == Map::Buckets {
                found.buckets = elements.iter().filter_map(bucket).collect();
            }
            let elements =
                elements.into_iter().map(|Element { key, key_end, value }| ((key, key_end), value));
            found.elements.insert(map, elements.collect());
        }
        Ok(found)
    }

    fn sets(netlink: &mut Netlink, table: &nftnl::Table) -> io::Result<Vec<(String, u32, u32)>> {
        retried(|| {
            let mut sets = Vec::new();
            let request = |seq| netlink::dump_request(table, Dump::Sets, seq);
            netlink.dump(request, |message| sets.extend(netlink::parse_set(table, message)))?;
            Ok(sets)
        })
    }

    fn chains(netlink: &mut Netlink, table: &nftnl::Table) -> io::Result<HashSet<String>> {
        retried(|| {
            let mut chains = HashSet::new();
            let request = |seq| netlink::dump_request(table, Dump::Chains, seq);
            netlink.dump(request, |message| {
                let named = netlink::parse_chain(message);
                chains.extend(named.filter(|(table, _)| table == ruleset::TABLE).map(|(_, name)| name));
            })?;
            Ok(chains)
        })
    }

    /// Name of each counter, and how many packets it has seen.
    pub(super) fn counters(netlink: &mut Netlink, table: &nftnl::Table) -> io::Result<Vec<(String, u64)>> {
        retried(|| {
            let mut counters = Vec::new();
            let request = |seq| netlink::dump_request(table, Dump::Counters, seq);
            netlink.dump(request, |message| counters.extend(netlink::parse_counter(table, message)))?;
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
            netlink.dump(request, |message| {
                netlink::parse_elements(table, message, |element| elements.push(element));
            })?;
            Ok(elements)
        })
    }

    pub(super) fn get(&self, map: Map, key: &Bytes, key_end: Option<&Bytes>) -> Option<&Value> {
        self.elements.get(&map)?.get(&(key.clone(), key_end.cloned()))
    }

    pub(super) fn take(&mut self, map: Map, key: &Bytes, key_end: Option<&Bytes>) -> Option<Value> {
        self.elements.get_mut(&map)?.remove(&(key.clone(), key_end.cloned()))
    }
}

const MAP_FLAG: u32 = libc::NFT_SET_MAP as u32;

fn bucket(element: &Element) -> Option<(String, u32)> {
    let Value::Goto(name) = &element.value else { return None };
    let bucket = element.key.first_chunk::<4>()?;
    Some((name.clone(), u32::from_ne_bytes(*bucket)))
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
