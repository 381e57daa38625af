//! What is done to names in the BPF file system, one operation at a time.
//!
//! In: paths. Out: names that are there, or are not. An agent may be killed between any two of these, and the agent that opens the
//! place next has to find its way; tests stop here.

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt as _, symlink},
    path::Path,
};

use aya::maps::Map;

use super::problem::Problem;

/// Is told of each operation on a name before it is done, for tests: one that does not return is a kill.
pub type Interrupt = Box<dyn FnMut(&Path) + Send>;

/// What does it: each operation by itself.
#[derive(Default)]
pub(super) struct Files(Option<Interrupt>);

impl Files {
    pub(super) fn interrupted_by(interrupt: Interrupt) -> Self {
        Self(Some(interrupt))
    }

    /// Says that something is about to be done to a name.
    pub(super) fn touch(&mut self, path: &Path) {
        if let Some(interrupt) = &mut self.0 {
            interrupt(path);
        }
    }

    /// Makes a directory, with those above it, for our eyes alone, if it is not there.
    pub(super) fn make_directory(&mut self, path: &Path) -> Result<(), Problem> {
        self.touch(path);
        let made = fs::DirBuilder::new().mode(0o700).recursive(true).create(path);
        made.map_err(|error| Problem::file("making the directory", path, error))
    }

    /// Pins a map.
    pub(super) fn pin(&mut self, map: &Map, path: &Path) -> Result<(), Problem> {
        self.touch(path);
        map.pin(path).map_err(|error| Problem::file("pinning", path, io::Error::other(error)))
    }

    /// Has a symbolic link lead elsewhere at one instant: to `target`, which is beside it.
    pub(super) fn lead(&mut self, link: &Path, target: &str) -> Result<(), Problem> {
        let next = link.with_file_name("next");
        self.discard(&next)?;
        self.touch(&next);
        symlink(target, &next).map_err(|error| Problem::file("making the link", &next, error))?;
        self.touch(link);
        fs::rename(&next, link).map_err(|error| Problem::file("renaming", &next, error))
    }

    /// Removes a name that may not be there.
    pub(super) fn discard(&mut self, path: &Path) -> Result<(), Problem> {
        self.touch(path);
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Problem::file("removing", path, error))
            }
            _ => Ok(()),
        }
    }

    /// Removes a directory with the maps that are pinned there. One that has anything else in it stays.
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
                tracing::warn!(directory = %path.display(), "something else is in there; the directory stays");
                Ok(())
            }
            removed => removed,
        }
    }
}
