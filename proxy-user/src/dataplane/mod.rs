//! Writes plans into the kernel.
//!
//! In: [`Delta`]s. Out: the same state in nftables, in eBPF maps or in memory, and a [`State`] read back from
//! there, which has one form for all planes.

use std::{collections::BTreeMap, fmt, net::IpAddr, time::Instant};

use serde::Serialize;

use crate::{
    model::{Family, PerFamily, Protocol},
    plan::{Backend, Delta, Frontend, PortId},
};

mod faulty;
mod memory;
pub use faulty::{Faults, Faulty};
pub use memory::Memory;
pub mod ebpf;
pub mod nftables;
mod stack;
pub use stack::Stack;

/// One data plane.
///
/// Calls block, and come from one thread. A data plane stores only as much about Services as it needs to
/// write the next delta: the caller has the plans.
///
/// A failure never affects more than one of these:
///
/// - A **service port** that the kernel refuses. Every other port of the delta is in place, at a start too. The plane keeps
///   the port as it was: as `before` in the delta or, after a complete delta, as it was found in the kernel. The caller
///   repeats the port later with the same `before`. After a complete delta that is `None`, and the plane replaces what it
///   kept. A plane in front of another removes the port instead, and reports that the other plane serves it.
/// - A **family** whose table cannot be written. The other family's part of the delta is in place. From then on the plane
///   does not write this family, until [`Dataplane::reread_family`] and a complete delta.
/// - One **plane** of two ([`Stack`]). The other one serves, and [`Dataplane::wants_everything`] returns when the failed one
///   needs a complete delta.
///
/// A complete delta names every service port of both families. Parts of unknown state apply it: all parts at the start, and
/// later those that were read back. All other parts have every earlier change, and ignore it.
pub trait Dataplane: Send {
    /// Applies `delta`. Each service port switches atomically: a new flow sees its old or its new state, and
    /// never a mixture.
    ///
    /// # Errors
    ///
    /// [`Error::Partly`] has what failed; all else of the delta is in place. After any other error the state
    /// of both families is unknown: call [`Dataplane::reread`], then apply a complete delta.
    fn apply(&mut self, delta: &Delta) -> Result<(), Error>;

    /// Reads the state of the kernel back. The next delta must be a complete one. Entries that are already
    /// right are not written again, so running traffic is not affected.
    ///
    /// # Errors
    ///
    /// When the kernel's state cannot be read.
    fn reread(&mut self) -> Result<(), Error>;

    /// Reads the state of one family back, if the plane separates families. Until the next complete delta,
    /// deltas of changes do not write this family.
    ///
    /// # Errors
    ///
    /// When the kernel's state cannot be read.
    fn reread_family(&mut self, family: Family) -> Result<(), Error> {
        let _ = family;
        self.reread()
    }

    /// Whether the plane has read a family's table back at this generation of the rule set or a later one, so
    /// that news of this generation is old.
    fn has_read(&self, family: Family, generation: u32) -> bool {
        let _ = (family, generation);
        false
    }

    /// Whether a quick check finds a family's objects as this plane wrote them. It may miss a change, but
    /// never reports one that did not happen.
    fn looks_intact(&mut self, family: Family) -> bool {
        let _ = family;
        true
    }

    /// The UDP frontends that were found in the kernel and that no complete delta named, since the last call.
    /// They have been removed.
    fn take_left_over(&mut self) -> Vec<Frontend> {
        Vec::new()
    }

    /// When a part that is independent of families needs a complete delta, if one does.
    fn wants_everything(&self) -> Option<Instant> {
        None
    }

    /// Takes this plane out of service, so that the next one serves. Keeps what it needs to serve again after
    /// a complete delta.
    ///
    /// # Errors
    ///
    /// When a part of it still serves.
    fn step_aside(&mut self) -> Result<(), Error> {
        self.remove()
    }

    /// The state of each plane that serves or should, the front one first.
    fn standing(&self) -> Vec<Standing> {
        Vec::new()
    }

    /// Reads the installed state from the kernel.
    ///
    /// # Errors
    ///
    /// When the kernel's state cannot be read.
    fn dump(&mut self) -> Result<State, Error>;

    /// Removes all of weir's objects from the kernel.
    ///
    /// # Errors
    ///
    /// When an object could not be removed.
    fn remove(&mut self) -> Result<(), Error>;

    /// The usage of every kernel map with a fixed size; empty if the plane has none.
    fn fill(&self) -> Vec<Fill> {
        Vec::new()
    }
}

/// The state of a plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// Its name in `/proxyMode`.
    pub plane: &'static str,
    /// False after it has stepped aside.
    pub active: bool,
    /// Failures of the whole plane.
    pub failures: u64,
    /// Failed removals of objects of families that are no longer used. Each is tried again later.
    pub failed_removals: PerFamily<u64>,
}

/// The parts of a delta that failed.
#[derive(Debug, Default)]
pub struct Shortfall {
    /// Service ports that do not have their new state, with the reason.
    pub refused: Vec<(PortId, String)>,
    /// Service ports that another plane serves than the one that should, with the reason.
    pub left: Vec<(PortId, String)>,
    /// Families whose state is unknown now, with the reason.
    pub failed: Vec<(Family, Error)>,
}

impl Shortfall {
    /// Only ports failed.
    #[must_use]
    pub fn of_ports(refused: Vec<(PortId, String)>) -> Self {
        Self { refused, ..Self::default() }
    }

    /// The result of the delta.
    ///
    /// # Errors
    ///
    /// Unless all parts are empty.
    pub fn into_result(self) -> Result<(), Error> {
        let Self { refused, left, failed } = &self;
        if refused.is_empty() && left.is_empty() && failed.is_empty() {
            return Ok(());
        }
        Err(Error::Partly(self))
    }
}

impl fmt::Display for Shortfall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { refused, left, failed } = self;
        let mut parts = Vec::new();
        for (ports, what) in [(refused, "could not be programmed"), (left, "are left to nftables")] {
            if let Some((port, problem)) = ports.first() {
                parts.push(format!("{} service ports {what}, first `{port}`: {problem}", ports.len()));
            }
        }
        parts.extend(failed.iter().map(|(family, error)| format!("{family}: {error}")));
        f.write_str(&parts.join("; "))
    }
}

/// The usage of a kernel map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fill {
    /// The name of the map.
    pub map: &'static str,
    /// Entries in it.
    pub elements: u32,
    /// Entries that it has room for before it has to grow.
    pub room: u32,
}

/// The outcome for new flows of one class of sources.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// To one of these, sorted; each has the same probability.
    Backends(Vec<Backend>),
    /// Refused.
    Reject,
    /// Dropped.
    Drop,
    /// The socket plane leaves the socket as it is, and nftables decides about its packets.
    Packets,
}

/// The outcome for one class of sources, with masquerading.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Installed {
    /// For new flows only.
    pub outcome: Outcome,
    /// Whether the backend sees an address of this node as the source.
    pub masquerade: bool,
}

/// One frontend in a data plane.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct InstalledFrontend {
    /// For pods.
    pub pod: Installed,
    /// For this host.
    pub host: Installed,
    /// For all other sources.
    pub outside: Installed,
    /// Session affinity in seconds; `None` also if no class of sources gets a backend.
    pub affinity: Option<u32>,
    /// The only sources that may connect, sorted; `None` if all may.
    pub allowed_sources: Option<Vec<ipnet::IpNet>>,
    /// Whether the plane does not translate it while its address is this host's own.
    pub answered_here: bool,
}

/// The content of a data plane, in one form for all planes. Backends are `local` if the hairpin table has
/// them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct State {
    /// The frontends of both families.
    pub frontends: BTreeMap<Frontend, InstalledFrontend>,
    /// Sorted.
    pub cluster_ips: Vec<IpAddr>,
}

impl State {
    /// The part of this state that the socket plane has: TCP and UDP, for pods and this host. It never
    /// masquerades and ignores whether a backend is local. It leaves frontends that are dropped, have source
    /// ranges or are answered here to nftables.
    #[must_use]
    pub fn for_sockets(&self) -> Self {
        let sockets = |installed: &Installed, restricted: bool| match &installed.outcome {
            Outcome::Backends(backends) if !restricted => {
                let without_locality = |backend: &Backend| Backend { local: false, ..*backend };
                Outcome::Backends(backends.iter().map(without_locality).collect())
            }
            Outcome::Reject if !restricted => Outcome::Reject,
            _ => Outcome::Packets,
        };
        let frontends = self.frontends.iter();
        let frontends = frontends.filter(|(frontend, _)| is_for_sockets(frontend.protocol));
        let project = |(frontend, installed): (&Frontend, &InstalledFrontend)| {
            let restricted = installed.allowed_sources.is_some() || installed.answered_here;
            let of = |installed| Installed { outcome: sockets(installed, restricted), masquerade: false };
            let (pod, host) = (of(&installed.pod), of(&installed.host));
            let affinity = installed.affinity.unwrap_or(0);
            (*frontend, InstalledFrontend::for_sockets(pod, host, affinity))
        };
        Self { frontends: frontends.map(project).collect(), cluster_ips: self.cluster_ips.clone() }
    }
}

/// Whether the socket plane serves a protocol. The kernel runs none of the hooks for SCTP sockets.
const fn is_for_sockets(protocol: Protocol) -> bool {
    match protocol {
        Protocol::Tcp | Protocol::Udp => true,
        Protocol::Sctp => false,
    }
}

impl InstalledFrontend {
    /// A frontend in the socket plane, where no client is outside.
    fn for_sockets(pod: Installed, host: Installed, affinity: u32) -> Self {
        let has_backends = |installed: &Installed| matches!(installed.outcome, Outcome::Backends(_));
        let affinity = (affinity != 0 && (has_backends(&pod) || has_backends(&host))).then_some(affinity);
        let outside = Installed { outcome: Outcome::Packets, masquerade: false };
        Self { pod, host, outside, affinity, allowed_sources: None, answered_here: false }
    }
}

/// Why a data plane could not apply a delta.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Parts of a delta failed; the rest is in place.
    #[error("{0}")]
    Partly(Shortfall),
    /// The kernel refused an object that belongs to no single Service, or its state is inconsistent.
    #[error("{0}")]
    Kernel(String),
    /// A system call failed.
    #[error("{context}")]
    Io {
        /// The operation.
        context: String,
        /// The error of the system call.
        #[source]
        source: std::io::Error,
    },
}
