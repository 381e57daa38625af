//! What a delta comes to: which number, record and slots each service port of it gets, before anything is written.
//!
//! In: port changes, and where ports are. Out: [`Step`]s, and how much room they need.

use std::{sync::Arc, time::Instant};

use crate::sys::bpf;
use proxy_ebpf::{FrontendKey, FrontendValue, MemberKey, Record};
use rustc_hash::{FxHashMap, FxHashSet};

use super::{
    columns::Columns,
    element::{self, Set, Site},
    found::Found,
    slots::{MOST_RESTING_NUMBERS, MOST_RESTING_RECORDS, Range, Slots},
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
    /// What is to be written at the place of its record; nothing where the record stays.
    pub(super) record: Option<Record>,
    /// The frontends that are to be written.
    pub(super) turns: Vec<Turn>,
    /// Frontends that lead to its number, which it found, and that are not its own.
    pub(super) strays: Vec<FrontendKey>,
}

/// A frontend that changes.
pub(super) struct Turn {
    pub(super) key: FrontendKey,
    pub(super) known: Option<FrontendValue>,
    pub(super) wanted: FrontendValue,
}

impl Turn {
    /// Whether the port has the frontend already.
    pub(super) fn is_own(&self) -> bool {
        self.known.is_some_and(|known| known.is_of(&self.key) && known.number() == self.wanted.number())
    }
}

/// Where everything is.
pub(super) struct Ground {
    pub(super) ports: FxHashMap<PortId, Site>,
    pub(super) numbers: Slots,
    pub(super) records: Slots,
    pub(super) slots: Slots,
    /// What is in the maps and not yet claimed; only until a complete delta is through.
    pub(super) found: Option<Found>,
}

impl Default for Ground {
    fn default() -> Self {
        Self::of(Found::default(), Instant::now(), true)
    }
}

impl Ground {
    /// As the maps are. What is free in them has to rest first unless programs that were led there have ended.
    pub(super) fn of(found: Found, now: Instant, rested: bool) -> Self {
        let single = |places: Vec<u32>| places.into_iter().map(|first| Range { first, count: 1 }).collect();
        let (numbers, mut records) = (found.unclaimed_numbers(), found.unclaimed_records());
        records.push(Record::NOTHING);
        Self {
            ports: FxHashMap::default(),
            numbers: Slots::new(MOST_RESTING_NUMBERS).with_taken(single(numbers), now, rested),
            records: Slots::new(MOST_RESTING_RECORDS).with_taken(single(records), now, rested),
            slots: Slots::default().with_taken(found.taken(), now, rested),
            found: Some(found),
        }
    }

    /// Finds a place for what a port is to be.
    pub(super) fn step(&mut self, delta: &PortDelta, now: Instant) -> Option<Step> {
        let id = delta.id()?.clone();
        let known = self.ports.get(&id).copied();
        let before = delta.before.clone().zip(known);
        let Some(plan) = delta.after.clone() else {
            return Some(Step::new(id, before, None));
        };
        let claimed =
            if known.is_none() { self.found.as_mut().and_then(|found| found.claim(&plan)) } else { None };
        let (adopted, strays) = claimed.map_or((None, Vec::new()), |(site, strays)| (Some(site), strays));
        let sticky = plan.affinity.is_some();
        let is_new = known.is_none() && adopted.is_none();
        let had = known.or(adopted);
        let number = had.map_or_else(|| self.numbers.take_one(now, settle), |site| site.port);
        let mut site = Site::new(number, sticky);
        site.record = had.map_or(Record::NOTHING, |site| site.record);
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
        Some(Step { fresh, is_new, strays, ..Step::new(id, before, Some((plan, site))) })
    }

    /// Says what of a step's port is to be written, now that its number and slots are known. `there` looks a frontend up
    /// and `record` a record, where they are in the maps and not among what was found.
    pub(super) fn arrange<E>(
        &mut self,
        step: &mut Step,
        is_theirs: &dyn Fn(&FrontendKey) -> bool,
        there: impl Fn(&FrontendKey) -> Option<FrontendValue>,
        record: impl Fn(u32) -> Result<Record, E>,
        now: Instant,
    ) -> Result<(), E> {
        let Some((plan, site)) = &mut step.after else { return Ok(()) };
        let keys = plan.frontends.iter().map(|planned| element::key(&planned.frontend));
        let look = |key| match &self.found {
            Some(found) => (key, found.frontends.get(&key).copied()),
            None => (key, there(&key)),
        };
        let known: Vec<(FrontendKey, Option<FrontendValue>)> = keys.map(look).collect();
        let routes = plan.frontends.iter().zip(&known).map(|(planned, (key, known))| {
            let own = known.filter(|known| known.is_of(key) && known.number() == site.port);
            (planned.route, own.map(FrontendValue::column))
        });
        let columns = Columns::assign(&routes.collect::<Vec<_>>());
        let wanted = element::record(plan, site, columns.columns);
        let there = match &self.found {
            Some(found) => found.record(site),
            None if site.record == Record::NOTHING => None,
            None => Some(record(site.record)?),
        };
        if there == Some(wanted) {
            if let Some(found) = &mut self.found {
                found.claim_record(site.record);
            }
        } else {
            site.record = self.records.take_one(now, settle);
            step.record = Some(wanted);
        }
        let turns = plan.frontends.iter().zip(&known).zip(columns.of);
        let turns = turns.filter_map(|((planned, &(key, known)), column)| {
            let packets = column.is_none() || element::is_for_packets(planned) || is_theirs(&key);
            let wanted = FrontendValue::new(&key, site.port, column.unwrap_or(0), packets);
            (known != Some(wanted)).then_some(Turn { key, known, wanted })
        });
        step.turns = turns.collect();
        Ok(())
    }

    /// Lets go of everything that a port has, or was about to get, because it could not be written.
    pub(super) fn lost(&mut self, step: &Step, now: Instant) {
        match (&step.after, self.ports.remove(&step.id)) {
            (Some((_, site)), old) => {
                if let Some(old) = old {
                    self.replaced(step, &old, site, now);
                }
                self.free(site, now);
            }
            (None, Some(old)) => self.free(&old, now),
            (None, None) => {}
        }
    }

    /// Draws the consequences of a step that is done.
    pub(super) fn done(&mut self, step: &Step, now: Instant) {
        let old = self.ports.get(&step.id).copied();
        match (&step.after, old) {
            (Some((_, site)), old) => {
                if let Some(old) = old {
                    self.replaced(step, &old, site, now);
                }
                self.ports.insert(step.id.clone(), *site);
            }
            (None, Some(old)) => {
                self.free(&old, now);
                self.ports.remove(&step.id);
            }
            (None, None) => {}
        }
    }

    /// Takes back what a port had and has no more.
    fn replaced(&mut self, step: &Step, old: &Site, new: &Site, now: Instant) {
        step.fresh.iter().for_each(|set| self.slots.give_back(old.range(*set), now));
        if old.record != new.record {
            self.give_record_back(old.record, now);
        }
    }

    fn free(&mut self, site: &Site, now: Instant) {
        Set::ALL.iter().for_each(|set| self.slots.give_back(site.range(*set), now));
        self.give_record_back(site.record, now);
        self.numbers.give_one_back(site.port, now);
    }

    fn give_record_back(&mut self, record: u32, now: Instant) {
        if record != Record::NOTHING {
            self.records.give_one_back(record, now);
        }
    }

    /// Gives back what nobody claimed of what was found. Returns it, to be deleted.
    pub(super) fn leftovers(&mut self, now: Instant) -> Option<Found> {
        let found = self.found.take()?;
        found.unclaimed_ranges().into_iter().for_each(|range| self.slots.give_back(range, now));
        found.unclaimed_records().into_iter().for_each(|record| self.give_record_back(record, now));
        found.unclaimed_numbers().into_iter().for_each(|number| self.numbers.give_one_back(number, now));
        Some(found)
    }
}

/// Waits for the programs that run; false where the kernel cannot, as with `nohz_full`.
pub(super) fn settle() -> bool {
    let waited = bpf::wait_for_programs();
    if let Err(error) = &waited {
        tracing::debug!(%error, "cannot wait for programs");
    }
    waited.is_ok()
}

impl Step {
    fn new(id: PortId, before: Option<(Arc<PortPlan>, Site)>, after: Option<(Arc<PortPlan>, Site)>) -> Self {
        Self {
            id,
            before,
            after,
            fresh: Vec::new(),
            is_new: false,
            record: None,
            turns: Vec::new(),
            strays: Vec::new(),
        }
    }

    /// The frontends that are to be.
    pub(super) fn wanted(&self) -> impl Iterator<Item = FrontendKey> + '_ {
        frontends(self.after.as_ref())
    }

    /// The frontends that are.
    pub(super) fn had(&self) -> impl Iterator<Item = FrontendKey> + '_ {
        frontends(self.before.as_ref())
    }

    /// Where the port is and where it is to be.
    pub(super) fn sites(&self) -> impl Iterator<Item = &Site> + '_ {
        self.before.iter().chain(&self.after).map(|(_, site)| site)
    }

    /// The members as they are to be.
    pub(super) fn wanted_members(&self) -> FxHashSet<MemberKey> {
        members(self.after.as_ref())
    }

    /// The members as they are.
    pub(super) fn had_members(&self) -> FxHashSet<MemberKey> {
        members(self.before.as_ref())
    }

    /// Whether a frontend that the port has already gets another value.
    pub(super) fn turns_own(&self) -> bool {
        self.turns.iter().any(Turn::is_own)
    }
}

fn members(side: Option<&(Arc<PortPlan>, Site)>) -> FxHashSet<MemberKey> {
    side.into_iter().flat_map(|(plan, site)| element::members(plan, site.port)).collect()
}

fn frontends(side: Option<&(Arc<PortPlan>, Site)>) -> impl Iterator<Item = FrontendKey> + '_ {
    side.into_iter()
        .flat_map(|(plan, _)| plan.frontends.iter().map(|planned| element::key(&planned.frontend)))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::dataplane::ebpf::{
        fixture::{WithFrontends as _, backend, port},
        slots::{REST, Range},
    };

    fn change(before: Option<&PortPlan>, after: Option<&PortPlan>) -> PortDelta {
        PortDelta { before: before.cloned().map(Arc::new), after: after.cloned().map(Arc::new) }
    }

    fn site(step: &Step) -> Site {
        step.after.as_ref().unwrap().1
    }

    /// Says what a step comes to in maps where there is nothing but what was found.
    fn arrange(ground: &mut Ground, delta: &PortDelta, now: Instant) -> Option<Step> {
        let mut step = ground.step(delta, now)?;
        let nothing = |_| Err("nothing is in the maps");
        if ground.arrange(&mut step, &|_| false, |_| None, nothing, now).is_err() {
            // A change of a port that is there: its record is another one, which is all that counts here.
            step.after.as_mut().unwrap().1.record = ground.records.take_one(now, settle);
        }
        Some(step)
    }

    /// What the maps hold after a complete delta with these ports.
    fn found(plans: &[PortPlan]) -> (Ground, Found) {
        let (mut ground, now) = (Ground::default(), Instant::now());
        let changes = plans.iter().map(|plan| change(None, Some(plan)));
        let steps: Vec<Step> = changes.filter_map(|change| arrange(&mut ground, &change, now)).collect();
        let (mut frontends, mut ports, mut slots) = (FxHashMap::default(), FxHashMap::default(), Vec::new());
        for step in &steps {
            frontends.extend(step.turns.iter().map(|turn| (turn.key, turn.wanted)));
            ports.insert(site(step).port, (site(step).record, step.record.unwrap()));
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
        (ground, Found::of(frontends, ports, FxHashSet::default(), slots))
    }

    #[test]
    fn a_port_keeps_its_number_and_the_slots_of_the_same_backends_in_any_order() {
        let [a, b] = ["10.244.0.1", "10.244.0.2"];
        let (web, dns) = (port("web", &[a, b]).at_ip("10.96.0.1"), port("dns", &[b]).at_ip("10.96.0.2"));
        let (old, found) = found(&[web.clone(), dns.clone()]);
        let (mut ground, now) = (Ground::of(found, Instant::now(), true), Instant::now());
        let turned = port("web", &[b, a]).at_ip("10.96.0.1");
        let step = arrange(&mut ground, &change(None, Some(&turned)), now).unwrap();
        assert_eq!((site(&step), &step.fresh[..], step.is_new), (old.ports[&web.id], &[][..], false));
        assert!(step.record.is_none() && step.turns.is_empty(), "nothing is written");

        let grown = port("dns", &[a, b]).at_ip("10.96.0.2");
        let step = arrange(&mut ground, &change(None, Some(&grown)), now).unwrap();
        let was = old.ports[&dns.id];
        assert_ne!(site(&step).record, was.record, "a record is not changed while it is led to");
        assert!(step.turns.is_empty(), "the frontends lead to the port as before");
        assert_eq!((site(&step).port, &step.fresh[..], step.is_new), (was.port, &[Set::Cluster][..], false));
        assert_eq!(site(&step).range(Set::Cluster), Range { first: 3, count: 2 }, "beside what is in use");
        ground.done(&step, now);
        let left = ground.leftovers(now).unwrap();
        assert_eq!(left.unclaimed_ranges(), [was.range(Set::Cluster)]);
        assert_eq!(left.unclaimed_records(), [was.record]);
        assert!(left.unclaimed_numbers().is_empty());
    }

    #[test]
    fn of_two_ports_that_find_one_number_the_first_has_it() {
        let both = port("old", &["10.244.0.1"]).at_ip("10.96.0.1").at_ip("10.96.0.2");
        let (_, found) = found(std::slice::from_ref(&both));
        let (mut ground, now) = (Ground::of(found, Instant::now(), true), Instant::now());
        let mut step = |name, ip| {
            let plan = port(name, &["10.244.0.1"]).at_ip(ip);
            ground.step(&change(None, Some(&plan)), now).unwrap()
        };
        let (first, second) = (step("first", "10.96.0.1"), step("second", "10.96.0.2"));
        assert_eq!((site(&first).port, first.is_new, first.fresh.len()), (0, false, 0));
        let other = element::key(&both.frontends[1].frontend);
        assert_eq!(first.strays, [other], "what leads to its number and is not its own");
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
        let ports = plans.iter().zip(&sites).map(|(plan, site)| {
            (site.port, (site.port + 1, element::record(plan, site, Columns::default().columns)))
        });
        let frontends = plans.iter().zip(&sites).map(|(plan, site)| {
            let key = element::key(&plan.frontends[0].frontend);
            (key, FrontendValue::new(&key, site.port, 0, false))
        });
        let found = Found::of(frontends.collect(), ports.collect(), FxHashSet::default(), vec![a, b, c]);
        let (mut ground, now) = (Ground::of(found, Instant::now(), true), Instant::now());
        let steps = plans.map(|plan| ground.step(&change(None, Some(&plan)), now).unwrap());
        assert_eq!(steps.each_ref().map(|step| site(step).port), [0, 1]);
        let ranges = steps.each_ref().map(|step| site(step).range(Set::Cluster));
        assert_eq!(ranges, [Range { first: 0, count: 2 }, Range { first: 3, count: 2 }]);
    }

    #[test]
    fn what_nobody_claims_is_given_to_others_after_a_rest() {
        let (_, found) = found(&[port("old", &["10.244.0.1"]).at_ip("10.96.0.1")]);
        let (mut ground, now) = (Ground::of(found, Instant::now(), true), Instant::now());
        assert_eq!(ground.leftovers(now).unwrap().unclaimed_numbers(), [0]);
        let plan = port("new", &["10.244.0.1"]).at_ip("10.96.0.2");
        let step = ground.step(&change(None, Some(&plan)), now).unwrap();
        assert_eq!((site(&step).port, site(&step).range(Set::Cluster).first), (1, 1), "both rest");
    }

    proptest! {
        /// Whatever becomes of each step: no slot is two ports' at a time, and neither slots, records nor numbers are lost.
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
                let Some(step) = arrange(&mut ground, &delta, now) else { continue };
                if fate == 0 {
                    ground.lost(&step, now);
                    there.remove(&name);
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
            let most = 9 + MOST_RESTING_NUMBERS;
            prop_assert!(ground.numbers.end() <= most, "{} numbers", ground.numbers.end());
            prop_assert!(ground.records.end() <= 10 + MOST_RESTING_RECORDS, "{} records", ground.records.end());
            prop_assert!(ground.slots.end() <= 4096 + 1024, "{} slots", ground.slots.end());
        }
    }
}
