//! What the operator sets that decides what Services mean on this node.
//!
//! In: the configuration, once at start. Out: read by the model and, through it, by the plan.

use std::net::IpAddr;

use ipnet::IpNet;

use super::{DnsService, PerFamily};

/// How traffic from local pods is told from other traffic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DetectLocal {
    /// By source address in these networks: the first of each family counts.
    ClusterCidr(Vec<IpNet>),
    /// By source address in this Node's podCIDRs: the first of each family counts.
    NodeCidr,
    /// By arrival through the bridge of this name.
    Bridge(String),
    /// By arrival through an interface whose name starts so.
    InterfacePrefix(String),
}

/// Which addresses of the node serve NodePorts (R13 to R15).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodePortSetting {
    /// The node's own address of each family.
    pub primary: bool,
    /// Addresses of the host inside these networks. A family that neither these nor `primary` have an address of serves on
    /// all, loopback ones apart.
    pub networks: Vec<IpNet>,
}

impl NodePortSetting {
    /// Every address of the host but loopback ones.
    pub const ALL: Self = Self { primary: false, networks: Vec::new() };
    /// The node's own address of each family.
    pub const PRIMARY: Self = Self { primary: true, networks: Vec::new() };

    /// Addresses inside these networks.
    #[must_use]
    pub const fn of(networks: Vec<IpNet>) -> Self {
        Self { primary: false, networks }
    }
}

/// Whether processes of this node reach NodePorts on the loopback address of a family, 127.0.0.1 or ::1 (R13, R18).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LoopbackNodePorts {
    /// They do not.
    #[default]
    Never,
    /// Where the sockets' plane serves, to which a loopback address is an address like any other: as in kube-proxy's
    /// iptables mode, nobody asked for it in so many words.
    BySockets,
    /// Whatever plane serves, because it was asked for.
    Always,
}

/// Everything the model and the plan need to be told once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// This node's name, trimmed and in lower case.
    pub node_name: String,
    /// How local pods are told.
    pub detect_local: DetectLocal,
    /// Whether everything sent to a ClusterIP is masqueraded (R7).
    pub masquerade_all: bool,
    /// Which bit of the packet mark asks for masquerading, 0 to 31 (R8).
    pub masquerade_bit: u8,
    /// Where NodePorts answer.
    pub node_port_addresses: NodePortSetting,
    /// Whether processes of this node reach NodePorts on the loopback address of a family (R13, R18).
    pub loopback_node_ports: PerFamily<LoopbackNodePorts>,
    /// Whether `spec.externalIPs` is honoured (R10).
    pub external_ips: bool,
    /// Whether connection tracking lets TCP packets outside the window through, and packet rules with it.
    pub tcp_be_liberal: bool,
    /// The node's address of its family, if the operator names a specific one, whatever the Node says.
    pub bind_address: Option<IpAddr>,
    /// The families served (R17).
    pub families: PerFamily<bool>,
    /// The cluster's DNS Service, where this node answers names in its place.
    pub dns_service: Option<DnsService>,
    /// Networks whose queries are answered besides those of pods.
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
