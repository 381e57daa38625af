//! The network: the control plane's namespace, and for each run a node with all endpoints in it.
//!
//! ```text
//! control plane                                 node
//! API_SERVER on lo   CONTROL_ADDRESS ──veth── eth0              POD_CIDR: every address is local
//! ```
//!
//! A packet that no subject translates yet leaves the node for the control plane, which answers with a reset:
//! a probe sees at once that it has to try again.

use std::{
    collections::VecDeque,
    io::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener},
};

use anyhow::Context as _;

use super::{
    cluster::{POD_CIDR, SERVICE_CIDR},
    subject::Roots,
};
use weir_tests::{bpffs::BpfFs, cgroup::Cgroup, netns::Namespace};

/// The address of the API server.
pub(super) const API_SERVER: Ipv4Addr = Ipv4Addr::new(10, 255, 0, 1);
/// The node's own addresses, those that its Node object names; every node of the benchmark has the same ones.
pub(super) const NODE_ADDRESSES: (Ipv4Addr, Ipv6Addr) =
    (Ipv4Addr::new(10, 255, 255, 11), Ipv6Addr::new(0xfd00, 0x255, 0xffff, 0, 0, 0, 0, 11));
pub(super) const BACKEND_PORT: u16 = 8080;
const CONTROL_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 255, 1, 1);
const LINK_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 255, 1, 2);
const LINK: &str = "bench0";

/// Makes the control plane's namespace.
pub(super) fn control_plane() -> anyhow::Result<Namespace> {
    let namespace = Namespace::new("control-plane")?;
    namespace.ip(&[format!("addr add {API_SERVER}/32 dev lo")])?;
    let rules = format!(
        "table ip bench {{ \
         counter to-nodes {{ }}; counter from-nodes {{ }}; \
         chain early {{ type filter hook prerouting priority -300; \
         ip daddr {SERVICE_CIDR} meta l4proto tcp reject with tcp reset; }}; \
         chain in {{ type filter hook input priority 0; iifname != lo ip daddr {API_SERVER} counter name from-nodes; }}; \
         chain out {{ type filter hook output priority 0; oifname != lo ip saddr {API_SERVER} counter name to-nodes; }}; }}"
    );
    namespace.stdout("nft", &[&rules])?;
    Ok(namespace)
}

/// The node of one run.
pub(super) struct Node<'a> {
    pub(super) namespace: Namespace,
    /// Where socket programs go.
    pub(super) roots: Roots,
    _cgroup: Cgroup,
    _bpffs: BpfFs,
    control_plane: &'a Namespace,
}

impl<'a> Node<'a> {
    /// Makes the node, linked to the control plane, with a server behind every endpoint.
    pub(super) fn new(control_plane: &'a Namespace) -> anyhow::Result<Self> {
        let (cgroup, bpffs) = (Cgroup::new("node")?, BpfFs::new()?);
        let namespace = Namespace::within(&cgroup, "node")?;
        control_plane.ip(&[
            format!("link add {LINK} type veth peer name eth0 netns {}", namespace.path()),
            format!("addr add {CONTROL_ADDRESS}/30 dev {LINK}"),
            format!("link set {LINK} up"),
        ])?;
        let roots = Roots { cgroup: cgroup.path().to_owned(), bpf: bpffs.directory("weir")? };
        let node = Self { namespace, roots, _cgroup: cgroup, _bpffs: bpffs, control_plane };
        node.namespace.ip(&[
            format!("addr add {LINK_ADDRESS}/30 dev eth0"),
            format!("addr add {}/32 dev lo", NODE_ADDRESSES.0),
            format!("addr add {}/128 dev lo nodad", NODE_ADDRESSES.1),
            "link set eth0 up".to_owned(),
            format!("route add default via {CONTROL_ADDRESS}"),
            format!("route add local {POD_CIDR} dev lo"),
        ])?;
        let listener = node.namespace.run(|| {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, BACKEND_PORT)).context("listening for the endpoints")
        })?;
        node.namespace.thread(move || serve(&listener))?;
        Ok(node)
    }
}

impl Drop for Node<'_> {
    fn drop(&mut self) {
        // The namespace goes with its threads a moment later; the next run needs the name at once.
        if let Err(error) = self.control_plane.ip(&[format!("link del {LINK}")]) {
            super::report::say(format_args!("{error:#}"));
        }
    }
}

/// Answers every client with the endpoint that it reached. Clients close; a few connections are kept so that they can read.
fn serve(listener: &TcpListener) {
    let mut open = VecDeque::new();
    for stream in listener.incoming() {
        let Ok(mut stream) = stream else { continue };
        let Ok(IpAddr::V4(own)) = stream.local_addr().map(|address| address.ip()) else { continue };
        if own.is_loopback() {
            return;
        }
        if stream.write_all(&own.octets()).is_ok() {
            open.push_back(stream);
        }
        if open.len() > 256 {
            open.pop_front();
        }
    }
}
