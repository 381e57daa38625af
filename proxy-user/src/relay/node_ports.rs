//! The NodePorts on loopback addresses, and their backends for processes of this node.
//!
//! In: service ports that are in force. Out: [`NodePortChanges`], and [`NodePorts`], which applies them.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use crate::{
    model::{Family, PerFamily, Protocol},
    plan::{Destination, PortDelta, PortPlan, Target},
};

/// A NodePort on the loopback address of a family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct LoopbackPort {
    pub(crate) family: Family,
    /// TCP or UDP.
    pub(crate) protocol: Protocol,
    pub(crate) number: u16,
}

impl LoopbackPort {
    #[must_use]
    pub(crate) fn address(self) -> SocketAddr {
        let loopback: IpAddr = match self.family {
            Family::V4 => Ipv4Addr::LOCALHOST.into(),
            Family::V6 => Ipv6Addr::LOCALHOST.into(),
        };
        SocketAddr::new(loopback, self.number)
    }

    /// The NodePort of a service port, unless it is SCTP.
    fn of(plan: &PortPlan) -> Option<Self> {
        let frontends = plan.frontends.iter().map(|planned| planned.frontend);
        let frontend = frontends.into_iter().find(|it| matches!(it.destination, Destination::NodePort(_)))?;
        let protocol = Some(frontend.protocol).filter(|protocol| *protocol != Protocol::Sctp)?;
        Some(Self { family: frontend.destination.family(), protocol, number: frontend.port })
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Backends {
    /// Never empty.
    pub(crate) addresses: Arc<[SocketAddr]>,
    /// How long a client stays with its backend.
    pub(crate) affinity: Option<Duration>,
}

impl Backends {
    /// The backends of a service port for processes of this node. `None` if there are none; weir then does not
    /// listen, so that the kernel refuses connections.
    fn of(plan: &PortPlan) -> Option<Self> {
        let node_port = |destination| matches!(destination, Destination::NodePort(_));
        let planned = plan.frontends.iter().find(|planned| node_port(planned.frontend.destination))?;
        let backends = match planned.route.host.target {
            Target::Cluster => &plan.cluster,
            Target::Local => &plan.local,
            Target::Reject | Target::Drop => return None,
        };
        let addresses: Arc<[SocketAddr]> =
            backends.iter().map(|backend| SocketAddr::new(backend.address, backend.port)).collect();
        let affinity = plan.affinity.map(|seconds| Duration::from_secs(seconds.into()));
        (!addresses.is_empty()).then_some(Self { addresses, affinity })
    }
}

/// Changes of NodePorts that came into force.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct NodePortChanges {
    /// Families of which `ports` has all NodePorts.
    everything_of: Vec<Family>,
    /// NodePorts that changed. Removed ones come first, because another Service may have the number now.
    ports: Vec<(LoopbackPort, Option<Backends>)>,
}

impl NodePortChanges {
    /// The changes for relayed families. `everything_of` names the families of which all service ports are in
    /// `changes`.
    pub(crate) fn of<'a>(
        changes: impl IntoIterator<Item = &'a PortDelta>,
        everything_of: &[Family],
        relayed: PerFamily<bool>,
    ) -> Self {
        let (mut gone, mut come) = (Vec::new(), Vec::new());
        for PortDelta { before, after } in changes {
            let is_relayed = |port: &LoopbackPort| *relayed.get(port.family);
            let before = before.as_deref().and_then(LoopbackPort::of).filter(is_relayed);
            let after = after
                .as_deref()
                .and_then(|plan| Some((LoopbackPort::of(plan).filter(is_relayed)?, Backends::of(plan))));
            gone.extend(before.filter(|port| after.as_ref().is_none_or(|(new, _)| new != port)));
            come.extend(after);
        }
        let gone = gone.into_iter().map(|port| (port, None));
        let everything_of = everything_of.iter().copied().filter(|family| *relayed.get(*family)).collect();
        Self { everything_of, ports: gone.chain(come).collect() }
    }

    /// Whether no NodePort changes.
    #[must_use]
    pub(crate) fn is_empty(&self) -> bool {
        self.everything_of.is_empty() && self.ports.is_empty()
    }
}

/// All NodePorts that have backends.
#[derive(Debug, Default)]
pub(crate) struct NodePorts(BTreeMap<LoopbackPort, Backends>);

impl NodePorts {
    /// Applies changes that came into force.
    pub(crate) fn apply(&mut self, changes: NodePortChanges) {
        let NodePortChanges { everything_of, ports } = changes;
        self.0.retain(|port, _| !everything_of.contains(&port.family));
        for (port, backends) in ports {
            match backends {
                Some(backends) => drop(self.0.insert(port, backends)),
                None => drop(self.0.remove(&port)),
            }
        }
    }

    #[must_use]
    pub(crate) fn get(&self, port: LoopbackPort) -> Option<&Backends> {
        self.0.get(&port)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (LoopbackPort, &Backends)> {
        self.0.iter().map(|(port, backends)| (*port, backends))
    }
}
