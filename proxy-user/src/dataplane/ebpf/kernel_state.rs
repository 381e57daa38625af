//! The content of the maps when they were read: what an earlier agent wrote.
//!
//! In: the maps. Out: the index, record and slots that a service port has already, and in the end what no port claimed.

use proxy_ebpf::{Endpoint, FrontendKey, FrontendValue, MemberKey, Record, kind};
use rustc_hash::{FxHashMap, FxHashSet};

use super::{
    element::{self, Placement},
    maps::Maps,
    problem::Problem,
    ranges::Range,
};
use crate::plan::{BackendSet, PortPlan};

/// The content of the maps, without what ports have claimed.
#[derive(Default)]
pub(super) struct KernelState {
    pub(super) frontends: FxHashMap<FrontendKey, FrontendValue>,
    pub(super) members: FxHashSet<MemberKey>,
    slots: Vec<Endpoint>,
    /// The record of each port, by the port's index: the record's index and content.
    records_of_ports: FxHashMap<u32, (u32, Record)>,
    /// The frontends of each port, by the port's index.
    frontends_of_ports: FxHashMap<u32, Vec<FrontendKey>>,
    /// The indices of records that ports use.
    records: FxHashSet<u32>,
    /// The slots that records use: the length of each range, by its first slot.
    ranges: FxHashMap<u32, u32>,
}

impl KernelState {
    pub(super) fn read(maps: &Maps) -> Result<Self, Problem> {
        let frontends = maps.frontends()?;
        let records = maps.records_of(port_indices(&frontends))?;
        let mut state = Self::of(frontends, records, maps.members()?, Vec::new());
        let end = state.ranges_in_use().iter().map(|range| range.first.saturating_add(range.count)).max();
        state.slots = maps.slots(end.unwrap_or(0))?;
        Ok(state)
    }

    pub(super) fn of(
        frontends: FxHashMap<FrontendKey, FrontendValue>,
        records_of_ports: FxHashMap<u32, (u32, Record)>,
        members: FxHashSet<MemberKey>,
        slots: Vec<Endpoint>,
    ) -> Self {
        let mut frontends_of_ports = FxHashMap::<_, Vec<_>>::default();
        with_ports(&frontends).for_each(|(key, port)| frontends_of_ports.entry(port).or_default().push(key));
        let records = records_of_ports.values().map(|(record, _)| *record).collect();
        let ranges = without_overlap(ranges(&records_of_ports).collect());
        Self { frontends, members, slots, records_of_ports, frontends_of_ports, records, ranges }
    }

    /// The ranges that records use; a range that several records use occurs several times.
    pub(super) fn ranges_in_use(&self) -> Vec<Range> {
        ranges(&self.records_of_ports).collect()
    }

    /// The indices that no port claimed.
    pub(super) fn unclaimed_ports(&self) -> Vec<u32> {
        sorted(self.frontends_of_ports.keys())
    }

    /// The records that no port claimed.
    pub(super) fn unclaimed_records(&self) -> Vec<u32> {
        sorted(&self.records)
    }

    /// The ranges that no port claimed.
    pub(super) fn unclaimed_ranges(&self) -> Vec<Range> {
        let ranges = self.ranges.iter().map(|(&first, &count)| Range { first, count });
        let mut ranges: Vec<Range> = ranges.collect();
        ranges.sort_unstable_by_key(|range| range.first);
        ranges
    }

    /// Finds the placement of a service port by one of its frontends. The first of two ports that find the same index
    /// gets it. A set whose slots do not have its backends gets an empty range. With the placement come the frontends that
    /// refer to the same index and are not the port's: another Service may have had them.
    pub(super) fn claim(&mut self, plan: &PortPlan) -> Option<(Placement, Vec<FrontendKey>)> {
        let mut keys = plan.frontends.iter().map(|planned| element::key(&planned.frontend));
        let port = keys.find_map(|key| self.frontends.get(&key).filter(|value| value.is_of(&key)))?.port();
        let mut foreign = self.frontends_of_ports.remove(&port)?;
        let own: FxHashSet<_> =
            plan.frontends.iter().map(|planned| element::key(&planned.frontend)).collect();
        foreign.retain(|key| !own.contains(key));
        let mut placement = Placement::new(port, plan.affinity.is_some());
        let Some((index, record)) = self.records_of_ports.get(&port).copied() else {
            return Some((placement, foreign));
        };
        if self.records.contains(&index) {
            placement.record = index;
        }
        for set in BackendSet::ALL {
            let slots = record.sets[element::set_index(set)];
            let range = Range { first: slots.first, count: slots.count };
            if range.count > 0 && self.holds(range, plan, set) {
                self.ranges.remove(&range.first);
                placement.set_range(set, range);
            }
        }
        Some((placement, foreign))
    }

    /// The content of a claimed port's record, unless another port has claimed the record.
    pub(super) fn record(&self, placement: &Placement) -> Option<Record> {
        let (index, record) = self.records_of_ports.get(&placement.port)?;
        (*index == placement.record && self.records.contains(index)).then_some(*record)
    }

    /// Claims the record that a port keeps.
    pub(super) fn claim_record(&mut self, index: u32) {
        self.records.remove(&index);
    }

    /// Whether a range has exactly the backends of a set, in any order.
    fn holds(&self, range: Range, plan: &PortPlan, set: BackendSet) -> bool {
        if self.ranges.get(&range.first) != Some(&range.count) {
            return false;
        }
        let (first, count) = (range.first as usize, range.count as usize);
        let Some(slots) = self.slots.get(first..first.saturating_add(count)) else { return false };
        let mut found: Vec<Endpoint> = slots.to_vec();
        let mut wanted: Vec<Endpoint> = plan.backends(set).iter().map(element::endpoint).collect();
        found.sort_unstable();
        wanted.sort_unstable();
        found == wanted
    }
}

/// The indices of the ports that frontends refer to.
pub(super) fn port_indices(frontends: &FxHashMap<FrontendKey, FrontendValue>) -> FxHashSet<u32> {
    with_ports(frontends).map(|(_, port)| port).collect()
}

/// The frontends of service ports, each with its port's index. Entries with another key's value are left out.
fn with_ports(
    frontends: &FxHashMap<FrontendKey, FrontendValue>,
) -> impl Iterator<Item = (FrontendKey, u32)> + '_ {
    let of_ports = frontends.iter().filter(|(key, value)| key.kind != kind::ADDRESS && value.is_of(key));
    of_ports.map(|(key, value)| (*key, value.port()))
}

fn sorted<'a>(indices: impl IntoIterator<Item = &'a u32>) -> Vec<u32> {
    let mut indices: Vec<u32> = indices.into_iter().copied().collect();
    indices.sort_unstable();
    indices
}

fn ranges(records_of_ports: &FxHashMap<u32, (u32, Record)>) -> impl Iterator<Item = Range> + '_ {
    let slots = records_of_ports.values().flat_map(|(_, record)| record.sets);
    slots.map(|slots| Range { first: slots.first, count: slots.count })
}

/// Each range once. Of ranges that overlap, which weir never writes, only the first is kept.
fn without_overlap(mut ranges: Vec<Range>) -> FxHashMap<u32, u32> {
    ranges.retain(|range| range.count > 0);
    ranges.sort_unstable_by_key(|range| (range.first, range.count));
    let mut end = 0;
    ranges.retain(|range| {
        let fits = range.first >= end;
        if fits {
            end = range.first.saturating_add(range.count);
        }
        fits
    });
    ranges.into_iter().map(|range| (range.first, range.count)).collect()
}
