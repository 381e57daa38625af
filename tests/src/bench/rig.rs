//! The network of one run: a node namespace whose endpoints all live in it, linked to the control plane's namespace.
//!
//! ```text
//! control plane (the caller's namespace)        node
//! API_SERVER on lo   CONTROL_ADDRESS ──veth── NODE_ADDRESS      POD_CIDR: every address is local
//! ```
//!
//! What no subject has programmed yet leaves the node for the control plane, which answers with a reset: a probe learns
//! at once that it has to try again.

use std::{
    collections::VecDeque,
    io::Write as _,
    net::{IpAddr, Ipv4Addr, TcpListener},
};

use anyhow::Context as _;

use super::{
    cluster::{POD_CIDR, SERVICE_CIDR},
    namespace::{Namespace, command, enter_new},
};

/// Where the API server is, for everybody.
pub(super) const API_SERVER: Ipv4Addr = Ipv4Addr::new(10, 255, 0, 1);
/// The node's own address.
pub(super) const NODE_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 255, 1, 2);
/// What endpoints listen on.
pub(super) const BACKEND_PORT: u16 = 8080;
const CONTROL_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 255, 1, 1);
const LINK: &str = "bench0";

/// Puts the calling thread, and what it starts from now on, into a namespace for the control plane.
///
/// # Errors
///
/// Without the right to, or without the tools.
pub(super) fn enter_control_plane() -> anyhow::Result<()> {
    enter_new()?;
    command(&format!("ip addr add {API_SERVER}/32 dev lo"))?;
    command("nft add table ip bench")?;
    command("nft add chain ip bench early { type filter hook prerouting priority -300 ; }")?;
    command(&format!(
        "nft add rule ip bench early ip daddr {SERVICE_CIDR} meta l4proto tcp reject with tcp reset"
    ))
}

/// The node of one run.
pub(super) struct Node {
    /// Its namespace.
    pub(super) namespace: Namespace,
}

impl Node {
    /// Makes the node, linked to the caller's namespace, with a server behind every endpoint.
    ///
    /// # Errors
    ///
    /// When something cannot be set up.
    pub(super) fn new() -> anyhow::Result<Self> {
        let namespace = Namespace::new()?;
        command(&format!("ip link add {LINK} type veth peer name eth0 netns {}", namespace.path()))?;
        let node = Self { namespace };
        command(&format!("ip addr add {CONTROL_ADDRESS}/30 dev {LINK}"))?;
        command(&format!("ip link set {LINK} up"))?;
        node.namespace.run(|| {
            command(&format!("ip addr add {NODE_ADDRESS}/30 dev eth0"))?;
            command("ip link set eth0 up")?;
            command(&format!("ip route add default via {CONTROL_ADDRESS}"))?;
            command(&format!("ip route add local {POD_CIDR} dev lo"))
        })?;
        let listener = node.namespace.run(|| {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, BACKEND_PORT)).context("listening for the endpoints")
        })?;
        node.namespace.spawn(move || serve(&listener))?;
        Ok(node)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // The namespace goes with its thread a moment later; the next run needs the name at once.
        if let Err(error) = command(&format!("ip link del {LINK}")) {
            super::report::say(format_args!("{error:#}"));
        }
    }
}

/// Tells every client which endpoint it reached. Clients close; a few connections are kept so that they can read.
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
