//! Allocates an index, a record and slots for each service port of a delta, before anything is written.
//!
//! In: port changes, and the placements of ports. Out: [`PortUpdate`]s, with everything that is to be written.

use std::{sync::Arc, time::Instant};

use proxy_ebpf::{FrontendKey, FrontendValue, MemberKey, Record};
use rustc_hash::{FxHashMap, FxHashSet};

use super::{
    columns::Columns,
    element::{self, Placement},
    kernel_state::KernelState,
    ranges::{MAX_RESTING_PORTS, MAX_RESTING_RECORDS, Range, RangeAllocator},
};
use crate::{
    plan::{BackendSet, PortDelta, PortId, PortPlan},
    sys::bpf,
};

/// The change of one service port in the maps.
pub(super) struct PortUpdate {
    pub(super) id: PortId,
    pub(super) before: Option<Side>,
    pub(super) after: Option<Side>,
    /// The sets whose slots are to be written.
    pub(super) fresh: Vec<BackendSet>,
    /// Whether no port had the index before.
    pub(super) is_new: bool,
    /// The record to write; `None` if the port keeps its record.
    pub(super) record: Option<Record>,
    /// The frontends to write.
    pub(super) frontends: Vec<FrontendUpdate>,
    /// Frontends of other ports that refer to the index, which this port takes over from an earlier agent.
    pub(super) foreign: Vec<FrontendKey>,
}

/// A service port before or after its change, with its keys.
pub(super) struct Side {
    pub(super) plan: Arc<PortPlan>,
    pub(super) placement: Placement,
    /// In the order of the plan.
    pub(super) frontends: Vec<FrontendKey>,
    pub(super) members: FxHashSet<MemberKey>,
}

/// The change of one frontend.
pub(super) struct FrontendUpdate {
    pub(super) key: FrontendKey,
    pub(super) known: Option<FrontendValue>,
    pub(super) wanted: FrontendValue,
}

/// The placements of all ports, and what is free.
pub(super) struct Allocations {
    pub(super) placements: FxHashMap<PortId, Placement>,
    pub(super) ports: RangeAllocator,
    pub(super) records: RangeAllocator,
    pub(super) slots: RangeAllocator,
    /// Entries of the maps that no port has claimed; `None` after a complete delta.
    pub(super) unclaimed: Option<KernelState>,
}

impl Default for Allocations {
    fn default() -> Self {
        Self::of(KernelState::default(), Instant::now(), true)
    }
}

impl Allocations {
    /// Allocations as in the maps. Free entries rest first, unless all programs that may read them have ended
    /// (`rested`).
    pub(super) fn of(state: KernelState, now: Instant, rested: bool) -> Self {
        let single = |indices: Vec<u32>| indices.into_iter().map(|first| Range { first, count: 1 }).collect();
        let (ports, mut records) = (state.unclaimed_ports(), state.unclaimed_records());
        records.push(Record::NOTHING);
        Self {
            placements: FxHashMap::default(),
            ports: RangeAllocator::new(MAX_RESTING_PORTS).with_taken(single(ports), now, rested),
            records: RangeAllocator::new(MAX_RESTING_RECORDS).with_taken(single(records), now, rested),
            slots: RangeAllocator::default().with_taken(state.ranges_in_use(), now, rested),
            unclaimed: Some(state),
        }
    }

    /// Allocates an index and slots for a port.
    pub(super) fn allocate(&mut self, delta: &PortDelta, now: Instant) -> Option<PortUpdate> {
        let id = delta.id()?.clone();
        let known = self.placements.get(&id).copied();
        let before = delta.before.clone().zip(known).map(|(plan, placement)| Side::new(plan, placement));
        let Some(plan) = delta.after.clone() else {
            return Some(PortUpdate::new(id, before, None));
        };
        let claimed =
            if known.is_none() { self.unclaimed.as_mut().and_then(|state| state.claim(&plan)) } else { None };
        let (adopted, foreign) =
            claimed.map_or((None, Vec::new()), |(placement, foreign)| (Some(placement), foreign));
        let had = known.or(adopted);
        let port = had.map_or_else(|| self.ports.take_one(now, wait_for_programs), |had| had.port);
        let mut placement = Placement::new(port, plan.affinity.is_some());
        placement.record = had.map_or(Record::NOTHING, |had| had.record);
        let mut fresh = Vec::new();
        for set in BackendSet::ALL {
            let backends = plan.backends(set);
            let is_same = match &before {
                Some(old) => old.plan.backends(set) == backends,
                None => adopted.is_some_and(|adopted| adopted.range(set).count as usize == backends.len()),
            };
            if let (true, Some(had)) = (is_same, had) {
                placement.set_range(set, had.range(set));
            } else {
                let count = u32::try_from(backends.len()).unwrap_or(u32::MAX);
                placement.set_range(set, self.slots.take(count, now, wait_for_programs));
                fresh.push(set);
            }
        }
        let after = Some(Side::new(plan, placement));
        Some(PortUpdate { fresh, is_new: had.is_none(), foreign, ..PortUpdate::new(id, before, after) })
    }

    /// Adds the record and the frontends to an update, whose port has its index and slots by now. `frontend` and
    /// `record` look values up in the maps.
    pub(super) fn add_values<E>(
        &mut self,
        update: &mut PortUpdate,
        is_for_packets: &dyn Fn(&FrontendKey) -> bool,
        frontend: impl Fn(&FrontendKey) -> Option<FrontendValue>,
        record: impl Fn(u32) -> Result<Record, E>,
        now: Instant,
    ) -> Result<(), E> {
        let Some(Side { plan, placement, frontends, .. }) = &mut update.after else { return Ok(()) };
        let known: Vec<Option<FrontendValue>> = match &self.unclaimed {
            Some(state) => frontends.iter().map(|key| state.frontends.get(key).copied()).collect(),
            None => frontends.iter().map(frontend).collect(),
        };
        let routes = plan.frontends.iter().zip(&*frontends).zip(&known).map(|((planned, key), known)| {
            let own = known.filter(|known| known.is_of(key) && known.port() == placement.port);
            (planned.route, own.map(FrontendValue::column))
        });
        let columns = Columns::assign(&routes.collect::<Vec<_>>());
        let wanted = element::record(plan, placement, columns.columns);
        let current = match &self.unclaimed {
            Some(state) => state.record(placement),
            None if placement.record == Record::NOTHING => None,
            None => Some(record(placement.record)?),
        };
        if current == Some(wanted) {
            if let Some(state) = &mut self.unclaimed {
                state.claim_record(placement.record);
            }
        } else {
            placement.record = self.records.take_one(now, wait_for_programs);
            update.record = Some(wanted);
        }
        let values = plan.frontends.iter().zip(&*frontends).zip(known).zip(columns.of);
        let changed = values.filter_map(|(((planned, &key), known), column)| {
            let packets = column.is_none() || element::is_for_packets(planned) || is_for_packets(&key);
            let wanted = FrontendValue::new(&key, placement.port, column.unwrap_or(0), packets);
            (known != Some(wanted)).then_some(FrontendUpdate { key, known, wanted })
        });
        update.frontends = changed.collect();
        Ok(())
    }

    /// Frees everything that a port has, or was about to get, because the port cannot be written.
    pub(super) fn abandon(&mut self, update: &PortUpdate, now: Instant) {
        match (&update.after, self.placements.remove(&update.id)) {
            (Some(after), old) => {
                if let Some(old) = old {
                    self.free_replaced(update, &old, &after.placement, now);
                }
                self.free(&after.placement, now);
            }
            (None, Some(old)) => self.free(&old, now),
            (None, None) => {}
        }
    }

    /// Stores the placement of a port that is written, and frees what it no longer uses.
    pub(super) fn commit(&mut self, update: &PortUpdate, now: Instant) {
        match (&update.after, self.placements.get(&update.id).copied()) {
            (Some(after), old) => {
                if let Some(old) = old {
                    self.free_replaced(update, &old, &after.placement, now);
                }
                self.placements.insert(update.id.clone(), after.placement);
            }
            (None, Some(old)) => {
                self.free(&old, now);
                self.placements.remove(&update.id);
            }
            (None, None) => {}
        }
    }

    /// Frees the old slots and the old record of a port that stays.
    fn free_replaced(&mut self, update: &PortUpdate, old: &Placement, new: &Placement, now: Instant) {
        update.fresh.iter().for_each(|set| self.slots.give_back(old.range(*set), now));
        if old.record != new.record {
            self.free_record(old.record, now);
        }
    }

    fn free(&mut self, placement: &Placement, now: Instant) {
        BackendSet::ALL.iter().for_each(|set| self.slots.give_back(placement.range(*set), now));
        self.free_record(placement.record, now);
        self.ports.give_one_back(placement.port, now);
    }

    fn free_record(&mut self, record: u32, now: Instant) {
        if record != Record::NOTHING {
            self.records.give_one_back(record, now);
        }
    }

    /// Frees what no port has claimed. Returns it, to be deleted from the maps.
    pub(super) fn take_unclaimed(&mut self, now: Instant) -> Option<KernelState> {
        let state = self.unclaimed.take()?;
        state.unclaimed_ranges().into_iter().for_each(|range| self.slots.give_back(range, now));
        state.unclaimed_records().into_iter().for_each(|record| self.free_record(record, now));
        state.unclaimed_ports().into_iter().for_each(|port| self.ports.give_one_back(port, now));
        Some(state)
    }
}

/// Waits until all programs that run now have ended; false where the kernel cannot, as with `nohz_full`.
pub(super) fn wait_for_programs() -> bool {
    let waited = bpf::wait_for_programs();
    if let Err(error) = &waited {
        tracing::debug!(%error, "cannot wait for running programs");
    }
    waited.is_ok()
}

impl PortUpdate {
    fn new(id: PortId, before: Option<Side>, after: Option<Side>) -> Self {
        let (fresh, frontends, foreign) = (Vec::new(), Vec::new(), Vec::new());
        Self { id, before, after, fresh, is_new: false, record: None, frontends, foreign }
    }

    /// The frontends that the port has before the change.
    pub(super) fn old_frontends(&self) -> impl Iterator<Item = FrontendKey> + '_ {
        self.before.iter().flat_map(|side| &side.frontends).copied()
    }

    /// The frontends that the port has after the change.
    pub(super) fn new_frontends(&self) -> impl Iterator<Item = FrontendKey> + '_ {
        self.after.iter().flat_map(|side| &side.frontends).copied()
    }

    /// The members that the change adds.
    pub(super) fn added_members(&self) -> impl Iterator<Item = MemberKey> + '_ {
        without(self.after.as_ref(), self.before.as_ref())
    }

    /// The members that the change removes.
    pub(super) fn removed_members(&self) -> impl Iterator<Item = MemberKey> + '_ {
        without(self.before.as_ref(), self.after.as_ref())
    }

    /// The members before and after the change.
    pub(super) fn all_members(&self) -> impl Iterator<Item = MemberKey> + '_ {
        self.before.iter().chain(&self.after).flat_map(|side| &side.members).copied()
    }

    /// The port's indices before and after the change.
    pub(super) fn ports(&self) -> impl Iterator<Item = u32> + '_ {
        self.before.iter().chain(&self.after).map(|side| side.placement.port)
    }

    /// Whether a frontend that refers to the port already gets another value.
    pub(super) fn changes_own_frontends(&self) -> bool {
        self.frontends.iter().any(FrontendUpdate::is_own)
    }
}

impl Side {
    fn new(plan: Arc<PortPlan>, placement: Placement) -> Self {
        let frontends = plan.frontends.iter().map(|planned| element::key(&planned.frontend)).collect();
        let members = element::members(&plan, placement.port).collect();
        Self { plan, placement, frontends, members }
    }
}

impl FrontendUpdate {
    /// Whether the frontend refers to the port already.
    pub(super) fn is_own(&self) -> bool {
        self.known.is_some_and(|known| known.is_of(&self.key) && known.port() == self.wanted.port())
    }
}

/// The members of one side that the other does not have.
fn without<'a>(side: Option<&'a Side>, other: Option<&'a Side>) -> impl Iterator<Item = MemberKey> + 'a {
    let members = side.into_iter().flat_map(|side| &side.members).copied();
    members.filter(move |member| !other.is_some_and(|other| other.members.contains(member)))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::dataplane::ebpf::{
        fixture::{WithFrontends as _, backend, port},
        ranges::REST,
    };

    fn change(before: Option<&PortPlan>, after: Option<&PortPlan>) -> PortDelta {
        PortDelta { before: before.cloned().map(Arc::new), after: after.cloned().map(Arc::new) }
    }

    fn placement(update: &PortUpdate) -> Placement {
        update.after.as_ref().unwrap().placement
    }

    /// Allocates for a change, where the maps have only what `allocations` has read from them.
    fn allocate(allocations: &mut Allocations, delta: &PortDelta, now: Instant) -> Option<PortUpdate> {
        let mut update = allocations.allocate(delta, now)?;
        let empty = |_| Err("there is nothing in the maps");
        if allocations.add_values(&mut update, &|_| false, |_| None, empty, now).is_err() {
            // A change of a port that is there. It gets another record, which is all that counts here.
            update.after.as_mut().unwrap().placement.record =
                allocations.records.take_one(now, wait_for_programs);
        }
        Some(update)
    }

    /// The maps after a complete delta with these ports.
    fn written(plans: &[PortPlan]) -> (Allocations, KernelState) {
        let (mut allocations, now) = (Allocations::default(), Instant::now());
        let changes = plans.iter().map(|plan| change(None, Some(plan)));
        let updates: Vec<PortUpdate> =
            changes.filter_map(|change| allocate(&mut allocations, &change, now)).collect();
        let (mut frontends, mut ports, mut slots) = (FxHashMap::default(), FxHashMap::default(), Vec::new());
        for update in &updates {
            frontends.extend(update.frontends.iter().map(|frontend| (frontend.key, frontend.wanted)));
            ports.insert(placement(update).port, (placement(update).record, update.record.unwrap()));
            for set in &update.fresh {
                let range = placement(update).range(*set);
                slots.resize(slots.len().max((range.first + range.count) as usize), Default::default());
                let backends = update.after.as_ref().unwrap().plan.backends(*set);
                (range.first as usize..).zip(backends).for_each(|(slot, backend)| {
                    slots[slot] = element::endpoint(backend);
                });
            }
            allocations.commit(update, now);
        }
        (allocations, KernelState::of(frontends, ports, FxHashSet::default(), slots))
    }

    #[test]
    fn a_port_keeps_its_index_and_the_slots_of_the_same_backends_in_any_order() {
        let [a, b] = ["10.244.0.1", "10.244.0.2"];
        let (web, dns) = (port("web", &[a, b]).at_ip("10.96.0.1"), port("dns", &[b]).at_ip("10.96.0.2"));
        let (old, state) = written(&[web.clone(), dns.clone()]);
        let (mut allocations, now) = (Allocations::of(state, Instant::now(), true), Instant::now());
        let turned = port("web", &[b, a]).at_ip("10.96.0.1");
        let update = allocate(&mut allocations, &change(None, Some(&turned)), now).unwrap();
        let kept = (placement(&update), &update.fresh[..], update.is_new);
        assert_eq!(kept, (old.placements[&web.id], &[][..], false));
        assert!(update.record.is_none() && update.frontends.is_empty(), "nothing is written");

        let grown = port("dns", &[a, b]).at_ip("10.96.0.2");
        let update = allocate(&mut allocations, &change(None, Some(&grown)), now).unwrap();
        let was = old.placements[&dns.id];
        assert_ne!(placement(&update).record, was.record, "a record in use is never changed");
        assert!(update.frontends.is_empty(), "the frontends refer to the port as before");
        let kept = (placement(&update).port, &update.fresh[..], update.is_new);
        assert_eq!(kept, (was.port, &[BackendSet::Cluster][..], false));
        let range = placement(&update).range(BackendSet::Cluster);
        assert_eq!(range, Range { first: 3, count: 2 }, "beside the slots in use");
        allocations.commit(&update, now);
        let left = allocations.take_unclaimed(now).unwrap();
        assert_eq!(left.unclaimed_ranges(), [was.range(BackendSet::Cluster)]);
        assert_eq!(left.unclaimed_records(), [was.record]);
        assert!(left.unclaimed_ports().is_empty());
    }

    #[test]
    fn the_first_of_two_ports_that_find_one_index_has_it() {
        let both = port("old", &["10.244.0.1"]).at_ip("10.96.0.1").at_ip("10.96.0.2");
        let (_, state) = written(std::slice::from_ref(&both));
        let (mut allocations, now) = (Allocations::of(state, Instant::now(), true), Instant::now());
        let mut update = |name, ip| {
            let plan = port(name, &["10.244.0.1"]).at_ip(ip);
            allocations.allocate(&change(None, Some(&plan)), now).unwrap()
        };
        let (first, second) = (update("first", "10.96.0.1"), update("second", "10.96.0.2"));
        assert_eq!((placement(&first).port, first.is_new, first.fresh.len()), (0, false, 0));
        let other = element::key(&both.frontends[1].frontend);
        assert_eq!(first.foreign, [other], "the frontend that refers to its index and is not its own");
        assert_eq!((placement(&second).port, second.is_new), (1, true));
        assert_eq!(placement(&second).range(BackendSet::Cluster), Range { first: 1, count: 1 });
    }

    #[test]
    fn of_ranges_that_overlap_only_the_first_is_adopted() {
        let [a, b, c] = ["10.244.0.1", "10.244.0.2", "10.244.0.3"].map(|ip| element::endpoint(&backend(ip)));
        let plans = [
            port("web", &["10.244.0.1", "10.244.0.2"]).at_ip("10.96.0.1"),
            port("dns", &["10.244.0.2", "10.244.0.3"]).at_ip("10.96.0.2"),
        ];
        let placements = [0, 1].map(|port| {
            let mut placement = Placement::new(port, false);
            placement.set_range(BackendSet::Cluster, Range { first: port, count: 2 });
            placement
        });
        let ports = plans.iter().zip(&placements).map(|(plan, placement)| {
            let record = element::record(plan, placement, Columns::default().columns);
            (placement.port, (placement.port + 1, record))
        });
        let frontends = plans.iter().zip(&placements).map(|(plan, placement)| {
            let key = element::key(&plan.frontends[0].frontend);
            (key, FrontendValue::new(&key, placement.port, 0, false))
        });
        let state =
            KernelState::of(frontends.collect(), ports.collect(), FxHashSet::default(), vec![a, b, c]);
        let (mut allocations, now) = (Allocations::of(state, Instant::now(), true), Instant::now());
        let updates = plans.map(|plan| allocations.allocate(&change(None, Some(&plan)), now).unwrap());
        assert_eq!(updates.each_ref().map(|update| placement(update).port), [0, 1]);
        let ranges = updates.each_ref().map(|update| placement(update).range(BackendSet::Cluster));
        assert_eq!(ranges, [Range { first: 0, count: 2 }, Range { first: 3, count: 2 }]);
    }

    #[test]
    fn unclaimed_indices_and_slots_rest_before_another_port_gets_them() {
        let (_, state) = written(&[port("old", &["10.244.0.1"]).at_ip("10.96.0.1")]);
        let (mut allocations, now) = (Allocations::of(state, Instant::now(), true), Instant::now());
        assert_eq!(allocations.take_unclaimed(now).unwrap().unclaimed_ports(), [0]);
        let plan = port("new", &["10.244.0.1"]).at_ip("10.96.0.2");
        let update = allocations.allocate(&change(None, Some(&plan)), now).unwrap();
        let place = (placement(&update).port, placement(&update).range(BackendSet::Cluster).first);
        assert_eq!(place, (1, 1), "both rest");
    }

    proptest! {
        /// Whether updates succeed or fail: no slot belongs to two ports at a time, and no slot, record or index is lost.
        #[test]
        fn no_slot_belongs_to_two_ports_and_none_is_lost(
            changes in proptest::collection::vec((0..8_u8, 0..24_u8, 0..8_u8), 1..20),
        ) {
            let (mut allocations, mut now) = (Allocations::default(), Instant::now());
            let mut current: FxHashMap<u8, PortPlan> = FxHashMap::default();
            let backends: Vec<String> = (0..24).map(|number| format!("10.244.0.{number}")).collect();
            // The same again and again, so that losses add up.
            for (name, count, fate) in (0..100).flat_map(|_| changes.iter().copied()) {
                now += REST + Duration::from_secs(1);
                let backends: Vec<&str> = backends.iter().take(count.into()).map(|ip| &**ip).collect();
                let wanted = (count > 0).then(|| port(&format!("s{name}"), &backends));
                let delta = change(current.get(&name), wanted.as_ref());
                let Some(update) = allocate(&mut allocations, &delta, now) else { continue };
                if fate == 0 {
                    allocations.abandon(&update, now);
                    current.remove(&name);
                    continue;
                }
                allocations.commit(&update, now);
                match wanted {
                    Some(plan) => current.insert(name, plan),
                    None => current.remove(&name),
                };
                let placements = allocations.placements.values();
                let mut ranges: Vec<Range> =
                    placements.map(|placement| placement.range(BackendSet::Cluster)).collect();
                ranges.sort_unstable_by_key(|range| range.first);
                prop_assert!(ranges.windows(2).all(|two| two[0].first + two[0].count <= two[1].first));
            }
            let (ports, records) = (allocations.ports.end(), allocations.records.end());
            prop_assert!(ports <= 9 + MAX_RESTING_PORTS, "{ports} indices");
            prop_assert!(records <= 10 + MAX_RESTING_RECORDS, "{records} records");
            prop_assert!(allocations.slots.end() <= 4096 + 1024, "{} slots", allocations.slots.end());
        }
    }
}
