//! The maps of a sockets' plane as they are in the kernel, numbers and all.
//!
//! In: where they are pinned. Out: [`Maps`], which can be compared byte by byte, or, as [`Group`]s, whatever the numbers
//! and slots that ports happen to have.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context as _, Result};
use aya::{
    Pod,
    maps::{Array, HashMap, Map, MapData, MapError},
};
use proxy_ebpf::{Choice, Endpoint, FrontendKey, FrontendValue, MemberKey, set};
use weir::dataplane::ebpf::Place;

/// What leads to backends.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Maps {
    /// `frontends`.
    pub frontends: BTreeMap<FrontendKey, FrontendValue>,
    /// `slots`, those that frontends lead to.
    pub slots: BTreeMap<u32, Endpoint>,
    /// `members`, with the time each joined.
    pub members: BTreeMap<MemberKey, u64>,
}

/// What one number holds together, without the number and without the slots.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Group {
    /// Each frontend with its flags and its affinity, and for pods and for the host: the verdict, which of the port's
    /// sets, and the backends.
    pub frontends: Vec<(FrontendKey, [u32; 2], [(u32, u32, Vec<Endpoint>); 2])>,
    /// Each member with the kind of its set.
    pub members: Vec<(u32, Endpoint)>,
}

impl Maps {
    /// Reads them.
    ///
    /// # Errors
    ///
    /// When they are not there, or are not what they should be.
    pub fn read(place: &Place) -> Result<Self> {
        let directory = place.maps();
        let mut maps = Self {
            frontends: whole(&directory, "frontends")?,
            members: whole(&directory, "members")?,
            slots: BTreeMap::new(),
        };
        let slots: Array<_, Endpoint> = Map::Array(pinned(&directory, "slots")?).try_into()?;
        for choice in maps.frontends.values().flat_map(|value| [value.pod, value.host]) {
            for slot in choice.first..choice.first + choice.count {
                maps.slots.insert(slot, slots.get(&slot, 0)?);
            }
        }
        Ok(maps)
    }

    /// The same by number, in an order that does not depend on it. Addresses by themselves are a group each.
    #[must_use]
    pub fn groups(&self) -> Vec<Group> {
        let mut groups: BTreeMap<u32, Group> = BTreeMap::new();
        let mut sorted = Vec::new();
        for (key, value) in &self.frontends {
            let frontend =
                (*key, [value.flags, value.affinity], [value.pod, value.host].map(|c| self.choice(&c)));
            if key.port == 0 {
                sorted.push(Group { frontends: vec![frontend], members: Vec::new() });
            } else {
                groups.entry(value.port).or_default().frontends.push(frontend);
            }
        }
        for member in self.members.keys() {
            groups.entry(set::port(member.set)).or_default().members.push((member.set & 3, member.backend));
        }
        sorted.extend(groups.into_values());
        sorted.sort_unstable();
        sorted
    }

    fn choice(&self, choice: &Choice) -> (u32, u32, Vec<Endpoint>) {
        let slots = choice.first..choice.first + choice.count;
        let mut backends: Vec<Endpoint> = slots.filter_map(|slot| self.slots.get(&slot).copied()).collect();
        backends.sort_unstable();
        (choice.verdict, choice.set & 3, backends)
    }
}

fn pinned(directory: &Path, name: &str) -> Result<MapData> {
    MapData::from_pin(directory.join(name)).with_context(|| format!("opening the map {name}"))
}

fn whole<K: Pod + Ord, V: Pod>(directory: &Path, name: &str) -> Result<BTreeMap<K, V>> {
    let map: HashMap<_, K, V> = Map::HashMap(pinned(directory, name)?).try_into()?;
    let entries: Result<_, MapError> = map.iter().collect();
    entries.with_context(|| format!("reading the map {name}"))
}
