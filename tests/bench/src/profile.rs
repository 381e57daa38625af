//! `--profile`: where weir's agent spends its time while it is measured.
//!
//! In: an agent that runs, `perf`. Out: folded stacks, one line each, as flame graph tools read them, and what the kernel
//! counted of the agent's programs. Sampling is perf's, from outside: the agent is the one that users run. perf attaches
//! to a process that has begun, so the first milliseconds of a start are missing.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use aya::sys::{Stats, enable_stats};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{hooks, report::say};

/// Samples in a second; no divisor of what timers do.
const FREQUENCY: &str = "199";

/// Profiles agents into a directory.
pub(super) struct Profiler {
    directory: PathBuf,
    /// The kernel counts as long as this is open.
    _counting: OwnedFd,
}

pub(super) struct Profile {
    name: PathBuf,
    data: PathBuf,
    perf: Child,
    agent: u32,
}

impl Profiler {
    /// Makes the directory, after a look whether perf is there.
    pub(super) fn new(directory: &Path) -> Result<Self> {
        let perf = Command::new("perf").arg("--version").output();
        let works = perf.is_ok_and(|output| output.status.success());
        ensure!(works, "--profile needs perf in PATH (on Debian the package linux-perf)");
        fs::create_dir_all(directory).with_context(|| format!("making {}", directory.display()))?;
        let counting = enable_stats(Stats::RunTime).context("making the kernel count what programs take")?;
        Ok(Self { directory: directory.to_owned(), _counting: counting })
    }

    /// Starts to take samples of an agent.
    pub(super) fn attach(&self, name: &str, agent: u32) -> Result<Profile> {
        let name = self.directory.join(name.replace(' ', "-"));
        let data = name.with_extension("data");
        let errors = File::create(name.with_extension("log"))?;
        let perf = Command::new("perf")
            // A machine in a machine seldom has hardware counters. Stacks are unwound from copies, since release builds
            // keep no frame pointers.
            .args(["record", "--event", "cpu-clock", "--freq", FREQUENCY, "--call-graph", "dwarf,16384"])
            .args(["--pid", &agent.to_string(), "--output"])
            .arg(&data)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(errors)
            .spawn()
            .context("starting perf")?;
        Ok(Profile { name, data, perf, agent })
    }
}

impl Profile {
    /// Ends it and writes what there is, while the agent still runs.
    pub(super) fn end(mut self) -> Result<()> {
        let programs = hooks::counted_all(self.agent)?;
        fs::write(self.name.with_extension("programs.json"), serde_json::to_vec_pretty(&programs)?)?;
        kill(Pid::from_raw(i32::try_from(self.perf.id())?), Signal::SIGINT)?;
        self.perf.wait()?;
        let output = Command::new("perf")
            .args(["script", "--no-inline", "--fields", "comm,ip,sym", "--input"])
            .arg(&self.data)
            .output()?;
        let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "perf script: {}", complaint.trim());
        let folded = fold(&String::from_utf8_lossy(&output.stdout));
        let path = self.name.with_extension("folded");
        fs::write(&path, folded).with_context(|| format!("writing {}", path.display()))?;
        fs::remove_file(&self.data)?;
        say(format_args!("{} has the agent's stacks", path.display()));
        Ok(())
    }
}

impl Drop for Profile {
    fn drop(&mut self) {
        // Both fail only for one that has ended already.
        let _ = self.perf.kill();
        let _ = self.perf.wait();
    }
}

/// The output of `perf script`, as `thread;outermost;…;innermost count` lines.
fn fold(script: &str) -> String {
    let mut counts: BTreeMap<String, u64> = BTreeMap::new();
    for sample in script.split("\n\n") {
        let mut lines = sample.lines().filter(|line| !line.trim().is_empty());
        let Some(thread) = lines.next() else { continue };
        let mut stack: Vec<&str> = lines.map(symbol).collect();
        stack.push(thread.trim());
        stack.reverse();
        *counts.entry(stack.join(";")).or_default() += 1;
    }
    counts.into_iter().map(|(stack, count)| format!("{stack} {count}\n")).collect()
}

/// The symbol of a line that begins with an address.
fn symbol(line: &str) -> &str {
    line.trim().split_once(' ').map_or("[unknown]", |(_, symbol)| symbol.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_with_the_same_stack_are_one_line() {
        let sample = "engine \n\t ffff01 nft_add_set_elem\n\t 55aa weir::run::engine\n";
        let other = "tokio-rt 7 \n\t 0010 [unknown]\n";
        let folded = fold(&[sample, sample, other].join("\n"));
        assert_eq!(folded, "engine;weir::run::engine;nft_add_set_elem 2\ntokio-rt 7;[unknown] 1\n");
    }
}
