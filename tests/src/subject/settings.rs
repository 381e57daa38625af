//! How the agents are set up: one KubeProxyConfiguration for all kinds.

use std::path::Path;

use serde_json::json;

use super::Kind;
use crate::node::CLUSTER_CIDRS;

/// How traffic from pods is recognised (R6, R7).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Detector {
    /// By the cluster's pod networks: every pod of the cluster counts.
    #[default]
    ClusterCidr,
    /// By the node's own pod networks.
    NodeCidr,
    /// By the interface it came in on.
    InterfacePrefix,
    None,
}

/// The settings that differ between the runs of the cases.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Settings {
    /// How pods are recognised.
    pub detector: Detector,
    /// `masqueradeAll` (R7).
    pub masquerade_all: bool,
    /// `nodePortAddresses` (R14); empty leaves the default (R15).
    pub node_port_addresses: Vec<String>,
}

impl Settings {
    /// The configuration file. Its mode decides where NodePorts answer by default (R15).
    #[must_use]
    pub fn configuration(&self, kind: Kind, kubeconfig: Option<&Path>) -> String {
        let (detector, cidrs, prefix) = match self.detector {
            Detector::ClusterCidr => ("ClusterCIDR", CLUSTER_CIDRS.join(","), ""),
            Detector::NodeCidr => ("NodeCIDR", String::new(), ""),
            Detector::InterfacePrefix => ("InterfaceNamePrefix", String::new(), "pod"),
            Detector::None => ("ClusterCIDR", String::new(), ""),
        };
        let configuration = json!({
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": kind.mode(),
            "clientConnection": {"kubeconfig": kubeconfig, "qps": 1000, "burst": 1000},
            "detectLocalMode": detector,
            "detectLocal": {"interfaceNamePrefix": prefix},
            "clusterCIDR": cidrs,
            "nodePortAddresses": self.node_port_addresses,
            "nftables": {"masqueradeAll": self.masquerade_all, "minSyncPeriod": "10ms"},
            // A network namespace other than the first may not change these.
            "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
        });
        configuration.to_string()
    }
}
