//! What Services mean on this node, in frontends and backends.
//!
//! In: one Service, its endpoints, this node (from `model`). Out: a [`ServicePlan`], and from two of them the [`Delta`]
//! a data plane applies. Planning is pure: nothing here waits, reads a clock or touches the kernel.
//!
//! ```text
//! (service, endpoints, node) ──plan_service──▶ ServicePlan ──Delta──▶ dataplane
//!                                              └ PortPlan: one service port in one family
//!                                                  ├ cluster, local: the two backend sets (E6, E7)
//!                                                  └ frontends: address:port/protocol → Route
//! ```

use std::{fmt, net::IpAddr, sync::Arc};

use ipnet::IpNet;
use serde::Serialize;

use crate::model::{Family, NameClients, ObjectName, PerFamily, Protocol};
pub use crate::model::{LocalTraffic, Removal};

mod claims;
mod delta;
mod frontend;
mod node;
mod planner;
#[cfg(test)]
mod tests;
mod topology;

pub use claims::{Conflict, Precedence};
pub use frontend::{MOST_FRONTENDS, plan_service};
pub use planner::{NoLocalEndpoints, Planner};

/// Where traffic for a frontend is addressed to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub enum Destination {
    /// Exactly this address: a ClusterIP, an external IP, a load balancer's VIP.
    Address(IpAddr),
    /// Any address of this node that serves NodePorts (R13, R14).
    NodePort(Family),
}

impl Destination {
    /// The family the destination belongs to.
    #[must_use]
    pub fn family(self) -> Family {
        match self {
            Self::Address(address) => Family::of(address),
            Self::NodePort(family) => family,
        }
    }
}

/// What a client asks for: the key of everything a data plane holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct Frontend {
    /// The address part.
    pub destination: Destination,
    /// The protocol.
    pub protocol: Protocol,
    /// The port.
    pub port: u16,
}

impl fmt::Display for Frontend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.destination {
            Destination::Address(IpAddr::V4(address)) => write!(f, "{address}")?,
            Destination::Address(IpAddr::V6(address)) => write!(f, "[{address}]")?,
            Destination::NodePort(Family::V4) => f.write_str("node")?,
            Destination::NodePort(Family::V6) => f.write_str("[node]")?,
        }
        write!(f, ":{}/{}", self.port, self.protocol)
    }
}

/// One address and port that serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct Backend {
    /// The endpoint's address.
    pub address: IpAddr,
    /// The endpoint's port.
    pub port: u16,
    /// Whether the endpoint is on this node (E1), or may be because nothing says which node it is on. Such a one may be its own
    /// client (R9).
    pub local: bool,
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&std::net::SocketAddr::new(self.address, self.port), f)
    }
}

/// What happens to a new flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum Target {
    /// One of [`PortPlan::cluster`], which is not empty.
    Cluster,
    /// One of [`PortPlan::local`], which is not empty.
    Local,
    /// Refused with an ICMP port unreachable (F1).
    Reject,
    /// Dropped without a word (F2, F3).
    Drop,
}

impl Target {
    /// The backend set that new flows go to, if they go to one.
    #[must_use]
    pub const fn backends(self) -> Option<BackendSet> {
        match self {
            Self::Cluster => Some(BackendSet::Cluster),
            Self::Local => Some(BackendSet::Local),
            Self::Reject | Self::Drop => None,
        }
    }
}

/// One of the two backend sets of a service port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum BackendSet {
    /// [`PortPlan::cluster`] (E6).
    Cluster,
    /// [`PortPlan::local`] (E7).
    Local,
}

impl BackendSet {
    /// Both sets, in their order.
    pub const ALL: [Self; 2] = [Self::Cluster, Self::Local];
}

/// What one class of sources gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Treatment {
    /// Where the flow goes.
    pub target: Target,
    /// Whether the backend sees this node's address instead of the client's (R5, R6, R7).
    pub masquerade: bool,
}

/// What a frontend does for each class of sources: one column of the matrix in R1 to R7.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Route {
    /// For pods, as [`NodePlan::local_traffic`] tells them. Without a detector there is no such class: equal to
    /// `outside`.
    pub pod: Treatment,
    /// For sources that are an address of this host.
    pub host: Treatment,
    /// For everything else.
    pub outside: Treatment,
}

impl Route {
    /// The same treatment whatever the source.
    #[must_use]
    pub const fn uniform(treatment: Treatment) -> Self {
        Self { pod: treatment, host: treatment, outside: treatment }
    }
}

/// A frontend with its route.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FrontendPlan {
    /// What clients ask for.
    pub frontend: Frontend,
    /// What they get.
    pub route: Route,
    /// The only sources let in (F7), merged and sorted, of the frontend's family; `None` lets everybody in.
    pub allowed_sources: Option<Arc<[IpNet]>>,
    /// Whether a process of this node answers in place of the backends for as long as the address is this host's own:
    /// the cluster's DNS, where the node answers names.
    pub answered_here: bool,
}

impl FrontendPlan {
    /// Whether the frontend is for clients with this address (F7).
    #[must_use]
    pub fn lets_in(&self, client: IpAddr) -> bool {
        self.allowed_sources.as_deref().is_none_or(|sources| {
            let next = sources.partition_point(|source| source.network() <= client);
            sources[..next].last().is_some_and(|source| source.contains(&client))
        })
    }
}

/// Which service port a [`PortPlan`] is for (W6), in which family.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct PortId {
    /// The Service.
    #[serde(serialize_with = "as_text")]
    pub service: ObjectName,
    /// The port's name, empty when it has none.
    pub port: Arc<str>,
    /// The port's protocol.
    pub protocol: Protocol,
    /// The family.
    pub family: Family,
}

fn as_text<S: serde::Serializer>(name: &ObjectName, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(name)
}

impl fmt::Display for PortId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { service, port, protocol, family } = self;
        let colon = if port.is_empty() { "" } else { ":" };
        write!(f, "{service}{colon}{port}/{protocol} ({family})")
    }
}

/// One service port in one family: the unit that a data plane switches atomically.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PortPlan {
    /// Which service port this is.
    pub id: PortId,
    /// The Cluster set (E6). Its order is the order of slots; see [`PortPlan::settle`]. No backend is in it twice, because
    /// slots are keyed by backend there: a repeated one would be lost at the next change.
    pub cluster: Vec<Backend>,
    /// The Local set (E7), empty when no route uses it.
    pub local: Vec<Backend>,
    /// Every frontend of the port, sorted, no frontend twice.
    pub frontends: Vec<FrontendPlan>,
    /// How long a client stays with its backend, in seconds (A1); `None` without session affinity.
    pub affinity: Option<u32>,
    /// What becomes of sockets that were led to a backend which stopped serving. For UDP always a reset at once,
    /// because its clients would not notice (K2).
    pub on_removal: Removal,
    /// Every endpoint on any node that is serving or ready, sorted: UDP flows and sockets to anything else are stale (K2). Empty where
    /// [`PortPlan::on_removal`] keeps them, since nobody asks then.
    pub serving: Vec<Backend>,
}

impl PortPlan {
    /// The backends of one set, in the order of their slots.
    #[must_use]
    pub fn backends(&self, set: BackendSet) -> &[Backend] {
        match set {
            BackendSet::Cluster => &self.cluster,
            BackendSet::Local => &self.local,
        }
    }

    /// What the port does with a frontend, if it has it.
    #[must_use]
    pub fn frontend(&self, frontend: Frontend) -> Option<&FrontendPlan> {
        let index = self.frontends.binary_search_by_key(&frontend, |planned| planned.frontend).ok()?;
        self.frontends.get(index)
    }
}

/// What a Service's healthCheckNodePort answers (H1, H2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct HealthCheck {
    /// The port listened on.
    pub port: u16,
    /// Distinct addresses of local ready endpoints.
    pub local_endpoints: usize,
}

/// Everything one Service means on this node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ServicePlan {
    /// The Service's active ClusterIPs: whatever is not served on them is refused (F4).
    pub cluster_ips: Vec<IpAddr>,
    /// The ports, sorted by id.
    pub ports: Vec<Arc<PortPlan>>,
    /// The health check, if the Service has one.
    pub health_check: Option<HealthCheck>,
    /// When the Service was created, in seconds since 1970: of two that claim one frontend the older has it (R12).
    #[serde(skip)]
    pub created: i64,
    /// The load balancer's addresses, sorted: of two that claim one frontend it counts what the address is to them (R12).
    #[serde(skip)]
    pub load_balancer_ips: Box<[IpAddr]>,
    /// How many frontends the Service has beyond [`MOST_FRONTENDS`], which are not served.
    #[serde(skip)]
    pub beyond: usize,
}

/// Which addresses of this node serve NodePorts (R13, R14).
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum NodePortAddresses {
    /// Every address of this host but loopback ones.
    AnyLocal,
    /// Exactly these.
    Only(Vec<IpAddr>),
}

/// What holds for the whole node rather than for one Service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NodePlan {
    /// How pods are told; `None` when there is no way to tell.
    pub local_traffic: PerFamily<Option<LocalTraffic>>,
    /// Where NodePorts answer.
    pub node_port_addresses: PerFamily<NodePortAddresses>,
    /// Whether processes of this node reach NodePorts on 127.0.0.1 or ::1 (R13), where a plane can do that.
    pub loopback_node_ports: PerFamily<bool>,
    /// This host's own addresses of both families, sorted, without loopback ones and without those IPv6 link-local ones
    /// that no setting names.
    pub host_addresses: Vec<IpAddr>,
    /// The packet mark that asks for masquerading (R8), one bit.
    pub masquerade_mark: u32,
    /// Addresses in these that are no known ClusterIP are dropped (F5).
    pub service_cidrs: Vec<IpNet>,
    /// Whether frontends may be answered here.
    pub answers_names: bool,
    /// For whom, besides this host; `None` for all.
    pub name_clients: Option<NameClients>,
    /// Whether TCP packets that fit no connection do not reach pods, nor what pods speak to.
    pub drops_out_of_window: bool,
}

/// How one service port changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortDelta {
    /// What the data plane was last given for it, refusals left out; `None` also when it refused a complete delta's.
    pub before: Option<Arc<PortPlan>>,
    /// What it should hold now.
    pub after: Option<Arc<PortPlan>>,
}

/// How one ClusterIP becomes known or forgotten (F4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClusterIpDelta {
    /// Now a Service's.
    Add(IpAddr),
    /// No Service's any more.
    Remove(IpAddr),
}

/// What a data plane is to make true.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Delta {
    /// The node-wide part, when it changed.
    pub node: Option<Arc<NodePlan>>,
    /// ClusterIPs that come and go.
    pub cluster_ips: Vec<ClusterIpDelta>,
    /// Service ports that change. Each is applied whole or not at all. One whose two sides are the same asks for nothing
    /// new: a plane that has left it to another one tries again.
    pub ports: Vec<PortDelta>,
    /// Whether this names everything that should exist: what the data plane holds beyond it is to go.
    pub complete: bool,
}
