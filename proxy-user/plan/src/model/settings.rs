//! The operator's settings that decide what Services mean on this node.
//!
//! In: the configuration, once at start. Out: [`Settings`], which the model and the plan read.

use std::net::IpAddr;

use ipnet::IpNet;

use super::{DnsService, PerFamily};

/// How traffic of local pods is recognized.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DetectLocal {
    /// By a source address in these networks. Only the first of each family counts.
    ClusterCidr(Vec<IpNet>),
    /// By a source address in this Node's podCIDRs. Only the first of each family counts.
    NodeCidr,
    /// By arrival through this bridge.
    Bridge(String),
    /// By arrival through an interface with this prefix of its name.
    InterfacePrefix(String),
}

/// The addresses of the node that serve NodePorts (R13 to R15).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodePortSetting {
    /// Whether the node's own address of each family serves.
    pub primary: bool,
    /// The host's addresses in these networks serve too. If neither `primary` nor `networks` yield an address
    /// of a family, all its addresses but loopback ones serve.
    pub networks: Vec<IpNet>,
}

impl NodePortSetting {
    /// Every address of the host but loopback ones.
    pub const ALL: Self = Self { primary: false, networks: Vec::new() };
    /// The node's own address of each family.
    pub const PRIMARY: Self = Self { primary: true, networks: Vec::new() };

    /// The host's addresses in these networks.
    #[must_use]
    pub const fn of(networks: Vec<IpNet>) -> Self {
        Self { primary: false, networks }
    }
}

/// Whether NodePorts answer processes of this node on 127.0.0.1 or ::1 (R13, R18).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LoopbackNodePorts {
    /// They do not.
    #[default]
    Never,
    /// Only with the socket plane, as in kube-proxy's iptables mode: the operator did not ask for it, and the
    /// socket plane treats a loopback address like any other.
    SocketPlaneOnly,
    /// With any plane, because the operator asked for it.
    Always,
}

/// All settings of the model and the plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// This node's name, trimmed and in lower case.
    pub node_name: String,
    /// How traffic of local pods is recognized.
    pub detect_local: DetectLocal,
    /// Whether all traffic to ClusterIPs is masqueraded (R7).
    pub masquerade_all: bool,
    /// The bit of the packet mark that requests masquerading, 0 to 31 (R8).
    pub masquerade_bit: u8,
    /// The addresses at which NodePorts answer.
    pub node_port_addresses: NodePortSetting,
    /// Whether NodePorts answer processes of this node on loopback addresses (R13, R18).
    pub loopback_node_ports: PerFamily<LoopbackNodePorts>,
    /// Whether `spec.externalIPs` is served (R10).
    pub external_ips: bool,
    /// Whether conntrack, and with it weir's rules, accepts TCP packets outside the window.
    pub tcp_be_liberal: bool,
    /// The node's address of its family, if the operator set one. It overrides the Node.
    pub bind_address: Option<IpAddr>,
    /// The families that weir serves (R17).
    pub families: PerFamily<bool>,
    /// The cluster's DNS Service, if weir answers in its place.
    pub dns_service: Option<DnsService>,
    /// Networks of further DNS clients besides pods.
    pub dns_clients: Vec<IpNet>,
}

impl Default for Settings {
    /// kube-proxy's defaults for its nftables mode, for a node without a name.
    fn default() -> Self {
        Self {
            node_name: String::new(),
            detect_local: DetectLocal::ClusterCidr(Vec::new()),
            masquerade_all: false,
            masquerade_bit: 14,
            node_port_addresses: NodePortSetting::PRIMARY,
            loopback_node_ports: PerFamily::default(),
            external_ips: true,
            tcp_be_liberal: false,
            bind_address: None,
            families: PerFamily { v4: true, v6: true },
            dns_service: None,
            dns_clients: Vec::new(),
        }
    }
}
