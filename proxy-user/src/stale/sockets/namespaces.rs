//! Visits every network namespace that may have translated sockets.
//!
//! In: directories with named namespaces, and the visible processes. Out: one visit of each namespace.
//!
//! No descriptor stays open between visits, because it would keep the namespace of a deleted pod alive.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    os::linux::fs::MetadataExt as _,
    path::PathBuf,
};

use nix::sched::{CloneFlags, setns};

/// The directories in which weir finds namespaces.
pub(super) struct Namespaces {
    /// Directories of container runtimes and of `ip netns`.
    pub(super) names: Vec<PathBuf>,
    /// /proc, which has the namespace of each process.
    pub(super) processes: PathBuf,
}

impl Namespaces {
    /// Runs `visit` in the caller's own namespace, then in every other one, and returns to the own one. Counts
    /// namespaces with errors, except those that vanished meanwhile.
    ///
    /// # Errors
    ///
    /// When the own namespace cannot be opened or entered again.
    pub(super) fn each(&self, mut visit: impl FnMut() -> io::Result<()>) -> io::Result<Failures> {
        let own = File::open("/proc/thread-self/ns/net")?;
        let identity = own.metadata()?;
        let mut seen = BTreeSet::from([identity.st_ino()]);
        let mut failures = Failures::default();
        failures.note(visit());
        for path in self.paths() {
            let Ok(found) = fs::metadata(&path) else { continue };
            // A file of another file system is no namespace.
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

    /// Paths that may be namespaces. One namespace may have several paths.
    fn paths(&self) -> impl Iterator<Item = PathBuf> {
        let entries = |directory: &PathBuf| fs::read_dir(directory).into_iter().flatten().flatten();
        let numeric = |name: &std::ffi::OsStr| name.as_encoded_bytes().iter().all(u8::is_ascii_digit);
        let processes = entries(&self.processes).filter(move |entry| numeric(&entry.file_name()));
        let processes = processes.map(|entry| entry.path().join("ns/net"));
        self.names.iter().flat_map(entries).map(|entry| entry.path()).chain(processes)
    }
}

/// The number of namespaces with errors, and the first error.
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
