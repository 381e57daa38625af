//! The Services that traffic goes to, among all the others.
//!
//! In: a family and a port of the endpoints'. Out: addresses that lead there; the objects for an API server.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::Result;
use k8s_openapi::{
    api::{core::v1::Service, discovery::v1::EndpointSlice},
    serde_json::{Value, from_value, json},
};
use weir::model::Family;

use super::{
    super::{cluster::NODE, node::NODE_ADDRESSES},
    topology::{BULK, Endpoints, LONE, SHARED, external_address},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// Endpoints on the subject's node.
    Near,
    /// The same with session affinity.
    Sticky,
    /// Endpoints on the other node.
    Far,
}

/// Ports: of the Service, of the endpoints, and their name; all by TCP, and some by UDP.
const PORTS: [(u16, u16, &str, bool); 3] =
    [(80, LONE, "lone", true), (81, SHARED, "shared", false), (82, BULK, "bulk", true)];

impl Target {
    pub(super) const ALL: [Self; 3] = [Self::Near, Self::Sticky, Self::Far];

    fn name(self) -> &'static str {
        match self {
            Self::Near => "near",
            Self::Sticky => "sticky",
            Self::Far => "far",
        }
    }

    fn number(self) -> u8 {
        match self {
            Self::Near => 1,
            Self::Sticky => 2,
            Self::Far => 3,
        }
    }

    fn endpoints(self) -> Endpoints {
        match self {
            Self::Near | Self::Sticky => Endpoints::Near,
            Self::Far => Endpoints::Far,
        }
    }

    /// The ClusterIP with the port that leads to this one of the endpoints'.
    #[must_use]
    pub(super) fn cluster_ip(self, family: Family, port: u16) -> SocketAddr {
        SocketAddr::new(self.ip(family), service_port(port))
    }

    fn ip(self, family: Family) -> IpAddr {
        match family {
            Family::V4 => Ipv4Addr::new(10, 99, 0, self.number()).into(),
            Family::V6 => {
                Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0x990 + u16::from(self.number())).into()
            }
        }
    }

    /// The node's address with the NodePort that leads there.
    #[must_use]
    pub(super) fn node_port(self, family: Family, port: u16) -> SocketAddr {
        let node: IpAddr = match family {
            Family::V4 => NODE_ADDRESSES.0.into(),
            Family::V6 => NODE_ADDRESSES.1.into(),
        };
        SocketAddr::new(node, self.node_port_number(service_port(port)))
    }

    fn node_port_number(self, port: u16) -> u16 {
        30_000 + u16::from(self.number()) * 100 + port
    }

    /// The external address with the port that leads there.
    #[must_use]
    pub(super) fn external(self, family: Family, port: u16) -> SocketAddr {
        SocketAddr::new(external_address(family), service_port(port))
    }

    /// The Service.
    pub(super) fn service(self) -> Result<Service> {
        let ips = Family::ALL.map(|family| self.ip(family).to_string());
        let ports = protocols().map(|(port, endpoints, name, protocol)| {
            json!({
                "name": name, "port": port, "targetPort": endpoints, "protocol": protocol,
                "nodePort": self.node_port_number(port),
            })
        });
        let external =
            if self == Self::Near { Family::ALL.map(external_address).to_vec() } else { Vec::new() };
        Ok(from_value(json!({
            "metadata": { "name": self.name() },
            "spec": {
                "type": "NodePort",
                "clusterIP": ips[0],
                "clusterIPs": ips,
                "ipFamilies": ["IPv4", "IPv6"],
                "ipFamilyPolicy": "RequireDualStack",
                "sessionAffinity": if self == Self::Sticky { "ClientIP" } else { "None" },
                "externalIPs": external,
                "ports": ports.collect::<Vec<_>>(),
            },
        }))?)
    }

    /// The endpoints: in each family a slice with all addresses, and one with the only address that iperf3 listens on.
    pub(super) fn slices(self) -> Result<Vec<EndpointSlice>> {
        let kinds = Family::ALL.into_iter().flat_map(|family| [(family, false), (family, true)]);
        kinds.map(|(family, bulk)| self.slice(family, bulk)).collect()
    }

    fn slice(self, family: Family, bulk: bool) -> Result<EndpointSlice> {
        let node = if self.endpoints() == Endpoints::Near { NODE } else { "other" };
        let addresses = self.endpoints().addresses(family);
        let endpoints = addresses.iter().take(if bulk { 1 } else { addresses.len() }).map(|address| {
            json!({
                "addresses": [address],
                "conditions": { "ready": true, "serving": true, "terminating": false },
                "nodeName": node,
            })
        });
        let ports = protocols()
            .filter(|(_, port, ..)| (*port == BULK) == bulk)
            .map(|(_, port, name, protocol)| json!({ "name": name, "port": port, "protocol": protocol }));
        let kind = if bulk { "bulk" } else { "all" };
        Ok(from_value(json!({
            "metadata": {
                "name": format!("{}-{kind}-{family}", self.name()).to_lowercase(),
                "labels": { "kubernetes.io/service-name": self.name() },
            },
            "addressType": family.to_string(),
            "ports": ports.collect::<Vec<Value>>(),
            "endpoints": endpoints.collect::<Vec<_>>(),
        }))?)
    }
}

/// [`PORTS`] with a name for each protocol.
fn protocols() -> impl Iterator<Item = (u16, u16, String, &'static str)> {
    PORTS.into_iter().flat_map(|(port, endpoints, name, datagrams)| {
        let both = [("TCP", true), ("UDP", datagrams)].into_iter().filter(|(_, has)| *has);
        both.map(move |(protocol, _)| {
            (port, endpoints, format!("{name}-{}", protocol.to_lowercase()), protocol)
        })
    })
}

fn service_port(endpoints: u16) -> u16 {
    PORTS.iter().find(|(_, port, ..)| *port == endpoints).map_or(0, |(port, ..)| *port)
}
