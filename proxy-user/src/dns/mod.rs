//! Node-local answers for the cluster's names.
//!
//! In: [`crate::dns::names::Names`], kept by the engine from the same watch as everything else, and queries. Out: answers.
//!
//! ```text
//! server (UDP, TCP) ──query──▶ limits ──▶ answer (pure: names → records) ──▶ reply ──▶ encode
//!                                            └─ not of the cluster ──▶ forward ──▶ remembered, else
//!                                                                         └─▶ upstream ──▶ believed
//! ```

mod answer;
mod believed;
mod counters;
mod device;
mod encode;
mod endpoints;
mod forward;
mod limits;
mod listen;
pub mod names;
mod question;
mod remembered;
mod reply;
mod server;
mod start;
#[cfg(test)]
mod tests;
mod tun;
mod upstream;
mod watchdog;

pub use answer::{Answer, Query, Resolution, Zone, answer};
pub use counters::{Counters, Outcome};
pub use device::DeviceError;
pub use forward::{Forwarder, Origin, UnderWay};
pub use limits::{Admission, Clients, Limits};
pub use listen::Sockets;
pub use question::{Part, Question};
pub use reply::{Pending, Replier, Reply, SharedNames};
pub use server::{Responder, connections, datagrams};
pub(crate) use start::{Room, start, tell_of_strangers};
pub use tun::{TunError, openable};
pub use upstream::Outside;
pub use watchdog::{Standing, Wanted, Watchdog};
