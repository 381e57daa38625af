//! NodePorts on loopback addresses, where only the nftables plane serves (R18).
//!
//! The kernel lets no packet with a loopback address leave the machine: IPv6 never, and IPv4 only with
//! `route_localnet`, which also opens the machine's loopback services to its neighbours. So without the socket plane
//! the agent itself listens on 127.0.0.1 and ::1 and connects to the backend, as kube-proxy does.
//!
//! In: [`NodePortChanges`] that are in force. Out: bound sockets, and bytes between clients and backends.
//! [`ConnectionLimit`](crate::connection_limit::ConnectionLimit) limits the connections, with a share for each NodePort, so a NodePort with many
//! clients takes nothing from other NodePorts.
//!
//! ```text
//! engine ──NodePortChanges──▶ NodePorts ──▶ Picker ◀── streams, datagrams ──▶ backends
//! ```

mod datagrams;
mod node_ports;
mod picker;
mod start;
mod streams;
#[cfg(test)]
mod tests;

pub(crate) use datagrams::{Datagrams, relay_datagrams};
pub(crate) use node_ports::{LoopbackPort, NodePortChanges, NodePorts};
pub(crate) use picker::Picker;
pub(crate) use start::{relayed, start};
pub(crate) use streams::{Streams, relay_streams};
