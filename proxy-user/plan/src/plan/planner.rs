//! Every plan of the node, and what a data plane still has to be told of them.
//!
//! In: new plans of Services whose model changed, and which ports failed. Out: [`Delta`]s, and the plans for whoever
//! shows, counts or answers health checks.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use rustc_hash::{FxHashMap, FxHashSet};

use super::{
    ClusterIpDelta, Delta, Destination, Frontend, FrontendPlan, HealthCheck, NodePlan, PortDelta, PortId,
    PortPlan, ServicePlan, Target,
    claims::{Claims, Conflict, Wish},
    delta,
};
use crate::model::{Family, ObjectName, PerFamily};

/// One Service's plan and the frontends of it that another Service has (R12).
#[derive(Debug)]
struct Held {
    plan: Arc<ServicePlan>,
    withheld: Box<[(PortId, FrontendPlan)]>,
}

/// How many service ports have endpoints, but none here for traffic that must stay here (F2, F3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NoLocalEndpoints {
    /// Because of internalTrafficPolicy.
    pub internal: PerFamily<usize>,
    /// Because of externalTrafficPolicy.
    pub external: PerFamily<usize>,
}

/// Holds all plans and turns their changes into deltas.
#[derive(Debug, Default)]
pub struct Planner {
    services: FxHashMap<ObjectName, Held>,
    claims: Claims,
    /// The Services that have too many frontends, since they were last asked for, and by how many.
    beyond: BTreeMap<ObjectName, usize>,
    /// How many Services have each ClusterIP.
    cluster_ips: FxHashMap<IpAddr, usize>,
    node: Option<Arc<NodePlan>>,
    node_pending: bool,
    /// What the data plane has of each port that is not as it should be.
    pending_ports: FxHashMap<PortId, Option<Arc<PortPlan>>>,
    /// Whether the data plane knows each ClusterIP that may not be as it should be.
    pending_ips: BTreeMap<IpAddr, bool>,
    /// Ports that wait for another try, with what the data plane has of each.
    refused: FxHashMap<PortId, Option<Arc<PortPlan>>>,
    /// Ports refused as part of a complete delta and not programmed since: what the data plane has is what it found.
    found: FxHashSet<PortId>,
    /// Ports that one plane has left to another, which is to try again.
    left: FxHashSet<PortId>,
    /// Of those, the ones to be told again with the next delta.
    repeated: FxHashSet<PortId>,
    /// Families in which something was found that no port names any more.
    stray: PerFamily<bool>,
}

impl Planner {
    /// Replaces the plan of a Service; an empty plan forgets the Service. The next delta tells the difference.
    pub fn update(&mut self, name: &ObjectName, plan: ServicePlan) {
        let before = self.services.get(name).map(claimed).unwrap_or_default();
        let now = Wish::of(&plan, plan.ports.iter().flat_map(|port| frontends(port)));
        let affected = self.claims.replace(name, &before, &now);
        if plan.beyond != self.service(name).map_or(0, |before| before.beyond) {
            self.beyond.insert(name.clone(), plan.beyond);
        }
        self.install(name, plan);
        for other in affected {
            if let Some(wanted) = self.services.get(&other).map(wanted) {
                self.install(&other, wanted);
            }
        }
    }

    /// Replaces the node-wide plan.
    pub fn update_node(&mut self, plan: NodePlan) {
        if self.node.as_deref() != Some(&plan) {
            self.node = Some(Arc::new(plan));
            self.node_pending = true;
        }
    }

    /// What changed since the last delta; empty if nothing did. Ports that were refused are not in it, unless they changed
    /// meanwhile or [`Planner::retry`] was called.
    pub fn take_delta(&mut self) -> Delta {
        let mut pending = std::mem::take(&mut self.pending_ports);
        let repeated = std::mem::take(&mut self.repeated);
        let ports = delta::order(self.changes(&mut pending, &repeated));
        let ips = std::mem::take(&mut self.pending_ips).into_iter();
        let ips = ips.filter_map(|(ip, known)| match (known, self.cluster_ips.contains_key(&ip)) {
            (false, true) => Some(ClusterIpDelta::Add(ip)),
            (true, false) => Some(ClusterIpDelta::Remove(ip)),
            _ => None,
        });
        let cluster_ips = ips.collect();
        let node = if std::mem::take(&mut self.node_pending) { self.node.clone() } else { None };
        Delta { node, cluster_ips, ports, complete: false }
    }

    /// The changes of these ports, sorted. Of what was found and belongs to no port any more it is noted where that is.
    fn changes(
        &mut self,
        pending: &mut FxHashMap<PortId, Option<Arc<PortPlan>>>,
        repeated: &FxHashSet<PortId>,
    ) -> Vec<PortDelta> {
        let again = repeated.iter().filter(|id| !pending.contains_key(*id));
        let mut ids: Vec<PortId> = pending.keys().chain(again).cloned().collect();
        ids.sort_unstable();
        let mut changes = Vec::with_capacity(ids.len());
        for id in ids {
            let after = self.port(&id).cloned();
            let Some(before) = pending.remove(&id) else {
                changes.extend(
                    after.map(|plan| PortDelta { before: Some(Arc::clone(&plan)), after: Some(plan) }),
                );
                continue;
            };
            if before.is_none() && after.is_none() && self.found.remove(&id) {
                *self.stray.get_mut(id.family) = true;
            }
            // One that a plane has left is told again also when it is to be by now what it was.
            if before != after || (after.is_some() && repeated.contains(&id)) {
                changes.push(PortDelta { before, after });
            }
        }
        changes
    }

    /// Everything that should exist, for a data plane of which nothing is known. Supersedes what was pending.
    pub fn complete(&mut self) -> Delta {
        self.complete_for(PerFamily { v4: true, v6: true })
    }

    /// Everything that should exist, for those families of a data plane of which nothing is known. Supersedes what was
    /// pending for them; of the others the data plane must have been told already.
    pub fn complete_for(&mut self, families: PerFamily<bool>) -> Delta {
        let other = |family: Family| !families.get(family);
        self.pending_ports.retain(|id, _| other(id.family));
        self.refused.retain(|id, _| other(id.family));
        self.found.retain(|id| other(id.family));
        self.pending_ips.retain(|ip, _| other(Family::of(*ip)));
        for family in Family::ALL {
            *self.stray.get_mut(family) &= other(family);
        }
        self.node_pending = false;
        let mut services: Vec<(&ObjectName, &Held)> = self.services.iter().collect();
        services.sort_unstable_by_key(|(name, _)| *name);
        let ports = services.into_iter().flat_map(|(_, held)| &held.plan.ports);
        let mut ips: Vec<IpAddr> = self.cluster_ips.keys().copied().collect();
        ips.sort_unstable();
        Delta {
            node: self.node.clone(),
            cluster_ips: ips.into_iter().map(ClusterIpDelta::Add).collect(),
            ports: ports.map(|port| PortDelta { before: None, after: Some(Arc::clone(port)) }).collect(),
            complete: true,
        }
    }

    /// Tells that `delta` is in place but for these ports, which wait for [`Planner::retry`]. Returns the families in which
    /// that cannot put things right, because such a port has a frontend to do with another port: there the data plane
    /// is to be reread and given a complete delta.
    pub fn settled(&mut self, delta: &Delta, refused: &[PortId]) -> PerFamily<bool> {
        let mut entangled = PerFamily::default();
        if refused.is_empty() && self.found.is_empty() {
            return entangled;
        }
        let moved = delta::moved(&delta.ports);
        let refused: FxHashSet<&PortId> = refused.iter().collect();
        for port in &delta.ports {
            let Some(id) = port.id() else { continue };
            if !refused.contains(id) {
                self.found.remove(id);
                continue;
            }
            if delta.complete {
                self.found.insert(id.clone());
            }
            *entangled.get_mut(id.family) |= !delta.complete
                && port.released().chain(port.taken()).any(|frontend| moved.contains_key(&frontend));
            self.refused.insert(id.clone(), port.before.clone());
        }
        entangled
    }

    /// Tells that one plane has left these ports to another. They wait for [`Planner::retry`] too.
    pub fn left(&mut self, ids: impl IntoIterator<Item = PortId>) {
        self.left.extend(ids);
    }

    /// Puts every port that waits for it into the next delta.
    pub fn retry(&mut self) {
        for (id, has) in self.refused.drain() {
            self.pending_ports.entry(id).or_insert(has);
        }
        self.repeated.extend(self.left.drain());
    }

    /// Whether a port waits for another try.
    #[must_use]
    pub fn waits(&self, id: &PortId) -> bool {
        self.refused.contains_key(id)
    }

    /// Whether one plane has left a port to another.
    #[must_use]
    pub fn is_left(&self, id: &PortId) -> bool {
        self.left.contains(id)
    }

    /// Whether any port waits for another try.
    #[must_use]
    pub fn has_waiting(&self) -> bool {
        !self.refused.is_empty() || !self.left.is_empty()
    }

    /// The families in which the data plane kept, for a port that it refused and that is gone by now, what it had found:
    /// a complete delta takes it away.
    pub fn take_stray(&mut self) -> PerFamily<bool> {
        std::mem::take(&mut self.stray)
    }

    /// The plan of one Service, as far as its frontends are its own.
    #[must_use]
    pub fn service(&self, name: &ObjectName) -> Option<&Arc<ServicePlan>> {
        self.services.get(name).map(|held| &held.plan)
    }

    /// The plans of all Services, in no particular order.
    pub fn services(&self) -> impl ExactSizeIterator<Item = (&ObjectName, &Arc<ServicePlan>)> {
        self.services.iter().map(|(name, held)| (name, &held.plan))
    }

    /// The node-wide plan.
    #[must_use]
    pub fn node(&self) -> Option<&Arc<NodePlan>> {
        self.node.as_ref()
    }

    /// Whether any Service has this frontend.
    #[must_use]
    pub fn has_frontend(&self, frontend: &Frontend) -> bool {
        self.claims.has_owner(frontend)
    }

    /// The frontends that a Service claims and another one has (R12).
    pub fn withheld(&self, name: &ObjectName) -> impl Iterator<Item = Frontend> + '_ {
        let held = self.services.get(name).into_iter();
        held.flat_map(|held| &held.withheld).map(|(_, planned)| planned.frontend)
    }

    /// The frontends that two Services claim (R12), of which nobody has been told yet.
    pub fn take_conflicts(&mut self) -> Vec<Conflict> {
        self.claims.take_conflicts()
    }

    /// The Services that have come to have more frontends than one can have, and how many are not served.
    pub fn take_beyond(&mut self) -> impl Iterator<Item = (ObjectName, usize)> + use<> {
        std::mem::take(&mut self.beyond).into_iter().filter(|(_, beyond)| *beyond > 0)
    }

    /// What every healthCheckNodePort answers (H1, H2), in no particular order.
    pub fn health_checks(&self) -> impl Iterator<Item = (&ObjectName, HealthCheck)> {
        self.services.iter().filter_map(|(name, held)| Some((name, held.plan.health_check?)))
    }

    /// Counts the service ports that drop traffic for want of a local endpoint.
    #[must_use]
    pub fn no_local_endpoints(&self) -> NoLocalEndpoints {
        let mut count = NoLocalEndpoints::default();
        for held in self.services.values() {
            for port in &held.plan.ports {
                let drops = |internal: bool| {
                    port.frontends.iter().any(|planned| {
                        planned.route.outside.target == Target::Drop
                            && internal == is_cluster_ip(&held.plan, planned.frontend.destination)
                    })
                };
                *count.internal.get_mut(port.id.family) += usize::from(drops(true));
                *count.external.get_mut(port.id.family) += usize::from(drops(false));
            }
        }
        count
    }

    fn port(&self, id: &PortId) -> Option<&Arc<PortPlan>> {
        find(&self.services.get(&id.service)?.plan, id)
    }

    /// Puts a plan in place, less the frontends that are another Service's.
    fn install(&mut self, name: &ObjectName, mut plan: ServicePlan) {
        let withheld = self.withhold(name, &mut plan);
        let before = self.services.remove(name).map(|held| held.plan).unwrap_or_default();
        for port in &mut plan.ports {
            match find(&before, &port.id) {
                None => self.mark(&port.id, None),
                Some(known) => {
                    Arc::make_mut(port).settle(known);
                    if port == known {
                        *port = Arc::clone(known);
                    } else {
                        self.mark(&port.id, Some(known));
                    }
                }
            }
        }
        for gone in before.ports.iter().filter(|port| find(&plan, &port.id).is_none()) {
            self.mark(&gone.id, Some(gone));
        }
        if plan.cluster_ips != before.cluster_ips {
            plan.cluster_ips.iter().for_each(|ip| self.count_ip(*ip, true));
            before.cluster_ips.iter().for_each(|ip| self.count_ip(*ip, false));
        }
        if !plan.ports.is_empty() || !plan.cluster_ips.is_empty() || plan.health_check.is_some() {
            self.services.insert(name.clone(), Held { plan: Arc::new(plan), withheld });
        }
    }

    fn withhold(&self, name: &ObjectName, plan: &mut ServicePlan) -> Box<[(PortId, FrontendPlan)]> {
        let mut withheld = Vec::new();
        for port in &mut plan.ports {
            if frontends(port).all(|frontend| self.claims.owns(name, &frontend)) {
                continue;
            }
            let port = Arc::make_mut(port);
            let (own, foreign) =
                port.frontends.drain(..).partition(|planned| self.claims.owns(name, &planned.frontend));
            port.frontends = own;
            let foreign: Vec<FrontendPlan> = foreign;
            withheld.extend(foreign.into_iter().map(|planned| (port.id.clone(), planned)));
        }
        withheld.into()
    }

    /// Remembers what the data plane has of a port, unless a change still pending says so already.
    fn mark(&mut self, id: &PortId, installed: Option<&Arc<PortPlan>>) {
        if !self.pending_ports.contains_key(id) {
            let has = self.refused.remove(id).unwrap_or_else(|| installed.cloned());
            self.pending_ports.insert(id.clone(), has);
        }
    }

    fn count_ip(&mut self, ip: IpAddr, more: bool) {
        let count = self.cluster_ips.entry(ip).or_insert(0);
        self.pending_ips.entry(ip).or_insert(*count > 0);
        *count = if more { *count + 1 } else { count.saturating_sub(1) };
        if *count == 0 {
            self.cluster_ips.remove(&ip);
        }
    }
}

impl PortDelta {
    /// Which service port this is about.
    #[must_use]
    pub fn id(&self) -> Option<&PortId> {
        self.after.as_ref().or(self.before.as_ref()).map(|plan| &plan.id)
    }
}

fn frontends(port: &PortPlan) -> impl Iterator<Item = Frontend> + '_ {
    port.frontends.iter().map(|planned| planned.frontend)
}

fn is_cluster_ip(plan: &ServicePlan, destination: Destination) -> bool {
    matches!(destination, Destination::Address(address) if plan.cluster_ips.contains(&address))
}

fn find<'a>(plan: &'a ServicePlan, id: &PortId) -> Option<&'a Arc<PortPlan>> {
    plan.ports.binary_search_by(|port| port.id.cmp(id)).ok().map(|index| &plan.ports[index])
}

/// Every frontend a Service claims, those it has and those it does not get.
fn claimed(held: &Held) -> Wish {
    let own = held.plan.ports.iter().flat_map(|port| frontends(port));
    Wish::of(&held.plan, own.chain(held.withheld.iter().map(|(_, planned)| planned.frontend)))
}

/// A Service's plan as it was before others' frontends were left out.
fn wanted(held: &Held) -> ServicePlan {
    let mut plan = ServicePlan::clone(&held.plan);
    // Those of one port stand together.
    for withheld in held.withheld.chunk_by(|(one, _), (other, _)| one == other) {
        let Some((id, _)) = withheld.first() else { continue };
        let Ok(index) = plan.ports.binary_search_by(|port| port.id.cmp(id)) else { continue };
        let port = Arc::make_mut(&mut plan.ports[index]);
        port.frontends.extend(withheld.iter().map(|(_, planned)| planned.clone()));
        port.frontends.sort_unstable_by_key(|planned| planned.frontend);
    }
    plan
}
