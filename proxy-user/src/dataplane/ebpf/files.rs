//! Operations on names in the BPF file system.
//!
//! In: paths. Out: created, renamed or removed names. An agent may be killed between any two operations, and
//! the next agent has to continue from there; tests stop at each operation.

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt as _, symlink},
    path::Path,
};

use aya::maps::Map;

use super::problem::Problem;

/// Called before each operation on a name, for tests: one that does not return acts as a kill.
pub type Interrupt = Box<dyn FnMut(&Path) + Send>;

/// Runs the operations. The interrupt is `None` outside of tests.
#[derive(Default)]
pub(super) struct Files(Option<Interrupt>);

impl Files {
    pub(super) fn interrupted_by(interrupt: Interrupt) -> Self {
        Self(Some(interrupt))
    }

    /// Calls the interrupt before an operation on a name.
    pub(super) fn touch(&mut self, path: &Path) {
        if let Some(interrupt) = &mut self.0 {
            interrupt(path);
        }
    }

    /// Makes a directory and its parents, readable by the owner only, if it does not exist.
    pub(super) fn make_directory(&mut self, path: &Path) -> Result<(), Problem> {
        self.touch(path);
        let made = fs::DirBuilder::new().mode(0o700).recursive(true).create(path);
        made.map_err(|error| Problem::file("making the directory", path, error))
    }

    pub(super) fn pin(&mut self, map: &Map, path: &Path) -> Result<(), Problem> {
        self.touch(path);
        map.pin(path).map_err(|error| Problem::file("pinning", path, io::Error::other(error)))
    }

    /// Replaces a symbolic link atomically; `target` is in the same directory.
    pub(super) fn replace_link(&mut self, link: &Path, target: &str) -> Result<(), Problem> {
        let next = link.with_file_name("next");
        self.discard(&next)?;
        self.touch(&next);
        symlink(target, &next).map_err(|error| Problem::file("making the link", &next, error))?;
        self.touch(link);
        fs::rename(&next, link).map_err(|error| Problem::file("renaming", &next, error))
    }

    /// Removes a name if it exists.
    pub(super) fn discard(&mut self, path: &Path) -> Result<(), Problem> {
        self.touch(path);
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Problem::file("removing", path, error))
            }
            _ => Ok(()),
        }
    }

    /// Removes a directory and the maps that are pinned there. A directory with anything else in it stays.
    pub(super) fn remove_directory(&mut self, path: &Path) -> io::Result<()> {
        for entry in fs::read_dir(path)? {
            let entry = entry?;
            if !entry.file_type()?.is_dir() {
                self.touch(&entry.path());
                fs::remove_file(entry.path())?;
            }
        }
        self.touch(path);
        match fs::remove_dir(path) {
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {
                tracing::warn!(directory = %path.display(), "directory not removed, because it is not empty");
                Ok(())
            }
            removed => removed,
        }
    }
}
