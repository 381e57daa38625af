//! A limit of memory for the agents, in a control group of their own.
//!
//! In: process ids and bytes. Out: a kernel that holds them to that. With the memory controller of cgroup v2 where the
//! system has it there, else with that of v1.

use std::{fs, path::PathBuf, process};

use anyhow::{Context as _, Result};
use weir_tests::cgroup;

pub(crate) struct MemoryLimit {
    path: PathBuf,
    v2: bool,
}

impl MemoryLimit {
    /// Makes the group, without a limit.
    pub(crate) fn new() -> Result<Self> {
        static MADE: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = MADE.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let name = format!("weir-chaos-{}-{number}", process::id());
        let root = cgroup::root()?;
        let controllers = fs::read_to_string(root.join("cgroup.controllers")).unwrap_or_default();
        let v2 = controllers.split_whitespace().any(|controller| controller == "memory");
        let path = if v2 {
            fs::write(root.join("cgroup.subtree_control"), "+memory")?;
            root.join(name)
        } else {
            hierarchy()?.join(name)
        };
        fs::create_dir(&path).with_context(|| format!("making {} needs root", path.display()))?;
        Ok(Self { path, v2 })
    }

    pub(crate) fn hold(&self, id: u32) -> Result<()> {
        Ok(fs::write(self.path.join("cgroup.procs"), id.to_string())?)
    }

    /// The memory in use now, in bytes.
    pub(crate) fn used(&self) -> Result<u64> {
        let file = if self.v2 { "memory.current" } else { "memory.usage_in_bytes" };
        Ok(fs::read_to_string(self.path.join(file))?.trim().parse()?)
    }

    /// Sets the limit, or takes it away.
    pub(crate) fn set(&self, bytes: Option<u64>) -> Result<()> {
        let (file, none) = if self.v2 { ("memory.max", "max") } else { ("memory.limit_in_bytes", "-1") };
        let text = bytes.map_or_else(|| none.to_owned(), |bytes| bytes.to_string());
        Ok(fs::write(self.path.join(file), text)?)
    }
}

impl Drop for MemoryLimit {
    fn drop(&mut self) {
        // The agents are gone, or about to be: then the group stays until the machine starts again, and is empty.
        let _ = fs::remove_dir(&self.path);
    }
}

/// Where the memory controller of v1 is mounted.
fn hierarchy() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts")?;
    let memory = mounts.lines().find_map(|mount| {
        let fields: Vec<&str> = mount.split(' ').collect();
        let [_, path, "cgroup", options, ..] = fields[..] else { return None };
        options.split(',').any(|option| option == "memory").then(|| PathBuf::from(path))
    });
    memory.context("no memory controller is mounted; the memory limit needs one")
}
