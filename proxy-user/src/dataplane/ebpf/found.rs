//! What the maps held when they were read: the memory of whoever ran before.
//!
//! In: the maps. Out: which number and which slots a service port has already, and what is left over in the end.

use proxy_ebpf::{Endpoint, FrontendKey, FrontendValue, MemberKey, set};
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
    pub(super) members: FxHashMap<MemberKey, u64>,
    slots: Vec<Endpoint>,
    /// The numbers of ports.
    numbers: FxHashSet<u32>,
    /// The numbers of ports that stay as they are.
    spared: FxHashSet<u32>,
    /// How long each range is that frontends lead to, by where it begins.
    ranges: FxHashMap<u32, u32>,
}

impl Found {
    pub(super) fn read(maps: &Maps) -> Result<Self, Problem> {
        let mut found = Self::of(maps.frontends()?, maps.members()?, Vec::new());
        found.slots = maps.slots(found.end())?;
        Ok(found)
    }

    pub(super) fn of(
        frontends: FxHashMap<FrontendKey, FrontendValue>,
        members: FxHashMap<MemberKey, u64>,
        slots: Vec<Endpoint>,
    ) -> Self {
        let ports = frontends.iter().filter(|(key, _)| key.port != 0);
        let numbers = ports.map(|(_, value)| value.port).collect();
        let ranges = apart(ranges(&frontends).collect());
        Self { frontends, members, slots, numbers, ranges, ..Self::default() }
    }

    /// One more than the last slot that a frontend leads to.
    fn end(&self) -> u32 {
        ranges(&self.frontends).map(|range| range.first.saturating_add(range.count)).max().unwrap_or(0)
    }

    /// The ranges that frontends lead to, several times where several do.
    pub(super) fn taken(&self) -> Vec<Range> {
        ranges(&self.frontends).collect()
    }

    /// The numbers that nobody claimed.
    pub(super) fn unclaimed_numbers(&self) -> Vec<u32> {
        let mut numbers: Vec<u32> = self.numbers.iter().copied().collect();
        numbers.sort_unstable();
        numbers
    }

    /// The ranges that nobody claimed.
    pub(super) fn unclaimed_ranges(&self) -> Vec<Range> {
        let ranges = self.ranges.iter().map(|(&first, &count)| Range { first, count });
        let mut ranges: Vec<Range> = ranges.collect();
        ranges.sort_unstable_by_key(|range| range.first);
        ranges
    }

    /// Where a service port is, as far as one of its frontends tells. Of two ports that find the same number the first
    /// has it. A set that is not there as it should be has an empty range.
    pub(super) fn claim(&mut self, plan: &PortPlan) -> Option<Site> {
        let known = plan.frontends.iter().map(|planned| element::key(&planned.frontend));
        let known: Vec<FrontendValue> = known.filter_map(|key| self.frontends.get(&key).copied()).collect();
        let port = known.first()?.port;
        if !self.numbers.remove(&port) {
            return None;
        }
        let mut site = Site::new(port, plan.affinity.is_some());
        for set in Set::ALL {
            let choices = known.iter().flat_map(|value| [value.pod, value.host]);
            let mut ranges = choices
                .filter(|choice| choice.set == set.number(port) && choice.count > 0)
                .map(|choice| Range { first: choice.first, count: choice.count });
            if let Some(range) = ranges.find(|range| self.holds(*range, plan, set)) {
                self.ranges.remove(&range.first);
                site.set_range(set, range);
            }
        }
        Some(site)
    }

    /// Leaves alone these frontends and what is under this number, because it could not be brought to what it should be.
    pub(super) fn spare(&mut self, frontends: impl Iterator<Item = FrontendKey>, number: u32) {
        frontends.for_each(|key| {
            self.frontends.remove(&key);
        });
        self.spared.insert(number);
    }

    /// What nobody claimed and is not spared.
    pub(super) fn unclaimed(&self) -> (Vec<FrontendKey>, Vec<MemberKey>) {
        let spared = |number: u32| self.spared.contains(&number);
        let frontends = self.frontends.iter().filter(|(key, value)| key.port == 0 || !spared(value.port));
        let members = self.members.keys().filter(|member| !spared(set::port(member.set)));
        (frontends.map(|(key, _)| *key).collect(), members.copied().collect())
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

fn ranges(frontends: &FxHashMap<FrontendKey, FrontendValue>) -> impl Iterator<Item = Range> + '_ {
    let choices = frontends.values().flat_map(|value| [value.pod, value.host]);
    choices.map(|choice| Range { first: choice.first, count: choice.count })
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
