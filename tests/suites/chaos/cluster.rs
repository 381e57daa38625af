//! The Services of the node, and what a client of each must see.
//!
//! In: numbers. Out: manifests, and [`Probe`]s. Everything follows from a Service's number: its kind, its addresses, and its
//! endpoints, which no other Service has, so an answer from an endpoint of another Service is recognised by its address.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use serde_json::{Value, json};
use weir::model::Family;
use weir_tests::{
    node::{Location, node_address, node_name},
    traffic::Transport,
};

pub(crate) const SERVICES: u16 = 2_000;
/// The first ten of so many are one of each kind.
pub(crate) const EACH: u16 = 50;
/// The port of all of them.
pub(crate) const PORT: u16 = 80;
pub(crate) const TARGET: u16 = 8080;
/// How many are in one file.
pub(crate) const IN_FILE: u16 = 100;
/// Where clients are that are pods; no endpoint is there.
pub(crate) const CLIENT: Location = Location::Pod(1, 2);
/// Where the endpoints of block 200 are, on the node; those of block 201 are elsewhere.
pub(crate) const HERE: Location = Location::Pod(1, 1);
/// See [`HERE`].
pub(crate) const ELSEWHERE: Location = Location::Pod(2, 1);
/// The networks of endpoints and the pods that have them.
pub(crate) const ENDPOINTS: [(u8, Location); 3] = [(200, HERE), (201, ELSEWHERE), (MARKED, HERE)];
/// The network of load balancers' addresses.
pub(crate) const BALANCERS: u8 = 210;
/// The network of external addresses.
pub(crate) const EXTERNAL: u8 = 211;
/// The network of the marker's endpoints.
const MARKED: u8 = 202;

/// A network of this suite.
pub(crate) fn network(family: Family, block: u8) -> String {
    match family {
        Family::V4 => format!("10.{block}.0.0/16"),
        Family::V6 => format!("fd00:10:{block}::/64"),
    }
}

/// An address of a network of this suite.
pub(crate) fn address(family: Family, block: u8, number: u16) -> IpAddr {
    let [high, low] = number.to_be_bytes();
    match family {
        Family::V4 => Ipv4Addr::new(10, block, high, low).into(),
        Family::V6 => {
            // Written so that the IPv6 network reads like the IPv4 one.
            let block = u16::from_str_radix(&block.to_string(), 16).unwrap_or_default();
            Ipv6Addr::new(0xfd00, 0x10, block, 0, 0, 0, 0, number).into()
        }
    }
}

/// The special property of a Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A ClusterIP.
    Plain,
    /// A ClusterIP with session affinity.
    Sticky,
    /// A NodePort.
    NodePort,
    /// A NodePort with session affinity.
    StickyNodePort,
    /// A load balancer's address with a local policy and a health check.
    Local,
    /// A ClusterIP with a local policy.
    InternalLocal,
    /// A load balancer's address with source ranges.
    Ranges,
    /// As [`Kind::Local`], with session affinity.
    StickyLocal,
    /// An external address.
    External,
    /// No endpoints: connections are refused.
    Empty,
}

impl Kind {
    const COMMON: [Self; 5] = [Self::Plain, Self::NodePort, Self::InternalLocal, Self::External, Self::Plain];

    const ALL: [Self; 10] = [
        Self::Plain,
        Self::Sticky,
        Self::NodePort,
        Self::StickyNodePort,
        Self::Local,
        Self::InternalLocal,
        Self::Ranges,
        Self::StickyLocal,
        Self::External,
        Self::Empty,
    ];
}

/// A Service by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Service(pub u16);

/// The result that a client must see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Expected {
    /// An answer from one of these; any other is an answer from another Service.
    Endpoints(Vec<IpAddr>),
    /// An answer from this one, some time after it was written.
    Marker(IpAddr),
    /// No answer: refused, or not sent at all.
    Refused,
}

/// One question, and what the answer must be.
#[derive(Clone, Debug)]
pub(crate) struct Probe {
    pub(crate) from: Location,
    /// Whether programs at sockets do not see the client.
    pub(crate) by_packets: bool,
    pub(crate) to: SocketAddr,
    pub(crate) transport: Transport,
    pub(crate) expected: Expected,
}

impl Service {
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        (0..SERVICES).map(Self)
    }

    /// Ten of [`EACH`] are one of each kind; the others are of the kinds that most Services have.
    pub(crate) fn kind(self) -> Kind {
        let number = usize::from(self.0 % EACH);
        Kind::ALL.get(number).copied().unwrap_or(Kind::COMMON[number % Kind::COMMON.len()])
    }

    pub(crate) fn name(self) -> String {
        format!("svc-{}", self.0)
    }

    pub(crate) fn cluster_ip(self, family: Family) -> IpAddr {
        // Beyond the addresses of the cluster's own Services.
        let number = 0x100 + self.0;
        let [high, low] = number.to_be_bytes();
        match family {
            Family::V4 => Ipv4Addr::new(10, 96, high, low).into(),
            Family::V6 => Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, number).into(),
        }
    }

    /// Its NodePort, if it has one.
    pub(crate) fn node_port(self) -> Option<u16> {
        let has = matches!(
            self.kind(),
            Kind::NodePort | Kind::StickyNodePort | Kind::Local | Kind::Ranges | Kind::StickyLocal
        );
        has.then_some(30_000 + self.0)
    }

    fn is_balanced(self) -> bool {
        matches!(self.kind(), Kind::Local | Kind::Ranges | Kind::StickyLocal)
    }

    /// The port of its health check, if it has one.
    pub(crate) fn health_port(self) -> Option<u16> {
        let kinds = usize::from(self.kind() == Kind::StickyLocal);
        matches!(self.kind(), Kind::Local | Kind::StickyLocal)
            .then_some(32_000 + self.0 / 10 * 2 + kinds as u16)
    }

    fn is_sticky(self) -> bool {
        matches!(self.kind(), Kind::Sticky | Kind::StickyNodePort | Kind::StickyLocal)
    }

    /// Its endpoints: on this node and elsewhere.
    pub(crate) fn endpoints(self, family: Family) -> Vec<IpAddr> {
        if self.kind() == Kind::Empty {
            return Vec::new();
        }
        [200, 201].map(|block| address(family, block, self.0 + 1)).to_vec()
    }

    fn expected(self, family: Family, locally: bool) -> Expected {
        let mut endpoints = self.endpoints(family);
        if locally {
            endpoints.truncate(1);
        }
        if endpoints.is_empty() { Expected::Refused } else { Expected::Endpoints(endpoints) }
    }

    /// To its ClusterIP, in one way.
    pub(crate) fn to_cluster_ip(
        self,
        family: Family,
        from: Location,
        by_packets: bool,
        transport: Transport,
    ) -> Probe {
        Probe {
            from,
            by_packets,
            to: SocketAddr::new(self.cluster_ip(family), PORT),
            transport,
            expected: self.expected(family, self.kind() == Kind::InternalLocal),
        }
    }

    /// Every way to it.
    pub(crate) fn ways(self) -> Vec<Probe> {
        let mut ways = Vec::new();
        for family in Family::ALL {
            for transport in [Transport::Tcp, Transport::Udp, Transport::Datagram] {
                ways.push(self.to_cluster_ip(family, CLIENT, false, transport));
                ways.push(self.to_cluster_ip(family, Location::Host(1), false, transport));
                ways.push(self.to_cluster_ip(family, Location::Host(1), true, transport));
                ways.extend(self.ways_of_others(family, transport));
            }
        }
        ways
    }

    fn ways_of_others(self, family: Family, transport: Transport) -> Vec<Probe> {
        let local = matches!(self.kind(), Kind::Local | Kind::StickyLocal);
        let way = |from, to: SocketAddr| Probe {
            from,
            by_packets: false,
            to,
            transport,
            expected: self.expected(family, local && from == Location::Outside(0)),
        };
        let mut ways = Vec::new();
        if let Some(port) = self.node_port() {
            let to = SocketAddr::new(node_address(family, 1), port);
            ways.extend([Location::Outside(0), CLIENT].map(|from| way(from, to)));
        }
        if self.is_balanced() {
            let to = SocketAddr::new(address(family, BALANCERS, self.0 + 1), PORT);
            ways.push(way(Location::Outside(0), to));
        }
        if self.kind() == Kind::External {
            let to = SocketAddr::new(address(family, EXTERNAL, self.0 + 1), PORT);
            ways.push(way(Location::Outside(0), to));
        }
        ways
    }

    pub(crate) fn objects(self) -> Vec<Value> {
        let node_port = self.node_port();
        let port = |name: &str, protocol: &str| {
            let mut port = json!({ "name": name, "protocol": protocol, "port": PORT, "targetPort": TARGET });
            if let Some(node_port) = node_port {
                port["nodePort"] = node_port.into();
            }
            port
        };
        let both = |block| Family::ALL.map(|family| address(family, block, self.0 + 1).to_string());
        let kind = match () {
            () if self.is_balanced() => "LoadBalancer",
            () if node_port.is_some() => "NodePort",
            () => "ClusterIP",
        };
        let cluster_ips = Family::ALL.map(|family| self.cluster_ip(family).to_string());
        let policy = |local| if local { "Local" } else { "Cluster" };
        let mut spec = json!({
            "type": kind,
            "clusterIP": cluster_ips[0],
            "clusterIPs": cluster_ips,
            "ipFamilies": ["IPv4", "IPv6"],
            "ipFamilyPolicy": "RequireDualStack",
            "internalTrafficPolicy": policy(self.kind() == Kind::InternalLocal),
            "sessionAffinity": if self.is_sticky() { "ClientIP" } else { "None" },
            "ports": [port("stream", "TCP"), port("datagram", "UDP")],
        });
        let mut status = json!({});
        if node_port.is_some() || self.kind() == Kind::External {
            spec["externalTrafficPolicy"] = policy(self.health_port().is_some()).into();
        }
        if let Some(port) = self.health_port() {
            spec["healthCheckNodePort"] = port.into();
        }
        if self.kind() == Kind::External {
            spec["externalIPs"] = json!(both(EXTERNAL));
        }
        if self.is_balanced() {
            status = json!({ "loadBalancer": { "ingress": both(BALANCERS).map(|ip| json!({ "ip": ip })) } });
        }
        if self.kind() == Kind::Ranges {
            // The client outside is in them.
            spec["loadBalancerSourceRanges"] =
                json!(["192.168.77.0/24", format!("172.16.{}.0/24", self.0 % 250), "fd00:192:168:77::/64"]);
        }
        let mut objects = vec![json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": { "name": self.name(), "namespace": "default" },
            "spec": spec,
            "status": status,
        })];
        objects.extend(
            Family::ALL.map(|family| slice("default", &self.name(), family, &self.endpoints(family))),
        );
        objects
    }
}

/// A slice; endpoints of block 200 and of the marker are on node 1.
pub(crate) fn slice(namespace: &str, service: &str, family: Family, endpoints: &[IpAddr]) -> Value {
    let elsewhere = |endpoint: &IpAddr| *endpoint == address(family, 201, low(*endpoint));
    let endpoint = |address: &IpAddr| {
        json!({
            "addresses": [address.to_string()],
            "conditions": { "ready": true, "serving": true, "terminating": false },
            "nodeName": node_name(if elsewhere(address) { 2 } else { 1 }),
        })
    };
    // Long names of Services leave room for the family in names of slices, which may be longer.
    json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": format!("{service}-{}", family.to_string().to_lowercase()),
            "namespace": namespace,
            "labels": { "kubernetes.io/service-name": service },
        },
        "addressType": family.to_string(),
        "ports": [
            { "name": "stream", "protocol": "TCP", "port": TARGET },
            { "name": "datagram", "protocol": "UDP", "port": TARGET },
        ],
        "endpoints": endpoints.iter().map(endpoint).collect::<Vec<_>>(),
    })
}

/// The last 16 bits.
fn low(address: IpAddr) -> u16 {
    match address {
        IpAddr::V4(address) => (address.to_bits() & 0xffff) as u16,
        IpAddr::V6(address) => address.segments()[7],
    }
}

/// The Service that shows whether the agent follows changes: each version has another endpoint.
pub(crate) mod marker {
    use super::{
        CLIENT, Expected, Family, Location, MARKED, PORT, Probe, Service, SocketAddr, TARGET, Transport,
        Value, address, json, slice,
    };

    const MARKER: Service = Service(super::SERVICES);
    const NAME: &str = "marker";

    /// The marker's objects at this version.
    pub(crate) fn objects(version: u16) -> Vec<Value> {
        let cluster_ips = Family::ALL.map(|family| MARKER.cluster_ip(family).to_string());
        let port = |name, protocol| json!({ "name": name, "protocol": protocol, "port": PORT, "targetPort": TARGET });
        let service = json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": { "name": NAME, "namespace": "default" },
            "spec": {
                "clusterIP": cluster_ips[0],
                "clusterIPs": cluster_ips,
                "ipFamilies": ["IPv4", "IPv6"],
                "ipFamilyPolicy": "RequireDualStack",
                "ports": [port("stream", "TCP"), port("datagram", "UDP")],
            },
        });
        let slices =
            Family::ALL.map(|family| slice("default", NAME, family, &[address(family, MARKED, version)]));
        [vec![service], slices.to_vec()].concat()
    }

    /// Probes that show that the agent has this version, at sockets and by packets.
    pub(crate) fn ways(version: u16) -> Vec<Probe> {
        let mut ways = Vec::new();
        for family in Family::ALL {
            for (from, by_packets) in [(CLIENT, false), (Location::Host(1), false), (Location::Host(1), true)]
            {
                ways.push(Probe {
                    from,
                    by_packets,
                    to: SocketAddr::new(MARKER.cluster_ip(family), PORT),
                    transport: Transport::Tcp,
                    expected: Expected::Marker(address(family, MARKED, version)),
                });
            }
        }
        ways
    }
}
