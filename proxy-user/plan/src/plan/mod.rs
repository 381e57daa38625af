//! Plans: the meaning of Services on this node, as frontends and backends.
//!
//! In: one Service, its endpoints, this node (from `model`). Out: a [`ServicePlan`], and from two of them the
//! [`Delta`] that a data plane applies. Planning is pure: it does not wait, reads no clock and does not touch
//! the kernel.
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

/// The destination address of traffic to a frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub enum Destination {
    /// One address: a ClusterIP, an external IP, or an address of a load balancer.
    Address(IpAddr),
    /// Any address of this node that serves NodePorts (R13, R14).
    NodePort(Family),
}

impl Destination {
    /// The address family.
    #[must_use]
    pub fn family(self) -> Family {
        match self {
            Self::Address(address) => Family::of(address),
            Self::NodePort(family) => family,
        }
    }
}

/// The destination that a client connects to. It is the key of everything in a data plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct Frontend {
    /// The address of the destination.
    pub destination: Destination,
    /// The transport protocol.
    pub protocol: Protocol,
    /// The port of the destination.
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

/// An address and port that a frontend translates to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct Backend {
    /// Address of the endpoint.
    pub address: IpAddr,
    /// Port of the endpoint.
    pub port: u16,
    /// Whether the endpoint is on this node (E1), or may be, because its slice names no node. Such an
    /// endpoint may connect to itself (R9).
    pub local: bool,
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&std::net::SocketAddr::new(self.address, self.port), f)
    }
}

/// The target of a new flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum Target {
    /// Translated to one of [`PortPlan::cluster`], which is not empty.
    Cluster,
    /// Translated to one of [`PortPlan::local`], which is not empty.
    Local,
    /// Refused with an ICMP port unreachable (F1).
    Reject,
    /// Dropped silently (F2, F3).
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

/// The treatment of flows from one class of sources.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Treatment {
    /// The backends, or the refusal.
    pub target: Target,
    /// Whether the backend sees this node's address instead of the client's (R5, R6, R7).
    pub masquerade: bool,
}

/// The treatment of each class of sources: one column of the matrix in R1 to R7.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Route {
    /// Traffic of pods, recognized by [`NodePlan::local_traffic`]. Without a detector pods are not
    /// recognized, and this equals `outside`.
    pub pod: Treatment,
    /// Traffic from an address of this host.
    pub host: Treatment,
    /// All other traffic.
    pub outside: Treatment,
}

impl Route {
    /// A route with the same treatment for all sources.
    #[must_use]
    pub const fn uniform(treatment: Treatment) -> Self {
        Self { pod: treatment, host: treatment, outside: treatment }
    }
}

/// A frontend with its route.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FrontendPlan {
    /// The destination that clients connect to.
    pub frontend: Frontend,
    /// The treatment of their flows.
    pub route: Route,
    /// The allowed sources (F7), merged and sorted, of the frontend's family; `None` allows every client.
    pub allowed_sources: Option<Arc<[IpNet]>>,
    /// Whether weir's DNS server answers in place of the backends, for as long as the address is this host's
    /// own. That is the cluster's DNS Service with `--dns`.
    pub answered_here: bool,
}

impl FrontendPlan {
    /// Whether this client may use the frontend (F7).
    #[must_use]
    pub fn lets_in(&self, client: IpAddr) -> bool {
        self.allowed_sources.as_deref().is_none_or(|sources| {
            let next = sources.partition_point(|source| source.network() <= client);
            sources[..next].last().is_some_and(|source| source.contains(&client))
        })
    }
}

/// Identifies the service port (W6) and family of a [`PortPlan`].
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct PortId {
    /// Namespace and name of the Service.
    #[serde(serialize_with = "as_text")]
    pub service: ObjectName,
    /// The name of the port, empty if it has none.
    pub port: Arc<str>,
    /// The transport protocol.
    pub protocol: Protocol,
    /// The address family.
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

/// A service port in one family: the unit that a data plane switches atomically.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PortPlan {
    /// The service port and family.
    pub id: PortId,
    /// The Cluster set (E6), in the order of slots; see [`PortPlan::keep_slots`]. It has no backend twice,
    /// because slots are keyed by backend, and a repeated backend would be lost at the next change.
    pub cluster: Vec<Backend>,
    /// The Local set (E7), empty if no route uses it.
    pub local: Vec<Backend>,
    /// The frontends of the port, sorted, each once.
    pub frontends: Vec<FrontendPlan>,
    /// The timeout of session affinity in seconds (A1); `None` without session affinity.
    pub affinity: Option<u32>,
    /// The fate of sockets after their backend stopped serving. For UDP always an immediate reset, because
    /// UDP clients would not notice (K2).
    pub on_removal: Removal,
    /// Every serving or ready endpoint on any node, sorted. UDP flows and sockets to any other backend are
    /// stale (K2). Empty if [`PortPlan::on_removal`] keeps them, because then it is not needed.
    pub serving: Vec<Backend>,
}

impl PortPlan {
    /// Whether UDP flows and sockets of this port may stay with an endpoint (K2).
    #[must_use]
    pub fn serves(&self, address: IpAddr, port: u16) -> bool {
        let key = |backend: &Backend| (backend.address, backend.port);
        self.serving.binary_search_by_key(&(address, port), key).is_ok()
    }

    /// The backends of one set, in the order of their slots.
    #[must_use]
    pub fn backends(&self, set: BackendSet) -> &[Backend] {
        match set {
            BackendSet::Cluster => &self.cluster,
            BackendSet::Local => &self.local,
        }
    }

    /// The plan of a frontend, if the port has it.
    #[must_use]
    pub fn frontend(&self, frontend: Frontend) -> Option<&FrontendPlan> {
        let index = self.frontends.binary_search_by_key(&frontend, |planned| planned.frontend).ok()?;
        self.frontends.get(index)
    }
}

/// The answer of a Service's healthCheckNodePort (H1, H2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct HealthCheck {
    /// The port to listen on.
    pub port: u16,
    /// The number of distinct addresses of local ready endpoints.
    pub local_endpoints: usize,
}

/// The meaning of one Service on this node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ServicePlan {
    /// The Service's ClusterIPs. Traffic to other ports of these addresses is refused (F4).
    pub cluster_ips: Vec<IpAddr>,
    /// The ports, sorted by id.
    pub ports: Vec<Arc<PortPlan>>,
    /// The health check, if the Service has one.
    pub health_check: Option<HealthCheck>,
    /// When the Service was created, in seconds since 1970. The older Service wins a conflict (R12).
    #[serde(skip)]
    pub created: i64,
    /// The load balancer's addresses, sorted. They rank above external IPs in a conflict (R12).
    #[serde(skip)]
    pub load_balancer_ips: Box<[IpAddr]>,
    /// The number of frontends beyond [`MOST_FRONTENDS`], which are not served.
    #[serde(skip)]
    pub unserved: usize,
}

/// The addresses of this node that serve NodePorts (R13, R14).
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum NodePortAddresses {
    /// Every address of this host but loopback ones.
    AnyLocal,
    /// These addresses only.
    Only(Vec<IpAddr>),
}

/// The part of the plan that belongs to the node and to no Service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NodePlan {
    /// How traffic of pods is recognized; `None` if it cannot be.
    pub local_traffic: PerFamily<Option<LocalTraffic>>,
    /// The addresses that serve NodePorts.
    pub node_port_addresses: PerFamily<NodePortAddresses>,
    /// Whether NodePorts answer processes of this node on 127.0.0.1 or ::1 (R13), as far as a plane can do
    /// that.
    pub loopback_node_ports: PerFamily<bool>,
    /// This host's addresses of both families, sorted, without loopback addresses and without IPv6 link-local
    /// addresses that no setting names.
    pub host_addresses: Vec<IpAddr>,
    /// The bit of the packet mark that requests masquerading (R8).
    pub masquerade_mark: u32,
    /// Networks of ClusterIPs. Traffic to an address in them that no Service has is dropped (F5).
    pub service_cidrs: Vec<IpNet>,
    /// Whether a frontend may have [`FrontendPlan::answered_here`].
    pub answers_names: bool,
    /// The DNS clients that weir answers, besides this host; `None` means all.
    pub name_clients: Option<NameClients>,
    /// Whether TCP packets outside the window are dropped on their way to and from pods.
    pub drops_out_of_window: bool,
}

/// The change of one service port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortDelta {
    /// The plan that the data plane applied last. `None` if there is none, or if the data plane refused the
    /// port in a complete delta.
    pub before: Option<Arc<PortPlan>>,
    /// The plan to apply.
    pub after: Option<Arc<PortPlan>>,
}

/// The change of one ClusterIP (F4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClusterIpDelta {
    /// A Service has it now.
    Add(IpAddr),
    /// No Service has it any more.
    Remove(IpAddr),
}

/// The changes for a data plane to apply.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Delta {
    /// The node's part, if it changed.
    pub node: Option<Arc<NodePlan>>,
    /// ClusterIPs that are new or gone.
    pub cluster_ips: Vec<ClusterIpDelta>,
    /// Service ports that change. Each is applied as a whole or not at all. If `before` and `after` are
    /// equal, the socket plane, if it left the port to nftables, tries again.
    pub ports: Vec<PortDelta>,
    /// Whether this delta names everything that should exist, so that the data plane removes everything else.
    pub complete: bool,
}
