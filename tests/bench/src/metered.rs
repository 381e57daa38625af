//! The costs of a running program, read from /proc.
//!
//! In: a program and where to run it. Out: its CPU time and memory, its own and its children's.

use std::{
    collections::VecDeque,
    fs,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context as _, bail};
use nix::unistd::{SysconfVar, sysconf};
use weir_tests::{netns::Namespace, process::Process};

use super::bound::Deadline;

/// The period of reading memory, for its peak.
const SAMPLING: Duration = Duration::from_millis(20);

/// A running program and a thread that samples its memory.
pub(super) struct Metered {
    process: Process,
    stop: Arc<AtomicBool>,
    peak: Arc<AtomicU64>,
    sampler: Option<JoinHandle<()>>,
}

impl Metered {
    /// Starts `program` in a namespace, with its log in `directory`.
    pub(super) fn start(
        namespace: &Namespace,
        program: &Path,
        arguments: &[String],
        directory: &Path,
    ) -> anyhow::Result<Self> {
        let log = directory.join(program.file_name().unwrap_or_default()).with_extension("log");
        let process = namespace.launch(program, &log, |command| {
            command.args(arguments);
        })?;
        let (stop, peak) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let sampler = thread::spawn({
            let (stop, peak, pid) = (Arc::clone(&stop), Arc::clone(&peak), process.id());
            move || {
                while !stop.load(Ordering::Relaxed) {
                    peak.fetch_max(tree(pid).into_iter().map(resident).sum(), Ordering::Relaxed);
                    thread::sleep(SAMPLING);
                }
            }
        });
        Ok(Self { process, stop, peak, sampler: Some(sampler) })
    }

    #[must_use]
    pub(super) fn id(&self) -> u32 {
        self.process.id()
    }

    /// Fails with the end of the log when the program has ended.
    pub(super) fn check(&mut self) -> anyhow::Result<()> {
        self.process.check()
    }

    /// CPU time so far, of the process and of its children that have ended.
    pub(super) fn cpu(&self) -> anyhow::Result<Duration> {
        let pid = self.id();
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).context("reading CPU time")?;
        let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        let fields: Vec<u64> = after_name.split_whitespace().map(|word| word.parse().unwrap_or(0)).collect();
        let [user, system, children_user, children_system] = fields[11..15] else {
            bail!("/proc/{pid}/stat is too short");
        };
        let tick = sysconf(SysconfVar::CLK_TCK)?.unwrap_or(100) as u64;
        let ticks = |count: u64| Duration::from_nanos(count * 1_000_000_000 / tick);
        // Ticks are too coarse for one change; the scheduler's own count of the threads that live is not.
        let threads: u64 = fs::read_dir(format!("/proc/{pid}/task"))?
            .filter_map(|task| fs::read_to_string(task.ok()?.path().join("schedstat")).ok())
            .filter_map(|text| text.split_whitespace().next()?.parse::<u64>().ok())
            .sum();
        Ok(ticks(user + system).max(Duration::from_nanos(threads)) + ticks(children_user + children_system))
    }

    /// Waits until the process has used next to no CPU time for a while. How much it has used in all. The while
    /// is longer than the pause that kube-proxy makes between two syncs, so what is measured next starts at once. Idle is
    /// what takes a twentieth of one CPU at most: a debug build's regular looks take a hundredth or two, and more on a
    /// machine that takes back the memory of idle programs.
    pub(super) fn settle(&mut self, deadline: Deadline) -> anyhow::Result<Duration> {
        const WINDOW: Duration = Duration::from_millis(300);
        const WINDOWS: usize = 4;
        let mut counts = VecDeque::from([self.cpu()?]);
        loop {
            deadline
                .check()
                .with_context(|| format!("waiting for {} to come to rest", self.process.name()))?;
            thread::sleep(WINDOW);
            self.check()?;
            let now = self.cpu()?;
            counts.push_back(now);
            if counts.len() <= WINDOWS {
                continue;
            }
            // The time of a thread that has ended is counted in ticks only, so the sum may go back a little.
            let used = counts.pop_front().map_or(Duration::ZERO, |before| now.saturating_sub(before));
            if used < WINDOW * WINDOWS as u32 / 20 {
                return Ok(now);
            }
        }
    }

    /// No longer looks at memory, which takes a little CPU time each time.
    pub(super) fn stop_sampling(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Memory in bytes.
    #[must_use]
    pub(super) fn memory(&self) -> Memory {
        let pid = self.id();
        Memory {
            resident: status(pid, "VmRSS:"),
            peak: status(pid, "VmHWM:"),
            peak_with_children: self.peak.load(Ordering::Relaxed).max(status(pid, "VmHWM:")),
        }
    }
}

impl Drop for Metered {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(sampler) = self.sampler.take() {
            let _ = sampler.join();
        }
    }
}

/// Memory of a process, in bytes.
#[derive(Clone, Copy, Debug, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    /// Resident now.
    pub resident: u64,
    /// The most the process itself ever had resident.
    pub peak: u64,
    /// The most it and its children were seen to have together.
    pub peak_with_children: u64,
}

fn status(pid: u32, field: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(field));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) * 1024
}

fn resident(pid: u32) -> u64 {
    status(pid, "VmRSS:")
}

/// A process and its descendants.
fn tree(pid: u32) -> Vec<u32> {
    let mut found = vec![pid];
    let mut next = 0;
    while next < found.len() {
        let tasks = fs::read_dir(format!("/proc/{}/task", found[next])).into_iter().flatten().flatten();
        for task in tasks {
            let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
            found.extend(children.split_whitespace().filter_map(|child| child.parse::<u32>().ok()));
        }
        next += 1;
    }
    found
}
