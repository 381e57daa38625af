//! The network of one subject: a node and two of its pods, wired the same for every subject.
//!
//! ```text
//! control plane ──veth── node ──veth── client pod
//!                          └────veth── server pod, with an address for every endpoint of the target
//! ```

use std::{
    array::from_fn,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use weir::model::Family;

use super::super::{cluster::ENDPOINTS, subject::Roots};
use crate::{bpffs::BpfFs, cgroup::Cgroup, netns::Namespace};

/// What a lone client's server listens on, for those who come by the Service.
pub(super) const LONE: u16 = 8080;
/// What the server of many clients listens on, for those who come by the Service.
pub(super) const SHARED: u16 = 8081;
/// So much higher is the port of those who come straight: a connection one way has nothing in common with one the other
/// way, least of all an entry in connection tracking that would be its predecessor's.
pub(super) const STRAIGHT: u16 = 10;

/// A node with two pods.
pub(super) struct Topology {
    /// The node, where its subject runs.
    pub(super) node: Namespace,
    /// Where clients are.
    pub(super) client: Namespace,
    /// Where the servers are.
    pub(super) server: Namespace,
    /// Where socket programs go.
    pub(super) roots: Roots,
    _cgroup: Cgroup,
    _bpffs: BpfFs,
}

impl Topology {
    /// Wires one up. `number` tells it from the others on the same control plane; the one that reaches it is 1.
    ///
    /// # Errors
    ///
    /// Without the right to, or without the tools.
    pub(super) fn new(all: &Cgroup, control_plane: &Namespace, number: u8) -> anyhow::Result<Self> {
        let cgroup = all.child(&format!("paths-{number}"))?;
        let bpffs = BpfFs::new()?;
        let pod = |label: &str| Namespace::within(&cgroup.child(label)?, label);
        let topology = Self {
            node: Namespace::within(&cgroup, "node")?,
            client: pod("client")?,
            server: pod("server")?,
            roots: Roots { cgroup: cgroup.path().to_owned(), bpf: bpffs.directory("weir")? },
            _cgroup: cgroup,
            _bpffs: bpffs,
        };
        topology.wire(control_plane, number)?;
        Ok(topology)
    }

    fn wire(&self, control_plane: &Namespace, number: u8) -> anyhow::Result<()> {
        let [control, node] = [1, 2].map(|host| Ipv4Addr::new(10, 255, number, host));
        control_plane.ip(&[
            format!("link add paths{number} type veth peer name eth0 netns {}", self.node.path()),
            format!("addr add {control}/30 dev paths{number}"),
            format!("link set paths{number} up"),
        ])?;
        let mut lines = vec![
            format!("addr add {node}/30 dev eth0"),
            "link set eth0 up".to_owned(),
            format!("route add default via {control}"),
        ];
        let clients = Family::ALL.map(client_address).to_vec();
        let servers = Family::ALL.map(server_addresses).concat();
        for (name, pod, addresses) in [("client", &self.client, &clients), ("server", &self.server, &servers)]
        {
            lines.push(format!("link add {name} type veth peer name eth0 netns {}", pod.path()));
            lines.push(format!("link set {name} up"));
            lines.extend(Family::ALL.map(|family| format!("addr add {} dev {name} nodad", gateway(family))));
            lines.extend(addresses.iter().map(|address| format!("route add {address} dev {name}")));
        }
        self.node.ip(&lines)?;
        wire_pod(&self.client, &clients)?;
        wire_pod(&self.server, &servers)
    }
}

fn wire_pod(pod: &Namespace, addresses: &[IpAddr]) -> anyhow::Result<()> {
    // A connection that is over must not get in the way of one of the next thousands.
    pod.sysctl("net/ipv4/ip_local_port_range", "1024 65535")?;
    let mut lines = vec!["link set eth0 up".to_owned()];
    lines.extend(addresses.iter().map(|address| format!("addr add {address} dev eth0 nodad")));
    for family in Family::ALL {
        lines.push(format!("route add {} dev eth0", gateway(family)));
        lines.push(format!("route add default via {}", gateway(family)));
    }
    pod.ip(&lines)
}

fn client_address(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(10, 190, 0, 2).into(),
        Family::V6 => Ipv6Addr::new(0xfd00, 0x190, 0, 0, 0, 0, 0, 2).into(),
    }
}

/// The endpoints of the target, all of them addresses of one pod.
pub(super) fn server_addresses(family: Family) -> [IpAddr; ENDPOINTS as usize] {
    from_fn(|number| match family {
        Family::V4 => Ipv4Addr::new(10, 190, 1, 1 + number as u8).into(),
        Family::V6 => Ipv6Addr::new(0xfd00, 0x190, 1, 0, 0, 0, 0, 1 + number as u16).into(),
    })
}

fn gateway(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(10, 190, 255, 1).into(),
        Family::V6 => Ipv6Addr::new(0xfd00, 0x190, 0xffff, 0, 0, 0, 0, 1).into(),
    }
}
