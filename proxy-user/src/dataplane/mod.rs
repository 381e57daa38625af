//! Makes plans true in the kernel.
//!
//! In: [`Delta`]s. Out: the same state in nftables, in eBPF maps or in memory, and a [`State`] that tells what is
//! really there, in one form for all of them.

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
/// Calls block and are made from one thread. A data plane remembers nothing about Services beyond what it needs to
/// write the next delta: the caller keeps the plans.
///
/// What cannot be done costs nothing else anything, in three sizes:
///
/// - A **service port** that is refused. Every other port of the delta is in place, at a start too. Of the refused port
///   the plane keeps what it has: what the delta calls `before` or, when the delta was a complete one, what was found
///   in the kernel. The caller tells the port again later, with the same `before`; after a complete delta that is `None`,
///   and the plane replaces what it kept.
///   A plane in front of another lets go of the port instead, and says that it has left it: then it has nothing of it.
/// - A **family** whose table cannot be written. The other family's part of the delta is in place. From then on the plane
///   leaves this family alone, until [`Dataplane::reread_family`] and a complete delta put it right.
/// - A **plane** of several that fails ([`Stack`]). The others serve, and say with [`Dataplane::wants_everything`] when
///   the failed one is to be given a complete delta.
///
/// A complete delta always names everything of both families. It is taken in by that of which nothing is known: at the
/// start, and after it was reread. All else must have been told every change before and leaves it alone.
pub trait Dataplane: Send {
    /// Makes `delta` true. Each service port switches atomically: a new flow sees it as it was or as it is to be.
    ///
    /// # Errors
    ///
    /// [`Error::Partly`] names what could not be done; all else of the delta is in place. After any other error nothing
    /// is known of either family: call [`Dataplane::reread`], then apply a complete delta.
    fn apply(&mut self, delta: &Delta) -> Result<(), Error>;

    /// Reads back what the kernel holds. The next delta must be a complete one; what is already there and right is
    /// left alone, so that running traffic does not notice.
    ///
    /// # Errors
    ///
    /// When the kernel's state cannot be read.
    fn reread(&mut self) -> Result<(), Error>;

    /// Reads back what the kernel holds of one family, where families are kept apart. Until the next complete delta,
    /// deltas of changes leave this family alone.
    ///
    /// # Errors
    ///
    /// When the kernel's state cannot be read.
    fn reread_family(&mut self, family: Family) -> Result<(), Error> {
        let _ = family;
        self.reread()
    }

    /// Whether a family's table was read back when the rule set had this generation, or a later one: news of it is old.
    fn has_read(&self, family: Family, generation: u32) -> bool {
        let _ = (family, generation);
        false
    }

    /// Whether a quick look finds a family's objects as this plane left them. It may miss a change, and reports none that
    /// did not happen.
    fn looks_intact(&mut self, family: Family) -> bool {
        let _ = family;
        true
    }

    /// The UDP frontends that were found in the kernel and that no complete delta named, since this was last asked: they are
    /// gone by now.
    fn take_left_over(&mut self) -> Vec<Frontend> {
        Vec::new()
    }

    /// From when on a part that no family depends on is to be given a complete delta, if one is.
    fn wants_everything(&self) -> Option<Instant> {
        None
    }

    /// Lets nothing of this plane serve, so that the next one does, and keeps what is needed to serve again after a
    /// complete delta.
    ///
    /// # Errors
    ///
    /// When something could not be taken out of the way.
    fn step_aside(&mut self) -> Result<(), Error> {
        self.remove()
    }

    /// How each of the planes stands that serve or should, the front one first.
    fn standing(&self) -> Vec<Standing> {
        Vec::new()
    }

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

    /// How full everything is that has a size; empty where nothing has.
    fn fill(&self) -> Vec<Fill> {
        Vec::new()
    }
}

/// How a plane stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// Its name, as `/proxyMode` tells it.
    pub plane: &'static str,
    /// Whether it serves.
    pub active: bool,
    /// How often it has failed as a whole.
    pub failures: u64,
    /// How often something of a family that has no use any more could not be removed. It is tried again later.
    pub failed_removals: PerFamily<u64>,
}

/// What of a delta could not be done.
#[derive(Debug, Default)]
pub struct Shortfall {
    /// Service ports that are not as they should be, and why.
    pub refused: Vec<(PortId, String)>,
    /// Service ports that are served, though not by the plane that should serve them, and why.
    pub left: Vec<(PortId, String)>,
    /// Families of which nothing is known now, and why.
    pub failed: Vec<(Family, Error)>,
}

impl Shortfall {
    /// Of ports alone.
    #[must_use]
    pub fn of_ports(refused: Vec<(PortId, String)>) -> Self {
        Self { refused, ..Self::default() }
    }

    /// The result of a delta of which this was not done.
    ///
    /// # Errors
    ///
    /// Unless everything was done.
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
        for (ports, what) in [(refused, "could not be programmed"), (left, "were left to the packets")] {
            if let Some((port, problem)) = ports.first() {
                parts.push(format!("{} service ports {what}, first `{port}`: {problem}", ports.len()));
            }
        }
        parts.extend(failed.iter().map(|(family, error)| format!("{family}: {error}")));
        f.write_str(&parts.join("; "))
    }
}

/// How full a kernel map is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fill {
    /// The map's name.
    pub map: &'static str,
    /// Elements in it.
    pub elements: u32,
    /// Elements it has room for before it has to grow.
    pub room: u32,
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
    /// Left as it is by the sockets, for the packets to decide.
    Packets,
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
    /// Whether it is left alone while its address is this host's own.
    pub answered_here: bool,
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

impl State {
    /// What of this the sockets' plane holds: TCP and UDP, for pods and this host. Sockets do not know who is local,
    /// masquerade nobody and leave to the packets what is dropped, lets in some sources only or is answered here.
    #[must_use]
    pub fn for_sockets(&self) -> Self {
        let sockets = |installed: &Installed, guarded: bool| match &installed.outcome {
            Outcome::Backends(backends) if !guarded => {
                let apart = |backend: &Backend| Backend { local: false, ..*backend };
                Outcome::Backends(backends.iter().map(apart).collect())
            }
            Outcome::Reject if !guarded => Outcome::Reject,
            _ => Outcome::Packets,
        };
        let frontends = self.frontends.iter();
        let frontends = frontends.filter(|(frontend, _)| frontend.protocol != Protocol::Sctp);
        let project = |(frontend, installed): (&Frontend, &InstalledFrontend)| {
            let guarded = installed.allowed_sources.is_some() || installed.answered_here;
            let of = |installed| Installed { outcome: sockets(installed, guarded), masquerade: false };
            let (pod, host) = (of(&installed.pod), of(&installed.host));
            let affinity = installed.affinity.unwrap_or(0);
            (*frontend, InstalledFrontend::for_sockets(pod, host, affinity))
        };
        Self { frontends: frontends.map(project).collect(), cluster_ips: self.cluster_ips.clone() }
    }
}

impl InstalledFrontend {
    /// A frontend as sockets have it: nobody comes from outside.
    fn for_sockets(pod: Installed, host: Installed, affinity: u32) -> Self {
        let leads = |installed: &Installed| matches!(installed.outcome, Outcome::Backends(_));
        let affinity = (affinity != 0 && (leads(&pod) || leads(&host))).then_some(affinity);
        let outside = Installed { outcome: Outcome::Packets, masquerade: false };
        Self { pod, host, outside, affinity, allowed_sources: None, answered_here: false }
    }
}

/// Why a data plane could not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Some of a delta could not be done; the rest is in place.
    #[error("{0}")]
    Partly(Shortfall),
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
