//! Answers of the health check servers (H1 to H3): they follow what is in force.
//!
//! In: the names of replanned Services, and the refused ports. Out: changed states of health checks.

use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
};

use crate::{
    model::{Family, Model, ObjectName},
    observe::{HealthCheckState, HealthChecks},
    plan::{NodePortAddresses, Planner},
};

#[derive(Default)]
pub(super) struct Checks {
    servers: Option<HealthChecks>,
    /// Replanned, and not yet in force.
    replanned: Vec<ObjectName>,
    told: HashMap<ObjectName, HealthCheckState>,
    /// The addresses of the servers' last state.
    addresses: Vec<IpAddr>,
}

impl Checks {
    pub(super) fn of(servers: HealthChecks) -> Self {
        Self { servers: Some(servers), ..Self::default() }
    }

    pub(super) fn replanned(&mut self, name: ObjectName) {
        if self.servers.is_some() {
            self.replanned.push(name);
        }
    }

    /// Sends the states of replanned Services, whose plans are now in force, and of all Services if the node's addresses changed. For
    /// a Service with `refused` ports only a smaller number of endpoints is sent, so that no load balancer sends clients to
    /// a port that is not programmed.
    pub(super) fn tell(
        &mut self,
        model: &Model,
        planner: &Planner,
        families: &[Family],
        refused: &BTreeSet<ObjectName>,
    ) {
        let Some(servers) = &self.servers else { return };
        let addresses = addresses(planner, families);
        if addresses != self.addresses {
            self.replanned.extend(self.told.keys().cloned());
            self.addresses.clone_from(&addresses);
        }
        let mut waiting = Vec::new();
        for name in self.replanned.drain(..) {
            let check = planner.service(&name).and_then(|plan| plan.health_check);
            let state = check.map(|check| HealthCheckState {
                port: check.port,
                local_endpoints: check.local_endpoints,
                addresses: addresses.clone(),
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

/// Whether only the number of endpoints differs, and is smaller.
fn is_fewer(state: &HealthCheckState, known: &HealthCheckState) -> bool {
    let same = HealthCheckState { local_endpoints: known.local_endpoints, ..state.clone() };
    same == *known && state.local_endpoints < known.local_endpoints
}

/// The addresses of health check servers (H3): all, or those that serve NodePorts.
fn addresses(planner: &Planner, families: &[Family]) -> Vec<IpAddr> {
    let Some(node) = planner.node() else { return Vec::new() };
    let of = |family: &Family| match node.node_port_addresses.get(*family) {
        NodePortAddresses::AnyLocal => vec![HealthChecks::anywhere(*family)],
        NodePortAddresses::Only(addresses) => addresses.clone(),
    };
    families.iter().flat_map(of).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{
        fixture::{model, named, service, settings},
        model::{NodePortSetting, Settings},
    };

    #[test]
    fn h3_servers_go_along_with_the_addresses_of_the_node() {
        let nets = NodePortSetting::of(vec!["192.0.2.0/24".parse().unwrap()]);
        let spec = json!({
            "type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 30100,
            "clusterIP": "10.0.3.1", "ports": [{ "port": 80, "nodePort": 30080 }],
        });
        let mut model = model(Settings { node_port_addresses: nets, ..settings() }, [service("lb", spec)]);
        let (servers, mut told) = HealthChecks::channel();
        let (mut checks, mut planner) = (Checks::of(servers), Planner::default());
        for (address, replanned) in [("192.0.2.1", true), ("192.0.2.2", false)] {
            model.set_host_addresses(vec![address.parse().unwrap()]);
            planner.update_node(model.node_plan());
            if replanned {
                planner.update(&named("lb"), model.plan(&named("lb")));
                checks.replanned(named("lb"));
            }
            checks.tell(&model, &planner, &[Family::V4], &BTreeSet::new());
            let (name, state) = told.try_recv().unwrap();
            assert_eq!((name, state.unwrap().addresses), (named("lb"), vec![address.parse().unwrap()]));
            checks.tell(&model, &planner, &[Family::V4], &BTreeSet::new());
            assert!(told.try_recv().is_err(), "nothing changed");
        }
    }
}
