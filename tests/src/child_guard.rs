//! Programs that do not outlive the process that started them.
//!
//! In: programs. Out: children that the kernel kills once this process has died, or their [`ChildGuard`] was dropped.

use std::{
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc::{Sender, channel},
    thread,
};

use anyhow::{Context as _, Result, ensure};

type Job = Box<dyn FnOnce() + Send>;

/// A thread that starts programs: the kernel's death signal is bound to the thread that did, not to the process.
#[derive(Debug)]
pub struct ChildGuard {
    label: String,
    jobs: Sender<Job>,
}

impl ChildGuard {
    /// Starts the thread in the caller's network namespace and runs `prepare` on it first; programs find themselves
    /// where that leaves it.
    ///
    /// # Errors
    ///
    /// When the thread cannot be started, or `prepare` fails.
    pub fn start<T: Send + 'static>(
        label: &str,
        prepare: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<(Self, T)> {
        let (ready, prepared) = channel();
        let (jobs, todo) = channel::<Job>();
        thread::Builder::new().name(format!("keep-{label}")).spawn(move || {
            if ready.send(prepare()).is_ok() {
                todo.into_iter().for_each(|job| job());
            }
        })?;
        Ok((Self { label: label.to_owned(), jobs }, prepared.recv()??))
    }

    /// Starts a program, to which `prepare` gives arguments and files.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub fn spawn(&self, program: &Path, prepare: impl FnOnce(&mut Command)) -> Result<Child> {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(program).stdin(Stdio::null());
        prepare(&mut command);
        let (answer, child) = channel();
        let job: Job = Box::new(move || drop(answer.send(command.spawn())));
        ensure!(self.jobs.send(job).is_ok(), "the thread that starts programs for {} is gone", self.label);
        child.recv()?.with_context(|| format!("cannot start setpriv {} in {}", program.display(), self.label))
    }
}

/// Kills a program and waits until it is gone.
pub fn end(process: &mut Child) {
    // Both fail only for a process that has ended already.
    let _ = process.kill();
    let _ = process.wait();
}

/// The end of a log file, for messages. Before it come the last warnings and errors, which a start with many servers
/// would push out of it.
#[must_use]
pub fn tail(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    let (before, end) = lines.split_at(lines.len().saturating_sub(30));
    let troubles: Vec<&str> =
        before.iter().copied().filter(|line| line.contains(" WARN ") || line.contains(" ERROR ")).collect();
    [&troubles[troubles.len().saturating_sub(20)..], end].concat().join("\n")
}
