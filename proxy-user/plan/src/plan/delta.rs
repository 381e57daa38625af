//! Keeps the difference between two plans small and safe to apply.
//!
//! In: old and new plans, in any order. Out: backends that keep their slots, and port changes in an order in
//! which a frontend is released before another port takes it.

use std::collections::VecDeque;

use rustc_hash::FxHashMap;

use super::{Backend, Delta, Frontend, PortDelta, PortPlan};

impl Delta {
    /// Whether there is nothing to apply.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.node.is_none() && self.cluster_ips.is_empty() && self.ports.is_empty() && !self.complete
    }
}

impl PortPlan {
    /// Reorders the backend sets so that a backend that stays keeps its slot. Free slots go first to new
    /// backends, then to backends with a slot beyond the new end. The sets themselves do not change.
    pub fn keep_slots(&mut self, before: &Self) {
        keep_slots(&mut self.cluster, &before.cluster);
        keep_slots(&mut self.local, &before.local);
    }
}

fn keep_slots(now: &mut Vec<Backend>, before: &[Backend]) {
    if now == before {
        return;
    }
    let slots: FxHashMap<Backend, usize> =
        before.iter().enumerate().map(|(slot, backend)| (*backend, slot)).collect();
    let mut ordered: Vec<Option<Backend>> = vec![None; now.len()];
    let (mut new, mut from_the_end) = (Vec::new(), Vec::new());
    for backend in now.drain(..) {
        match slots.get(&backend) {
            Some(slot) => match ordered.get_mut(*slot) {
                Some(place) => *place = Some(backend),
                None => from_the_end.push(backend),
            },
            None => new.push(backend),
        }
    }
    let mut fill = new.into_iter().chain(from_the_end);
    now.extend(ordered.into_iter().filter_map(|place| place.or_else(|| fill.next())));
}

impl PortDelta {
    /// The frontends that the port releases.
    pub fn released(&self) -> impl Iterator<Item = Frontend> + '_ {
        missing(self.before.as_deref(), self.after.as_deref())
    }

    /// The frontends that the port takes.
    pub(super) fn taken(&self) -> impl Iterator<Item = Frontend> + '_ {
        missing(self.after.as_deref(), self.before.as_deref())
    }
}

/// The frontends of `some` that `others` lacks.
fn missing<'a>(
    some: Option<&'a PortPlan>,
    others: Option<&'a PortPlan>,
) -> impl Iterator<Item = Frontend> + 'a {
    let lacks = move |frontend: &Frontend| others.is_none_or(|plan| plan.frontend(*frontend).is_none());
    some.into_iter().flat_map(|plan| &plan.frontends).map(|planned| planned.frontend).filter(lacks)
}

/// The index of the port that releases each frontend that another port takes.
pub(super) fn moved(ports: &[PortDelta]) -> FxHashMap<Frontend, usize> {
    let released = ports.iter().enumerate().filter(|(_, port)| port.before.is_some());
    let mut released: FxHashMap<Frontend, usize> =
        released.flat_map(|(index, port)| port.released().map(move |frontend| (frontend, index))).collect();
    if !released.is_empty() {
        let taken = ports.iter().flat_map(PortDelta::taken);
        let mut moved = FxHashMap::default();
        moved.extend(taken.filter_map(|frontend| released.remove_entry(&frontend)));
        return moved;
    }
    released
}

/// Orders `ports` so that each frontend is released before it is taken, unless two ports swap frontends.
pub(super) fn order(ports: Vec<PortDelta>) -> Vec<PortDelta> {
    let moved = moved(&ports);
    if moved.is_empty() {
        return ports;
    }
    let mut waits_for = vec![0_usize; ports.len()];
    let mut followers: FxHashMap<usize, Vec<usize>> = FxHashMap::default();
    for (taker, port) in ports.iter().enumerate() {
        for releaser in port.taken().filter_map(|frontend| moved.get(&frontend)) {
            waits_for[taker] += 1;
            followers.entry(*releaser).or_default().push(taker);
        }
    }
    let mut ready: VecDeque<usize> = (0..ports.len()).filter(|index| waits_for[*index] == 0).collect();
    let mut ports: Vec<Option<PortDelta>> = ports.into_iter().map(Some).collect();
    let mut ordered = Vec::with_capacity(ports.len());
    while let Some(index) = ready.pop_front() {
        ordered.extend(ports[index].take());
        for follower in followers.remove(&index).unwrap_or_default() {
            waits_for[follower] -= 1;
            if waits_for[follower] == 0 {
                ready.push_back(follower);
            }
        }
    }
    ordered.extend(ports.into_iter().flatten());
    ordered
}
