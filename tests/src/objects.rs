//! Kubernetes objects of the cases, in few words.
//!
//! In: a [`Shape`], which is what is special about a Service and its endpoints, and [`Addresses`], which give it addresses
//! that no other Service has. Out: complete objects as a cluster would hold them.

use std::{collections::BTreeMap, net::IpAddr};

use k8s_openapi::{
    api::{
        core::v1::{
            ClientIPConfig, LoadBalancerIngress, LoadBalancerStatus, Node, NodeAddress, NodeSpec, NodeStatus,
            Service, ServicePort, ServiceSpec, ServiceStatus, SessionAffinityConfig,
        },
        discovery::v1::{
            Endpoint as SliceEndpoint, EndpointConditions, EndpointHints, EndpointPort, EndpointSlice,
            ForNode, ForZone,
        },
        networking::v1::{ServiceCIDR, ServiceCIDRSpec},
    },
    apimachinery::pkg::{apis::meta::v1::ObjectMeta, util::intstr::IntOrString},
};
use weir::model::{Family, Object};

use crate::{
    node::{Location, SERVICE_CIDRS, node_address, node_name, pod_address},
    traffic::Transport,
};

/// The namespace of every object here.
pub const NAMESPACE: &str = "default";

/// The name and the addresses of one Service: all follow from its number, so that no two Services meet.
#[derive(Clone, Copy, Debug)]
pub struct Addresses {
    number: u16,
    name: Option<&'static str>,
}

impl Addresses {
    /// The highest number that leaves room for NodePorts and health check ports.
    pub const LAST: u16 = 240;

    #[must_use]
    pub const fn new(number: u16) -> Self {
        Self { number, name: None }
    }

    /// With a name for people to read.
    #[must_use]
    pub const fn named(self, name: &'static str) -> Self {
        Self { name: Some(name), ..self }
    }

    /// The name of the Service.
    #[must_use]
    pub fn name(self) -> String {
        self.name.map_or_else(|| format!("case-{}", self.number), str::to_owned)
    }

    fn within(self, v4: [u8; 3], v6: &str, family: Family) -> IpAddr {
        let number = self.number;
        match family {
            Family::V4 => IpAddr::from([v4[0], v4[1], v4[2], number as u8]),
            Family::V6 => format!("{v6}{number:x}").parse().unwrap_or(IpAddr::from([0; 16])),
        }
    }

    #[must_use]
    pub fn cluster_ip(self, family: Family) -> IpAddr {
        self.within([10, 96, 1], "fd00:10:96::1", family)
    }

    /// An address of the Service range that no Service has.
    #[must_use]
    pub fn unused_cluster_ip(self, family: Family) -> IpAddr {
        self.within([10, 96, 2], "fd00:10:96::2", family)
    }

    #[must_use]
    pub fn external_ip(self, family: Family) -> IpAddr {
        self.within([192, 0, 2], "2001:db8:1::", family)
    }

    #[must_use]
    pub fn balancer_ip(self, family: Family) -> IpAddr {
        self.within([198, 51, 100], "2001:db8:2::", family)
    }

    /// The NodePort of the service port with this number: the same for all its transports, as Kubernetes permits.
    #[must_use]
    pub fn node_port(self, port: u16) -> u16 {
        30_000 + self.number * 8 + port % 8
    }
}

/// The type of a Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServiceType {
    ClusterIp,
    NodePort,
    /// LoadBalancer, with a NodePort.
    LoadBalancer,
    /// ExternalName: nothing for a proxy (W4).
    ExternalName,
}

#[derive(Clone, Debug)]
pub struct Port {
    pub name: &'static str,
    pub transport: Transport,
    pub port: u16,
}

/// A port of an EndpointSlice: name, transport and number.
pub type SlicePort = (&'static str, Transport, u16);

/// An EndpointSlice of both families.
#[derive(Clone, Debug)]
pub struct Slice {
    /// The ports; their names join them to the Service's (W6).
    pub ports: Vec<SlicePort>,
    pub endpoints: Vec<Endpoint>,
    /// Labels beyond the Service's name.
    pub labels: Vec<(&'static str, &'static str)>,
}

/// One endpoint and its state (E2).
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// The pod, or the node itself for a pod in the host's network.
    pub location: Location,
    /// Ready, serving and terminating, each as the slice says or leaves open.
    pub conditions: [Option<bool>; 3],
    /// Zones and nodes that should use it.
    pub hints: (Vec<&'static str>, Vec<&'static str>),
    /// Whether its slice names its node.
    pub placed: bool,
}

/// A ready pod.
#[must_use]
pub fn pod(node: u8, pod: u8) -> Endpoint {
    at(Location::Pod(node, pod))
}

/// A ready endpoint at a location.
#[must_use]
pub fn at(location: Location) -> Endpoint {
    let conditions = [Some(true), Some(true), Some(false)];
    Endpoint { location, conditions, hints: (Vec::new(), Vec::new()), placed: true }
}

impl Endpoint {
    /// Terminating and still serving (E6, E7).
    #[must_use]
    pub fn terminating(mut self) -> Self {
        self.conditions = [Some(false), Some(true), Some(true)];
        self
    }

    /// With conditions as given: ready, serving, terminating.
    #[must_use]
    pub fn conditions(mut self, conditions: [Option<bool>; 3]) -> Self {
        self.conditions = conditions;
        self
    }

    /// In a slice that does not name its node.
    #[must_use]
    pub fn unplaced(mut self) -> Self {
        self.placed = false;
        self
    }

    /// Hinted for zones (E9).
    #[must_use]
    pub fn zones(mut self, zones: &[&'static str]) -> Self {
        self.hints.0 = zones.to_vec();
        self
    }

    /// Hinted for nodes (E9).
    #[must_use]
    pub fn nodes(mut self, nodes: &[&'static str]) -> Self {
        self.hints.1 = nodes.to_vec();
        self
    }

    fn object(&self, family: Family) -> SliceEndpoint {
        let (address, node) = match self.location {
            Location::Pod(node, pod) => (pod_address(family, node, pod), Some(node_name(node))),
            Location::Host(node) => (node_address(family, node), Some(node_name(node))),
            other => (other.client_address(family), None),
        };
        let [ready, serving, terminating] = self.conditions;
        let some = |names: &[&str]| {
            (!names.is_empty()).then(|| names.iter().map(|name| (*name).to_owned()).collect())
        };
        let (zones, nodes): (Option<Vec<String>>, Option<Vec<String>>) =
            (some(&self.hints.0), some(&self.hints.1));
        let hints = (zones.is_some() || nodes.is_some()).then(|| EndpointHints {
            for_zones: zones.map(|zones| zones.into_iter().map(|name| ForZone { name }).collect()),
            for_nodes: nodes.map(|nodes| nodes.into_iter().map(|name| ForNode { name }).collect()),
        });
        SliceEndpoint {
            addresses: vec![address.to_string()],
            conditions: Some(EndpointConditions { ready, serving, terminating }),
            node_name: node.filter(|_| self.placed),
            hints,
            ..SliceEndpoint::default()
        }
    }
}

/// A Service and its endpoints.
#[derive(Clone, Debug)]
pub struct Shape {
    pub kind: ServiceType,
    /// The families it has a ClusterIP of.
    pub families: Vec<Family>,
    pub ports: Vec<Port>,
    /// Whether it has an external address.
    pub external_ip: bool,
    /// The `ipMode` of the load balancer's address, `Some(None)` where there is one without mode.
    pub balancer: Option<Option<&'static str>>,
    /// Whether `internalTrafficPolicy` is Local.
    pub internal_local: bool,
    /// Whether `externalTrafficPolicy` is Local.
    pub external_local: bool,
    /// The timeout of ClientIP affinity in seconds.
    pub affinity: Option<i32>,
    /// `loadBalancerSourceRanges`.
    pub source_ranges: Vec<String>,
    pub labels: Vec<(&'static str, &'static str)>,
    pub slices: Vec<Slice>,
}

/// The port every [`Shape`] starts with, by TCP and by UDP.
pub const PORT: u16 = 80;
/// Where endpoints serve it.
pub const TARGET: u16 = 8080;

/// A ClusterIP Service of both families, with port 80 by TCP and UDP, and these endpoints.
#[must_use]
pub fn service(endpoints: impl Into<Vec<Endpoint>>) -> Shape {
    Shape {
        kind: ServiceType::ClusterIp,
        families: Family::ALL.to_vec(),
        ports: vec![
            Port { name: "stream", transport: Transport::Tcp, port: PORT },
            Port { name: "datagram", transport: Transport::Udp, port: PORT },
        ],
        external_ip: false,
        balancer: None,
        internal_local: false,
        external_local: false,
        affinity: None,
        source_ranges: Vec::new(),
        labels: Vec::new(),
        slices: vec![slice(endpoints)],
    }
}

/// A slice with the ports of [`service`].
#[must_use]
pub fn slice(endpoints: impl Into<Vec<Endpoint>>) -> Slice {
    let ports = vec![("stream", Transport::Tcp, TARGET), ("datagram", Transport::Udp, TARGET)];
    Slice { ports, endpoints: endpoints.into(), labels: Vec::new() }
}

impl Shape {
    #[must_use]
    pub fn of(mut self, kind: ServiceType) -> Self {
        self.kind = kind;
        self
    }

    /// With a NodePort, an external address and a load balancer's address: every kind of external destination.
    #[must_use]
    pub fn everywhere(mut self) -> Self {
        self.kind = ServiceType::LoadBalancer;
        self.external_ip = true;
        self.balancer = Some(None);
        self
    }

    #[must_use]
    pub fn external(mut self) -> Self {
        self.external_ip = true;
        self
    }

    /// With `internalTrafficPolicy: Local`.
    #[must_use]
    pub fn internal_local(mut self) -> Self {
        self.internal_local = true;
        self
    }

    /// With `externalTrafficPolicy: Local`.
    #[must_use]
    pub fn external_local(mut self) -> Self {
        self.external_local = true;
        self
    }

    /// With ClientIP affinity.
    #[must_use]
    pub fn sticky(mut self, seconds: i32) -> Self {
        self.affinity = Some(seconds);
        self
    }

    /// Whether clients are to stay with a backend.
    #[must_use]
    pub fn is_sticky(&self) -> bool {
        self.affinity.is_some()
    }

    /// Open to these sources only, at the load balancer's address.
    #[must_use]
    pub fn only_from(mut self, ranges: &[&str]) -> Self {
        self.source_ranges = ranges.iter().map(|range| (*range).to_owned()).collect();
        self
    }

    #[must_use]
    pub fn ports(mut self, ports: &[(&'static str, Transport, u16)]) -> Self {
        self.ports = ports.iter().map(|&(name, transport, port)| Port { name, transport, port }).collect();
        self
    }

    #[must_use]
    pub fn slices(mut self, slices: impl Into<Vec<Slice>>) -> Self {
        self.slices = slices.into();
        self
    }

    /// Whether it has no endpoints, in whatever state.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.slices.iter().all(|slice| slice.endpoints.is_empty())
    }

    /// The objects at these addresses.
    #[must_use]
    pub fn objects(&self, addresses: Addresses) -> Vec<Object> {
        let mut objects = vec![Object::Service(Box::new(self.service(addresses)))];
        for (number, slice) in self.slices.iter().enumerate() {
            for &family in &self.families {
                objects.push(Object::EndpointSlice(Box::new(slice.object(addresses, number, family))));
            }
        }
        objects
    }

    fn service(&self, addresses: Addresses) -> Service {
        let spec =
            if self.kind == ServiceType::ExternalName { self.external_name() } else { self.spec(addresses) };
        let ingress = self.balancer.map(|mode| {
            let address = |family| LoadBalancerIngress {
                ip: Some(addresses.balancer_ip(family).to_string()),
                ip_mode: mode.map(str::to_owned),
                ..LoadBalancerIngress::default()
            };
            self.families.iter().copied().map(address).collect()
        });
        let status = ServiceStatus { load_balancer: Some(LoadBalancerStatus { ingress }), conditions: None };
        Service {
            metadata: named(&addresses.name(), &self.labels),
            spec: Some(spec),
            status: self.balancer.is_some().then_some(status),
        }
    }

    fn external_name(&self) -> ServiceSpec {
        ServiceSpec {
            type_: Some("ExternalName".to_owned()),
            external_name: Some("elsewhere.example".to_owned()),
            ..ServiceSpec::default()
        }
    }

    fn spec(&self, addresses: Addresses) -> ServiceSpec {
        let cluster_ips: Vec<String> =
            self.families.iter().map(|&family| addresses.cluster_ip(family).to_string()).collect();
        let external = |yes: bool, address: fn(Addresses, Family) -> IpAddr| {
            yes.then(|| self.families.iter().map(|&family| address(addresses, family).to_string()).collect())
        };
        let with_node_port = matches!(self.kind, ServiceType::NodePort | ServiceType::LoadBalancer);
        let ports =
            self.ports.iter().map(|port| port.object(with_node_port.then(|| addresses.node_port(port.port))));
        let balanced = self.kind == ServiceType::LoadBalancer;
        ServiceSpec {
            type_: Some(self.kind.name().to_owned()),
            ip_families: Some(self.families.iter().map(ToString::to_string).collect()),
            ip_family_policy: Some(
                if cluster_ips.len() == 2 { "RequireDualStack" } else { "SingleStack" }.to_owned(),
            ),
            cluster_ip: cluster_ips.first().cloned(),
            cluster_ips: Some(cluster_ips),
            ports: Some(ports.collect()),
            external_ips: external(self.external_ip, Addresses::external_ip),
            internal_traffic_policy: Some(policy(self.internal_local)),
            external_traffic_policy: (with_node_port || self.external_ip)
                .then(|| policy(self.external_local)),
            health_check_node_port: (balanced && self.external_local)
                .then(|| 32_000 + i32::from(addresses.number)),
            session_affinity: Some(if self.affinity.is_some() { "ClientIP" } else { "None" }.to_owned()),
            session_affinity_config: self.affinity.map(|seconds| SessionAffinityConfig {
                client_ip: Some(ClientIPConfig { timeout_seconds: Some(seconds) }),
            }),
            load_balancer_source_ranges: balanced.then(|| self.source_ranges.clone()),
            ..ServiceSpec::default()
        }
    }
}

impl ServiceType {
    fn name(self) -> &'static str {
        match self {
            Self::ClusterIp => "ClusterIP",
            Self::NodePort => "NodePort",
            Self::LoadBalancer => "LoadBalancer",
            Self::ExternalName => "ExternalName",
        }
    }
}

fn policy(local: bool) -> String {
    if local { "Local" } else { "Cluster" }.to_owned()
}

impl Port {
    fn object(&self, node_port: Option<u16>) -> ServicePort {
        ServicePort {
            name: Some(self.name.to_owned()),
            protocol: Some(self.transport.protocol().to_owned()),
            port: self.port.into(),
            target_port: Some(IntOrString::Int(TARGET.into())),
            node_port: node_port.map(Into::into),
            ..ServicePort::default()
        }
    }
}

impl Slice {
    fn object(&self, addresses: Addresses, number: usize, family: Family) -> EndpointSlice {
        let name = format!("{}-{number}-{}", addresses.name(), family.to_string().to_lowercase());
        let service = addresses.name();
        let mut metadata = named(&name, &self.labels);
        let labels = metadata.labels.get_or_insert_default();
        labels.entry("kubernetes.io/service-name".to_owned()).or_insert(service);
        EndpointSlice {
            metadata,
            address_type: family.to_string(),
            endpoints: Some(self.endpoints.iter().map(|endpoint| endpoint.object(family)).collect()),
            ports: Some(self.ports.iter().map(slice_port).collect()),
        }
    }
}

fn slice_port(&(name, transport, port): &SlicePort) -> EndpointPort {
    EndpointPort {
        name: Some(name.to_owned()),
        protocol: Some(transport.protocol().to_owned()),
        port: Some(port.into()),
        ..EndpointPort::default()
    }
}

fn named(name: &str, labels: &[(&str, &str)]) -> ObjectMeta {
    let labels: BTreeMap<String, String> =
        labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    ObjectMeta {
        name: Some(name.to_owned()),
        namespace: Some(NAMESPACE.to_owned()),
        labels: (!labels.is_empty()).then_some(labels),
        ..ObjectMeta::default()
    }
}

/// The Node object of a node; node 1 is in `zone-a`, node 2 in `zone-b` (E11).
#[must_use]
pub fn node(number: u8) -> Object {
    node_in(number, if number == 1 { "zone-a" } else { "zone-b" })
}

/// The Node object of a node, in this zone.
#[must_use]
pub fn node_in(number: u8, zone: &str) -> Object {
    let name = node_name(number);
    let address = |family| NodeAddress {
        type_: "InternalIP".to_owned(),
        address: node_address(family, number).to_string(),
    };
    let cidrs = vec![format!("10.244.{number}.0/24"), format!("fd00:10:244:{number}::/64")];
    Object::Node(Box::new(Node {
        metadata: ObjectMeta {
            namespace: None,
            ..named(&name, &[("topology.kubernetes.io/zone", zone), ("kubernetes.io/hostname", &name)])
        },
        spec: Some(NodeSpec {
            pod_cidr: cidrs.first().cloned(),
            pod_cidrs: Some(cidrs),
            ..NodeSpec::default()
        }),
        status: Some(NodeStatus {
            addresses: Some(Family::ALL.map(address).to_vec()),
            ..NodeStatus::default()
        }),
    }))
}

/// The ServiceCIDR that a cluster's API server makes by itself.
#[must_use]
pub fn service_cidr() -> Object {
    let cidrs = SERVICE_CIDRS.map(str::to_owned).to_vec();
    Object::ServiceCidr(Box::new(ServiceCIDR {
        metadata: ObjectMeta { namespace: None, ..named("kubernetes", &[]) },
        spec: Some(ServiceCIDRSpec { cidrs: Some(cidrs) }),
        status: None,
    }))
}
