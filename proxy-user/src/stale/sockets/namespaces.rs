//! Every network namespace in which sockets may have been led to a backend.
//!
//! In: a directory of named namespaces, the processes that can be seen. Out: each namespace visited once.
//!
//! Nothing is kept open from one visit to the next: a socket of ours would keep the namespace of a pod that is gone.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    os::linux::fs::MetadataExt as _,
    path::PathBuf,
};

use nix::sched::{CloneFlags, setns};

/// Where to look for namespaces.
pub(super) struct Namespaces {
    /// Where CNI's runtimes and `ip netns` name them.
    pub(super) names: Vec<PathBuf>,
    /// Where processes tell theirs.
    pub(super) processes: PathBuf,
}

impl Namespaces {
    /// Runs `visit` in the caller's own namespace, then in every other one, and comes back. Says of how many something
    /// went wrong and what did first; those that vanished meanwhile do not count.
    ///
    /// # Errors
    ///
    /// When the own namespace cannot be told, or not be entered again.
    pub(super) fn each(&self, mut visit: impl FnMut() -> io::Result<()>) -> io::Result<Failures> {
        let own = File::open("/proc/thread-self/ns/net")?;
        let identity = own.metadata()?;
        let mut seen = BTreeSet::from([identity.st_ino()]);
        let mut failures = Failures::default();
        failures.note(visit());
        for path in self.paths() {
            let Ok(found) = fs::metadata(&path) else { continue };
            // A file of another file system is a name without a namespace.
            if found.st_dev() != identity.st_dev() || !seen.insert(found.st_ino()) {
                continue;
            }
            let Ok(namespace) = File::open(&path) else { continue };
            failures
                .note(setns(&namespace, CloneFlags::CLONE_NEWNET).map_err(Into::into).and_then(|()| visit()));
        }
        setns(own, CloneFlags::CLONE_NEWNET)?;
        Ok(failures)
    }

    /// What may be a namespace, each perhaps many times.
    fn paths(&self) -> impl Iterator<Item = PathBuf> {
        let entries = |directory: &PathBuf| fs::read_dir(directory).into_iter().flatten().flatten();
        let numeric = |name: &std::ffi::OsStr| name.as_encoded_bytes().iter().all(u8::is_ascii_digit);
        let processes = entries(&self.processes).filter(move |entry| numeric(&entry.file_name()));
        let processes = processes.map(|entry| entry.path().join("ns/net"));
        self.names.iter().flat_map(entries).map(|entry| entry.path()).chain(processes)
    }
}

/// In how many namespaces something went wrong.
#[derive(Debug, Default)]
pub(super) struct Failures {
    pub(super) count: usize,
    pub(super) first: Option<io::Error>,
}

impl Failures {
    fn note(&mut self, result: io::Result<()>) {
        if let Err(error) = result {
            self.count += 1;
            self.first.get_or_insert(error);
        }
    }
}
