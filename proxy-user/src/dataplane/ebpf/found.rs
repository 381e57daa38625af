//! What the maps held when they were read: the memory of whoever ran before.
//!
//! In: the maps. Out: which number and which slots a service port has already, and what is left over in the end.

use proxy_ebpf::{Endpoint, FrontendKey, FrontendValue, MemberKey};
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
    claimed: FxHashSet<u32>,
}

impl Found {
    pub(super) fn read(maps: &Maps) -> Result<Self, Problem> {
        let mut found = Self::default();
        for entry in maps.frontends() {
            found.frontends.extend([entry?]);
        }
        for entry in maps.members() {
            found.members.extend([entry?]);
        }
        let end = found.ranges().map(|range| range.first.saturating_add(range.count)).max().unwrap_or(0);
        for slot in 0..end.min(maps.slots()) {
            found.slots.push(maps.slot(slot)?);
        }
        Ok(found)
    }

    /// The ranges that frontends lead to, several times where several do.
    pub(super) fn ranges(&self) -> impl Iterator<Item = Range> + '_ {
        self.frontends.values().flat_map(|value| {
            [value.pod, value.host].map(|choice| Range { first: choice.first, count: choice.count })
        })
    }

    /// The numbers of ports.
    pub(super) fn ports(&self) -> impl Iterator<Item = u32> + '_ {
        self.frontends.iter().filter(|(key, _)| key.port != 0).map(|(_, value)| value.port)
    }

    /// Where a service port is, as far as one of its frontends tells. Of two ports that find the same number the first
    /// has it. A set that is not there as it should be has an empty range.
    pub(super) fn site(&mut self, plan: &PortPlan) -> Option<Site> {
        let known = || {
            plan.frontends.iter().filter_map(|planned| self.frontends.get(&element::key(&planned.frontend)))
        };
        let port = known().next()?.port;
        let mut site = Site::new(port, plan.affinity.is_some());
        for set in Set::ALL {
            let choices = known().flat_map(|value| [value.pod, value.host]);
            let mut ranges = choices
                .filter(|choice| choice.set == set.number(port) && choice.count > 0)
                .map(|choice| Range { first: choice.first, count: choice.count });
            let fits = ranges.find(|range| self.holds(*range, plan, set));
            site.set_range(set, fits.unwrap_or_default());
        }
        self.claimed.insert(port).then_some(site)
    }

    /// Whether a range holds exactly the backends of a set, in any order.
    fn holds(&self, range: Range, plan: &PortPlan, set: Set) -> bool {
        let (first, count) = (range.first as usize, range.count as usize);
        let Some(slots) = self.slots.get(first..first.saturating_add(count)) else { return false };
        let mut there: Vec<Endpoint> = slots.to_vec();
        let mut wanted: Vec<Endpoint> = set.of(plan).iter().map(element::endpoint).collect();
        there.sort_unstable();
        wanted.sort_unstable();
        there == wanted
    }
}
