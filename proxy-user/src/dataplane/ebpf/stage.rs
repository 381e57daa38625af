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

/// Waits for the programs that run; false where the kernel cannot, as with `nohz_full`.
pub(super) fn settle() -> bool {
    let waited = system::wait_for_programs();
    if let Err(error) = &waited {
        tracing::debug!(%error, "cannot wait for programs");
    }
    waited.is_ok()
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::dataplane::ebpf::{
        fixture::{backend, port},
        slots::{REST, Range},
    };

    fn change(before: Option<&PortPlan>, after: Option<&PortPlan>) -> PortDelta {
        PortDelta { before: before.cloned().map(Arc::new), after: after.cloned().map(Arc::new) }
    }

    fn site(step: &Step) -> Site {
        step.after.as_ref().unwrap().1
    }

    /// What the maps hold after a complete delta with these ports.
    fn found(plans: &[PortPlan]) -> (Ground, Found) {
        let (mut ground, now) = (Ground::default(), Instant::now());
        let steps: Vec<Step> =
            plans.iter().filter_map(|plan| ground.step(&change(None, Some(plan)), now)).collect();
        let (mut frontends, mut slots) = (FxHashMap::default(), Vec::new());
        for step in &steps {
            frontends.extend(step.wanted(&|_| false));
            for set in &step.fresh {
                let range = site(step).range(*set);
                slots.resize(slots.len().max((range.first + range.count) as usize), Default::default());
                let backends = set.of(&step.after.as_ref().unwrap().0);
                (range.first as usize..).zip(backends).for_each(|(slot, backend)| {
                    slots[slot] = element::endpoint(backend);
                });
            }
            ground.done(step, now);
        }
        (ground, Found::of(frontends, FxHashMap::default(), slots))
    }

    #[test]
    fn a_port_keeps_its_number_and_the_slots_of_the_same_backends_in_any_order() {
        let [a, b] = ["10.244.0.1", "10.244.0.2"];
        let (web, dns) = (port("web", &[a, b]).at_ip("10.96.0.1"), port("dns", &[b]).at_ip("10.96.0.2"));
        let (old, found) = found(&[web.clone(), dns.clone()]);
        let (mut ground, now) = (Ground::of(found), Instant::now());
        let turned = port("web", &[b, a]).at_ip("10.96.0.1");
        let step = ground.step(&change(None, Some(&turned)), now).unwrap();
        assert_eq!((site(&step), &step.fresh[..], step.is_new), (old.ports[&web.id], &[][..], false));

        let grown = port("dns", &[a, b]).at_ip("10.96.0.2");
        let step = ground.step(&change(None, Some(&grown)), now).unwrap();
        let was = old.ports[&dns.id];
        assert_eq!((site(&step).port, &step.fresh[..], step.is_new), (was.port, &[Set::Cluster][..], false));
        assert_eq!(site(&step).range(Set::Cluster), Range { first: 3, count: 2 }, "beside what is in use");
        ground.done(&step, now);
        let left = ground.leftovers(now).unwrap();
        assert_eq!(left.unclaimed_ranges(), [was.range(Set::Cluster)]);
        assert!(left.unclaimed_numbers().is_empty());
    }

    #[test]
    fn of_two_ports_that_find_one_number_the_first_has_it() {
        let both = port("old", &["10.244.0.1"]).at_ip("10.96.0.1").at_ip("10.96.0.2");
        let (_, found) = found(std::slice::from_ref(&both));
        let (mut ground, now) = (Ground::of(found), Instant::now());
        let mut step = |name, ip| {
            let plan = port(name, &["10.244.0.1"]).at_ip(ip);
            ground.step(&change(None, Some(&plan)), now).unwrap()
        };
        let (first, second) = (step("first", "10.96.0.1"), step("second", "10.96.0.2"));
        assert_eq!((site(&first).port, first.is_new, first.fresh.len()), (0, false, 0));
        assert_eq!((site(&second).port, second.is_new), (1, true));
        assert_eq!(site(&second).range(Set::Cluster), Range { first: 1, count: 1 });
    }

    #[test]
    fn ranges_that_overlap_are_nobodys_after_the_first() {
        let [a, b, c] = ["10.244.0.1", "10.244.0.2", "10.244.0.3"].map(|ip| element::endpoint(&backend(ip)));
        let plans = [
            port("web", &["10.244.0.1", "10.244.0.2"]).at_ip("10.96.0.1"),
            port("dns", &["10.244.0.2", "10.244.0.3"]).at_ip("10.96.0.2"),
        ];
        let sites = [0, 1].map(|number| {
            let mut site = Site::new(number, false);
            site.set_range(Set::Cluster, Range { first: number, count: 2 });
            site
        });
        let frontends = plans.iter().zip(&sites).map(|(plan, site)| {
            let planned = &plan.frontends[0];
            (element::key(&planned.frontend), element::value(plan, planned, site, false))
        });
        let found = Found::of(frontends.collect(), FxHashMap::default(), vec![a, b, c]);
        let (mut ground, now) = (Ground::of(found), Instant::now());
        let steps = plans.map(|plan| ground.step(&change(None, Some(&plan)), now).unwrap());
        assert_eq!(steps.each_ref().map(|step| site(step).port), [0, 1]);
        let ranges = steps.each_ref().map(|step| site(step).range(Set::Cluster));
        assert_eq!(ranges, [Range { first: 0, count: 2 }, Range { first: 3, count: 2 }]);
    }

    #[test]
    fn what_nobody_claims_is_given_to_others_after_a_rest() {
        let (_, found) = found(&[port("old", &["10.244.0.1"]).at_ip("10.96.0.1")]);
        let (mut ground, now) = (Ground::of(found), Instant::now());
        assert_eq!(ground.leftovers(now).unwrap().unclaimed_numbers(), [0]);
        let plan = port("new", &["10.244.0.1"]).at_ip("10.96.0.2");
        let step = ground.step(&change(None, Some(&plan)), now).unwrap();
        assert_eq!((site(&step).port, site(&step).range(Set::Cluster).first), (0, 1));
    }

    proptest! {
        /// Whatever becomes of each step: no slot is two ports' at a time, and neither slots nor numbers are lost.
        #[test]
        fn no_slot_is_two_ports_and_none_is_lost(
            changes in proptest::collection::vec((0..8_u8, 0..24_u8, 0..8_u8), 1..20),
        ) {
            let (mut ground, mut now) = (Ground::default(), Instant::now());
            let mut there: FxHashMap<u8, PortPlan> = FxHashMap::default();
            let backends: Vec<String> = (0..24).map(|number| format!("10.244.0.{number}")).collect();
            // The same again and again, so that what is lost adds up.
            for (name, count, fate) in (0..100).flat_map(|_| changes.iter().copied()) {
                now += REST + Duration::from_secs(1);
                let backends: Vec<&str> = backends.iter().take(count.into()).map(|ip| &**ip).collect();
                let wanted = (count > 0).then(|| port(&format!("s{name}"), &backends));
                let delta = change(there.get(&name), wanted.as_ref());
                let Some(step) = ground.step(&delta, now) else { continue };
                if fate == 0 {
                    ground.undo(&step, now);
                    continue;
                }
                ground.done(&step, now);
                match wanted {
                    Some(plan) => there.insert(name, plan),
                    None => there.remove(&name),
                };
                let mut ranges: Vec<Range> = ground.ports.values().map(|site| site.range(Set::Cluster)).collect();
                ranges.sort_unstable_by_key(|range| range.first);
                prop_assert!(ranges.windows(2).all(|two| two[0].first + two[0].count <= two[1].first));
            }
            prop_assert!(ground.numbers.end() <= 9, "{} numbers", ground.numbers.end());
            prop_assert!(ground.slots.end() <= 4096 + 1024, "{} slots", ground.slots.end());
        }
    }
}
