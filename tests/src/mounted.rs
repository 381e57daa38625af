//! File systems that no mount namespace of a process shows.
//!
//! In: a kind of file system. Out: a directory of it, by a path that every process can open while this one lives. A
//! thread mounts it in a mount namespace of its own, which ends with the thread; an open file keeps the file system.
//! However the process ends, the kernel removes it.

use std::{
    fs::File,
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
    thread,
};

use anyhow::{Context as _, Result, anyhow};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};

/// A mounted file system, until dropped.
#[derive(Debug)]
pub struct Mounted(File);

impl Mounted {
    /// Mounts a file system that needs no device, such as `bpf` or `cgroup2`.
    ///
    /// # Errors
    ///
    /// Without the right to mount, or on a kernel without this file system.
    pub fn new(kind: &'static str) -> Result<Self> {
        let place = tempfile::Builder::new().prefix("weir-mount-").tempdir()?;
        let path = place.path().to_owned();
        let mounting =
            thread::Builder::new().name(format!("mount-{kind}")).spawn(move || open(kind, &path))?;
        let root = mounting.join().map_err(|_| anyhow!("the thread that mounts panicked"))?;
        root.map(Self)
            .with_context(|| format!("cannot mount a file system of the kind {kind}; this needs root"))
    }

    /// Its root directory.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd()))
    }
}

fn open(kind: &str, place: &Path) -> Result<File> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    // A mount in a namespace that shares mounts with others would show there.
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
    mount(Some(kind), place, Some(kind), MsFlags::empty(), None::<&str>)?;
    let root = File::open(place);
    umount2(place, MntFlags::MNT_DETACH)?;
    Ok(root?)
}
