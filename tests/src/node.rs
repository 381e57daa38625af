//! Two nodes with two pods each, a client outside the cluster and the router that joins them, all dual-stack.
//!
//! In: nothing. Out: a [`Topology`]; its addresses follow from the numbering alone.
//!
//! ```text
//! pod 1/1 ─┐                                            ┌─ pod 2/1
//!          ├─ node 1 ── bridge of the router ── node 2 ─┤
//! pod 1/2 ─┘                     │                      └─ pod 2/2
//!                             outside
//! ```
//! Nodes reach each other's pods by routes. All other traffic of a node goes to the router, which answers on the
//! external and load balancer addresses itself: traffic no proxy captured is seen there.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    process::{Child, Command},
};

use anyhow::Result;
use weir::model::Family;

use crate::{bpffs::BpfFs, cgroup::Cgroup, netns::Namespace, process::end};

/// How many addresses the outside client may use as source.
pub const OUTSIDE_CLIENTS: u8 = 16;

/// Somewhere traffic starts, or a backend answers. Nodes and pods are numbered from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Location {
    /// A pod: its node, and its number there.
    Pod(u8, u8),
    Host(u8),
    /// The client outside the cluster, with one of [`OUTSIDE_CLIENTS`] source addresses.
    Outside(u8),
    Router,
}

impl Location {
    pub const PODS: [Self; 4] = [Self::Pod(1, 1), Self::Pod(1, 2), Self::Pod(2, 1), Self::Pod(2, 2)];

    /// The source address clients use here. On a node it is the second address, which masquerading never picks.
    #[must_use]
    pub fn client_address(self, family: Family) -> IpAddr {
        match self {
            Self::Pod(node, pod) => pod_address(family, node, pod),
            Self::Host(node) => second_node_address(family, node),
            Self::Outside(client) => link(family, 100 + u16::from(client)),
            Self::Router => link(family, 1),
        }
    }

    /// The address servers here listen on; the router's take whatever is routed to them.
    #[must_use]
    pub fn server_address(self, family: Family) -> IpAddr {
        match (self, family) {
            (Self::Host(node), _) => node_address(family, node),
            (Self::Router, Family::V4) => Ipv4Addr::UNSPECIFIED.into(),
            (Self::Router, Family::V6) => Ipv6Addr::UNSPECIFIED.into(),
            _ => self.client_address(family),
        }
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pod(node, pod) => write!(f, "pod-{node}-{pod}"),
            Self::Host(node) => write!(f, "node-{node}"),
            Self::Outside(client) => write!(f, "outside-{client}"),
            Self::Router => f.write_str("router"),
        }
    }
}

/// The name of a node in Kubernetes.
#[must_use]
pub fn node_name(node: u8) -> String {
    format!("node-{node}")
}

fn link(family: Family, host: u16) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(192, 168, 77, host as u8).into(),
        // Written so that the IPv6 address reads like the IPv4 one.
        Family::V6 => format!("fd00:192:168:77::{host}").parse().unwrap_or(Ipv6Addr::UNSPECIFIED.into()),
    }
}

/// A node's own address, the one its Node object names.
#[must_use]
pub fn node_address(family: Family, node: u8) -> IpAddr {
    link(family, 10 + u16::from(node))
}

/// A node's second address, which no Node object names.
#[must_use]
pub fn second_node_address(family: Family, node: u8) -> IpAddr {
    link(family, 20 + u16::from(node))
}

#[must_use]
pub fn pod_address(family: Family, node: u8, pod: u8) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(10, 244, node, 10 + pod).into(),
        Family::V6 => Ipv6Addr::new(0xfd00, 0x10, 0x244, node.into(), 0, 0, 0, 0x10 + u16::from(pod)).into(),
    }
}

/// The address a node has on the link to each of its pods: what a local pod sees of a masqueraded client.
#[must_use]
pub fn pod_gateway(family: Family, node: u8) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(10, 244, node, 1).into(),
        Family::V6 => Ipv6Addr::new(0xfd00, 0x10, 0x244, node.into(), 0, 0, 0, 1).into(),
    }
}

/// Every address of a node.
#[must_use]
pub fn node_addresses(family: Family, node: u8) -> [IpAddr; 3] {
    [node_address(family, node), second_node_address(family, node), pod_gateway(family, node)]
}

/// The pods of the cluster, as kube-proxy's `clusterCIDR` wants them.
pub const CLUSTER_CIDRS: [&str; 2] = ["10.244.0.0/16", "fd00:10:244::/48"];
pub const SERVICE_CIDRS: [&str; 2] = ["10.96.0.0/16", "fd00:10:96::/112"];
/// External addresses of Services, routed to node 1 from outside.
pub const EXTERNAL_CIDRS: [&str; 2] = ["192.0.2.0/24", "2001:db8:1::/64"];
/// Load balancer addresses of Services, routed to node 1 from outside.
pub const BALANCER_CIDRS: [&str; 2] = ["198.51.100.0/24", "2001:db8:2::/64"];

/// The process that every pod has from its beginning to its end, and that agents find the pod's namespace by.
#[derive(Debug)]
struct Pause(Child);

impl Pause {
    fn within(pod: &Namespace) -> Result<Self> {
        let forever = |sleep: &mut Command| {
            sleep.arg("infinity");
        };
        Ok(Self(pod.spawn(Path::new("sleep"), forever)?))
    }
}

impl Drop for Pause {
    fn drop(&mut self) {
        end(&mut self.0);
    }
}

/// A directory that no machine has, for agents that get none.
const NOWHERE: &str = "/nonexistent";

fn child(parent: Option<&Cgroup>, label: &str) -> Result<Option<Cgroup>> {
    parent.map(|parent| parent.child(label)).transpose()
}

fn within(cgroup: Option<&Cgroup>, label: &str) -> Result<Namespace> {
    cgroup.map_or_else(|| Namespace::new(label), |cgroup| Namespace::within(cgroup, label))
}

/// The namespaces, wired up.
#[derive(Debug)]
pub struct Topology {
    /// Before the namespaces and groups: nothing is left in those when they go.
    pauses: Vec<Pause>,
    /// The router; also where the API server runs, since both nodes reach it.
    pub router: Namespace,
    pub nodes: [Namespace; 2],
    /// The pods: `pods[node][pod]`, counted from 0.
    pub pods: [[Namespace; 2]; 2],
    /// The client outside the cluster.
    pub outside: Namespace,
    /// The control groups of the two nodes: their pods' are below.
    cgroups: [Option<Cgroup>; 2],
    bpffs: Option<BpfFs>,
}

impl Topology {
    /// Builds everything. Dropping the value removes it all.
    ///
    /// # Errors
    ///
    /// Without the privilege to make network namespaces, or without `ip` (iproute2).
    pub fn new() -> Result<Self> {
        Self::wired(Some(&Cgroup::new("topology")?), Some(BpfFs::new()?))
    }

    /// [`Topology::new`] without control groups and without a BPF file system: there is no socket plane here.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn without_sockets() -> Result<Self> {
        Self::wired(None, None)
    }

    fn wired(all: Option<&Cgroup>, bpffs: Option<BpfFs>) -> Result<Self> {
        let cgroups = [child(all, "node-1")?, child(all, "node-2")?];
        let [first, second] = [cgroups[0].as_ref(), cgroups[1].as_ref()];
        let in_own_group = |parent, label| within(child(parent, label)?.as_ref(), label);
        let mut topology = Self {
            pauses: Vec::new(),
            router: in_own_group(all, "router")?,
            nodes: [within(first, "node-1")?, within(second, "node-2")?],
            pods: [
                [in_own_group(first, "pod-1-1")?, in_own_group(first, "pod-1-2")?],
                [in_own_group(second, "pod-2-1")?, in_own_group(second, "pod-2-2")?],
            ],
            outside: in_own_group(all, "outside")?,
            cgroups,
            bpffs,
        };
        topology.wire_router()?;
        for node in [1, 2] {
            topology.wire_node(node)?;
            for pod in [1, 2] {
                topology.wire_pod(node, pod)?;
            }
        }
        topology.wire_outside()?;
        topology.pauses =
            Location::PODS.map(|pod| Pause::within(topology.at(pod))).into_iter().collect::<Result<_>>()?;
        Ok(topology)
    }

    /// The namespace of a location.
    #[must_use]
    pub fn at(&self, location: Location) -> &Namespace {
        match location {
            Location::Pod(node, pod) => &self.pods[usize::from(node) - 1][usize::from(pod) - 1],
            Location::Host(node) => &self.nodes[usize::from(node) - 1],
            Location::Outside(_) => &self.outside,
            Location::Router => &self.router,
        }
    }

    /// The control group of a node, its pods included: weir's `--cgroup-root` there.
    #[must_use]
    pub fn cgroup_root(&self, node: u8) -> &Path {
        self.cgroups[usize::from(node) - 1].as_ref().map_or(Path::new(NOWHERE), Cgroup::path)
    }

    /// A node's directory of a BPF file system: weir's `--bpf-root` there.
    ///
    /// # Errors
    ///
    /// When it cannot be made.
    pub fn bpf_root(&self, node: u8) -> Result<PathBuf> {
        self.bpffs.as_ref().map_or(Ok(NOWHERE.into()), |bpffs| bpffs.directory(&node_name(node)))
    }

    /// Names every namespace `PREFIX-…` for `ip netns exec`.
    ///
    /// # Errors
    ///
    /// When a name is taken.
    pub fn publish(&mut self, prefix: &str) -> Result<()> {
        for namespace in self.all() {
            let name = format!("{prefix}-{}", namespace.label());
            namespace.publish(&name)?;
        }
        Ok(())
    }

    fn all(&mut self) -> impl Iterator<Item = &mut Namespace> {
        let fixed = [&mut self.router, &mut self.outside];
        fixed.into_iter().chain(&mut self.nodes).chain(self.pods.iter_mut().flatten())
    }

    fn wire_router(&self) -> Result<()> {
        let mut lines = vec![
            "link add br0 type bridge mcast_snooping 0 forward_delay 0".to_owned(),
            "link set br0 up".to_owned(),
        ];
        lines.extend(Family::ALL.map(|family| add_address(link(family, 1), on_link(family), "br0", "")));
        for (family, node) in Family::ALL.into_iter().flat_map(|family| [(family, 1), (family, 2)]) {
            lines.push(format!("route add {} via {}", pod_network(family, node), node_address(family, node)));
        }
        for cidr in EXTERNAL_CIDRS.iter().chain(&BALANCER_CIDRS) {
            lines.push(format!("route add local {cidr} dev lo"));
        }
        let ends = [("node1", &self.nodes[0]), ("node2", &self.nodes[1]), ("outside", &self.outside)];
        for (port, other) in ends {
            lines.push(format!("link add {port} type veth peer name eth0 netns {}", other.path()));
            lines.push(format!("link set {port} master br0 up"));
        }
        self.router.ip(&lines)
    }

    fn wire_node(&self, node: u8) -> Result<()> {
        let mut lines = vec!["link set eth0 up".to_owned()];
        for family in Family::ALL {
            lines.push(add_address(node_address(family, node), on_link(family), "eth0", ""));
            lines.push(add_address(
                second_node_address(family, node),
                on_link(family),
                "eth0",
                "preferred_lft 0",
            ));
            lines.push(format!("route add default via {}", link(family, 1)));
            let other = 3 - node;
            lines.push(format!(
                "route add {} via {}",
                pod_network(family, other),
                node_address(family, other)
            ));
        }
        for pod in [1, 2] {
            let path = self.at(Location::Pod(node, pod)).path();
            lines.push(format!("link add pod{pod} type veth peer name eth0 netns {path}"));
            lines.push(format!("link set pod{pod} up"));
            for family in Family::ALL {
                let gateway = pod_gateway(family, node);
                lines.push(add_address(gateway, single(family), &format!("pod{pod}"), ""));
                lines.push(format!("route add {} dev pod{pod}", pod_address(family, node, pod)));
            }
        }
        self.at(Location::Host(node)).ip(&lines)
    }

    fn wire_pod(&self, node: u8, pod: u8) -> Result<()> {
        let mut lines = vec!["link set eth0 up".to_owned()];
        for family in Family::ALL {
            let gateway = pod_gateway(family, node);
            lines.push(add_address(pod_address(family, node, pod), single(family), "eth0", ""));
            lines.push(format!("route add {gateway} dev eth0"));
            lines.push(format!("route add default via {gateway}"));
        }
        self.at(Location::Pod(node, pod)).ip(&lines)
    }

    fn wire_outside(&self) -> Result<()> {
        let mut lines = vec!["link set eth0 up".to_owned()];
        for (index, family) in Family::ALL.into_iter().enumerate() {
            for client in 0..OUTSIDE_CLIENTS {
                let lifetime = if client == 0 { "" } else { "preferred_lft 0" };
                let address = Location::Outside(client).client_address(family);
                lines.push(add_address(address, on_link(family), "eth0", lifetime));
            }
            for node in [1, 2] {
                lines.push(format!(
                    "route add {} via {}",
                    pod_network(family, node),
                    node_address(family, node)
                ));
            }
            for cidr in [SERVICE_CIDRS[index], EXTERNAL_CIDRS[index], BALANCER_CIDRS[index]] {
                lines.push(format!("route add {cidr} via {}", node_address(family, 1)));
            }
        }
        self.outside.ip(&lines)
    }
}

fn pod_network(family: Family, node: u8) -> String {
    match family {
        Family::V4 => format!("10.244.{node}.0/24"),
        Family::V6 => format!("fd00:10:244:{node}::/64"),
    }
}

fn on_link(family: Family) -> u8 {
    match family {
        Family::V4 => 24,
        Family::V6 => 64,
    }
}

fn single(family: Family) -> u8 {
    match family {
        Family::V4 => 32,
        Family::V6 => 128,
    }
}

/// A line for `ip`; `lifetime` is for IPv6 addresses that should not be chosen as source by themselves.
fn add_address(address: IpAddr, prefix: u8, device: &str, lifetime: &str) -> String {
    match address {
        IpAddr::V4(_) => format!("addr add {address}/{prefix} dev {device}"),
        IpAddr::V6(_) => format!("addr add {address}/{prefix} dev {device} nodad {lifetime}"),
    }
}
