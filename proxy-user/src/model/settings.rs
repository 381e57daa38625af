//! What the operator sets that decides what Services mean on this node.
//!
//! In: the configuration, once at start. Out: read by the model and, through it, by the plan.

use std::net::IpAddr;

use ipnet::IpNet;

use super::{ObjectName, PerFamily};

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
pub enum NodePortSetting {
    /// The node's own address of each family.
    Primary,
    /// Every address of the host but loopback ones.
    All,
    /// Addresses of the host inside these networks; a family that none of them belongs to serves on all.
    Cidrs(Vec<IpNet>),
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
    /// Whether processes of this node reach NodePorts on the loopback address of a family, as in kube-proxy's iptables
    /// mode (R13). Only the eBPF plane can do that.
    pub loopback_node_ports: PerFamily<bool>,
    /// Whether `spec.externalIPs` is honoured (R10).
    pub external_ips: bool,
    /// The node's address of its family, if the operator names a specific one, whatever the Node says.
    pub bind_address: Option<IpAddr>,
    /// The families served (R17).
    pub families: PerFamily<bool>,
    /// The cluster's DNS Service, where this node answers names in its place.
    pub dns_service: Option<ObjectName>,
}

impl Default for Settings {
    /// kube-proxy's defaults for its nftables mode, for a node without a name.
    fn default() -> Self {
        Self {
            node_name: String::new(),
            detect_local: DetectLocal::ClusterCidr(Vec::new()),
            masquerade_all: false,
            masquerade_bit: 14,
            node_port_addresses: NodePortSetting::Primary,
            loopback_node_ports: PerFamily { v4: false, v6: false },
            external_ips: true,
            bind_address: None,
            families: PerFamily { v4: true, v6: true },
            dns_service: None,
        }
    }
}
