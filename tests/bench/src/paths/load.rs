//! The actions of clients, and their ways to a Service.

use std::{fmt, net::SocketAddr};

use serde::{Deserialize, Serialize};
use weir::model::Family;

use super::{
    server::WORKERS,
    target::Target,
    topology::{BULK, Endpoints, From, LONE, SHARED, STRAIGHT},
};

/// The action that a client repeats.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Traffic {
    /// TCP: connect, one request, close.
    Connect,
    /// TCP: requests on one connection.
    Request,
    /// UDP: requests from a connected socket.
    ConnectedDatagram,
    /// UDP: requests from a socket that names the destination of each.
    Datagram,
    /// TCP: as many bytes as go through.
    Bulk,
    /// UDP: as many small packets as go through, unanswered.
    Packets,
}

impl Traffic {
    /// The name in tables.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Connect => "TCP connect, request, close",
            Self::Request => "TCP requests, kept connection",
            Self::ConnectedDatagram => "UDP requests, connected",
            Self::Datagram => "UDP requests, unconnected",
            Self::Bulk => "TCP bulk",
            Self::Packets => "UDP packets of 64 bytes",
        }
    }

    /// The unit that is counted in a second.
    #[must_use]
    pub fn unit(self) -> &'static str {
        match self {
            Self::Bulk => "KiB",
            Self::Packets => "packets",
            Self::Connect | Self::Request | Self::ConnectedDatagram | Self::Datagram => "requests",
        }
    }

    /// Whether iperf3 makes it.
    #[must_use]
    pub(super) fn is_flood(self) -> bool {
        matches!(self, Self::Bulk | Self::Packets)
    }

    fn id(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Request => "request",
            Self::ConnectedDatagram => "udp",
            Self::Datagram => "udp-unconnected",
            Self::Bulk => "bulk",
            Self::Packets => "packets",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Load {
    pub traffic: Traffic,
    pub clients: usize,
    pub v6: bool,
}

/// Reads like `connect/16/IPv6`.
impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.traffic.id())?;
        if self.clients > 1 {
            write!(f, "/{}", self.clients)?;
        }
        write!(f, "/{}", self.family())
    }
}

impl Load {
    /// One client that does this.
    #[must_use]
    pub(crate) const fn alone(traffic: Traffic, v6: bool) -> Self {
        Self { traffic, clients: 1, v6 }
    }

    pub(crate) const ALL: [Self; 12] = [
        Self::alone(Traffic::Connect, false),
        Self::alone(Traffic::Connect, true),
        Self { traffic: Traffic::Connect, clients: WORKERS, v6: false },
        Self::alone(Traffic::Request, false),
        Self::alone(Traffic::Request, true),
        Self::alone(Traffic::ConnectedDatagram, false),
        Self::alone(Traffic::ConnectedDatagram, true),
        Self::alone(Traffic::Datagram, false),
        Self::alone(Traffic::Datagram, true),
        Self::alone(Traffic::Bulk, false),
        Self::alone(Traffic::Bulk, true),
        Self::alone(Traffic::Packets, false),
    ];

    /// The address family of it.
    #[must_use]
    pub(crate) fn family(self) -> Family {
        if self.v6 { Family::V6 } else { Family::V4 }
    }

    /// The port of the endpoints' that it goes to.
    #[must_use]
    pub(super) fn port(self) -> u16 {
        match self.traffic {
            Traffic::Bulk | Traffic::Packets => BULK,
            _ if self.clients > 1 => SHARED,
            _ => LONE,
        }
    }
}

/// How clients reach the endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// By their own addresses.
    Straight,
    /// By one of the Service's.
    Service,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Route {
    /// From a pod to a ClusterIP with endpoints on the same node.
    PodSameNode,
    /// From a pod to a ClusterIP with endpoints on the other node.
    PodOtherNode,
    /// From the node itself to a ClusterIP with endpoints on it.
    Host,
    /// From a pod to a ClusterIP with session affinity and endpoints on the same node.
    Affinity,
    /// From outside to a NodePort with endpoints on that node.
    NodePortLocal,
    /// From outside to a NodePort with endpoints on the other node.
    NodePortRemote,
    /// From outside to an external address with endpoints on that node.
    ExternalIp,
}

impl Route {
    pub const ALL: [Self; 7] = [
        Self::PodSameNode,
        Self::PodOtherNode,
        Self::Host,
        Self::Affinity,
        Self::NodePortLocal,
        Self::NodePortRemote,
        Self::ExternalIp,
    ];

    /// The name in tables.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::PodSameNode => "pod to ClusterIP, same node",
            Self::PodOtherNode => "pod to ClusterIP, other node",
            Self::Host => "host to ClusterIP",
            Self::Affinity => "pod to ClusterIP with affinity",
            Self::NodePortLocal => "outside to NodePort, local",
            Self::NodePortRemote => "outside to NodePort, remote",
            Self::ExternalIp => "outside to externalIP",
        }
    }

    /// Its name for `--only`.
    #[must_use]
    pub(crate) fn id(self) -> &'static str {
        match self {
            Self::PodSameNode => "pod-same-node",
            Self::PodOtherNode => "pod-other-node",
            Self::Host => "host",
            Self::Affinity => "affinity",
            Self::NodePortLocal => "nodeport-local",
            Self::NodePortRemote => "nodeport-remote",
            Self::ExternalIp => "external-ip",
        }
    }

    #[must_use]
    pub(super) fn from(self) -> From {
        match self {
            Self::PodSameNode | Self::PodOtherNode | Self::Affinity => From::Pod,
            Self::Host => From::Host,
            Self::NodePortLocal | Self::NodePortRemote | Self::ExternalIp => From::Outside,
        }
    }

    #[must_use]
    pub(super) fn endpoints(self) -> Endpoints {
        match self {
            Self::PodOtherNode | Self::NodePortRemote => Endpoints::Far,
            Self::PodSameNode | Self::Host | Self::Affinity | Self::NodePortLocal | Self::ExternalIp => {
                Endpoints::Near
            }
        }
    }

    /// Which Service clients ask for.
    #[must_use]
    pub(super) fn target(self) -> Target {
        match self {
            Self::Affinity => Target::Sticky,
            Self::PodOtherNode | Self::NodePortRemote => Target::Far,
            Self::PodSameNode | Self::Host | Self::NodePortLocal | Self::ExternalIp => Target::Near,
        }
    }

    /// Whether clients also go straight to the pods where a subject serves: what the subject costs traffic to no Service.
    /// From outside only the node without a proxy is compared with.
    #[must_use]
    pub(crate) fn is_compared_in_place(self) -> bool {
        self.from() != From::Outside && self != Self::Affinity
    }

    /// Whether this load is measured on it. Unconnected sockets make a difference only where the socket plane serves.
    #[must_use]
    pub(crate) fn takes(self, load: Load) -> bool {
        load.traffic != Traffic::Datagram || self == Self::PodSameNode
    }

    /// Where clients with this load go.
    #[must_use]
    pub(super) fn targets(self, load: Load, way: Way) -> Vec<SocketAddr> {
        let (family, port) = (load.family(), load.port());
        match (way, load.traffic.is_flood()) {
            (Way::Service, _) => vec![self.service_address(family, port)],
            (Way::Straight, true) => vec![SocketAddr::new(self.endpoints().addresses(family)[0], port)],
            (Way::Straight, false) => {
                let addresses = self.endpoints().addresses(family);
                addresses.map(|ip| SocketAddr::new(ip, port + STRAIGHT)).to_vec()
            }
        }
    }

    fn service_address(self, family: Family, port: u16) -> SocketAddr {
        let target = self.target();
        match self {
            Self::NodePortLocal | Self::NodePortRemote => target.node_port(family, port),
            Self::ExternalIp => target.external(family, port),
            Self::PodSameNode | Self::PodOtherNode | Self::Host | Self::Affinity => {
                target.cluster_ip(family, port)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_case_has_a_name_of_its_own_and_somewhere_to_go() {
        let cases = || {
            let takes = |route: Route| Load::ALL.into_iter().filter(move |load| route.takes(*load));
            Route::ALL.into_iter().flat_map(move |route| takes(route).map(move |load| (route, load)))
        };
        let ids: BTreeSet<_> = cases().map(|(route, load)| format!("{}/{load}", route.id())).collect();
        assert_eq!(ids.len(), cases().count());
        assert!(ids.contains("nodeport-remote/connect/16/IPv4"), "{ids:?}");
        for (route, load) in cases() {
            for way in [Way::Straight, Way::Service] {
                let targets = route.targets(load, way);
                assert!(
                    targets.iter().all(|to| to.is_ipv6() == load.v6) && !targets.is_empty(),
                    "{targets:?}"
                );
            }
        }
    }
}
