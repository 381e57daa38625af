//! NodePorts on loopback addresses, for what no plane can lead there (R18).
//!
//! The kernel lets no packet of a loopback address leave the machine: IPv6 never, IPv4 only where `route_localnet` opens the
//! machine's loopback services to its neighbours too. So where sockets are not led, the agent itself listens on 127.0.0.1
//! and ::1, and speaks to the backend in the client's place, as kube-proxy does.
//!
//! In: [`News`] of what is in force. Out: bound sockets, and bytes between clients and backends. What runs here is bounded
//! by [`Places`](crate::places::Places), a share for each NodePort: a NodePort with many clients costs other NodePorts nothing.
//!
//! ```text
//! engine ──News──▶ Leads ──▶ Draw ◀── streams, datagrams ──▶ backends
//! ```

mod datagrams;
mod draw;
mod leads;
mod start;
mod streams;
#[cfg(test)]
mod tests;

pub use datagrams::{Datagrams, relay_datagrams};
pub use draw::Draw;
pub use leads::{Lead, Leads, News, Port};
pub(crate) use start::{relayed, start};
pub use streams::{Streams, relay_streams};
