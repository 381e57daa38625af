//! Keeps the programs attached.
//!
//! In: the programs and their links as the plane attached them. Out: the same links again, after another
//! program removed a pin, detached a link, or made the cgroup anew. The kernel reports none of these, so a
//! thread beside the plane checks every few seconds; a check takes a few system calls for each program.

use std::{
    fs::{self, File},
    io,
    os::{fd::OwnedFd, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::sys::bpf::{self, CgroupLink};

use super::problem::Problem;

/// The attached programs, shared by the plane and the thread.
#[derive(Clone, Debug, Default)]
pub struct Links(Arc<Mutex<Attached>>);

/// The programs as the plane attached them; empty before that.
#[derive(Debug, Default)]
pub(super) struct Attached {
    cgroup_root: PathBuf,
    /// In the order of attachment.
    programs: Vec<AttachedProgram>,
}

#[derive(Debug)]
struct AttachedProgram {
    pin: PathBuf,
    program: OwnedFd,
    as_attached: CgroupLink,
    /// Whether the last check found no pin. `weir cleanup` removes the links before the maps, and a check in
    /// between must not attach the programs again.
    was_missing: bool,
}

/// How a link differs from its state at attachment.
enum Difference {
    Missing,
    Detached,
    OtherProgram(OwnedFd),
}

impl Links {
    /// Locks the links while the plane attaches its programs, so that no check runs meanwhile.
    pub(super) fn while_attaching(&self) -> MutexGuard<'_, Attached> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Repairs links that are not as they were attached. Returns their pins. `in_use` returns whether the
    /// maps still exist.
    ///
    /// # Errors
    ///
    /// When a link cannot be checked or repaired. All other links have been.
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
    pub(super) fn set(
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

    /// Removes all programs, which are about to be detached.
    pub(super) fn clear(&mut self) {
        self.programs.clear();
    }
}

impl AttachedProgram {
    fn compare(&self, cgroup: u64) -> io::Result<Option<Difference>> {
        let link = match bpf::open_pinned(&self.pin) {
            Ok(link) => link,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Some(Difference::Missing)),
            Err(error) => return Err(error),
        };
        let found = bpf::cgroup_link(&link)?;
        Ok(if found.cgroup != cgroup {
            Some(Difference::Detached)
        } else if found.program != self.as_attached.program {
            Some(Difference::OtherProgram(link))
        } else {
            None
        })
    }

    fn repair(&mut self, number: u64, cgroup: &File, in_use: impl Fn() -> bool) -> io::Result<bool> {
        let Some(difference) = self.compare(number)? else {
            self.was_missing = false;
            return Ok(false);
        };
        match difference {
            Difference::OtherProgram(link) => bpf::update_link(link, &self.program)?,
            Difference::Missing if !self.was_missing || !in_use() => {
                self.was_missing = true;
                return Ok(false);
            }
            Difference::Missing | Difference::Detached => {
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
