//! What the health check servers are told of Services (H1 to H3): what is in force.
//!
//! In: the names of Services that were planned anew, and which of them have ports that could not be programmed. Out: the
//! state of each one's health check, where it changed.

use std::collections::{BTreeSet, HashMap};

use crate::{
    model::{Family, Model, ObjectName},
    observe::{HealthCheckState, HealthChecks},
    plan::{NodePortAddresses, Planner},
};

/// The Services that have a health check, and those that are to be looked at.
#[derive(Default)]
pub(super) struct Checks {
    servers: Option<HealthChecks>,
    /// Planned anew, and not yet in force.
    replanned: Vec<ObjectName>,
    told: HashMap<ObjectName, HealthCheckState>,
}

impl Checks {
    pub(super) fn of(servers: HealthChecks) -> Self {
        Self { servers: Some(servers), ..Self::default() }
    }

    /// A Service was planned anew.
    pub(super) fn replanned(&mut self, name: ObjectName) {
        if self.servers.is_some() {
            self.replanned.push(name);
        }
    }

    /// Tells of the Services that were planned anew, now that their plans are in force. Of one with `refused` ports only
    /// that it has fewer endpoints is told before those ports are programmed, so that no load balancer sends
    /// clients to what is not served.
    pub(super) fn tell(
        &mut self,
        model: &Model,
        planner: &Planner,
        families: &[Family],
        refused: &BTreeSet<ObjectName>,
    ) {
        let Some(servers) = &self.servers else { return };
        let mut waiting = Vec::new();
        for name in self.replanned.drain(..) {
            let check = planner.service(&name).and_then(|plan| plan.health_check);
            let state = check.map(|check| HealthCheckState {
                port: check.port,
                local_endpoints: check.local_endpoints,
                addresses: addresses(planner, families),
                uid: model.uid(&name),
            });
            let known = self.told.get(&name);
            if known == state.as_ref() {
                continue;
            }
            if let Some(state) = state.as_ref().filter(|_| refused.contains(&name)) {
                waiting.push(name.clone());
                if !known.is_some_and(|known| is_fewer(state, known)) {
                    continue;
                }
            }
            match &state {
                Some(state) => self.told.insert(name.clone(), state.clone()),
                None => self.told.remove(&name),
            };
            servers.set(name, state);
        }
        self.replanned = waiting;
    }
}

/// Whether nothing is different but that there are fewer endpoints.
fn is_fewer(state: &HealthCheckState, known: &HealthCheckState) -> bool {
    let same = HealthCheckState { local_endpoints: known.local_endpoints, ..state.clone() };
    same == *known && state.local_endpoints < known.local_endpoints
}

/// Where health check servers listen (H3): on all addresses, or on those that serve NodePorts.
fn addresses(planner: &Planner, families: &[Family]) -> Vec<std::net::IpAddr> {
    let Some(node) = planner.node() else { return Vec::new() };
    let of = |family: &Family| match node.node_port_addresses.get(*family) {
        NodePortAddresses::AnyLocal => vec![HealthChecks::anywhere(*family)],
        NodePortAddresses::Only(addresses) => addresses.clone(),
    };
    families.iter().flat_map(of).collect()
}
