//! Node-local answers for the cluster's names.
//!
//! In: [`crate::model::Names`], kept by the engine from the same watch as everything else, and queries. Out: answers.
//!
//! ```text
//! server (UDP, TCP) ──query──▶ limits ──▶ answer (pure: names → records) ──▶ reply
//!                                            └─ not of the cluster ──▶ forward (upstream, bounded cache)
//! ```

mod answer;
mod counters;
mod device;
mod encode;
mod endpoints;
mod forward;
mod limits;
mod listen;
mod question;
mod reply;
mod server;
#[cfg(test)]
mod tests;
mod watchdog;

pub use answer::{Answer, Query, Resolution, Zone, answer};
pub use counters::{Counters, Outcome};
pub use device::DeviceError;
pub use forward::{Forwarder, UnderWay};
pub use limits::{Admission, Clients, Limits};
pub use listen::Sockets;
pub use question::{Part, Question};
pub use reply::{Pending, Replier, Reply, SharedNames};
pub use server::{Responder, connections, datagrams};
pub use watchdog::{Standing, Wanted, Watchdog};
