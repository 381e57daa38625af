//! A BPF file system for the agents of a test to pin their maps and links in.
//!
//! In: nothing. Out: directories by paths that every process can open while this one lives. When the process ends, the
//! kernel removes everything pinned there, and every program that only a pinned link held.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use crate::mounted::Mounted;

/// A BPF file system of its own, until dropped.
#[derive(Debug)]
pub struct BpfFs(Mounted);

impl BpfFs {
    /// Mounts one.
    ///
    /// # Errors
    ///
    /// As [`Mounted::new`].
    pub fn new() -> Result<Self> {
        Mounted::new("bpf").map(Self)
    }

    /// The path of a directory in it, which is made if it is not there.
    ///
    /// # Errors
    ///
    /// When it cannot be made.
    pub fn directory(&self, name: &str) -> Result<PathBuf> {
        let path = self.0.path().join(name);
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
