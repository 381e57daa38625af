//! A data plane in memory.
//!
//! In: [`Delta`]s. Out: a [`State`] computed from nothing but these. `weir plan` prints it, and tests compare
//! it with the state of a kernel.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use super::{Dataplane, Error, Installed, InstalledFrontend, Outcome, State};
use crate::plan::{
    ClusterIpDelta, Delta, Frontend, FrontendPlan, NodePlan, PortDelta, PortId, PortPlan, Route, Target,
    Treatment,
};

/// The state after all applied deltas.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    node: Option<Arc<NodePlan>>,
    cluster_ips: BTreeSet<IpAddr>,
    ports: BTreeMap<PortId, Arc<PortPlan>>,
    /// The port of each frontend.
    frontends: BTreeMap<Frontend, PortId>,
}

impl Memory {
    /// The last node plan.
    #[must_use]
    pub fn node(&self) -> Option<&NodePlan> {
        self.node.as_deref()
    }

    /// The service ports, sorted by id.
    pub fn ports(&self) -> impl Iterator<Item = &Arc<PortPlan>> {
        self.ports.values()
    }

    fn apply_port(&mut self, delta: &PortDelta, complete: bool) -> Result<(), Error> {
        let Some(id) = delta.id() else { return Ok(()) };
        if !complete && self.ports.get(id) != delta.before.as_ref() {
            return Err(Error::Kernel(format!("{id} is not as the delta has it in `before`")));
        }
        self.remove_port(id);
        if let Some(after) = &delta.after {
            let keys = after.frontends.iter().map(|planned| (planned.frontend, id.clone()));
            self.frontends.extend(keys);
            self.ports.insert(id.clone(), Arc::clone(after));
        }
        Ok(())
    }

    /// Removes a port, and its frontends that no other port has taken.
    fn remove_port(&mut self, id: &PortId) {
        let Some(before) = self.ports.remove(id) else { return };
        for planned in &before.frontends {
            if self.frontends.get(&planned.frontend) == Some(id) {
                self.frontends.remove(&planned.frontend);
            }
        }
    }
}

impl Dataplane for Memory {
    fn apply(&mut self, delta: &Delta) -> Result<(), Error> {
        if let Some(node) = &delta.node {
            self.node = Some(Arc::clone(node));
        }
        if delta.complete {
            self.cluster_ips.clear();
            let named: BTreeSet<&PortId> = delta.ports.iter().filter_map(PortDelta::id).collect();
            let gone: Vec<PortId> = self.ports.keys().filter(|id| !named.contains(id)).cloned().collect();
            gone.iter().for_each(|id| self.remove_port(id));
        }
        for change in &delta.cluster_ips {
            match change {
                ClusterIpDelta::Add(ip) => self.cluster_ips.insert(*ip),
                ClusterIpDelta::Remove(ip) => self.cluster_ips.remove(ip),
            };
        }
        delta.ports.iter().try_for_each(|port| self.apply_port(port, delta.complete))
    }

    fn reread(&mut self) -> Result<(), Error> {
        Ok(())
    }

    fn dump(&mut self) -> Result<State, Error> {
        let mut state = State { cluster_ips: self.cluster_ips.iter().copied().collect(), ..State::default() };
        for (frontend, id) in &self.frontends {
            let plan = self.ports.get(id);
            let planned =
                plan.and_then(|plan| plan.frontends.iter().find(|known| known.frontend == *frontend));
            let (Some(plan), Some(planned)) = (plan, planned) else {
                return Err(Error::Kernel(format!("{frontend} belongs to {id}, which does not have it")));
            };
            state.frontends.insert(*frontend, InstalledFrontend::of(plan, planned));
        }
        Ok(state)
    }

    fn remove(&mut self) -> Result<(), Error> {
        *self = Self::default();
        Ok(())
    }
}

impl InstalledFrontend {
    /// The expected content of a data plane for one frontend of a port.
    #[must_use]
    pub fn of(plan: &PortPlan, planned: &FrontendPlan) -> Self {
        let installed = |treatment: Treatment| Installed {
            outcome: match treatment.target {
                Target::Cluster => Outcome::backends(&plan.cluster),
                Target::Local => Outcome::backends(&plan.local),
                Target::Reject => Outcome::Reject,
                Target::Drop => Outcome::Drop,
            },
            masquerade: treatment.masquerade,
        };
        let Route { pod, host, outside } = planned.route;
        // Without backends there is no session affinity.
        let has_backends =
            |treatment: &Treatment| matches!(treatment.target, Target::Cluster | Target::Local);
        Self {
            pod: installed(pod),
            host: installed(host),
            outside: installed(outside),
            affinity: plan.affinity.filter(|_| [pod, host, outside].iter().any(has_backends)),
            allowed_sources: planned.allowed_sources.as_deref().map(<[_]>::to_vec),
            answered_here: planned.answered_here,
        }
    }
}

impl Outcome {
    fn backends(backends: &[crate::plan::Backend]) -> Self {
        let mut sorted = backends.to_vec();
        sorted.sort_unstable();
        Self::Backends(sorted)
    }
}
