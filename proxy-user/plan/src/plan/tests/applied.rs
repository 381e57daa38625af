//! The state of a data plane after a run of deltas.
//!
//! In: [`Delta`]s. Out: the same state for the same plans, however they came about; a panic where a delta does not follow from
//! the ones before.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use crate::plan::{ClusterIpDelta, Delta, Frontend, PortDelta, PortId, PortPlan};

#[derive(Debug, Default, PartialEq)]
pub(super) struct Applied {
    cluster_ips: BTreeSet<IpAddr>,
    ports: BTreeMap<PortId, Arc<PortPlan>>,
    /// The port that each frontend leads to.
    frontends: BTreeMap<Frontend, PortId>,
}

impl Applied {
    pub(super) fn apply(&mut self, delta: &Delta) {
        if delta.complete {
            *self = Self::default();
        }
        for change in &delta.cluster_ips {
            match change {
                ClusterIpDelta::Add(ip) => self.cluster_ips.insert(*ip),
                ClusterIpDelta::Remove(ip) => self.cluster_ips.remove(ip),
            };
        }
        delta.ports.iter().for_each(|port| self.apply_port(port, delta.complete));
        for (frontend, id) in &self.frontends {
            let plan = &self.ports[id];
            assert!(
                plan.frontends.iter().any(|planned| planned.frontend == *frontend),
                "{frontend} leads to {id}"
            );
        }
    }

    fn apply_port(&mut self, delta: &PortDelta, complete: bool) {
        let Some(id) = delta.id() else { return };
        assert!(
            complete || self.ports.get(id) == delta.before.as_ref(),
            "{id} is not what the delta starts from"
        );
        if let Some(before) = self.ports.remove(id) {
            let released = before.frontends.iter().map(|planned| planned.frontend);
            let still_its = |frontend: &Frontend| self.frontends.get(frontend) == Some(id);
            let released: Vec<Frontend> = released.filter(still_its).collect();
            released.iter().for_each(|frontend| drop(self.frontends.remove(frontend)));
        }
        if let Some(after) = &delta.after {
            self.frontends.extend(after.frontends.iter().map(|planned| (planned.frontend, id.clone())));
            self.ports.insert(id.clone(), Arc::clone(after));
        }
    }
}
