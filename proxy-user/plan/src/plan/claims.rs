//! Decides which Service owns a frontend that several Services claim (R12).
//!
//! In: the frontends that each Service wants. Out: one owner for each frontend, independent of the order of
//! events, and the Services that win or lose a frontend by a change.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use rustc_hash::FxHashMap;

use super::{Destination, Frontend, ServicePlan};
use crate::model::ObjectName;

/// The relation of an address to the Service that claims it. An address that the cluster assigned ranks above
/// one that a user wrote, because a user may write the address of another tenant's Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    /// Its ClusterIP, or this node's address. The API server assigns each ClusterIP and each NodePort to one
    /// Service.
    Given,
    /// An address that the load balancer's controller wrote into the Service's status.
    LoadBalancer,
    /// An address in the Service's spec.
    ExternalIp,
}

/// A Service's claim on one frontend. The smallest claim wins: first by rank, then by age, then by name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Claim {
    rank: Rank,
    /// When the Service was created, in seconds since 1970.
    created: i64,
    /// The Service that claims.
    service: ObjectName,
}

/// All claims of one Service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct ServiceClaims {
    created: i64,
    /// Sorted, each frontend once.
    frontends: Vec<(Frontend, Rank)>,
}

impl ServiceClaims {
    /// The claims of a plan's Service on these frontends.
    pub(super) fn of(plan: &ServicePlan, frontends: impl Iterator<Item = Frontend>) -> Self {
        let mut frontends: Vec<_> =
            frontends.map(|frontend| (frontend, rank(plan, frontend.destination))).collect();
        frontends.sort_unstable();
        Self { created: plan.created, frontends }
    }

    fn claims<'a>(&'a self, service: &'a ObjectName) -> impl Iterator<Item = (Frontend, Claim)> + 'a {
        self.frontends.iter().map(|(frontend, rank)| {
            (*frontend, Claim { rank: *rank, created: self.created, service: service.clone() })
        })
    }
}

fn rank(plan: &ServicePlan, destination: Destination) -> Rank {
    match destination {
        Destination::NodePort(_) => Rank::Given,
        Destination::Address(ip) if plan.cluster_ips.contains(&ip) => Rank::Given,
        Destination::Address(ip) if plan.load_balancer_ips.binary_search(&ip).is_ok() => Rank::LoadBalancer,
        Destination::Address(_) => Rank::ExternalIp,
    }
}

/// Every claim on every frontend.
#[derive(Debug, Default)]
pub(super) struct Claims {
    owners: FxHashMap<Frontend, Claim>,
    /// Claims that lost, which are few.
    waiting: BTreeMap<Frontend, BTreeSet<Claim>>,
    /// Conflicts since the last call of [`Claims::take_conflicts`].
    conflicts: Vec<Conflict>,
}

/// A frontend that two Services claim (R12).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// The claimed frontend.
    pub frontend: Frontend,
    /// The Service that owns it.
    pub owner: ObjectName,
    /// The Service that loses.
    pub service: ObjectName,
    /// Why the owner won.
    pub precedence: Precedence,
}

/// Why one claim wins over another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precedence {
    /// The address is the winner's ClusterIP, and not the loser's.
    ClusterIp,
    /// The address is one of the winner's load balancer, and not of the loser's.
    LoadBalancer,
    /// The winner is older.
    Age,
    /// Both are equally old, and the winner has the smaller name.
    Name,
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { frontend, owner, .. } = self;
        match self.precedence {
            Precedence::ClusterIp => write!(f, "{frontend} is at the ClusterIP of Service {owner}"),
            Precedence::LoadBalancer => {
                write!(f, "{frontend} is at a load balancer's address of Service {owner}")
            }
            Precedence::Age => write!(f, "{frontend} belongs to the older Service {owner}"),
            Precedence::Name => {
                write!(f, "{frontend} belongs to Service {owner}, which is as old and comes first by name")
            }
        }
    }
}

impl Claims {
    /// The claims that lost since the last call.
    pub(super) fn take_conflicts(&mut self) -> Vec<Conflict> {
        std::mem::take(&mut self.conflicts)
    }

    /// Whether this Service owns a frontend.
    pub(super) fn owns(&self, service: &ObjectName, frontend: &Frontend) -> bool {
        self.owners.get(frontend).is_some_and(|owner| owner.service == *service)
    }

    /// Whether any Service owns a frontend.
    pub(super) fn has_owner(&self, frontend: &Frontend) -> bool {
        self.owners.contains_key(frontend)
    }

    /// Replaces the claims of a Service. Returns the other Services that win or lose a frontend.
    pub(super) fn replace(
        &mut self,
        service: &ObjectName,
        before: &ServiceClaims,
        now: &ServiceClaims,
    ) -> BTreeSet<ObjectName> {
        let mut affected = BTreeSet::new();
        // Most changes affect endpoints only.
        if before == now {
            return affected;
        }
        let mut known = before.claims(service).peekable();
        for (frontend, claim) in now.claims(service) {
            while let Some((gone, claim)) = known.next_if(|(known, _)| *known < frontend) {
                affected.extend(self.release(gone, &claim));
            }
            let had = known.next_if(|(known, _)| *known == frontend).map(|(_, claim)| claim);
            if had.as_ref() != Some(&claim) {
                affected.extend(self.assert(frontend, had.as_ref(), claim));
            }
        }
        for (gone, claim) in known {
            affected.extend(self.release(gone, &claim));
        }
        affected
    }

    /// Removes a claim. Returns the Service that now owns the frontend, if one waited for it.
    fn release(&mut self, frontend: Frontend, claim: &Claim) -> Option<ObjectName> {
        if self.owners.get(&frontend) != Some(claim) {
            self.stop_waiting(frontend, claim);
            return None;
        }
        self.owners.remove(&frontend);
        let waiting = self.waiting.get_mut(&frontend)?;
        let next = waiting.pop_first()?;
        if waiting.is_empty() {
            self.waiting.remove(&frontend);
        }
        let winner = next.service.clone();
        self.owners.insert(frontend, next);
        Some(winner)
    }

    /// Replaces the claim that the Service `had`. Returns the other Service that loses or wins the frontend.
    fn assert(&mut self, frontend: Frontend, had: Option<&Claim>, claim: Claim) -> Option<ObjectName> {
        let Some(owner) = self.owners.get_mut(&frontend) else {
            self.owners.insert(frontend, claim);
            return None;
        };
        if Some(&*owner) == had {
            *owner = claim;
            return self.yield_to_waiting(frontend);
        }
        let waited = had.is_some_and(|had| self.stop_waiting(frontend, had));
        let owner = self.owners.get_mut(&frontend)?;
        if claim > *owner {
            if !waited {
                self.conflicts.push(conflict(frontend, owner, &claim));
            }
            self.waiting.entry(frontend).or_default().insert(claim);
            return None;
        }
        self.conflicts.push(conflict(frontend, &claim, owner));
        let loser = std::mem::replace(owner, claim);
        let name = loser.service.clone();
        self.waiting.entry(frontend).or_default().insert(loser);
        Some(name)
    }

    /// The owner's claim changed, so a waiting claim may now win.
    fn yield_to_waiting(&mut self, frontend: Frontend) -> Option<ObjectName> {
        let (owner, waiting) = (self.owners.get_mut(&frontend)?, self.waiting.get_mut(&frontend)?);
        waiting.first().filter(|first| *first < owner)?;
        let first = waiting.pop_first()?;
        self.conflicts.push(conflict(frontend, &first, owner));
        let winner = first.service.clone();
        waiting.insert(std::mem::replace(owner, first));
        Some(winner)
    }

    /// Removes a waiting claim. Returns whether there was one.
    fn stop_waiting(&mut self, frontend: Frontend, claim: &Claim) -> bool {
        let Some(waiting) = self.waiting.get_mut(&frontend) else { return false };
        let stopped = waiting.remove(claim);
        if waiting.is_empty() {
            self.waiting.remove(&frontend);
        }
        stopped
    }
}

fn conflict(frontend: Frontend, owner: &Claim, loser: &Claim) -> Conflict {
    let precedence = match owner.rank {
        Rank::Given if owner.rank < loser.rank => Precedence::ClusterIp,
        Rank::LoadBalancer if owner.rank < loser.rank => Precedence::LoadBalancer,
        _ if owner.created < loser.created => Precedence::Age,
        _ => Precedence::Name,
    };
    Conflict { frontend, owner: owner.service.clone(), service: loser.service.clone(), precedence }
}
