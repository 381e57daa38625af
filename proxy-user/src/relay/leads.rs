//! Which NodePorts lead where, for processes of this node.
//!
//! In: service ports as they are in force. Out: [`News`] for what listens, and [`Leads`], which keeps them.

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
pub struct Port {
    /// Of which address.
    pub family: Family,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// The number.
    pub number: u16,
}

impl Port {
    /// Where it is listened on.
    #[must_use]
    pub fn address(self) -> SocketAddr {
        let loopback: IpAddr = match self.family {
            Family::V4 => Ipv4Addr::LOCALHOST.into(),
            Family::V6 => Ipv6Addr::LOCALHOST.into(),
        };
        SocketAddr::new(loopback, self.number)
    }

    /// The NodePort of a service port, if sockets can have it.
    fn of(plan: &PortPlan) -> Option<Self> {
        let frontends = plan.frontends.iter().map(|planned| planned.frontend);
        let frontend = frontends.into_iter().find(|it| matches!(it.destination, Destination::NodePort(_)))?;
        let protocol = Some(frontend.protocol).filter(|protocol| *protocol != Protocol::Sctp)?;
        Some(Self { family: frontend.destination.family(), protocol, number: frontend.port })
    }
}

/// Where a NodePort leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lead {
    /// One of these; there is one.
    pub backends: Arc<[SocketAddr]>,
    /// How long a client stays with its backend.
    pub affinity: Option<Duration>,
}

impl Lead {
    /// Where a service port leads processes of this node. A NodePort that leads nowhere is not listened on, so that the
    /// kernel refuses in its place.
    fn of(plan: &PortPlan) -> Option<Self> {
        let node_port = |destination| matches!(destination, Destination::NodePort(_));
        let planned = plan.frontends.iter().find(|planned| node_port(planned.frontend.destination))?;
        let backends = match planned.route.host.target {
            Target::Cluster => &plan.cluster,
            Target::Local => &plan.local,
            Target::Reject | Target::Drop => return None,
        };
        let backends: Arc<[SocketAddr]> =
            backends.iter().map(|backend| SocketAddr::new(backend.address, backend.port)).collect();
        let affinity = plan.affinity.map(|seconds| Duration::from_secs(seconds.into()));
        (!backends.is_empty()).then_some(Self { backends, affinity })
    }
}

/// What came into force.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct News {
    /// Families of which this says everything.
    everything_of: Vec<Family>,
    /// NodePorts that changed; nowhere first, because another Service may have the number now.
    ports: Vec<(Port, Option<Lead>)>,
}

impl News {
    /// What follows from these changes for the families that are relayed. `everything_of` names those of which all service
    /// ports are among the changes.
    pub fn of<'a>(
        changes: impl IntoIterator<Item = &'a PortDelta>,
        everything_of: &[Family],
        relayed: PerFamily<bool>,
    ) -> Self {
        let (mut gone, mut come) = (Vec::new(), Vec::new());
        for PortDelta { before, after } in changes {
            let is_relayed = |port: &Port| *relayed.get(port.family);
            let before = before.as_deref().and_then(Port::of).filter(is_relayed);
            let after =
                after.as_deref().and_then(|plan| Some((Port::of(plan).filter(is_relayed)?, Lead::of(plan))));
            gone.extend(before.filter(|port| after.as_ref().is_none_or(|(new, _)| new != port)));
            come.extend(after);
        }
        let gone = gone.into_iter().map(|port| (port, None));
        let everything_of = everything_of.iter().copied().filter(|family| *relayed.get(*family)).collect();
        Self { everything_of, ports: gone.chain(come).collect() }
    }

    /// Whether there is nothing in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.everything_of.is_empty() && self.ports.is_empty()
    }
}

/// All NodePorts that lead somewhere.
#[derive(Debug, Default)]
pub struct Leads(BTreeMap<Port, Lead>);

impl Leads {
    /// Takes news in.
    pub fn take_in(&mut self, news: News) {
        let News { everything_of, ports } = news;
        self.0.retain(|port, _| !everything_of.contains(&port.family));
        for (port, lead) in ports {
            match lead {
                Some(lead) => drop(self.0.insert(port, lead)),
                None => drop(self.0.remove(&port)),
            }
        }
    }

    /// Where a NodePort leads.
    #[must_use]
    pub fn get(&self, port: Port) -> Option<&Lead> {
        self.0.get(&port)
    }

    /// Each of them.
    pub fn iter(&self) -> impl Iterator<Item = (Port, &Lead)> {
        self.0.iter().map(|(port, lead)| (*port, lead))
    }
}
