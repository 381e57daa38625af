//! The network of one subject: two nodes, pods and a client outside, wired the same for every subject.
//!
//! ```text
//! control plane ──veth── node ──veth── client pod
//!                          ├────veth── server pod, with an address for every endpoint near by
//!                          ├────veth── other node: the endpoints far away
//!                          └────veth── outside
//! ```
//! The subject runs on the node. The other node forwards without a proxy and holds the far endpoints itself,
//! so that only the first node's work is measured. Traffic between outside and the other node passes the node
//! both ways, with a Service and without: NodePorts are compared with plain forwarding. The suites' topology
//! would not do: the bridge of its router would be in every figure, and its pods have one address each.

use std::{
    array::from_fn,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use weir::model::Family;

use super::super::{cluster::ENDPOINTS, node::NODE_ADDRESSES, subject::Roots};
use weir_tests::{bpffs::BpfFs, cgroup::Cgroup, netns::Namespace};

/// The port of a lone client's server, for clients that come by the Service.
pub(super) const LONE: u16 = 8080;
/// The port of the server of many clients, for those that come by the Service.
pub(super) const SHARED: u16 = 8081;
pub(super) const BULK: u16 = 5201;
/// So much higher is the port of clients that come straight: a connection one way has nothing in common with one the other
/// way, least of all an entry in connection tracking that would be its predecessor's.
pub(super) const STRAIGHT: u16 = 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum From {
    Pod,
    Host,
    Outside,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Endpoints {
    /// On the subject's node.
    Near,
    /// On the other node.
    Far,
}

impl Endpoints {
    /// Their addresses, all of them on one machine.
    #[must_use]
    pub(super) fn addresses(self, family: Family) -> [IpAddr; ENDPOINTS as usize] {
        let net = match self {
            Self::Near => 1,
            Self::Far => 2,
        };
        from_fn(|number| pod(family, net, 1 + number as u8))
    }
}

/// The nodes, their pods and the client outside.
pub(super) struct Topology {
    /// The node, where its subject runs.
    pub(super) node: Namespace,
    client: Namespace,
    server: Namespace,
    other: Namespace,
    outside: Namespace,
    /// Where socket programs go.
    pub(super) roots: Roots,
    _cgroup: Cgroup,
    _bpffs: BpfFs,
}

impl Topology {
    /// Wires one up. `number` is another for each on the same control plane.
    pub(super) fn new(all: &Cgroup, control_plane: &Namespace, number: u8) -> anyhow::Result<Self> {
        let cgroup = all.child(&format!("paths-{number}"))?;
        let bpffs = BpfFs::new()?;
        let pod = |label: &str| Namespace::within(&cgroup.child(label)?, label);
        let away = |label: &str| Namespace::within(&all.child(&format!("{label}-{number}"))?, label);
        let topology = Self {
            node: Namespace::within(&cgroup, "node")?,
            client: pod("client")?,
            server: pod("server")?,
            other: away("other")?,
            outside: away("outside")?,
            roots: Roots { cgroup: cgroup.path().to_owned(), bpf: bpffs.directory("weir")? },
            _cgroup: cgroup,
            _bpffs: bpffs,
        };
        topology.wire(control_plane, number)?;
        for namespace in
            [&topology.node, &topology.client, &topology.server, &topology.other, &topology.outside]
        {
            // The default of most machines; one that paces its packets measures its own timers. Where it is
            // missing, all stay with what there is.
            let _ = namespace.sysctl("net/ipv4/tcp_congestion_control", "cubic");
        }
        Ok(topology)
    }

    #[must_use]
    pub(super) fn clients(&self, from: From) -> &Namespace {
        match from {
            From::Pod => &self.client,
            From::Host => &self.node,
            From::Outside => &self.outside,
        }
    }

    #[must_use]
    pub(super) fn servers(&self, endpoints: Endpoints) -> &Namespace {
        match endpoints {
            Endpoints::Near => &self.server,
            Endpoints::Far => &self.other,
        }
    }

    fn wire(&self, control_plane: &Namespace, number: u8) -> anyhow::Result<()> {
        let control = |host| Family::ALL.map(|family| control_address(family, number, host));
        let mut lines =
            vec![format!("link add paths{number} type veth peer name eth0 netns {}", self.node.path())];
        lines.extend(control(1).map(|address| format!("addr add {address} dev paths{number} nodad")));
        lines.push(format!("link set paths{number} up"));
        control_plane.ip(&lines)?;
        let mut lines = vec!["link set eth0 up".to_owned()];
        lines.extend(control(2).map(|address| format!("addr add {address} dev eth0 nodad")));
        lines.extend(control(1).map(|address| format!("route add default via {}", bare(&address))));
        let ends = [
            ("client", &self.client, Family::ALL.map(client_address).to_vec()),
            ("server", &self.server, Family::ALL.map(|family| Endpoints::Near.addresses(family)).concat()),
            ("other", &self.other, Family::ALL.map(|family| Endpoints::Far.addresses(family)).concat()),
            ("uplink", &self.outside, Family::ALL.map(outside_address).to_vec()),
        ];
        for (device, end, addresses) in &ends {
            lines.push(format!("link add {device} type veth peer name eth0 netns {}", end.path()));
            lines.push(format!("link set {device} up"));
            lines
                .extend(Family::ALL.map(|family| format!("addr add {} dev {device} nodad", gateway(family))));
            lines.extend(addresses.iter().map(|address| format!("route add {address} dev {device}")));
        }
        // The addresses of Services with NodePorts.
        let own: [IpAddr; 2] = [NODE_ADDRESSES.0.into(), NODE_ADDRESSES.1.into()];
        lines.extend(own.map(|address| format!("addr add {address} dev uplink nodad")));
        self.node.ip(&lines)?;
        ends.iter().try_for_each(|(_, end, addresses)| wire_end(end, addresses))
    }
}

/// Everything but its own addresses is behind the node.
fn wire_end(end: &Namespace, addresses: &[IpAddr]) -> anyhow::Result<()> {
    // A connection that is over must not get in the way of one of the next thousands.
    end.sysctl("net/ipv4/ip_local_port_range", "1024 65535")?;
    let mut lines = vec!["link set eth0 up".to_owned()];
    lines.extend(addresses.iter().map(|address| format!("addr add {address} dev eth0 nodad")));
    for family in Family::ALL {
        lines.push(format!("route add {} dev eth0", gateway(family)));
        lines.push(format!("route add default via {}", gateway(family)));
    }
    end.ip(&lines)
}

fn control_address(family: Family, number: u8, host: u8) -> String {
    match family {
        Family::V4 => format!("10.255.{number}.{host}/30"),
        Family::V6 => format!("fd00:255:{number}::{host}/64"),
    }
}

fn bare(address: &str) -> &str {
    address.split('/').next().unwrap_or(address)
}

fn pod(family: Family, net: u8, host: u8) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(10, 190, net, host).into(),
        Family::V6 => Ipv6Addr::new(0xfd00, 0x190, net.into(), 0, 0, 0, 0, host.into()).into(),
    }
}

fn client_address(family: Family) -> IpAddr {
    pod(family, 0, 2)
}

fn outside_address(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(192, 168, 77, 100).into(),
        Family::V6 => Ipv6Addr::new(0xfd00, 0x192, 0x168, 0x77, 0, 0, 0, 0x100).into(),
    }
}

/// The external address of a Service; outside sends what goes there to the node.
pub(super) fn external_address(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(192, 0, 2, 1).into(),
        Family::V6 => Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 1).into(),
    }
}

fn gateway(family: Family) -> IpAddr {
    pod(family, 255, 1)
}
