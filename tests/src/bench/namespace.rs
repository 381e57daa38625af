//! A network namespace without a name: it belongs to a thread and goes with it, however the benchmark ends.
//!
//! In: jobs. Out: their results, computed inside the namespace. Threads and processes that a job starts stay inside.

use std::{
    path::PathBuf,
    process::Command,
    sync::mpsc,
    thread::{self, JoinHandle},
};

use anyhow::{Context as _, ensure};
use nix::{
    sched::{CloneFlags, unshare},
    unistd::{getpid, gettid},
};

type Job = Box<dyn FnOnce() + Send>;

/// One namespace, with `lo` up.
pub(super) struct Namespace {
    jobs: Option<mpsc::Sender<Job>>,
    path: PathBuf,
    thread: Option<JoinHandle<()>>,
}

impl Namespace {
    /// Makes one.
    ///
    /// # Errors
    ///
    /// Without the right to make namespaces.
    pub(super) fn new() -> anyhow::Result<Self> {
        let (jobs, todo) = mpsc::channel::<Job>();
        let (ready, made) = mpsc::channel();
        let thread = thread::spawn(move || {
            let entered = enter_new();
            let failed = entered.is_err();
            let path = PathBuf::from(format!("/proc/{}/task/{}/ns/net", getpid(), gettid()));
            if ready.send(entered.map(|()| path)).is_ok() && !failed {
                todo.into_iter().for_each(|job| job());
            }
        });
        let path = made.recv().context("the namespace's thread ended")??;
        Ok(Self { jobs: Some(jobs), path, thread: Some(thread) })
    }

    /// A path that names the namespace for `ip … netns`.
    #[must_use]
    pub(super) fn path(&self) -> String {
        self.path.display().to_string()
    }

    /// Runs `job` inside and waits for it.
    ///
    /// # Errors
    ///
    /// When the job fails.
    pub(super) fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
    ) -> anyhow::Result<T> {
        let (done, result) = mpsc::channel();
        let job = Box::new(move || {
            // Nobody waits any more only if the benchmark is ending.
            let _ = done.send(job());
        });
        self.jobs.as_ref().and_then(|jobs| jobs.send(job).ok()).context("the namespace is closed")?;
        result.recv().context("a job in the namespace panicked")?
    }

    /// Starts a thread inside.
    ///
    /// # Errors
    ///
    /// When the namespace is closed.
    pub(super) fn spawn<T: Send + 'static>(
        &self,
        body: impl FnOnce() -> T + Send + 'static,
    ) -> anyhow::Result<JoinHandle<T>> {
        self.run(move || Ok(thread::spawn(body)))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Moves the calling thread, and what it starts from now on, into a new namespace.
///
/// # Errors
///
/// Without the right to make namespaces.
pub(super) fn enter_new() -> anyhow::Result<()> {
    unshare(CloneFlags::CLONE_NEWNET).context("making a network namespace: run this as root")?;
    command("ip link set lo up")
}

/// Runs a command given as one line, in the caller's namespace.
///
/// # Errors
///
/// When it cannot be started or fails, with what it said.
pub(super) fn command(line: &str) -> anyhow::Result<()> {
    let mut words = line.split_whitespace();
    let program = words.next().context("an empty command")?;
    let output =
        Command::new(program).args(words).output().with_context(|| format!("starting `{program}`"))?;
    ensure!(output.status.success(), "`{line}`: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}
