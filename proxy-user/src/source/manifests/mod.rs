//! A directory of manifests as a source: for nodes without a cluster, for trying things out, for tests.
//!
//! In: `*.yaml`, `*.yml` and `*.json` files holding Services, EndpointSlices, Nodes and ServiceCIDRs, alone or in lists.
//! Out: [`Change`]s as files come, change and go, and a [`ManifestStatus`] that tells what became of them.
//!
//! ```text
//! notices ──something happened──▶ directory ──files──▶ catalog ──Change──▶ channel
//! (inotify, quiet)                (parse, check)       (merge, allocate, compare)
//! ```
//!
//! There is no API server here to reject nonsense or to fill in what was left out, so this room does both. A file counts
//! as a whole: while anything in it is wrong, what it last said rightly stays in force, over restarts too. What is allocated depends on the
//! directory's content alone, so every node with the same directory comes to the same addresses, now and after a
//! restart.

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
mod kept;
mod notices;
mod parse;
mod status;

use catalog::Catalog;
use directory::Directory;
use kept::Kept;
use notices::Notices;
pub use parse::ManifestError;
pub use status::{Allocation, FileStatus, ManifestStatus, NodePortAllocation};

/// How often to look without having been told to: inotify does not see through symlinks, nor over the network.
const LOOK_ANYWAY: Duration = Duration::from_secs(30);
/// How often to look while the directory is not there or cannot be watched.
const LOOK_FOR_DIRECTORY: Duration = Duration::from_secs(1);

/// Which manifests, and what to give Services that leave the choice to the API server.
#[derive(Clone, Debug)]
pub struct ManifestSource {
    /// The directory. Directories in it and files whose names start with a dot are not looked at.
    pub directory: PathBuf,
    /// The name of the Node this agent runs on; other Nodes are ignored.
    pub node: String,
    /// Where ClusterIPs are taken from. A family without a range can only be had explicitly.
    pub service_ranges: Vec<IpNet>,
    /// Where NodePorts are taken from.
    pub node_ports: RangeInclusive<u16>,
    /// A file to keep the [`ManifestStatus`] in, as JSON.
    pub status_file: Option<PathBuf>,
    /// Where to keep what each file last said rightly, if not beside the status file.
    pub last_good: Option<PathBuf>,
    /// Whether headless Services are wanted too, for their names.
    pub names: bool,
}

/// Where to keep what files last said rightly where nothing else is chosen: what is programmed does not live longer either.
const LAST_GOOD: &str = "/run/weir/manifests";

impl ManifestSource {
    /// A place to keep what the files of this directory last said rightly, for as long as the machine runs.
    #[must_use]
    pub fn place_until_reboot(directory: &Path) -> PathBuf {
        let absolute = std::path::absolute(directory).unwrap_or_else(|_| directory.to_owned());
        Path::new(LAST_GOOD).join(format!("{:016x}", allocate::hash(&absolute.to_string_lossy())))
    }

    /// The manifests in `directory` for `node`, with the ranges Kubernetes has by default: 10.96.0.0/16,
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
        /// The directory.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// Something in the files is wrong; this is all of it.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Files(Vec<ManifestError>),
}

/// Loads the directory once, as [`watch()`] would at its start.
///
/// # Errors
///
/// When the directory cannot be read, or anything in it is wrong.
pub fn load_once(settings: &ManifestSource) -> Result<Vec<Change>, LoadError> {
    let mut directory = Directory::new(settings, Kept::new(None));
    directory
        .look(&HashSet::new())
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

/// Watches until the receiver of `changes` is gone. A directory that is not there is waited for, and one that vanishes
/// takes nothing with it.
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
        let look = tokio::task::spawn_blocking(move || {
            let found = state.look(&writing);
            (state, found)
        });
        // Only a panic or the end of the runtime gets in the way, and neither leaves anything to watch with.
        let Ok((returned, found)) = look.await else { return };
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
        let patience = if complete && notices.working() { LOOK_ANYWAY } else { LOOK_FOR_DIRECTORY };
        tokio::select! {
            () = changes.closed() => return,
            _ = tokio::time::timeout(patience, notices.settled()) => {}
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

/// What is known of the directory between two looks.
struct State {
    settings: ManifestSource,
    directory: Directory,
    catalog: Catalog,
    status: ManifestStatus,
}

impl State {
    fn new(settings: ManifestSource) -> Self {
        let beside = settings.status_file.as_deref().map(kept::beside);
        let kept = Kept::new(beside.or_else(|| settings.last_good.clone()));
        let (directory, catalog) = (Directory::new(&settings, kept), Catalog::new(&settings));
        Self { settings, directory, catalog, status: ManifestStatus::default() }
    }

    /// Looks at the directory, but not at files that are being written, and answers what has changed.
    fn look(&mut self, writing: &HashSet<PathBuf>) -> Vec<Change> {
        let error = self.directory.look(writing).err().map(|error| {
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

    /// Says what was not said at the last look.
    fn log(&self, status: &ManifestStatus) {
        if status.error != self.status.error {
            match &status.error {
                Some(error) => error!("{error}; what it held stays in force"),
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
                info!(file = file.name, objects = file.objects, "the manifest file is good again");
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

/// Writes beside the file and renames, so that nobody reads half of it.
fn write_whole(path: &Path, status: &ManifestStatus) -> std::io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let beside = path.with_file_name(format!(".{name}.new"));
    std::fs::write(&beside, serde_json::to_vec_pretty(status)?)?;
    std::fs::rename(&beside, path)
}

#[cfg(test)]
mod tests;
