//! The plans of all Services, and which part of them a data plane does not have yet.
//!
//! In: new plans of Services, and the ports that a data plane refused. Out: [`Delta`]s, and plans for health
//! checks, metrics and `weir plan`.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use rustc_hash::{FxHashMap, FxHashSet};

use super::{
    ClusterIpDelta, Delta, Destination, Frontend, FrontendPlan, HealthCheck, NodePlan, PortDelta, PortId,
    PortPlan, ServicePlan, Target,
    claims::{Claims, Conflict, ServiceClaims},
    delta,
};
use crate::model::{Family, ObjectName, PerFamily};

/// A Service's plan, and those of its frontends that another Service owns (R12).
#[derive(Debug)]
struct StoredPlan {
    plan: Arc<ServicePlan>,
    withheld: Box<[(PortId, FrontendPlan)]>,
}

/// The number of service ports that have endpoints, but none on this node for traffic that must stay here
/// (F2, F3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NoLocalEndpoints {
    /// By internalTrafficPolicy.
    pub internal: PerFamily<usize>,
    /// By externalTrafficPolicy.
    pub external: PerFamily<usize>,
}

/// Stores all plans and turns their changes into deltas.
#[derive(Debug, Default)]
pub struct Planner {
    services: FxHashMap<ObjectName, StoredPlan>,
    claims: Claims,
    /// Services with too many frontends since the last call of [`Planner::take_over_limit`], each with the number
    /// of those left out.
    unserved: BTreeMap<ObjectName, usize>,
    /// How many Services have each ClusterIP.
    cluster_ips: FxHashMap<IpAddr, usize>,
    node: Option<Arc<NodePlan>>,
    node_pending: bool,
    /// The plan that the data plane has of each port that is not up to date.
    pending_ports: FxHashMap<PortId, Option<Arc<PortPlan>>>,
    /// Whether the data plane has each ClusterIP that may not be up to date.
    pending_ips: BTreeMap<IpAddr, bool>,
    /// Refused ports that wait for a retry, each with the plan that the data plane has.
    refused: FxHashMap<PortId, Option<Arc<PortPlan>>>,
    /// Ports that were refused in a complete delta and not programmed since. For these the data plane still
    /// has the state that it found at its start.
    refused_in_complete: FxHashSet<PortId>,
    /// Ports that the socket plane left to nftables, and that it will try again.
    left: FxHashSet<PortId>,
    /// Those of `left` that go into the next delta.
    repeated: FxHashSet<PortId>,
    /// The families with state from before the start that belongs to no port any more.
    orphaned: PerFamily<bool>,
}

impl Planner {
    /// Replaces the plan of a Service; an empty plan removes the Service. The difference is in the next
    /// delta.
    pub fn update(&mut self, name: &ObjectName, plan: ServicePlan) {
        let before = self.services.get(name).map(claimed).unwrap_or_default();
        let now = ServiceClaims::of(&plan, plan.ports.iter().flat_map(|port| frontends(port)));
        let affected = self.claims.replace(name, &before, &now);
        if plan.unserved != self.service(name).map_or(0, |before| before.unserved) {
            self.unserved.insert(name.clone(), plan.unserved);
        }
        self.install(name, plan);
        for other in affected {
            if let Some(wanted) = self.services.get(&other).map(wanted) {
                self.install(&other, wanted);
            }
        }
    }

    /// Replaces the plan of the node.
    pub fn update_node(&mut self, plan: NodePlan) {
        if self.node.as_deref() != Some(&plan) {
            self.node = Some(Arc::new(plan));
            self.node_pending = true;
        }
    }

    /// The changes since the last delta; empty if there are none. A refused port is in it only if it changed
    /// meanwhile or after [`Planner::retry`].
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

    /// The changes of these ports, sorted. Records the families in which state from before the start belongs
    /// to no port any more.
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
            if before.is_none() && after.is_none() && self.refused_in_complete.remove(&id) {
                *self.orphaned.get_mut(id.family) = true;
            }
            // A port that the socket plane left to nftables is sent again even if it is unchanged.
            if before != after || (after.is_some() && repeated.contains(&id)) {
                changes.push(PortDelta { before, after });
            }
        }
        changes
    }

    /// Everything that should exist, for a data plane with unknown content. Replaces the pending changes.
    pub fn complete(&mut self) -> Delta {
        self.complete_for(PerFamily { v4: true, v6: true })
    }

    /// Everything that should exist in these families, for a data plane with unknown content there. Replaces
    /// the pending changes of these families. The data plane must be up to date in the other family.
    pub fn complete_for(&mut self, families: PerFamily<bool>) -> Delta {
        let other = |family: Family| !families.get(family);
        self.pending_ports.retain(|id, _| other(id.family));
        self.refused.retain(|id, _| other(id.family));
        self.refused_in_complete.retain(|id| other(id.family));
        self.pending_ips.retain(|ip, _| other(Family::of(*ip)));
        for family in Family::ALL {
            *self.orphaned.get_mut(family) &= other(family);
        }
        self.node_pending = false;
        let mut services: Vec<(&ObjectName, &StoredPlan)> = self.services.iter().collect();
        services.sort_unstable_by_key(|(name, _)| *name);
        let ports = services.into_iter().flat_map(|(_, stored)| &stored.plan.ports);
        let mut ips: Vec<IpAddr> = self.cluster_ips.keys().copied().collect();
        ips.sort_unstable();
        Delta {
            node: self.node.clone(),
            cluster_ips: ips.into_iter().map(ClusterIpDelta::Add).collect(),
            ports: ports.map(|port| PortDelta { before: None, after: Some(Arc::clone(port)) }).collect(),
            complete: true,
        }
    }

    /// Records that `delta` is applied except for these ports, which wait for [`Planner::retry`]. Returns the
    /// families in which a retry is not enough, because a refused port takes a frontend from another port, or
    /// releases one to it. There the data plane must be read again and given a complete delta.
    pub fn record_applied(&mut self, delta: &Delta, refused: &[PortId]) -> PerFamily<bool> {
        let mut entangled = PerFamily::default();
        if refused.is_empty() && self.refused_in_complete.is_empty() {
            return entangled;
        }
        let moved = delta::moved(&delta.ports);
        let refused: FxHashSet<&PortId> = refused.iter().collect();
        for port in &delta.ports {
            let Some(id) = port.id() else { continue };
            if !refused.contains(id) {
                self.refused_in_complete.remove(id);
                continue;
            }
            if delta.complete {
                self.refused_in_complete.insert(id.clone());
            }
            *entangled.get_mut(id.family) |= !delta.complete
                && port.released().chain(port.taken()).any(|frontend| moved.contains_key(&frontend));
            self.refused.insert(id.clone(), port.before.clone());
        }
        entangled
    }

    /// Records that the socket plane left these ports to nftables. They wait for [`Planner::retry`] too.
    pub fn record_left(&mut self, ids: impl IntoIterator<Item = PortId>) {
        self.left.extend(ids);
    }

    /// Puts all waiting ports into the next delta.
    pub fn retry(&mut self) {
        for (id, has) in self.refused.drain() {
            self.pending_ports.entry(id).or_insert(has);
        }
        self.repeated.extend(self.left.drain());
    }

    /// Whether a port waits for a retry.
    #[must_use]
    pub fn waits(&self, id: &PortId) -> bool {
        self.refused.contains_key(id)
    }

    /// Whether the socket plane left a port to nftables.
    #[must_use]
    pub fn is_left(&self, id: &PortId) -> bool {
        self.left.contains(id)
    }

    /// Whether any port waits for a retry.
    #[must_use]
    pub fn has_waiting(&self) -> bool {
        !self.refused.is_empty() || !self.left.is_empty()
    }

    /// The families in which the data plane still has state from before the start of a refused port that is
    /// gone. A complete delta removes it.
    pub fn take_orphaned(&mut self) -> PerFamily<bool> {
        std::mem::take(&mut self.orphaned)
    }

    /// The plan of one Service, without the frontends that other Services own.
    #[must_use]
    pub fn service(&self, name: &ObjectName) -> Option<&Arc<ServicePlan>> {
        self.services.get(name).map(|stored| &stored.plan)
    }

    /// The plans of all Services, in no particular order.
    pub fn services(&self) -> impl ExactSizeIterator<Item = (&ObjectName, &Arc<ServicePlan>)> {
        self.services.iter().map(|(name, stored)| (name, &stored.plan))
    }

    /// The plan of the node.
    #[must_use]
    pub fn node(&self) -> Option<&Arc<NodePlan>> {
        self.node.as_ref()
    }

    /// Whether any Service has this frontend.
    #[must_use]
    pub fn has_frontend(&self, frontend: &Frontend) -> bool {
        self.claims.has_owner(frontend)
    }

    /// The frontends that a Service claims and another Service owns (R12).
    pub fn withheld(&self, name: &ObjectName) -> impl Iterator<Item = Frontend> + '_ {
        let stored = self.services.get(name).into_iter();
        stored.flat_map(|stored| &stored.withheld).map(|(_, planned)| planned.frontend)
    }

    /// The conflicts since the last call (R12).
    pub fn take_conflicts(&mut self) -> Vec<Conflict> {
        self.claims.take_conflicts()
    }

    /// The Services that exceeded the limit of frontends since the last call, each with the number of
    /// frontends that are not served.
    pub fn take_over_limit(&mut self) -> impl Iterator<Item = (ObjectName, usize)> + use<> {
        std::mem::take(&mut self.unserved).into_iter().filter(|(_, unserved)| *unserved > 0)
    }

    /// The answers of all healthCheckNodePorts (H1, H2), in no particular order.
    pub fn health_checks(&self) -> impl Iterator<Item = (&ObjectName, HealthCheck)> {
        self.services.iter().filter_map(|(name, stored)| Some((name, stored.plan.health_check?)))
    }

    /// Counts the service ports that drop traffic because they have no local endpoint.
    #[must_use]
    pub fn no_local_endpoints(&self) -> NoLocalEndpoints {
        let mut count = NoLocalEndpoints::default();
        for stored in self.services.values() {
            for port in &stored.plan.ports {
                let drops = |internal: bool| {
                    port.frontends.iter().any(|planned| {
                        planned.route.outside.target == Target::Drop
                            && internal == is_cluster_ip(&stored.plan, planned.frontend.destination)
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

    /// Stores a plan without the frontends that other Services own.
    fn install(&mut self, name: &ObjectName, mut plan: ServicePlan) {
        let withheld = self.withhold(name, &mut plan);
        let before = self.services.remove(name).map(|stored| stored.plan).unwrap_or_default();
        for port in &mut plan.ports {
            match find(&before, &port.id) {
                None => self.mark(&port.id, None),
                Some(known) => {
                    Arc::make_mut(port).keep_slots(known);
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
            self.services.insert(name.clone(), StoredPlan { plan: Arc::new(plan), withheld });
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

    /// Records the plan that the data plane has of a port, unless a pending change recorded it already.
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
    /// The id of the service port.
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

/// All frontends that a Service claims, whether it owns them or not.
fn claimed(stored: &StoredPlan) -> ServiceClaims {
    let own = stored.plan.ports.iter().flat_map(|port| frontends(port));
    ServiceClaims::of(&stored.plan, own.chain(stored.withheld.iter().map(|(_, planned)| planned.frontend)))
}

/// A Service's plan with the frontends that other Services own.
fn wanted(stored: &StoredPlan) -> ServicePlan {
    let mut plan = ServicePlan::clone(&stored.plan);
    // The frontends of one port are adjacent.
    for withheld in stored.withheld.chunk_by(|(one, _), (other, _)| one == other) {
        let Some((id, _)) = withheld.first() else { continue };
        let Ok(index) = plan.ports.binary_search_by(|port| port.id.cmp(id)) else { continue };
        let port = Arc::make_mut(&mut plan.ports[index]);
        port.frontends.extend(withheld.iter().map(|(_, planned)| planned.clone()));
        port.frontends.sort_unstable_by_key(|planned| planned.frontend);
    }
    plan
}
