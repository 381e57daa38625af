//! The state of this node, from its Node object and the settings.
//!
//! In: the API's Node, each time it changes, and the [`Settings`]. Out: [`NodeView`], the only thing besides
//! a Service and its endpoints that a plan depends on.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use k8s_openapi::api::core::v1 as api;
use serde::Serialize;

use super::{DetectLocal, Family, ObjectName, PerFamily, Problem, Settings, parse_address, parse_network};

/// The label with the zone of a node (E11).
pub const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

/// A taint with this key, whatever its effect, means that the autoscaler is about to remove the node (P3).
const AUTOSCALER_TAINT: &str = "ToBeDeletedByClusterAutoscaler";

/// How packets from local pods are recognized (R6, R7).
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum LocalTraffic {
    /// By a source address in this network.
    Source(IpNet),
    /// By arrival on this interface.
    Interface(String),
    /// By arrival on an interface with this prefix of its name.
    InterfacePrefix(String),
}

/// The parts of the Node object that weir uses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// The zone, empty without one (E11).
    pub zone: Box<str>,
    /// The first address of each family. Internal addresses go before external ones.
    pub addresses: PerFamily<Option<IpAddr>>,
    /// The first pod network of each family.
    pub pod_networks: PerFamily<Option<IpNet>>,
    /// Whether load balancers may send traffic here: it is neither being deleted nor about to be scaled away
    /// (P3).
    pub eligible: bool,
}

impl Node {
    /// Reads a Node. Values that weir cannot use are left out and added to `problems`.
    #[must_use]
    pub fn read(node: &api::Node, problems: &mut Vec<Problem>) -> Self {
        let spec = node.spec.as_ref();
        let labels = node.metadata.labels.as_ref();
        let mut taints = spec.and_then(|spec| spec.taints.as_deref()).unwrap_or_default().iter();
        let leaving =
            node.metadata.deletion_timestamp.is_some() || taints.any(|taint| taint.key == AUTOSCALER_TAINT);
        Self {
            zone: labels
                .and_then(|labels| labels.get(ZONE_LABEL))
                .map(|zone| zone.as_str().into())
                .unwrap_or_default(),
            addresses: read_addresses(node, problems),
            pod_networks: read_pod_networks(node, problems),
            eligible: !leaving,
        }
    }
}

fn read_addresses(node: &api::Node, problems: &mut Vec<Problem>) -> PerFamily<Option<IpAddr>> {
    let status = node.status.as_ref();
    let all = status.and_then(|status| status.addresses.as_deref()).unwrap_or_default();
    let mut found: PerFamily<Option<IpAddr>> = PerFamily::default();
    for kind in ["InternalIP", "ExternalIP"] {
        for (index, entry) in all.iter().enumerate().filter(|(_, entry)| entry.type_ == kind) {
            match parse_address(&entry.address) {
                None => {
                    let field = format!("status.addresses[{index}].address");
                    problems.push(Problem::new(field, &entry.address, "not an IP address"));
                }
                Some(address) => {
                    found.get_mut(Family::of(address)).get_or_insert(address);
                }
            }
        }
    }
    found
}

fn read_pod_networks(node: &api::Node, problems: &mut Vec<Problem>) -> PerFamily<Option<IpNet>> {
    let cidrs = node.spec.as_ref().and_then(|spec| spec.pod_cidrs.as_deref()).unwrap_or_default();
    let mut networks = Vec::new();
    for (index, cidr) in cidrs.iter().enumerate() {
        match parse_network(cidr) {
            None => {
                let field = format!("spec.podCIDRs[{index}]");
                problems.push(Problem::new(field, cidr, "not a network in CIDR notation"));
            }
            Some(network) => networks.push(network),
        }
    }
    first_of_each_family(&networks)
}

fn first_of_each_family(networks: &[IpNet]) -> PerFamily<Option<IpNet>> {
    let first = |family| networks.iter().copied().find(|network| Family::of(network.addr()) == family);
    PerFamily { v4: first(Family::V4), v6: first(Family::V6) }
}

/// The state of this node that plans depend on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeView {
    /// The zone, empty without one (E9).
    pub zone: Box<str>,
    /// How packets of local pods are recognized; `None` if they cannot be (R6, R7).
    pub local_traffic: PerFamily<Option<LocalTraffic>>,
    /// Whether all traffic to ClusterIPs is masqueraded (R7).
    pub masquerade_all: bool,
    /// The node's own address of each family; the loopback address if none is known (F7, R14).
    pub addresses: PerFamily<IpAddr>,
    /// The cluster's DNS Service, if weir answers in its place.
    pub dns_service: Option<ObjectName>,
}

impl NodeView {
    /// Combines the settings with the Node, if it is known.
    #[must_use]
    pub fn new(settings: &Settings, node: Option<&Node>) -> Self {
        let mut addresses =
            PerFamily { v4: IpAddr::V4(Ipv4Addr::LOCALHOST), v6: IpAddr::V6(Ipv6Addr::LOCALHOST) };
        let known = Family::ALL.into_iter().filter_map(|family| *node?.addresses.get(family));
        for address in known.chain(settings.bind_address.filter(|address| !address.is_unspecified())) {
            *addresses.get_mut(Family::of(address)) = address;
        }
        Self {
            zone: node.map(|node| node.zone.clone()).unwrap_or_default(),
            local_traffic: local_traffic(settings, node),
            masquerade_all: settings.masquerade_all,
            addresses,
            dns_service: None,
        }
    }
}

fn local_traffic(settings: &Settings, node: Option<&Node>) -> PerFamily<Option<LocalTraffic>> {
    let by_source = |networks: PerFamily<Option<IpNet>>| PerFamily {
        v4: networks.v4.map(LocalTraffic::Source),
        v6: networks.v6.map(LocalTraffic::Source),
    };
    let by_interface = |name: &str, traffic: fn(String) -> LocalTraffic| {
        let traffic = (!name.is_empty()).then(|| traffic(name.to_owned()));
        PerFamily { v4: traffic.clone(), v6: traffic }
    };
    match &settings.detect_local {
        DetectLocal::ClusterCidr(networks) => by_source(first_of_each_family(networks)),
        DetectLocal::NodeCidr => by_source(node.map(|node| node.pod_networks).unwrap_or_default()),
        DetectLocal::Bridge(name) => by_interface(name, LocalTraffic::Interface),
        DetectLocal::InterfacePrefix(prefix) => by_interface(prefix, LocalTraffic::InterfacePrefix),
    }
}
