//! A wrapper that makes a data plane fail on purpose, for tests.
//!
//! In: [`Delta`]s, and [`Faults`]. Out: the state of the wrapped data plane, which keeps the old state of
//! what failed.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::{Dataplane, Error, Shortfall, State};
use crate::{
    model::{Family, ObjectName, PerFamily},
    plan::{ClusterIpDelta, Delta, Frontend, PortDelta, PortId, PortPlan},
};

/// Permanent faults, which a test changes while the data plane is in use.
#[derive(Clone, Debug, Default)]
pub struct Faults(Arc<Mutex<Permanent>>);

#[derive(Debug, Default)]
struct Permanent {
    services: BTreeSet<ObjectName>,
    families: BTreeSet<Family>,
    calls: bool,
    removals: PerFamily<u64>,
}

impl Faults {
    /// Sets whether each port of a Service is refused.
    pub fn refuse(&self, service: ObjectName, refused: bool) {
        let services = &mut self.permanent().services;
        if refused {
            services.insert(service)
        } else {
            services.remove(&service)
        };
    }

    /// Sets whether a family cannot be written.
    pub fn break_family(&self, family: Family, broken: bool) {
        let families = &mut self.permanent().families;
        if broken {
            families.insert(family)
        } else {
            families.remove(&family)
        };
    }

    /// Sets whether each call fails before it does anything.
    pub fn fail_calls(&self, fail: bool) {
        self.permanent().calls = fail;
    }

    /// Sets how often an object of a family could not be removed until now.
    pub fn fail_removals(&self, times: PerFamily<u64>) {
        self.permanent().removals = times;
    }

    fn permanent(&self) -> MutexGuard<'_, Permanent> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Fails some calls of another data plane, the same ones for the same seed, and those of [`Faults`].
#[derive(Clone, Debug)]
pub struct Faulty<D> {
    inner: D,
    random: u64,
    ports: u8,
    calls: u8,
    faults: Faults,
    /// The plans that the data plane has.
    known: BTreeMap<PortId, Arc<PortPlan>>,
    standing: PerFamily<Standing>,
}

/// The state of a family.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Standing {
    /// The next delta is a complete one.
    #[default]
    Reread,
    /// It has every change.
    Current,
    /// It has failed and was not read back.
    Failed,
}

impl<D> Faulty<D> {
    /// Makes `ports` per cent of service ports fail individually, and `calls` per cent of calls as a whole:
    /// half of those before they do anything, half after they did everything.
    #[must_use]
    pub fn new(inner: D, seed: u64, ports: u8, calls: u8) -> Self {
        // A xorshift generator stays at zero.
        let random = seed.max(1);
        let (faults, known, standing) = (Faults::default(), BTreeMap::new(), PerFamily::default());
        Self { inner, random, ports, calls, faults, known, standing }
    }

    /// Fails only by `faults`.
    #[must_use]
    pub fn with(inner: D, faults: Faults) -> Self {
        Self { faults, ..Self::new(inner, 1, 0, 0) }
    }

    /// The same data plane with its state, as a restarted agent finds it, and with other faults.
    #[must_use]
    pub fn restarted(self, faults: Faults) -> Self {
        Self { faults, standing: PerFamily::default(), ..self }
    }

    /// The wrapped data plane.
    pub fn inner(&mut self) -> &mut D {
        &mut self.inner
    }

    /// A xorshift generator.
    fn happens(&mut self, per_cent: u8) -> bool {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 32) % 100 < u64::from(per_cent)
    }

    fn is_refused(&mut self, id: &PortId) -> bool {
        self.happens(self.ports) || self.faults.permanent().services.contains(&id.service)
    }

    /// The delta without the ports that fail and without families that do not take part.
    fn reduced(
        &mut self,
        delta: &Delta,
        part: PerFamily<bool>,
        refused: &mut Vec<(PortId, String)>,
    ) -> Delta {
        let takes_part = |family: Family| *part.get(family);
        let mut reduced = Delta { ports: Vec::new(), ..delta.clone() };
        if !delta.complete {
            reduced.cluster_ips.retain(|change| {
                let (ClusterIpDelta::Add(ip) | ClusterIpDelta::Remove(ip)) = change;
                takes_part(Family::of(*ip))
            });
        }
        let mut kept = Vec::new();
        for port in &delta.ports {
            let Some(id) = port.id() else { continue };
            let refuses = takes_part(id.family) && self.is_refused(id);
            let known = self.known.get(id);
            if takes_part(id.family) && !refuses {
                // A port that was refused before is replaced.
                let before = if delta.complete { None } else { port.before.as_ref().or(known) };
                reduced.ports.push(PortDelta { before: before.cloned(), after: port.after.clone() });
                continue;
            }
            kept.extend(known.filter(|_| delta.complete).cloned());
            if refuses {
                refused.push((id.clone(), injected().to_string()));
            }
        }
        reduced.ports.extend(without_frontends_of(&reduced.ports, kept));
        reduced
    }

    /// Stores the plans that the data plane has now.
    fn store_plans(&mut self, delta: Delta, refused: &[(PortId, String)]) {
        for PortDelta { before, after } in delta.ports {
            let Some(id) = after.as_ref().or(before.as_ref()).map(|plan| plan.id.clone()) else { continue };
            if refused.iter().any(|(refused, _)| *refused == id) {
                continue;
            }
            match after {
                Some(plan) => self.known.insert(id, plan),
                None => self.known.remove(&id),
            };
        }
    }

    /// Decides which families apply a delta, and which of them fail.
    fn parties(&mut self, delta: &Delta, failed: &mut Vec<(Family, Error)>) -> PerFamily<bool> {
        let broken = self.faults.permanent().families.clone();
        let mut part = PerFamily::default();
        for family in Family::ALL {
            let wanted = if delta.complete { Standing::Reread } else { Standing::Current };
            if *self.standing.get(family) != wanted {
                continue;
            }
            if broken.contains(&family) {
                *self.standing.get_mut(family) = Standing::Failed;
                failed.push((family, injected()));
                continue;
            }
            *self.standing.get_mut(family) = Standing::Current;
            *part.get_mut(family) = true;
        }
        part
    }
}

/// The kept ports, without frontends that other ports have taken.
fn without_frontends_of(ports: &[PortDelta], kept: Vec<Arc<PortPlan>>) -> Vec<PortDelta> {
    let plans = ports.iter().filter_map(|port| port.after.as_ref());
    let taken: BTreeSet<Frontend> =
        plans.flat_map(|plan| &plan.frontends).map(|planned| planned.frontend).collect();
    let kept = kept.into_iter().map(|mut plan| {
        if plan.frontends.iter().any(|planned| taken.contains(&planned.frontend)) {
            Arc::make_mut(&mut plan).frontends.retain(|planned| !taken.contains(&planned.frontend));
        }
        PortDelta { before: None, after: Some(plan) }
    });
    kept.collect()
}

fn injected() -> Error {
    Error::Kernel("a fault on purpose".to_owned())
}

impl<D: Dataplane> Dataplane for Faulty<D> {
    fn apply(&mut self, delta: &Delta) -> Result<(), Error> {
        let permanent = self.faults.permanent().calls;
        let fails = self.happens(self.calls);
        if permanent || fails && self.happens(50) {
            self.standing = PerFamily { v4: Standing::Failed, v6: Standing::Failed };
            return Err(injected());
        }
        let mut short = Shortfall::default();
        let part = self.parties(delta, &mut short.failed);
        if Family::ALL.iter().all(|family| !part.get(*family)) {
            return short.into_result();
        }
        let reduced = self.reduced(delta, part, &mut short.refused);
        let result = self.inner.apply(&reduced);
        if delta.complete {
            let named: BTreeSet<&PortId> = delta.ports.iter().filter_map(PortDelta::id).collect();
            self.known.retain(|id, _| named.contains(id));
        }
        match result {
            Ok(()) => self.store_plans(reduced, &[]),
            Err(Error::Partly(more)) => {
                self.store_plans(reduced, &more.refused);
                short.refused.extend(more.refused);
                short.failed.extend(more.failed);
            }
            Err(error) => {
                self.standing = PerFamily { v4: Standing::Failed, v6: Standing::Failed };
                return Err(error);
            }
        }
        if fails {
            self.standing = PerFamily { v4: Standing::Failed, v6: Standing::Failed };
            return Err(injected());
        }
        short.into_result()
    }

    fn reread(&mut self) -> Result<(), Error> {
        self.standing = PerFamily::default();
        self.inner.reread()
    }

    fn reread_family(&mut self, family: Family) -> Result<(), Error> {
        *self.standing.get_mut(family) = Standing::Reread;
        self.inner.reread_family(family)
    }

    fn standing(&self) -> Vec<super::Standing> {
        let failed_removals = self.faults.permanent().removals;
        vec![super::Standing { plane: "faulty", active: true, failures: 0, failed_removals }]
    }

    fn dump(&mut self) -> Result<State, Error> {
        self.inner.dump()
    }

    fn remove(&mut self) -> Result<(), Error> {
        self.known.clear();
        self.inner.remove()
    }
}
