//! What the maps held when they were read: the memory of the agent that ran before.
//!
//! In: the maps. Out: which number, record and slots a service port has already, and what is left over in the end.

use proxy_ebpf::{Endpoint, FrontendKey, FrontendValue, MemberKey, Record, kind};
use rustc_hash::{FxHashMap, FxHashSet};

use super::{
    element::{self, Set, Site},
    maps::Maps,
    problem::Problem,
    slots::Range,
};
use crate::plan::PortPlan;

/// The contents of the maps. What is claimed is taken out.
#[derive(Default)]
pub(super) struct Found {
    pub(super) frontends: FxHashMap<FrontendKey, FrontendValue>,
    pub(super) members: FxHashSet<MemberKey>,
    slots: Vec<Endpoint>,
    /// The record that each port leads to, and what it says.
    ports: FxHashMap<u32, (u32, Record)>,
    /// The frontends that lead to each number of a port.
    numbers: FxHashMap<u32, Vec<FrontendKey>>,
    /// The records that ports lead to.
    records: FxHashSet<u32>,
    /// How long each range is that records lead to, by where it begins.
    ranges: FxHashMap<u32, u32>,
}

impl Found {
    pub(super) fn read(maps: &Maps) -> Result<Self, Problem> {
        let frontends = maps.frontends()?;
        let ports = maps.ports(numbers(&frontends))?;
        let mut found = Self::of(frontends, ports, maps.members()?, Vec::new());
        let end = found.taken().iter().map(|range| range.first.saturating_add(range.count)).max();
        found.slots = maps.slots(end.unwrap_or(0))?;
        Ok(found)
    }

    pub(super) fn of(
        frontends: FxHashMap<FrontendKey, FrontendValue>,
        ports: FxHashMap<u32, (u32, Record)>,
        members: FxHashSet<MemberKey>,
        slots: Vec<Endpoint>,
    ) -> Self {
        let mut numbers = FxHashMap::<_, Vec<_>>::default();
        led(&frontends).for_each(|(key, number)| numbers.entry(number).or_default().push(key));
        let records = ports.values().map(|(record, _)| *record).collect();
        let ranges = apart(ranges(&ports).collect());
        Self { frontends, members, slots, ports, numbers, records, ranges }
    }

    /// The ranges that records lead to, several times where several do.
    pub(super) fn taken(&self) -> Vec<Range> {
        ranges(&self.ports).collect()
    }

    /// The numbers that no port claimed.
    pub(super) fn unclaimed_numbers(&self) -> Vec<u32> {
        sorted(self.numbers.keys())
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

    /// Where a service port is, as far as one of its frontends tells. Of two ports that find the same number the first
    /// has it. A set that is not there as it should be has an empty range. With it come the frontends that lead to the
    /// port's number and are not the port's: another Service may have had them.
    pub(super) fn claim(&mut self, plan: &PortPlan) -> Option<(Site, Vec<FrontendKey>)> {
        let mut keys = plan.frontends.iter().map(|planned| element::key(&planned.frontend));
        let port = keys.find_map(|key| self.frontends.get(&key).filter(|value| value.is_of(&key)))?.number();
        let mut strays = self.numbers.remove(&port)?;
        let own: FxHashSet<_> =
            plan.frontends.iter().map(|planned| element::key(&planned.frontend)).collect();
        strays.retain(|key| !own.contains(key));
        let mut site = Site::new(port, plan.affinity.is_some());
        let Some((number, record)) = self.ports.get(&port).copied() else { return Some((site, strays)) };
        if self.records.contains(&number) {
            site.record = number;
        }
        for set in Set::ALL {
            let slots = record.sets[set.index()];
            let range = Range { first: slots.first, count: slots.count };
            if range.count > 0 && self.holds(range, plan, set) {
                self.ranges.remove(&range.first);
                site.set_range(set, range);
            }
        }
        Some((site, strays))
    }

    /// What the record of a claimed port says, as long as no other port has claimed that.
    pub(super) fn record(&self, site: &Site) -> Option<Record> {
        let (number, record) = self.ports.get(&site.port)?;
        (*number == site.record && self.records.contains(number)).then_some(*record)
    }

    /// A port keeps its record.
    pub(super) fn claim_record(&mut self, number: u32) {
        self.records.remove(&number);
    }

    /// What no port claimed.
    pub(super) fn unclaimed(self) -> (Vec<FrontendKey>, FxHashSet<MemberKey>) {
        (self.frontends.into_keys().collect(), self.members)
    }

    /// Whether a range holds exactly the backends of a set, in any order.
    fn holds(&self, range: Range, plan: &PortPlan, set: Set) -> bool {
        if self.ranges.get(&range.first) != Some(&range.count) {
            return false;
        }
        let (first, count) = (range.first as usize, range.count as usize);
        let Some(slots) = self.slots.get(first..first.saturating_add(count)) else { return false };
        let mut there: Vec<Endpoint> = slots.to_vec();
        let mut wanted: Vec<Endpoint> = set.of(plan).iter().map(element::endpoint).collect();
        there.sort_unstable();
        wanted.sort_unstable();
        there == wanted
    }
}

/// The numbers of the ports that frontends lead to.
pub(super) fn numbers(frontends: &FxHashMap<FrontendKey, FrontendValue>) -> FxHashSet<u32> {
    led(frontends).map(|(_, number)| number).collect()
}

/// The frontends of ports, each with the number of its port. An element that is not its key's leads nowhere.
fn led(frontends: &FxHashMap<FrontendKey, FrontendValue>) -> impl Iterator<Item = (FrontendKey, u32)> + '_ {
    let ports = frontends.iter().filter(|(key, value)| key.kind != kind::ADDRESS && value.is_of(key));
    ports.map(|(key, value)| (*key, value.number()))
}

fn sorted<'a>(numbers: impl IntoIterator<Item = &'a u32>) -> Vec<u32> {
    let mut numbers: Vec<u32> = numbers.into_iter().copied().collect();
    numbers.sort_unstable();
    numbers
}

fn ranges(ports: &FxHashMap<u32, (u32, Record)>) -> impl Iterator<Item = Range> + '_ {
    let slots = ports.values().flat_map(|(_, record)| record.sets);
    slots.map(|slots| Range { first: slots.first, count: slots.count })
}

/// The ranges, each once. Of ranges that overlap, which nobody of us writes, the later ones are left out.
fn apart(mut ranges: Vec<Range>) -> FxHashMap<u32, u32> {
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
