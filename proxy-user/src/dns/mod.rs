//! DNS answers for the cluster's names, on the node itself.
//!
//! In: queries, and [`names::Names`], which the engine fills from its watches. Out: answers.
//!
//! ```text
//! server (UDP, TCP) ──query──▶ limits ──▶ answer (pure: names → records) ──▶ reply ──▶ encode
//!                                            └─ other names ──▶ forward ──▶ cache, else
//!                                                                  └─▶ upstream ──▶ relevant
//! ```

mod answer;
mod cache;
mod counters;
mod device;
mod encode;
mod endpoints;
mod forward;
mod limits;
mod listen;
pub mod names;
mod question;
mod relevant;
mod reply;
mod server;
mod start;
#[cfg(test)]
mod tests;
mod tun;
mod upstream;
mod watchdog;

pub(crate) use answer::Zone;
pub(crate) use counters::{Counters, Outcome};
pub(crate) use forward::{Forwarder, InFlight, Origin};
pub(crate) use limits::{Clients, Limits};
pub(crate) use listen::Sockets;
pub(crate) use reply::{Replier, SharedNames};
pub(crate) use server::{Responder, connections, datagrams};
pub(crate) use start::{Room, start, tell_of_strangers};
pub use tun::{TunError, openable};
pub(crate) use watchdog::{AnsweredAddresses, Wanted, Watchdog};
