//! Makes plans true in the kernel.
//!
//! In: [`Delta`]s. Out: the same state in nftables, in eBPF maps or in memory, and a [`State`] that tells what is
//! really there, in one form for all of them.

use std::{collections::BTreeMap, net::IpAddr};

use serde::Serialize;

use crate::plan::{Backend, Delta, Frontend, PortId};

mod memory;
pub use memory::{Faulty, Memory};
pub mod conntrack;
pub mod ebpf;
pub mod nftables;
pub mod sockets;

/// One data plane.
///
/// Calls block and are made from one thread. A data plane remembers nothing about Services beyond what it needs to
/// write the next delta: the caller keeps the plans.
pub trait Dataplane: Send {
    /// Makes `delta` true. Each service port switches atomically: a new flow sees it as it was or as it is to be.
    ///
    /// # Errors
    ///
    /// [`Error::Ports`] names the service ports that could not be programmed; all others of the delta are in place.
    /// After any other error nothing is known: call [`Dataplane::reread`], then apply a complete delta.
    fn apply(&mut self, delta: &Delta) -> Result<(), Error>;

    /// Reads back what the kernel holds. The next delta must be a complete one; what is already there and right is
    /// left alone, so that running traffic does not notice.
    ///
    /// # Errors
    ///
    /// When the kernel's state cannot be read.
    fn reread(&mut self) -> Result<(), Error>;

    /// What is installed, read from the kernel.
    ///
    /// # Errors
    ///
    /// When the kernel's state cannot be read.
    fn dump(&mut self) -> Result<State, Error>;

    /// Takes everything of ours out of the kernel.
    ///
    /// # Errors
    ///
    /// When something of ours could not be removed.
    fn remove(&mut self) -> Result<(), Error>;
}

/// Where new flows of one source class go.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// To one of these, each as likely as the other; sorted.
    Backends(Vec<Backend>),
    /// Refused.
    Reject,
    /// Dropped.
    Drop,
}

/// What one source class gets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Installed {
    /// Where new flows go.
    pub outcome: Outcome,
    /// Whether the source is masqueraded.
    pub masquerade: bool,
}

/// One frontend as a data plane holds it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct InstalledFrontend {
    /// What pods get.
    pub pod: Installed,
    /// What this host gets.
    pub host: Installed,
    /// What everybody else gets.
    pub outside: Installed,
    /// Session affinity in seconds; `None` also where nobody gets to a backend.
    pub affinity: Option<u32>,
    /// The only sources let in, sorted; `None` lets everybody in.
    pub allowed_sources: Option<Vec<ipnet::IpNet>>,
}

/// What a data plane holds, in a form that is the same for all of them. `local` of backends is as the hairpin table
/// has it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct State {
    /// Every frontend.
    pub frontends: BTreeMap<Frontend, InstalledFrontend>,
    /// The known ClusterIPs, sorted.
    pub cluster_ips: Vec<IpAddr>,
}

/// Why a data plane could not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Some service ports could not be programmed; the rest could.
    #[error("{} service ports could not be programmed, first `{}`: {}", .0.len(), .0[0].0, .0[0].1)]
    Ports(Vec<(PortId, String)>),
    /// The kernel refused something that belongs to no single Service.
    #[error("{0}")]
    Kernel(String),
    /// The system call failed.
    #[error("{context}")]
    Io {
        /// What was being done.
        context: String,
        /// What the kernel answered.
        #[source]
        source: std::io::Error,
    },
}
