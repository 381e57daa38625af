//! Whether the programs are still attached, and attaching them anew.
//!
//! In: the programs and their links as they were attached. Out: the same links again after others removed a pin, detached
//! a link, or made the cgroup anew. It is asked every few seconds by a thread beside the plane, because the kernel tells of
//! none of that; one look takes a few system calls for each program.

use std::{
    fs::{self, File},
    io,
    os::{fd::OwnedFd, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::sys::bpf::{self, CgroupLink};

use super::problem::Problem;

/// The links of the plane, shared with what keeps them up.
#[derive(Clone, Debug, Default)]
pub struct Links(Arc<Mutex<Attached>>);

/// The programs as they were attached; none before that.
#[derive(Debug, Default)]
pub(super) struct Attached {
    cgroup_root: PathBuf,
    /// In the order of attaching.
    programs: Vec<AttachedProgram>,
}

#[derive(Debug)]
struct AttachedProgram {
    pin: PathBuf,
    program: OwnedFd,
    as_attached: CgroupLink,
    /// Whether the last look found no pin. `weir cleanup` removes the links before the maps; a look in between must not
    /// bring back what it removes.
    was_missing: bool,
}

/// What a look finds instead of a link as it was attached.
enum Trouble {
    Missing,
    Detached,
    OtherProgram(OwnedFd),
}

impl Links {
    /// Keeps looks away while the plane attaches its programs.
    pub(super) fn while_attaching(&self) -> MutexGuard<'_, Attached> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Attaches anew what is no longer as it was attached, and tells which pins that were. `in_use` says whether there
    /// is still something to attach for.
    ///
    /// # Errors
    ///
    /// When a link cannot be looked at or made. All other links have been.
    pub fn repair(&self, in_use: impl Fn() -> bool) -> Result<Vec<PathBuf>, Problem> {
        let mut attached = self.while_attaching();
        let Attached { cgroup_root, programs } = &mut *attached;
        if programs.is_empty() {
            return Ok(Vec::new());
        }
        let opened = File::open(&*cgroup_root).and_then(|cgroup| Ok((cgroup.metadata()?.ino(), cgroup)));
        let (number, cgroup) =
            opened.map_err(|error| Problem::file("opening the cgroup", cgroup_root, error))?;
        let (mut repaired, mut failed) = (Vec::new(), None);
        for program in programs.iter_mut() {
            match program.repair(number, &cgroup, &in_use) {
                Ok(true) => repaired.push(program.pin.clone()),
                Ok(false) => {}
                Err(error) => {
                    failed.get_or_insert(Problem::file("attaching anew", &program.pin, error));
                }
            }
        }
        match failed {
            Some(problem) if repaired.is_empty() => Err(problem),
            _ => Ok(repaired),
        }
    }
}

impl Attached {
    /// Remembers what was attached.
    pub(super) fn are(
        &mut self,
        cgroup_root: &Path,
        programs: impl IntoIterator<Item = (PathBuf, OwnedFd)>,
    ) -> io::Result<()> {
        self.programs.clear();
        self.cgroup_root = cgroup_root.to_owned();
        for (pin, program) in programs {
            let as_attached = bpf::cgroup_link(bpf::open_pinned(&pin)?)?;
            self.programs.push(AttachedProgram { pin, program, as_attached, was_missing: false });
        }
        Ok(())
    }

    /// Forgets them: they are to go.
    pub(super) fn clear(&mut self) {
        self.programs.clear();
    }
}

impl AttachedProgram {
    fn look(&self, cgroup: u64) -> io::Result<Option<Trouble>> {
        let link = match bpf::open_pinned(&self.pin) {
            Ok(link) => link,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Some(Trouble::Missing)),
            Err(error) => return Err(error),
        };
        let found = bpf::cgroup_link(&link)?;
        Ok(if found.cgroup != cgroup {
            Some(Trouble::Detached)
        } else if found.program != self.as_attached.program {
            Some(Trouble::OtherProgram(link))
        } else {
            None
        })
    }

    fn repair(&mut self, number: u64, cgroup: &File, in_use: impl Fn() -> bool) -> io::Result<bool> {
        let Some(trouble) = self.look(number)? else {
            self.was_missing = false;
            return Ok(false);
        };
        match trouble {
            Trouble::OtherProgram(link) => bpf::update_link(link, &self.program)?,
            Trouble::Missing if !self.was_missing || !in_use() => {
                self.was_missing = true;
                return Ok(false);
            }
            Trouble::Missing | Trouble::Detached => {
                let fresh = bpf::link_to_cgroup(&self.program, cgroup, self.as_attached.attach_type)?;
                match fs::remove_file(&self.pin) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                    _ => bpf::pin(fresh, &self.pin)?,
                }
            }
        }
        self.was_missing = false;
        Ok(true)
    }
}
