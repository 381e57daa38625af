//! Programs that do not outlive the process that started them.
//!
//! In: programs. Out: children that the kernel kills once this process has died, or their [`ChildGuard`] was dropped; with
//! their logs, as [`Process`]es.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc::{Sender, channel},
    thread,
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

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

    /// [`ChildGuard::spawn`] with everything that the program writes added to the file `log`.
    ///
    /// # Errors
    ///
    /// When the file cannot be opened, or the program cannot be started.
    pub fn launch(&self, program: &Path, log: &Path, prepare: impl FnOnce(&mut Command)) -> Result<Process> {
        let output = File::options().create(true).append(true).open(log);
        let output = output.with_context(|| format!("opening {}", log.display()))?;
        let errors = output.try_clone()?;
        let child = self.spawn(program, |command| {
            prepare(command);
            command.stdout(output).stderr(errors);
        })?;
        let name = program.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        Ok(Process { child, name, log: log.to_owned() })
    }
}

/// A running program and its log. Dropping it kills the program as SIGKILL does.
#[derive(Debug)]
pub struct Process {
    child: Child,
    name: String,
    log: PathBuf,
}

impl Process {
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The name of its program.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that it logs to.
    #[must_use]
    pub fn log_file(&self) -> &Path {
        &self.log
    }

    /// Its whole log.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Sends it a signal.
    ///
    /// # Errors
    ///
    /// When it has ended and was waited for.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(self.child.id().try_into()?), signal)?)
    }

    /// Kills it and waits until it is gone.
    pub fn kill(&mut self) {
        end(&mut self.child);
    }

    /// How it ended, if it has.
    ///
    /// # Errors
    ///
    /// When the kernel does not report it.
    pub fn status(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Fails with the end of the log when the program has ended.
    ///
    /// # Errors
    ///
    /// See above.
    pub fn check(&mut self) -> Result<()> {
        let Some(status) = self.status()? else { return Ok(()) };
        bail!("{} ended: {status}\n{}", self.name, tail(&self.log))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
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
