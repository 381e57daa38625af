//! The handles of the maps: every read and write.
//!
//! In: keys and values. Out: the kernel's results, with [`Problem`]s that name the map. A write to a full map
//! fails here.

use std::{hash::Hash, io};

use crate::sys::bpf;
use aya::{
    Ebpf,
    maps::{Array, HashMap, IterableMap as _, Map, MapData, MapError, PerCpuArray},
};
use nix::time::{ClockId, clock_gettime};
use proxy_ebpf::{
    Affinity, AffinityKey, Endpoint, FrontendKey, FrontendValue, Member, MemberKey, Record, Settings, Tally,
};
use rustc_hash::{FxHashMap, FxHashSet};

use super::problem::Problem;

/// Decides whether a write to the map of this name fails, for tests.
pub type Fault = Box<dyn FnMut(&'static str) -> bool + Send>;

const ANY: u64 = 0;
const IF_ABSENT: u64 = 1;

pub(super) struct Maps {
    frontends: HashMap<MapData, FrontendKey, FrontendValue>,
    ports: bpf::Words,
    records: Array<MapData, Record>,
    slots: Array<MapData, Endpoint>,
    members: HashMap<MapData, MemberKey, Member>,
    affinities: HashMap<MapData, AffinityKey, Affinity>,
    tallies: Array<MapData, Tally>,
    settings: Array<MapData, Settings>,
    troubles: PerCpuArray<MapData, u64>,
    fault: Option<Fault>,
}

impl Maps {
    /// Takes the maps out of the loaded programs.
    pub(super) fn of(ebpf: &mut Ebpf) -> Result<Self, Problem> {
        let mut take = |name: &'static str| ebpf.take_map(name).ok_or(Problem::MissingMap(name));
        let ports: Array<MapData, u64> = typed("ports", take("ports")?)?;
        Ok(Self {
            frontends: typed("frontends", take("frontends")?)?,
            ports: bpf::Words::of(&ports).map_err(|error| Problem::map("ports", error.into()))?,
            records: typed("records", take("records")?)?,
            slots: typed("slots", take("slots")?)?,
            members: typed("members", take("members")?)?,
            affinities: typed("affinities", take("affinities")?)?,
            tallies: typed("tallies", take("tallies")?)?,
            settings: typed("settings", take("settings")?)?,
            troubles: typed("troubles", take("troubles")?)?,
            fault: None,
        })
    }

    /// Makes writes fail when `fault` returns true.
    pub(super) fn fail(&mut self, fault: Option<Fault>) {
        self.fault = fault;
    }

    /// Moves the state that is not in the kernel from another handle.
    pub(super) fn inherit(&mut self, from: &mut Self) {
        self.fault = from.fault.take();
    }

    fn write(
        &mut self,
        name: &'static str,
        write: impl FnOnce(&mut Self) -> Result<(), MapError>,
    ) -> Result<(), Problem> {
        if self.fault.as_mut().is_some_and(|fault| fault(name)) {
            return Err(Problem::Map { name: name.to_owned(), text: "a fault on purpose".to_owned() });
        }
        write(self).map_err(|error| Problem::map(name, error))
    }

    pub(super) fn frontends(&self) -> Result<FxHashMap<FrontendKey, FrontendValue>, Problem> {
        all("frontends", self.frontends.map())
    }

    pub(super) fn frontend(&self, key: &FrontendKey) -> Option<FrontendValue> {
        self.frontends.get(key, ANY).ok()
    }

    pub(super) fn set_frontend(&mut self, key: &FrontendKey, value: &FrontendValue) -> Result<(), Problem> {
        self.write("frontends", |maps| maps.frontends.insert(key, value, ANY))
    }

    /// False if there was none.
    pub(super) fn remove_frontend(&mut self, key: &FrontendKey) -> Result<bool, Problem> {
        removed("frontends", self.frontends.remove(key))
    }

    /// The record of each of these ports: its index and its content.
    pub(super) fn records_of(
        &self,
        ports: impl IntoIterator<Item = u32>,
    ) -> Result<FxHashMap<u32, (u32, Record)>, Problem> {
        let indices = ports.into_iter().filter_map(|port| Some((port, self.ports.get(port)? as u32)));
        let indices: Vec<(u32, u32)> = indices.collect();
        let end = indices.iter().map(|(_, record)| record.saturating_add(1)).max().unwrap_or(0);
        let mut records = Vec::new();
        let read = bpf::read_first(self.records.map(), end as usize, |_: u32, record| records.push(record));
        read.map_err(|error| Problem::map("records", error.into()))?;
        let with_content = |(port, record): (u32, u32)| {
            records.get(record as usize).map(|content: &Record| (port, (record, *content)))
        };
        Ok(indices.into_iter().filter_map(with_content).collect())
    }

    /// Switches a port, with all its frontends, to a record.
    pub(super) fn set_port(&mut self, port: u32, record: u32) -> Result<(), Problem> {
        self.write("ports", |maps| Ok(maps.ports.set(port, record.into())?))
    }

    /// Leaves a port to nftables. The port may not be in the map.
    pub(super) fn clear_port(&mut self, port: u32) {
        // An index beyond the end has nothing to clear.
        let _ = self.ports.set(port, Record::NOTHING.into());
    }

    pub(super) fn record(&self, index: u32) -> Result<Record, Problem> {
        self.records.get(&index, ANY).map_err(|error| Problem::map("records", error))
    }

    pub(super) fn set_record(&mut self, index: u32, record: &Record) -> Result<(), Problem> {
        self.write("records", |maps| maps.records.set(index, record, ANY))
    }

    /// Every member, without entries that have another key's value.
    pub(super) fn members(&self) -> Result<FxHashSet<MemberKey>, Problem> {
        let members: FxHashMap<MemberKey, Member> = all("members", self.members.map())?;
        let right = members.into_iter().filter(|(key, member)| member.is_of(key));
        Ok(right.map(|(key, _)| key).collect())
    }

    pub(super) fn set_member(&mut self, key: &MemberKey, joined: u64) -> Result<(), Problem> {
        self.write("members", |maps| maps.members.insert(key, Member::new(key, joined), ANY))
    }

    /// False if there was none.
    pub(super) fn remove_member(&mut self, member: &MemberKey) -> Result<bool, Problem> {
        removed("members", self.members.remove(member))
    }

    /// The slots before `end`, or all slots if there are fewer.
    pub(super) fn slots(&self, end: u32) -> Result<Vec<Endpoint>, Problem> {
        self.read_slots(end).map_err(|error| Problem::map("slots", error.into()))
    }

    fn read_slots(&self, end: u32) -> io::Result<Vec<Endpoint>> {
        let mut slots = Vec::new();
        bpf::read_first(self.slots.map(), end as usize, |_: u32, endpoint| slots.push(endpoint))?;
        Ok(slots)
    }

    pub(super) fn slot(&self, slot: u32) -> Result<Endpoint, Problem> {
        self.slots.get(&slot, ANY).map_err(|error| Problem::map("slots", error))
    }

    pub(super) fn set_slots(&mut self, first: u32, backends: &[Endpoint]) -> Result<(), Problem> {
        if backends.is_empty() {
            return Ok(());
        }
        self.write("slots", |maps| Ok(bpf::write_all(&maps.slots, first, backends)?))
    }

    pub(super) fn reset_tally(&mut self, port: u32) -> Result<(), Problem> {
        self.write("tallies", |maps| maps.tallies.set(port, Tally::default(), ANY))
    }

    pub(super) fn settings(&self) -> Result<Settings, Problem> {
        self.settings.get(&Settings::PLANE, ANY).map_err(|error| Problem::map("settings", error))
    }

    pub(super) fn set_settings(&mut self, settings: Settings) -> Result<(), Problem> {
        let set = self.settings.set(Settings::PLANE, settings, ANY);
        set.map_err(|error| Problem::map("settings", error))
    }

    pub(super) fn trouble(&self, trouble: u32) -> Result<u64, Problem> {
        let counts = self.troubles.get(&trouble, ANY).map_err(|error| Problem::map("troubles", error))?;
        Ok(counts.iter().sum())
    }

    /// Copies the map of this name from `old`; of `slots` only those in use.
    pub(super) fn copy(&mut self, name: &'static str, old: &Self, slots_in_use: u32) -> Result<(), Problem> {
        self.write(name, |new| match name {
            "frontends" => copy(&old.frontends, &mut new.frontends),
            "members" => copy(&old.members, &mut new.members),
            "affinities" => copy(&old.affinities, &mut new.affinities),
            "slots" => Ok(bpf::write_all(&new.slots, 0, &old.read_slots(slots_in_use)?)?),
            "ports" => {
                let words = (0..).map_while(|number| Some((number, old.ports.get(number)?)));
                Ok(words.into_iter().try_for_each(|(number, record)| new.ports.set(number, record))?)
            }
            "records" => {
                let mut records = Vec::new();
                bpf::read_all(old.records.map(), |_: u32, record: Record| records.push(record))?;
                Ok(bpf::write_all(&new.records, 0, &records)?)
            }
            _ => (0..old.tallies.len())
                .try_for_each(|port| new.tallies.set(port, old.tallies.get(&port, ANY)?, ANY)),
        })
    }

    /// Adds the clients of `old` that this map lacks.
    pub(super) fn add_affinities(&mut self, old: &Self) -> Result<(), Problem> {
        for entry in old.affinities.iter() {
            let (client, affinity) = entry.map_err(|error| Problem::map("affinities", error))?;
            match self.affinities.insert(client, affinity, IF_ABSENT) {
                Err(error) if code(&error) != Some(libc::EEXIST) => {
                    return Err(Problem::map("affinities", error));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// The time in nanoseconds of CLOCK_MONOTONIC, which the programs read.
pub(super) fn monotonic() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |now| {
        let (seconds, nanoseconds) = (now.tv_sec().unsigned_abs(), now.tv_nsec().unsigned_abs());
        seconds * 1_000_000_000 + nanoseconds
    })
}

pub(super) fn typed<M: TryFrom<Map, Error = MapError>>(name: &'static str, map: Map) -> Result<M, Problem> {
    M::try_from(map).map_err(|error| Problem::map(name, error))
}

fn all<K, V>(name: &'static str, map: &MapData) -> Result<FxHashMap<K, V>, Problem>
where
    K: aya::Pod + Default + Eq + Hash,
    V: aya::Pod + Default,
{
    let mut elements = FxHashMap::default();
    let read = bpf::read_all(map, |key, value| {
        elements.insert(key, value);
    });
    read.map_err(|error| Problem::map(name, error.into()))?;
    Ok(elements)
}

pub(super) fn removed(name: &'static str, result: Result<(), MapError>) -> Result<bool, Problem> {
    match result {
        Ok(()) => Ok(true),
        Err(error) if is_missing(&error) => Ok(false),
        Err(error) => Err(Problem::map(name, error)),
    }
}

fn copy<K: aya::Pod, V: aya::Pod>(
    from: &HashMap<MapData, K, V>,
    to: &mut HashMap<MapData, K, V>,
) -> Result<(), MapError> {
    from.iter().try_for_each(|entry| {
        let (key, value) = entry?;
        to.insert(key, value, ANY)
    })
}

/// The errno of an error.
fn code(error: &MapError) -> Option<i32> {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<io::Error>() {
            return io.raw_os_error();
        }
        cause = error.source();
    }
    None
}

/// Whether an error means that the entry or the file does not exist.
pub(super) fn is_missing(error: &MapError) -> bool {
    matches!(error, MapError::KeyNotFound | MapError::ElementNotFound) || code(error) == Some(libc::ENOENT)
}
