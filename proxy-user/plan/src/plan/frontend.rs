//! Plans one Service on this node: its frontends, and what each does with a new flow (R2 to R7, F1 to F3,
//! F7).
//!
//! In: a Service, its endpoints, this node. Out: a [`ServicePlan`], always the same for the same input.

use std::{net::IpAddr, sync::Arc, time::Duration};

use ipnet::IpNet;
use rustc_hash::FxHashSet;

use super::{
    Backend, Destination, Frontend, FrontendPlan, HealthCheck, PortId, PortPlan, Removal, Route, ServicePlan,
    Target, Treatment,
    topology::{self, Selection, Uses},
};
use crate::model::{Candidate, DNS_PORT, Endpoints, Family, NodeView, Protocol, Service, ServicePort};

/// The most frontends of one Service. Every node programs each of them, so without a limit one object could
/// cost every node seconds and much memory.
pub const MOST_FRONTENDS: usize = 16_384;

/// Plans `service` on `node`: one [`PortPlan`] for each port and family.
#[must_use]
pub fn plan_service(service: &Service, endpoints: &Endpoints, node: &NodeView) -> ServicePlan {
    let part = ServedPart::of(service);
    let mut ports = Vec::with_capacity(part.ports.len() * service.families().count());
    let mut taken = FxHashSet::default();
    for family in service.families() {
        let planner = FamilyPlanner::new(service, family, node, &part);
        for port in part.ports {
            let candidates = endpoints.of(&port.name, port.protocol, family);
            let mut plan = planner.port(port, &candidates);
            if service.ports.len() > 1 {
                plan.frontends.retain(|planned| taken.insert(planned.frontend));
            }
            ports.push(Arc::new(plan));
        }
    }
    ports.sort_unstable_by(|a, b| a.id.cmp(&b.id));
    let health_check = service.health_check_port.map(|port| HealthCheck {
        port,
        // A dual-stack Pod is one endpoint. Both families list it, unless one of them lags behind.
        local_endpoints: service.families().map(|family| endpoints.local_ready(family)).max().unwrap_or(0),
    });
    ServicePlan {
        cluster_ips: service.families().filter_map(|family| *service.cluster_ips.get(family)).collect(),
        ports,
        health_check,
        created: service.created,
        load_balancer_ips: service.load_balancer_ips.clone(),
        unserved: part.unserved,
    }
}

/// The part of a Service that fits into [`MOST_FRONTENDS`]: ClusterIPs and NodePorts of the first ports, then
/// addresses of these ports, those of the load balancer before external IPs.
struct ServedPart<'a> {
    ports: &'a [ServicePort],
    /// Sorted.
    load_balancer_ips: Vec<IpAddr>,
    /// Without the load balancer's addresses, because those have source ranges (F7).
    external_ips: Vec<IpAddr>,
    /// The number of frontends that are left out.
    unserved: usize,
}

impl<'a> ServedPart<'a> {
    fn of(service: &'a Service) -> Self {
        let families = service.families().count().max(1);
        let served = |ips: &[IpAddr]| -> Vec<IpAddr> {
            ips.iter().copied().filter(|ip| service.cluster_ips.get(Family::of(*ip)).is_some()).collect()
        };
        let load_balancer_ips = served(&service.load_balancer_ips);
        let mut external_ips = served(&service.external_ips);
        external_ips.retain(|ip| load_balancer_ips.binary_search(ip).is_err());
        let mut part = Self { ports: &service.ports, load_balancer_ips, external_ips, unserved: 0 };
        let wanted = part.fixed(families) + part.ports.len() * part.addresses();
        if wanted > MOST_FRONTENDS {
            // Each port has a ClusterIP and a NodePort in each family.
            part.ports = &part.ports[..part.ports.len().min(MOST_FRONTENDS / (2 * families))];
            let addresses = (MOST_FRONTENDS - part.fixed(families)) / part.ports.len().max(1);
            part.load_balancer_ips.truncate(addresses);
            part.external_ips.truncate(addresses - part.load_balancer_ips.len());
            part.unserved = wanted - part.fixed(families) - part.ports.len() * part.addresses();
        }
        part
    }

    /// The number of ClusterIP and NodePort frontends.
    fn fixed(&self, families: usize) -> usize {
        self.ports.iter().map(|port| families * (1 + usize::from(port.node_port != 0))).sum()
    }

    fn addresses(&self) -> usize {
        self.load_balancer_ips.len() + self.external_ips.len()
    }
}

/// Plans the ports of a Service in one family.
struct FamilyPlanner<'a> {
    service: &'a Service,
    family: Family,
    node: &'a NodeView,
    /// The addresses besides the ClusterIP, each with its allowed sources.
    external: Vec<(IpAddr, Option<Arc<[IpNet]>>)>,
}

impl<'a> FamilyPlanner<'a> {
    fn new(service: &'a Service, family: Family, node: &'a NodeView, part: &ServedPart<'_>) -> Self {
        let of_family = |ips: &[IpAddr]| -> Vec<IpAddr> {
            ips.iter().copied().filter(|ip| Family::of(*ip) == family).collect()
        };
        let vips = of_family(&part.load_balancer_ips);
        let allowed = allowed_sources(service, family, &vips, node);
        let mut external: Vec<_> = of_family(&part.external_ips).into_iter().map(|ip| (ip, None)).collect();
        external.extend(vips.iter().map(|ip| (*ip, allowed.clone())));
        external.retain(|(ip, _)| *service.cluster_ips.get(family) != Some(*ip));
        Self { service, family, node, external }
    }

    fn port(&self, port: &ServicePort, candidates: &[Candidate<'_>]) -> PortPlan {
        let Self { service, family, node, .. } = self;
        // E4: a port that is accessible from outside needs the Cluster set for pods and this host, whatever
        // the policy.
        let reachable = port.node_port != 0 || !self.external.is_empty();
        let uses = Uses {
            cluster: !service.internal_local || reachable,
            local: service.internal_local || (service.external_local && reachable),
        };
        let selection = topology::select(candidates, uses, node);
        let frontends = self.frontends(port, &selection);
        let on_removal = match port.protocol {
            Protocol::Udp => Removal::Reset { after: Duration::ZERO },
            Protocol::Tcp => service.on_removal,
            Protocol::Sctp => Removal::Keep,
        };
        let serving = match on_removal {
            // A ready endpoint gets new flows, so its existing flows are not stale, even if it is not
            // serving, as with publishNotReadyAddresses.
            Removal::Reset { .. } => topology::backends(candidates, |Candidate { endpoint, .. }| {
                endpoint.serving || endpoint.ready
            }),
            Removal::Keep => Vec::new(),
        };
        PortPlan {
            id: PortId {
                service: service.name.clone(),
                port: Arc::clone(&port.name),
                protocol: port.protocol,
                family: *family,
            },
            cluster: selection.cluster,
            local: selection.local,
            frontends,
            affinity: service.affinity,
            on_removal,
            serving,
        }
    }

    fn frontends(&self, port: &ServicePort, selection: &Selection) -> Vec<FrontendPlan> {
        let plan = |destination, port_number, route, allowed_sources| FrontendPlan {
            frontend: Frontend { destination, protocol: port.protocol, port: port_number },
            route,
            allowed_sources,
            answered_here: false,
        };
        let internal = self.internal_route(selection);
        let external = self.external_route(selection);
        let cluster_ip = self.service.cluster_ips.get(self.family).map(Destination::Address);
        let node_port = (port.node_port != 0).then_some(Destination::NodePort(self.family));
        let count =
            usize::from(cluster_ip.is_some()) + usize::from(node_port.is_some()) + self.external.len();
        let mut frontends = Vec::with_capacity(count);
        frontends.extend(cluster_ip.map(|destination| FrontendPlan {
            answered_here: self.is_answered_here(port),
            ..plan(destination, port.port, internal, None)
        }));
        frontends.extend(
            self.external
                .iter()
                .map(|(ip, allowed)| plan(Destination::Address(*ip), port.port, external, allowed.clone())),
        );
        frontends.extend(node_port.map(|destination| plan(destination, port.node_port, external, None)));
        frontends.sort_unstable_by_key(|planned| planned.frontend);
        frontends
    }

    /// Whether weir answers DNS on this port in place of the DNS Service.
    fn is_answered_here(&self, port: &ServicePort) -> bool {
        self.node.dns_service.as_ref() == Some(&self.service.name)
            && port.port == DNS_PORT
            && port.protocol != Protocol::Sctp
    }

    fn has_detector(&self) -> bool {
        self.node.local_traffic.get(self.family).is_some()
    }

    /// The route of the ClusterIP (R2, R7, F1, F2).
    fn internal_route(&self, selection: &Selection) -> Route {
        let target = if !selection.any {
            Target::Reject
        } else if self.service.internal_local {
            local_or_drop(selection)
        } else {
            cluster_or_reject(&selection.cluster)
        };
        let others = self.node.masquerade_all || self.has_detector();
        Route {
            pod: treatment(target, self.node.masquerade_all),
            host: treatment(target, others),
            outside: treatment(target, others),
        }
    }

    /// The route of NodePorts, external IPs and load balancer addresses (R3, R5, R6, F1, F3).
    fn external_route(&self, selection: &Selection) -> Route {
        let cluster = cluster_or_reject(&selection.cluster);
        if !selection.any || !self.service.external_local {
            return Route::uniform(treatment(cluster, true));
        }
        let outside = treatment(local_or_drop(selection), false);
        let pod = if self.has_detector() { treatment(cluster, false) } else { outside };
        Route { pod, host: treatment(cluster, true), outside }
    }
}

fn cluster_or_reject(cluster: &[Backend]) -> Target {
    if cluster.is_empty() { Target::Reject } else { Target::Cluster }
}

fn local_or_drop(selection: &Selection) -> Target {
    if selection.local.is_empty() { Target::Drop } else { Target::Local }
}

/// A flow that is not forwarded is not masqueraded either.
fn treatment(target: Target, masquerade: bool) -> Treatment {
    let goes = matches!(target, Target::Cluster | Target::Local);
    Treatment { target, masquerade: masquerade && goes }
}

/// The allowed sources of the load balancer's addresses of a family; `None` allows every client (F7).
fn allowed_sources(
    service: &Service,
    family: Family,
    vips: &[IpAddr],
    node: &NodeView,
) -> Option<Arc<[IpNet]>> {
    let ranges = service.source_ranges.iter().copied();
    let mut ranges: Vec<IpNet> = ranges.filter(|range| Family::of(range.addr()) == family).collect();
    if ranges.is_empty() || vips.is_empty() {
        return None;
    }
    // Packets from this host to such an address may have that address as their source.
    if ranges.iter().any(|range| range.contains(node.addresses.get(family))) {
        ranges.extend(vips.iter().copied().map(IpNet::from));
    }
    let mut merged = IpNet::aggregate(&ranges);
    merged.sort_unstable();
    merged.iter().all(|range| range.prefix_len() != 0).then(|| merged.into())
}
