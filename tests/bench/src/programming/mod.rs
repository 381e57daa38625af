//! How fast the Services of an API server are programmed, and what that costs.
//!
//! In: a cluster with a [`Workload`], subjects. Out: [`Run`]s. In each run one subject is started on a node of its own and
//! goes through the phases of [`Phase`]: it is measured until every Service works, then with single changes, then with
//! single changes while others go on all the time, then it is killed and started again. A phase that does not end in
//! bounded time ends the run, and the table says so. Rounds alternate between the subjects. Beside that, [`Recovery`]s: how
//! long a subject takes to serve again after a hostile act.

mod changes;
mod churn;
mod record;
mod recovery;
mod start;

use std::{cell::Cell, collections::BTreeSet, time::Duration};

use anyhow::{Context as _, Result, anyhow};
use tempfile::TempDir;
use tokio::runtime::Runtime;

pub use self::{
    record::{Busy, Change, Kind, Phase, Restart, Run, Start},
    recovery::{Act, Recovery},
};
use super::{
    bound::{Deadline, in_time},
    cluster::Cluster,
    kernel::{self, KernelMemory, Traffic},
    metered::Metered,
    node::Node,
    profile::{Profile, Profiler},
    report::say,
    subject::Subject,
    workload::{Numbered, Workload},
};
use weir_tests::{netns::Namespace, relay::Relay};

/// Numbers of Services that come and go start here.
const CHANGING: u32 = 400_000;
/// The longest that a process is waited for to come to rest where that is no part of a figure.
const PATIENCE: Duration = Duration::from_secs(300);

#[derive(Clone, Debug)]
pub(super) struct Plan {
    /// Starts of each subject.
    pub(super) rounds: u32,
    /// Changes of each kind while nothing else happens.
    pub(super) changes: u32,
    /// Changes of each kind while others go on.
    pub(super) busy_changes: u32,
    /// Those others in a second.
    pub(super) churn: u32,
    /// The longest that a phase may take.
    pub(super) bound: Duration,
}

/// The environment of the measurement.
pub(super) struct Programming<'a> {
    pub(super) cluster: &'a Cluster,
    pub(super) runtime: &'a Runtime,
    pub(super) control_plane: &'a Namespace,
    pub(super) plan: &'a Plan,
    pub(super) profiler: Option<&'a Profiler>,
    /// Numbers of Services that have come and gone.
    pub(super) used: &'a Cell<u32>,
}

/// A subject on its node.
struct Trial<'a> {
    node: Node<'a>,
    workload: Workload,
    /// Before the process, which it watches.
    profile: Option<Profile>,
    process: Option<Metered>,
    /// The way to the API server, where the subject does not connect to it itself.
    relay: Option<Relay>,
    directory: TempDir,
    run: Run,
}

impl Trial<'_> {
    fn process(&mut self) -> Result<&mut Metered> {
        self.process.as_mut().context("the subject does not run")
    }

    fn label(&self) -> String {
        format!("{}, round {}: {}", self.workload, self.run.round + 1, self.run.subject.name())
    }
}

impl Programming<'_> {
    /// Measures the subjects in turn with what the cluster has now.
    pub(super) fn measure(
        &self,
        workload: Workload,
        subjects: &[Subject],
        mut keep: impl FnMut(Run) -> Result<()>,
    ) -> Result<()> {
        let mut too_slow = BTreeSet::new();
        for round in 0..self.plan.rounds {
            for subject in subjects.iter().copied() {
                if too_slow.contains(&subject) {
                    continue;
                }
                let run = self.one(subject, workload, round);
                let run =
                    run.with_context(|| format!("{} with {workload}, round {round}", subject.name()))?;
                if run.unfinished.is_some() {
                    too_slow.insert(subject);
                }
                keep(run)?;
            }
        }
        Ok(())
    }

    fn one(&self, subject: Subject, workload: Workload, round: u32) -> Result<Run> {
        let mut trial = self.trial(subject, workload, round)?;
        for phase in [Phase::Start, Phase::Idle, Phase::Busy, Phase::Restart] {
            let done = match phase {
                Phase::Start => self.start(&mut trial),
                Phase::Idle => self.idle(&mut trial),
                Phase::Busy => self.busy(&mut trial),
                Phase::Restart => self.restart(&mut trial),
            };
            if in_time(done)?.is_none() {
                say(format_args!("{} did not end {phase:?} within {:?}", trial.label(), self.plan.bound));
                trial.run.unfinished = Some(phase);
                break;
            }
        }
        finish(trial)
    }

    fn trial(&self, subject: Subject, workload: Workload, round: u32) -> Result<Trial<'_>> {
        Ok(Trial {
            node: Node::new(self.control_plane)?,
            workload,
            profile: None,
            process: None,
            relay: None,
            directory: tempfile::tempdir()?,
            run: Run::new(subject, workload, round, self.plan.bound),
        })
    }

    fn deadline(&self) -> Deadline {
        Deadline::after(self.plan.bound)
    }

    fn fresh(&self) -> Numbered {
        let used = self.used.get();
        self.used.set(used + 1);
        Numbered(CHANGING + used)
    }

    fn traffic(&self) -> Result<Traffic> {
        Traffic::so_far(self.control_plane)
    }
}

/// Ends the subject and looks what it had in the kernel.
fn finish(mut trial: Trial<'_>) -> Result<Run> {
    if let Some(profile) = trial.profile.take() {
        profile.end()?;
    }
    let maps = trial.process.as_ref().map(|process| kernel::maps(process.id()));
    trial.process = None;
    let rules = kernel::cleared(&trial.node.namespace)?;
    // One that never came to the end of its start has only a part there.
    if let Some(maps) = maps
        && trial.run.start.is_some()
    {
        trial.run.kernel = Some(KernelMemory { maps: maps?, rules });
    }
    Ok(trial.run)
}

/// Waits for a probe while its subject runs.
fn join<T>(probe: std::thread::JoinHandle<Result<T>>, process: Option<&mut Metered>) -> Result<T> {
    if let Some(process) = process {
        while !probe.is_finished() {
            process.check()?;
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    probe.join().map_err(|_| anyhow!("a probe panicked"))?
}
