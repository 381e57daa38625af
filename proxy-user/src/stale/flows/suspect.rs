//! Which UDP flows a change may have left behind: the pure half.
//!
//! In: how service ports change (from `plan`). Out: [`Suspects`], the frontends worth looking at, and for each flow the
//! answer whether it is stale.
//!
//! Connection tracking sends an established flow to the backend it first picked. TCP clients notice a dead one and
//! connect again; a UDP client that keeps sending never gives its flow a chance to expire, so it has to be taken away.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use rustc_hash::{FxHashMap, FxHashSet};

use super::Coming;
use crate::{
    model::{Family, Protocol},
    plan::{
        Backend, Destination, Frontend, FrontendPlan, NodePlan, NodePortAddresses, PortDelta, PortPlan,
        Target,
    },
};

/// A UDP flow as connection tracking has it, all addresses in wire terms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Its client, as this node sees it.
    pub client: IpAddr,
    /// Where its client sends to.
    pub destination: SocketAddr,
    /// Where answers come from: the backend, or the destination itself when nothing was translated.
    pub answers: SocketAddr,
}

/// UDP frontends that may have flows which are not right any more, with what is right.
#[derive(Clone, Debug, Default)]
pub struct Suspects {
    frontends: FxHashMap<Frontend, Suspect>,
    /// Ports that changed without leaving anything stale. Flows to endpoints that joined are right, whatever was suspected
    /// before.
    newer: Vec<Arc<PortPlan>>,
    /// Addresses and ports of the node that look like a NodePort here and are frontends by themselves.
    apart: FxHashSet<SocketAddr>,
    /// Says where NodePorts answer.
    node: Option<Arc<NodePlan>>,
    /// What will be in force, and how many of those deltas these suspects know of.
    coming: Option<(Coming, u64)>,
}

/// One frontend that may have flows which are not right any more.
#[derive(Clone, Debug, Default)]
struct Suspect {
    /// The port that has the frontend and is looked at because of it; `None` where a port gave the frontend up and no
    /// other one has taken it.
    now: Option<Present>,
    /// The ports that had it, as they were.
    former: Vec<Arc<PortPlan>>,
    /// Whether a port had it of which nothing else is known.
    left_over: bool,
}

/// What has a frontend.
#[derive(Clone, Debug)]
struct Present {
    port: Arc<PortPlan>,
    frontend: FrontendPlan,
}

impl Suspects {
    /// Those among `ports`, which must be in the kernel by now. Exactly:
    ///
    /// - a port that is new, lost a serving endpoint, or had none while it has some now: all its frontends are meant, also
    ///   where nothing serves any more (K7);
    /// - of other ports only frontends that did not lead to a backend before, because their clients' packets may have been
    ///   tracked on the way to nowhere, and those that are for other clients than before (F7);
    /// - frontends that a port gave up or had when it went (K6).
    ///
    /// Endpoints that only join make nothing stale.
    pub fn of<'a>(ports: impl IntoIterator<Item = &'a PortDelta>) -> Self {
        let mut suspects = Self::default();
        for delta in ports.into_iter().filter(|delta| is_udp(delta)) {
            suspects.suspect_former(delta);
            suspects.suspect_present(delta);
        }
        suspects
    }

    /// What ports gave up, whether or not anything of it is in the kernel yet: the kernel may be told by a change that does
    /// not say so.
    pub fn given_up<'a>(ports: impl IntoIterator<Item = &'a PortDelta>) -> Self {
        let mut suspects = Self::default();
        ports.into_iter().filter(|delta| is_udp(delta)).for_each(|delta| suspects.suspect_former(delta));
        suspects
    }

    /// Frontends that an earlier agent led somewhere and that no port has.
    pub fn left_over(frontends: impl IntoIterator<Item = Frontend>) -> Self {
        let suspect = Suspect { left_over: true, ..Suspect::default() };
        let frontends = frontends.into_iter().map(|frontend| (frontend, suspect.clone())).collect();
        Self { frontends, ..Self::default() }
    }

    /// With the node whose addresses serve NodePorts, where an address and port of it that is a frontend by itself
    /// comes first for packets (R1).
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

    /// With what the kernel is told later: no flow is stale that it makes right. To be called before the next delta is
    /// announced.
    #[must_use]
    pub fn in_view_of(self, coming: &Coming) -> Self {
        Self { coming: Some((coming.clone(), coming.deltas())), ..self }
    }

    /// Flows are judged by these from now on: what was announced before is known.
    pub(crate) fn begin(&self) {
        if let Some((coming, known)) = &self.coming {
            coming.forget(*known);
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
                || (leads_anywhere(planned) && !was.is_some_and(leads_anywhere))
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

    /// Adds later suspects; where a frontend is in both, the later plan counts.
    pub fn extend(&mut self, later: Self) {
        let Self { frontends, newer, apart, node, coming } = later;
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
        self.coming = coming.or(self.coming.take());
    }

    /// Whether nothing follows from it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.frontends.is_empty() && self.newer.is_empty()
    }

    /// How many frontends there are to look at.
    #[must_use]
    pub fn len(&self) -> usize {
        self.frontends.len()
    }

    /// The frontends, in no order.
    pub fn frontends(&self) -> impl Iterator<Item = &Frontend> {
        self.frontends.keys()
    }

    /// The families of the frontends.
    #[must_use]
    pub fn families(&self) -> BTreeSet<Family> {
        self.frontends.keys().map(|frontend| frontend.destination.family()).collect()
    }

    /// Whether `flow` is addressed to a suspect and answered by something that does not serve it (K2), also when it
    /// was never translated, or is of a client that may not come any more. A NodePort is a port of this node (K3), unless the
    /// address and port are a frontend themselves: those come first for packets too (R1). What the kernel is about to be
    /// told counts as well.
    #[must_use]
    pub fn is_stale(&self, flow: Flow) -> bool {
        self.suspects(flow) && !self.coming.as_ref().is_some_and(|(coming, _)| coming.makes_right(flow))
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

    /// Whether the flow is certainly addressed to a NodePort, if there is one of its number. An outside machine may have a
    /// port of that number too, and a process of this node at an address that serves no NodePorts.
    fn is_node_port(&self, flow: Flow) -> bool {
        let address = flow.destination.ip();
        // Plans leave these addresses out. Only this node translates what is sent to them.
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
    /// Whether a flow with the frontend's port is stale. Where it is not certain that the flow is the frontend's, or no port
    /// has the frontend any more, only translated flows to backends of the ports that had it are: a process of this host, an
    /// outside machine or another program may have the address and port.
    fn has_stale(&self, flow: Flow, is_certain: bool) -> bool {
        match &self.now {
            Some(now) if answers(&now.port, flow) => !now.frontend.lets_in(flow.client),
            Some(_) if is_certain => true,
            _ if !flow.is_translated() => false,
            now => {
                (now.is_none() && self.left_over && is_certain)
                    || self.former.iter().any(|plan| answers(plan, flow))
            }
        }
    }
}

impl Flow {
    /// Whether another address or port than the one that its client sends to gets its packets.
    fn is_translated(&self) -> bool {
        self.answers != self.destination
    }
}

/// The addresses that serve NodePorts of a family, sorted, maybe among others of the other family.
fn node_port_addresses(node: &NodePlan, family: Family) -> &[IpAddr] {
    match node.node_port_addresses.get(family) {
        NodePortAddresses::AnyLocal => &node.host_addresses,
        NodePortAddresses::Only(addresses) => addresses,
    }
}

pub(super) fn is_udp(delta: &PortDelta) -> bool {
    delta.id().is_some_and(|id| id.protocol == Protocol::Udp)
}

/// Whether a flow goes to an endpoint that serves.
pub(super) fn answers(plan: &PortPlan, flow: Flow) -> bool {
    serves(&plan.serving, flow.answers.ip(), flow.answers.port())
}

fn serves(serving: &[Backend], address: IpAddr, port: u16) -> bool {
    serving.binary_search_by_key(&(address, port), |backend| (backend.address, backend.port)).is_ok()
}

fn lost(before: &PortPlan, after: &PortPlan) -> bool {
    before.serving.iter().any(|backend| !serves(&after.serving, backend.address, backend.port))
}

fn leads_anywhere(plan: &FrontendPlan) -> bool {
    [plan.route.pod, plan.route.host, plan.route.outside]
        .iter()
        .any(|treatment| matches!(treatment.target, Target::Cluster | Target::Local))
}
