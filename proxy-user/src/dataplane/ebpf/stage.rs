//! What a delta comes to: which numbers and slots each service port of it gets, before anything is written.
//!
//! In: port changes, and where ports are. Out: [`Step`]s, and how much room they need.

use std::{sync::Arc, time::Instant};

use proxy_ebpf::{FrontendKey, FrontendValue, MemberKey, system};
use rustc_hash::{FxHashMap, FxHashSet};

use super::{
    element::{self, Set, Site},
    found::Found,
    numbers::Numbers,
    slots::Slots,
};
use crate::plan::{PortDelta, PortId, PortPlan};

/// How one service port changes in the maps.
pub(super) struct Step {
    pub(super) id: PortId,
    pub(super) before: Option<(Arc<PortPlan>, Site)>,
    pub(super) after: Option<(Arc<PortPlan>, Site)>,
    /// The sets whose slots are to be written.
    pub(super) fresh: Vec<Set>,
    /// Whether the number is a new one.
    pub(super) is_new: bool,
}

/// Where everything is.
#[derive(Default)]
pub(super) struct Ground {
    pub(super) ports: FxHashMap<PortId, Site>,
    pub(super) numbers: Numbers,
    pub(super) slots: Slots,
    /// What is in the maps and not yet claimed; only until a complete delta is through.
    pub(super) found: Option<Found>,
}

impl Ground {
    /// As the maps are.
    pub(super) fn of(found: Found) -> Self {
        Self {
            ports: FxHashMap::default(),
            numbers: Numbers::with_taken(found.unclaimed_numbers().into_iter()),
            slots: Slots::with_taken(found.taken()),
            found: Some(found),
        }
    }

    /// Finds a place for what a port is to be.
    pub(super) fn step(&mut self, delta: &PortDelta, now: Instant) -> Option<Step> {
        let id = delta.id()?.clone();
        let known = self.ports.get(&id).copied();
        let before = delta.before.clone().zip(known);
        let Some(plan) = delta.after.clone() else {
            return Some(Step { id, before, after: None, fresh: Vec::new(), is_new: false });
        };
        let adopted =
            if known.is_none() { self.found.as_mut().and_then(|found| found.claim(&plan)) } else { None };
        let sticky = plan.affinity.is_some();
        let is_new = known.is_none() && adopted.is_none();
        let had = known.or(adopted);
        let mut site = Site::new(had.map_or_else(|| self.numbers.take(), |site| site.port), sticky);
        let mut fresh = Vec::new();
        for set in Set::ALL {
            let backends = set.of(&plan);
            let same = match &before {
                Some((old, _)) => set.of(old) == backends,
                None => adopted.is_some_and(|site| site.range(set).count as usize == backends.len()),
            };
            if let (true, Some(had)) = (same, had) {
                site.set_range(set, had.range(set));
            } else {
                let count = u32::try_from(backends.len()).unwrap_or(u32::MAX);
                site.set_range(set, self.slots.take(count, now, settle));
                fresh.push(set);
            }
        }
        Some(Step { id, before, after: Some((plan, site)), fresh, is_new })
    }

    /// Gives back what a step took, because it could not be done.
    pub(super) fn undo(&mut self, step: &Step, now: Instant) {
        let Some((_, site)) = &step.after else { return };
        step.fresh.iter().for_each(|set| self.slots.give_back(site.range(*set), now));
        if step.is_new {
            self.numbers.give_back(site.port);
        }
    }

    /// Draws the consequences of a step that is done.
    pub(super) fn done(&mut self, step: &Step, now: Instant) {
        let old = self.ports.get(&step.id).copied();
        match (&step.after, old) {
            (Some((_, site)), old) => {
                if let Some(old) = old {
                    step.fresh.iter().for_each(|set| self.slots.give_back(old.range(*set), now));
                }
                self.ports.insert(step.id.clone(), *site);
            }
            (None, Some(old)) => {
                Set::ALL.iter().for_each(|set| self.slots.give_back(old.range(*set), now));
                self.numbers.give_back(old.port);
                self.ports.remove(&step.id);
            }
            (None, None) => {}
        }
    }

    /// Gives back what nobody claimed of what was found. Returns it, to be deleted.
    pub(super) fn leftovers(&mut self, now: Instant) -> Option<Found> {
        let found = self.found.take()?;
        found.unclaimed_ranges().into_iter().for_each(|range| self.slots.give_back(range, now));
        found.unclaimed_numbers().into_iter().for_each(|number| self.numbers.give_back(number));
        Some(found)
    }
}

/// Waits for the programs that run. Where the kernel cannot, the time a range rested has to do.
pub(super) fn settle() {
    if let Err(error) = system::wait_for_programs() {
        tracing::debug!(%error, "cannot wait for programs");
    }
}

impl Step {
    /// The frontends as they are to be.
    pub(super) fn wanted<'a>(
        &'a self,
        is_theirs: &'a dyn Fn(&FrontendKey) -> bool,
    ) -> impl Iterator<Item = (FrontendKey, FrontendValue)> + 'a {
        frontends(self.after.as_ref(), is_theirs)
    }

    /// The frontends as they are.
    pub(super) fn had<'a>(
        &'a self,
        is_theirs: &'a dyn Fn(&FrontendKey) -> bool,
    ) -> impl Iterator<Item = (FrontendKey, FrontendValue)> + 'a {
        frontends(self.before.as_ref(), is_theirs)
    }

    /// The members as they are to be.
    pub(super) fn wanted_members(&self) -> FxHashSet<MemberKey> {
        members(self.after.as_ref())
    }

    /// The members as they are.
    pub(super) fn had_members(&self) -> FxHashSet<MemberKey> {
        members(self.before.as_ref())
    }
}

fn members(side: Option<&(Arc<PortPlan>, Site)>) -> FxHashSet<MemberKey> {
    side.into_iter().flat_map(|(plan, site)| element::members(plan, site.port)).collect()
}

fn frontends<'a>(
    side: Option<&'a (Arc<PortPlan>, Site)>,
    is_theirs: &'a dyn Fn(&FrontendKey) -> bool,
) -> impl Iterator<Item = (FrontendKey, FrontendValue)> + 'a {
    side.into_iter().flat_map(move |(plan, site)| {
        plan.frontends.iter().map(move |planned| {
            let key = element::key(&planned.frontend);
            (key, element::value(plan, planned, site, is_theirs(&key)))
        })
    })
}
