//! Which UDP flows a change may have made stale: the pure half.
//!
//! In: changes of service ports, from `plan`. Out: [`Suspects`]: the frontends to check, and for each flow whether it
//! is stale.
//!
//! Connection tracking sends a flow to the backend that its first packet got. TCP clients notice a dead backend and
//! connect again. The flow of a UDP client that keeps sending never expires, so weir has to delete it.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use rustc_hash::{FxHashMap, FxHashSet};

use super::AnnouncedPorts;
use crate::{
    model::{Family, Protocol},
    plan::{Destination, Frontend, FrontendPlan, NodePlan, NodePortAddresses, PortDelta, PortPlan, Target},
};

/// A UDP flow of connection tracking, with addresses as in packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// The client's address on this node.
    pub client: IpAddr,
    /// The address and port to which the client sends.
    pub destination: SocketAddr,
    /// The source of answers: the backend, or the destination itself if the flow is not translated.
    pub answers: SocketAddr,
}

/// UDP frontends that may have stale flows, with their ports.
#[derive(Clone, Debug, Default)]
pub struct Suspects {
    frontends: FxHashMap<Frontend, Suspect>,
    /// Ports that changed without making a flow stale. Their new endpoints count for earlier suspects.
    newer: Vec<Arc<PortPlan>>,
    /// Addresses of the node with the number of a NodePort that are frontends of their own.
    apart: FxHashSet<SocketAddr>,
    /// Has the addresses that serve NodePorts.
    node: Option<Arc<NodePlan>>,
    /// The announced ports, and how many deltas are in these suspects.
    announced: Option<(AnnouncedPorts, u64)>,
}

/// One frontend that may have stale flows.
#[derive(Clone, Debug, Default)]
struct Suspect {
    /// The port that has the frontend; `None` if a port lost it and no other port has taken it.
    now: Option<Present>,
    /// The ports that had the frontend before.
    former: Vec<Arc<PortPlan>>,
    /// Whether an unknown port of an earlier agent had the frontend.
    left_over: bool,
}

/// A port with its frontend.
#[derive(Clone, Debug)]
struct Present {
    port: Arc<PortPlan>,
    frontend: FrontendPlan,
}

impl Suspects {
    /// The suspects among changed `ports`, which must be in the kernel by now:
    ///
    /// - all frontends of a port that is new, lost a serving endpoint, or got its first endpoint, even if no endpoint
    ///   serves any more (K7);
    /// - of other ports, frontends that had no backend before, because the kernel may have tracked packets to them
    ///   untranslated, and frontends with other source ranges than before (F7);
    /// - frontends that a port lost, and those of a deleted port (K6).
    ///
    /// Endpoints that only join make no flow stale.
    pub fn of<'a>(ports: impl IntoIterator<Item = &'a PortDelta>) -> Self {
        let mut suspects = Self::default();
        for delta in ports.into_iter().filter(|delta| is_udp(delta)) {
            suspects.suspect_former(delta);
            suspects.suspect_present(delta);
        }
        suspects
    }

    /// The frontends that ports lost, whether or not the change is in the kernel yet. A later change may write it
    /// without mentioning these frontends.
    pub fn given_up<'a>(ports: impl IntoIterator<Item = &'a PortDelta>) -> Self {
        let mut suspects = Self::default();
        ports.into_iter().filter(|delta| is_udp(delta)).for_each(|delta| suspects.suspect_former(delta));
        suspects
    }

    /// Frontends that an earlier agent served and that no port has now.
    pub fn left_over(frontends: impl IntoIterator<Item = Frontend>) -> Self {
        let suspect = Suspect { left_over: true, ..Suspect::default() };
        let frontends = frontends.into_iter().map(|frontend| (frontend, suspect.clone())).collect();
        Self { frontends, ..Self::default() }
    }

    /// With the node whose addresses serve NodePorts. A frontend with one of these addresses and the number of a
    /// NodePort wins over the NodePort (R1).
    #[must_use]
    pub fn on(mut self, node: Option<&Arc<NodePlan>>, is_frontend: impl Fn(&Frontend) -> bool) -> Self {
        let Some(node) = node else { return self };
        for frontend in self.frontends.keys() {
            let Destination::NodePort(family) = frontend.destination else { continue };
            let addresses =
                node_port_addresses(node, family).iter().filter(|own| Family::of(**own) == family);
            for address in addresses {
                if is_frontend(&Frontend { destination: Destination::Address(*address), ..*frontend }) {
                    self.apart.insert(SocketAddr::new(*address, frontend.port));
                }
            }
        }
        self.node = Some(Arc::clone(node));
        self
    }

    /// With the announced ports: a flow that one of them serves is not stale. Call it before the next delta is
    /// announced.
    #[must_use]
    pub fn with_announced(self, announced: &AnnouncedPorts) -> Self {
        Self { announced: Some((announced.clone(), announced.deltas())), ..self }
    }

    /// A sweep with these suspects begins, so ports that were announced before them are dropped.
    pub(crate) fn begin(&self) {
        if let Some((announced, known)) = &self.announced {
            announced.forget(*known);
        }
    }

    fn suspect_former(&mut self, delta: &PortDelta) {
        let Some(before) = &delta.before else { return };
        for frontend in delta.released() {
            self.frontends.entry(frontend).or_default().former.push(Arc::clone(before));
        }
    }

    fn suspect_present(&mut self, delta: &PortDelta) {
        let Some(after) = &delta.after else { return };
        let before = delta.before.as_ref();
        let whole = before.is_none_or(|before| {
            lost(before, after) || (before.serving.is_empty() && !after.serving.is_empty())
        });
        let meant = |planned: &&FrontendPlan| {
            let was = before.and_then(|before| before.frontend(planned.frontend));
            whole
                || (has_backends(planned) && !was.is_some_and(has_backends))
                || was.is_some_and(|was| was.allowed_sources != planned.allowed_sources)
        };
        for planned in after.frontends.iter().filter(meant) {
            let suspect = self.frontends.entry(planned.frontend).or_default();
            suspect.now = Some(Present { port: Arc::clone(after), frontend: planned.clone() });
            suspect.former.extend(before.cloned());
        }
        if !whole {
            self.newer.push(Arc::clone(after));
        }
    }

    /// Adds later suspects. If both have a frontend, the later plan counts.
    pub fn extend(&mut self, later: Self) {
        let Self { frontends, newer, apart, node, announced } = later;
        for port in &newer {
            for planned in &port.frontends {
                let suspect = self.frontends.get_mut(&planned.frontend);
                if let Some(now) = suspect.and_then(|suspect| suspect.now.as_mut()) {
                    *now = Present { port: Arc::clone(port), frontend: planned.clone() };
                }
            }
        }
        for (frontend, Suspect { now, former, left_over }) in frontends {
            let suspect = self.frontends.entry(frontend).or_default();
            suspect.now = now;
            suspect.left_over |= left_over;
            suspect.former.extend(former);
        }
        self.newer.extend(newer);
        self.apart.extend(apart);
        self.node = node.or(self.node.take());
        self.announced = announced.or(self.announced.take());
    }

    /// Whether there is nothing to check.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.frontends.is_empty() && self.newer.is_empty()
    }

    /// The number of frontends to check.
    #[must_use]
    pub fn len(&self) -> usize {
        self.frontends.len()
    }

    /// The frontends to check, in any order.
    pub fn frontends(&self) -> impl Iterator<Item = &Frontend> {
        self.frontends.keys()
    }

    /// The families of the frontends to check.
    #[must_use]
    pub fn families(&self) -> BTreeSet<Family> {
        self.frontends.keys().map(|frontend| frontend.destination.family()).collect()
    }

    /// Whether `flow` goes to a suspect, and its answers come from an address that does not serve (K2), or source
    /// ranges now exclude its client. Untranslated flows count too. A NodePort's flows have an address of this node
    /// (K3), unless the address and port are a frontend of their own (R1). A flow that an announced port serves is
    /// not stale.
    #[must_use]
    pub fn is_stale(&self, flow: Flow) -> bool {
        self.suspects(flow) && !self.announced.as_ref().is_some_and(|(announced, _)| announced.serves(flow))
    }

    fn suspects(&self, flow: Flow) -> bool {
        let (address, port) = (flow.destination.ip(), flow.destination.port());
        let look_up =
            |destination| self.frontends.get(&Frontend { destination, protocol: Protocol::Udp, port });
        if let Some(suspect) = look_up(Destination::Address(address)) {
            return suspect.has_stale(flow, true);
        }
        if self.apart.contains(&flow.destination) {
            return false;
        }
        look_up(Destination::NodePort(Family::of(address)))
            .is_some_and(|suspect| suspect.has_stale(flow, self.is_node_port(flow)))
    }

    /// Whether the flow certainly goes to a NodePort, if there is one with its number. Another machine may have a
    /// port of that number too, and so may a process of this node at an address that serves no NodePorts.
    fn is_node_port(&self, flow: Flow) -> bool {
        let address = flow.destination.ip();
        // Plans do not contain these addresses. Only this node translates packets to them.
        let is_near = match address {
            IpAddr::V4(address) => address.is_loopback(),
            IpAddr::V6(address) => address.is_loopback() || address.is_unicast_link_local(),
        };
        let serves =
            |node: &NodePlan| node_port_addresses(node, Family::of(address)).binary_search(&address).is_ok();
        (is_near && flow.is_translated()) || self.node.as_deref().is_some_and(serves)
    }
}

impl Suspect {
    /// Whether a flow with the frontend's port is stale. If it is not certain that the flow belongs to the frontend,
    /// or if no port has the frontend any more, only translated flows to backends of former ports are stale, because
    /// a process of this host, another machine or another program may have the address and port.
    fn has_stale(&self, flow: Flow, is_certain: bool) -> bool {
        match &self.now {
            Some(now) if flow.is_served_by(&now.port) => !now.frontend.lets_in(flow.client),
            Some(_) if is_certain => true,
            _ if !flow.is_translated() => false,
            now => {
                (now.is_none() && self.left_over && is_certain)
                    || self.former.iter().any(|plan| flow.is_served_by(plan))
            }
        }
    }
}

impl Flow {
    fn is_translated(&self) -> bool {
        self.answers != self.destination
    }

    /// Whether the flow goes to an endpoint that serves.
    pub(super) fn is_served_by(&self, plan: &PortPlan) -> bool {
        plan.serves(self.answers.ip(), self.answers.port())
    }
}

/// The addresses that serve NodePorts of a family, sorted. May contain addresses of the other family.
fn node_port_addresses(node: &NodePlan, family: Family) -> &[IpAddr] {
    match node.node_port_addresses.get(family) {
        NodePortAddresses::AnyLocal => &node.host_addresses,
        NodePortAddresses::Only(addresses) => addresses,
    }
}

pub(super) fn is_udp(delta: &PortDelta) -> bool {
    delta.id().is_some_and(|id| id.protocol == Protocol::Udp)
}

fn lost(before: &PortPlan, after: &PortPlan) -> bool {
    before.serving.iter().any(|backend| !after.serves(backend.address, backend.port))
}

fn has_backends(plan: &FrontendPlan) -> bool {
    [plan.route.pod, plan.route.host, plan.route.outside]
        .iter()
        .any(|treatment| matches!(treatment.target, Target::Cluster | Target::Local))
}
