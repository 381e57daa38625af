//! Pods whose sockets weir leaves alone.
//!
//! In: Pods and Namespaces from the source. Out: the ids of their cgroups in the pinned map `bypassed`. The way is its own, so
//! that Services wait for no pod and no cgroup.
//!
//! ```text
//! source (task) ──PodChange──▶ pods (task; reason: on or off, and why) ──Bypassed──▶ map (own thread) ──▶ kernel
//!                                                            cgroups, notices ─────────┘
//! ```

mod cgroups;
mod map;
mod notices;
mod pods;
mod reason;
mod start;
#[cfg(test)]
mod tests;

pub use map::{Bypass, Census, Error};
pub use pods::{Bypassed, BypassedPod, Pods};
pub use reason::{Namespace, Pod, Reason, SOCKET_LB_KEY, SocketLb};
pub(crate) use start::show_census;
pub use start::{decide, start};
