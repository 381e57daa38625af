//! A BPF file system for the agents of a test to pin their maps and links in.
//!
//! In: nothing. Out: directories by paths that every process can open while this one lives. The file system is mounted
//! and at once unmounted again, and lives on by an open file: no other process sees it, and however the process ends, the
//! kernel takes it away, with everything pinned there and every program that only a pinned link held.

use std::{
    fs::{self, File},
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// A BPF file system of its own, until dropped.
#[derive(Debug)]
pub struct BpfFs(File);

impl BpfFs {
    /// Makes one.
    ///
    /// # Errors
    ///
    /// Without the right to mount, or without a kernel that has it.
    pub fn new() -> Result<Self> {
        let place = tempfile::Builder::new().prefix("weir-bpffs-").tempdir()?;
        mount(Some("bpf"), place.path(), Some("bpf"), MsFlags::empty(), None::<&str>)
            .context("cannot mount a BPF file system; these tests need root")?;
        let root = File::open(place.path());
        umount2(place.path(), MntFlags::MNT_DETACH)?;
        Ok(Self(root?))
    }

    /// The path of a directory in it, which is made if it is not there.
    ///
    /// # Errors
    ///
    /// When it cannot be made.
    pub fn directory(&self, name: &str) -> Result<PathBuf> {
        let path =
            PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())).join(name);
        fs::create_dir_all(&path).with_context(|| format!("making {}", path.display()))?;
        Ok(path)
    }
}

/// Removes everything pinned in a directory: programs that only their pinned links held are detached.
///
/// # Errors
///
/// When something cannot be removed.
pub fn unpin_all(directory: &Path) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}
