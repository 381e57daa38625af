//! A directory of manifests as a source: for nodes without a cluster, for trials, and for tests.
//!
//! In: `*.yaml`, `*.yml` and `*.json` files with Services, EndpointSlices, Nodes and ServiceCIDRs, alone or
//! in lists. Out: [`Change`]s when files change, and a [`ManifestStatus`] with the state of each file.
//!
//! ```text
//! notices ──something happened──▶ directory ──files──▶ catalog ──Change──▶ channel
//! (inotify, quiet)                (parse, check)       (merge, allocate, compare)
//! ```
//!
//! There is no API server that rejects wrong objects and sets defaults, so this room does both. A file is
//! accepted or rejected as a whole: while it has an error, its last valid content stays in force, also over
//! restarts. Allocations depend only on the content of the directory, so every node with the same directory
//! gets the same addresses, before and after a restart.

use std::{
    collections::{HashMap, HashSet},
    ops::RangeInclusive,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use ipnet::IpNet;
use tokio::sync::{mpsc, watch};
use tracing::{error, info, warn};

use super::SourceStatus;
use crate::model::{Change, Kind};

mod address;
mod allocate;
mod catalog;
mod check;
mod directory;
mod last_good;
mod notices;
mod parse;
mod status;

use catalog::Catalog;
use directory::Directory;
use last_good::LastGood;
use notices::Notices;
pub use parse::ManifestError;
pub use status::{Allocation, FileStatus, ManifestStatus, NodePortAllocation};

/// The interval of unprompted reads, because inotify does not report changes behind symlinks or on network
/// file systems.
const REREAD_INTERVAL: Duration = Duration::from_secs(30);
/// The interval of reads while the directory does not exist or cannot be watched.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// The manifests to read, and the ranges for Services that leave their addresses open.
#[derive(Clone, Debug)]
pub struct ManifestSource {
    /// The directory. Subdirectories, and files with a name that starts with a dot, are ignored.
    pub directory: PathBuf,
    /// The name of this node's Node. Other Nodes are ignored.
    pub node: String,
    /// The ranges of ClusterIPs. A family without a range needs explicit addresses.
    pub service_ranges: Vec<IpNet>,
    /// The range of NodePorts.
    pub node_ports: RangeInclusive<u16>,
    /// The file for the [`ManifestStatus`], as JSON.
    pub status_file: Option<PathBuf>,
    /// The directory for the last valid content of each file, if it is not next to the status file.
    pub last_good: Option<PathBuf>,
    /// Whether to read headless Services too, for DNS answers.
    pub names: bool,
}

/// The default directory for the last valid content. A reboot deletes it, as it deletes the kernel's state.
const LAST_GOOD: &str = "/run/weir/manifests";

impl ManifestSource {
    /// The default directory for the last valid content of the files in this directory. It is lost at a
    /// reboot.
    #[must_use]
    pub fn last_good_until_reboot(directory: &Path) -> PathBuf {
        let absolute = std::path::absolute(directory).unwrap_or_else(|_| directory.to_owned());
        Path::new(LAST_GOOD).join(format!("{:016x}", allocate::hash(&absolute.to_string_lossy())))
    }

    /// The manifests in `directory` for `node`, with Kubernetes' default ranges: 10.96.0.0/16,
    /// fd00:10:96::/112 and 30000 to 32767.
    #[must_use]
    pub fn new(directory: impl Into<PathBuf>, node: impl Into<String>) -> Self {
        use std::net::{Ipv4Addr, Ipv6Addr};
        let v4 = ipnet::Ipv4Net::new_assert(Ipv4Addr::new(10, 96, 0, 0), 16);
        let v6 = ipnet::Ipv6Net::new_assert(Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0), 112);
        Self {
            directory: directory.into(),
            node: node.into(),
            service_ranges: vec![v4.into(), v6.into()],
            node_ports: 30000..=32767,
            status_file: None,
            last_good: None,
            names: false,
        }
    }
}

/// Why manifests could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The directory cannot be read.
    #[error("cannot read the directory of manifests `{}`", path.display())]
    Directory {
        /// The path of the directory.
        path: PathBuf,
        /// The error of the read.
        #[source]
        source: std::io::Error,
    },
    /// All errors in the files.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Files(Vec<ManifestError>),
}

/// Loads the directory once, as [`watch()`] does at its start.
///
/// # Errors
///
/// When the directory cannot be read, or a file has an error.
pub fn load_once(settings: &ManifestSource) -> Result<Vec<Change>, LoadError> {
    let mut directory = Directory::new(settings, LastGood::new(None));
    directory
        .reread(&HashSet::new())
        .map_err(|source| LoadError::Directory { path: settings.directory.clone(), source })?;
    let mut catalog = Catalog::new(settings);
    let mut changes = catalog.update(directory.files());
    let errors: Vec<_> = directory.errors().chain(catalog.errors()).cloned().collect();
    if !errors.is_empty() {
        return Err(LoadError::Files(errors));
    }
    changes.extend(Kind::ALL.map(Change::Synced));
    Ok(changes)
}

/// Watches until the receiver of `changes` is dropped. Waits for a directory that does not exist. If the
/// directory is deleted, its objects stay in force.
pub async fn watch(
    settings: ManifestSource,
    changes: mpsc::Sender<Change>,
    status: Arc<SourceStatus>,
    view: watch::Sender<Arc<ManifestStatus>>,
) {
    let mut notices = Notices::new(&settings.directory);
    let mut state = State::new(settings);
    let mut synced = false;
    loop {
        notices.attach();
        let writing = notices.writing();
        let reread = tokio::task::spawn_blocking(move || {
            let found = state.reread(&writing);
            (state, found)
        });
        // This fails only after a panic or at the end of the runtime, and then there is nothing left to watch
        // with.
        let Ok((returned, found)) = reread.await else { return };
        state = returned;
        view.send_if_modified(|seen| {
            let changed = **seen != state.status;
            if changed {
                *seen = Arc::new(state.status.clone());
            }
            changed
        });
        let complete = state.status.error.is_none();
        report(&status, &state.catalog, complete, !found.is_empty());
        let first = complete && !synced;
        synced |= complete;
        let ends = first.then(|| Kind::ALL.map(Change::Synced)).into_iter().flatten();
        for change in found.into_iter().chain(ends) {
            if changes.send(change).await.is_err() {
                return;
            }
        }
        let patience = if complete && notices.working() { REREAD_INTERVAL } else { RETRY_INTERVAL };
        tokio::select! {
            () = changes.closed() => return,
            _ = tokio::time::timeout(patience, notices.quiet()) => {}
        }
    }
}

fn report(status: &SourceStatus, catalog: &Catalog, complete: bool, changed: bool) {
    for kind in Kind::ALL {
        let status = status.of(kind);
        status.set_connected(complete);
        if !complete {
            status.error();
            continue;
        }
        status.set_synced();
        if changed {
            status.event(catalog.count(kind));
        }
    }
}

/// The state between two reads of the directory.
struct State {
    settings: ManifestSource,
    directory: Directory,
    catalog: Catalog,
    status: ManifestStatus,
}

impl State {
    fn new(settings: ManifestSource) -> Self {
        let next_to_status = settings.status_file.as_deref().map(last_good::next_to);
        let last_good = LastGood::new(next_to_status.or_else(|| settings.last_good.clone()));
        let (directory, catalog) = (Directory::new(&settings, last_good), Catalog::new(&settings));
        Self { settings, directory, catalog, status: ManifestStatus::default() }
    }

    /// Reads the directory, except files that are being written, and returns the changes.
    fn reread(&mut self, writing: &HashSet<PathBuf>) -> Vec<Change> {
        let error = self.directory.reread(writing).err().map(|error| {
            format!("cannot read the directory of manifests `{}`: {error}", self.settings.directory.display())
        });
        let changes = match &error {
            None => self.catalog.update(self.directory.files()),
            Some(_) => Vec::new(),
        };
        let status = ManifestStatus::of(error, &self.directory, &self.catalog);
        self.log(&status);
        if status != self.status || self.status.files.is_empty() {
            self.save(&status);
        }
        self.status = status;
        changes
    }

    /// Logs the differences to the last status.
    fn log(&self, status: &ManifestStatus) {
        if status.error != self.status.error {
            match &status.error {
                Some(error) => error!("{error}; its last content stays in force"),
                None => {
                    info!(directory = %self.settings.directory.display(), "the directory of manifests is back")
                }
            }
        }
        let before: HashMap<&str, &FileStatus> =
            self.status.files.iter().map(|file| (file.name.as_str(), file)).collect();
        for file in &status.files {
            let known: HashSet<&String> =
                before.get(file.name.as_str()).into_iter().flat_map(|before| &before.errors).collect();
            for error in file.errors.iter().filter(|error| !known.contains(error)) {
                error!(file = file.name, still_in_force = file.objects, "{error}");
            }
            if file.errors.is_empty() && !known.is_empty() {
                info!(file = file.name, objects = file.objects, "the manifest file has no errors any more");
            }
        }
        let known: HashSet<&String> = self.status.warnings.iter().collect();
        for warning in status.warnings.iter().filter(|warning| !known.contains(warning)) {
            warn!("{warning}");
        }
    }

    fn save(&self, status: &ManifestStatus) {
        let Some(path) = &self.settings.status_file else { return };
        if let Err(error) = write_whole(path, status) {
            warn!(file = %path.display(), %error, "cannot write the status of the manifests");
        }
    }
}

/// Writes a temporary file and renames it, so that a reader never sees half a file.
fn write_whole(path: &Path, status: &ManifestStatus) -> std::io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!(".{name}.new"));
    std::fs::write(&temporary, serde_json::to_vec_pretty(status)?)?;
    std::fs::rename(&temporary, path)
}

#[cfg(test)]
mod tests;
