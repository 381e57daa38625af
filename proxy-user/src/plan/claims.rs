//! Who has a frontend that several Services claim (R12).
//!
//! In: the frontends that each Service wants. Out: one owner for each, the same whatever the order of events, and which
//! Services win or lose one when a claim comes or goes.

use std::collections::{BTreeMap, BTreeSet};

use rustc_hash::FxHashMap;

use super::Frontend;
use crate::model::ObjectName;

/// A Service's claim; the smaller one wins: the older Service, then the one with the smaller name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Claim {
    /// When the Service was created, in seconds since 1970.
    pub(super) created: i64,
    /// The Service.
    pub(super) service: ObjectName,
}

/// Every claim on every frontend.
#[derive(Debug, Default)]
pub(super) struct Claims {
    owners: FxHashMap<Frontend, Claim>,
    /// Claims that lost, which are few.
    waiting: BTreeMap<Frontend, BTreeSet<Claim>>,
    /// Claims that lost since somebody asked.
    conflicts: Vec<Conflict>,
}

/// A frontend that two Services claim (R12).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// The frontend.
    pub frontend: Frontend,
    /// The Service that has it.
    pub owner: ObjectName,
    /// The Service that does not get it.
    pub service: ObjectName,
}

impl Claims {
    /// The claims that lost since this was last asked.
    pub(super) fn take_conflicts(&mut self) -> Vec<Conflict> {
        std::mem::take(&mut self.conflicts)
    }

    /// Whether a frontend is the Service's.
    pub(super) fn owns(&self, service: &ObjectName, frontend: &Frontend) -> bool {
        self.owners.get(frontend).is_some_and(|owner| owner.service == *service)
    }

    /// Replaces what a Service claimed `before` by what it claims `now`. Returns the other Services that win or lose a
    /// frontend by that.
    pub(super) fn replace(
        &mut self,
        claim: &Claim,
        before: &[Frontend],
        now: &[Frontend],
    ) -> BTreeSet<ObjectName> {
        let mut affected = BTreeSet::new();
        for frontend in before.iter().filter(|frontend| !now.contains(frontend)) {
            affected.extend(self.release(frontend, &claim.service));
        }
        for frontend in now {
            affected.extend(self.assert(*frontend, claim));
        }
        affected
    }

    /// Forgets a Service's claim; returns who gets the frontend if somebody waited for it.
    fn release(&mut self, frontend: &Frontend, service: &ObjectName) -> Option<ObjectName> {
        if !self.owns(service, frontend) {
            self.stop_waiting(frontend, service);
            return None;
        }
        self.owners.remove(frontend);
        let waiting = self.waiting.get_mut(frontend)?;
        let next = waiting.pop_first()?;
        if waiting.is_empty() {
            self.waiting.remove(frontend);
        }
        let winner = next.service.clone();
        self.owners.insert(*frontend, next);
        Some(winner)
    }

    /// Makes or renews a claim; returns the other Service that loses or wins the frontend by it.
    fn assert(&mut self, frontend: Frontend, claim: &Claim) -> Option<ObjectName> {
        let Some(owner) = self.owners.get(&frontend) else {
            self.owners.insert(frontend, claim.clone());
            return None;
        };
        if owner == claim {
            return None;
        }
        let owner = owner.clone();
        if owner.service == claim.service {
            return self.renew(frontend, claim);
        }
        let known = self.stop_waiting(&frontend, &claim.service);
        let (winner, loser) = if *claim < owner { (claim, &owner) } else { (&owner, claim) };
        if !known || winner == claim {
            self.conflicts.push(conflict(frontend, winner, loser));
        }
        self.waiting.entry(frontend).or_default().insert(loser.clone());
        if winner == claim {
            self.owners.insert(frontend, claim.clone());
            return Some(owner.service);
        }
        None
    }

    /// The owner's age changed: somebody who waits may be older now.
    fn renew(&mut self, frontend: Frontend, claim: &Claim) -> Option<ObjectName> {
        self.owners.insert(frontend, claim.clone());
        let first = self.waiting.get(&frontend).and_then(BTreeSet::first)?;
        if first > claim {
            return None;
        }
        let lost = conflict(frontend, first, claim);
        self.conflicts.push(lost);
        let winner = self.release(&frontend, &claim.service)?;
        self.waiting.entry(frontend).or_default().insert(claim.clone());
        Some(winner)
    }

    /// Whether the Service waited for the frontend, which it does no longer.
    fn stop_waiting(&mut self, frontend: &Frontend, service: &ObjectName) -> bool {
        let Some(waiting) = self.waiting.get_mut(frontend) else { return false };
        let known = waiting.len();
        waiting.retain(|claim| claim.service != *service);
        let stopped = waiting.len() < known;
        if waiting.is_empty() {
            self.waiting.remove(frontend);
        }
        stopped
    }
}

fn conflict(frontend: Frontend, owner: &Claim, loser: &Claim) -> Conflict {
    Conflict { frontend, owner: owner.service.clone(), service: loser.service.clone() }
}
