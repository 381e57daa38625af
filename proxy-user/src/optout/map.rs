//! Writes the pods whose sockets the programs leave alone.
//!
//! In: [`Bypassed`], by pod UID. Out: the ids of their cgroups in the pinned map `bypassed`, and the number
//! of entries in `settings`. The programs look up all ancestors of the calling process's cgroup, so the entry
//! of a pod's cgroup covers its containers.
//!
//! ```text
//! Bypassed ──────────▶ update_map ──▶ bypassed (cgroup id), settings.bypassed
//! notices (inotify) ──▶    ▲
//! cgroups (UID → id) ──────┘
//! ```
//!
//! The kubelet creates a pod's cgroup after it has received the pod, so at about the same time as the agent.
//! inotify on the few directories where such cgroups appear reports a new one at once, long before a
//! container's first process is in it: a runtime first creates the pod's sandbox and network. For lost events
//! and for directories that do not exist yet, a timer with growing pauses runs as long as a cgroup is
//! missing.
//!
//! At a start nothing is removed: the entries of the map stay until the agent has the state of all pods.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::Path,
    sync::Arc,
    time::Duration,
};

use aya::maps::{Array, HashMap, MapData, MapError};
use proxy_ebpf::Settings;
use tokio::sync::watch;
use tracing::{debug, info, warn};

use super::{
    Bypassed, BypassedPod, Reason,
    cgroups::{Cgroups, Look},
    notices::Notices,
};
use crate::model::ObjectName;

/// The first pause of the timer, doubled up to [`LONGEST`].
const SHORTEST: Duration = Duration::from_millis(100);
/// The longest pause while a cgroup is missing.
const LONGEST: Duration = Duration::from_secs(5);
/// The period of searching pods for clusters. No event reports clusters, and a cluster takes longer to start.
const CLUSTERS: Duration = Duration::from_secs(10);
/// The pause if inotify does not work, whether or not a cgroup is missing.
const WITHOUT_NOTICES: Duration = Duration::from_secs(1);

/// Why sockets of some pods are not left alone.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A map is not pinned at its path, or is of another type.
    #[error("cannot open the pinned map `{path}`")]
    Open {
        /// The path.
        path: String,
        /// The kernel's error.
        #[source]
        source: MapError,
    },
    /// The cgroup of a pod could not be added to the map.
    #[error("cannot add pod {pod} to the map `bypassed`")]
    Pod {
        /// Its name.
        pod: ObjectName,
        /// The kernel's error; `E2BIG` means that the map is full.
        #[source]
        source: MapError,
    },
    /// The cgroup tree could not be read.
    #[error("cannot read the cgroups below `{root}`")]
    Cgroups {
        /// The root of the tree.
        root: String,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// The cgroup tree has no directory for pods.
    #[error("the kubelet has no directory `kubepods` below `{root}`; is that the cgroup v2 tree?")]
    NoPods {
        /// The root of the tree.
        root: String,
    },
    /// An entry of a map could not be read or written.
    #[error("cannot use the map `{map}`")]
    Map {
        /// The name of the map.
        map: &'static str,
        /// The kernel's error.
        #[source]
        source: MapError,
    },
}

/// The numbers of pods that opted out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Census {
    /// Pods whose sockets are left alone, by [`crate::optout::Reason::as_str`].
    pub pods: BTreeMap<&'static str, usize>,
    /// Pods whose cgroup does not exist, or could not be added to the map.
    pub waiting: usize,
}

/// Keeps the map `bypassed` up to date.
pub struct Bypass {
    map: HashMap<MapData, u64, u32>,
    settings: Array<MapData, Settings>,
    cgroups: Cgroups,
    notices: Notices,
    /// The entries of the map. Those that this process has assigned to a pod have its name.
    ids: BTreeMap<u64, Option<ObjectName>>,
    /// Pods with clusters in them, as of the last search.
    clusters: Vec<ObjectName>,
    census: watch::Sender<Census>,
    complaint: String,
}

impl Bypass {
    /// Opens the maps `bypassed` and `settings` that are pinned in the directory `maps`. The pods' cgroups
    /// are below `cgroup_root`, a cgroup v2 tree.
    ///
    /// # Errors
    ///
    /// When a map does not exist, or cannot be read.
    pub fn open(maps: &Path, cgroup_root: &Path) -> Result<Self, Error> {
        let pinned = |name: &str| {
            let path = maps.join(name);
            let data = MapData::from_pin(&path);
            data.map_err(|source| Error::Open { path: path.display().to_string(), source })
        };
        let map = aya::maps::Map::HashMap(pinned("bypassed")?);
        let map = map.try_into().map_err(|source| Error::Map { map: "bypassed", source })?;
        let settings = aya::maps::Map::Array(pinned("settings")?);
        let settings = settings.try_into().map_err(|source| Error::Map { map: "settings", source })?;
        Self::with_maps(map, settings, cgroup_root)
    }

    /// The same with open maps.
    ///
    /// # Errors
    ///
    /// When a map cannot be read.
    pub fn with_maps(
        map: HashMap<MapData, u64, u32>,
        settings: Array<MapData, Settings>,
        cgroup_root: &Path,
    ) -> Result<Self, Error> {
        let ids = map.keys().map(|id| id.map(|id| (id, None))).collect::<Result<_, _>>();
        let mut bypass = Self {
            ids: ids.map_err(|source| Error::Map { map: "bypassed", source })?,
            map,
            settings,
            cgroups: Cgroups::new(cgroup_root),
            notices: Notices::new(),
            clusters: Vec::new(),
            census: watch::Sender::default(),
            complaint: String::new(),
        };
        // An agent that was killed between two writes may have left another number.
        bypass.set_count(bypass.ids.len())?;
        Ok(bypass)
    }

    /// The numbers of pods, kept up to date.
    #[must_use]
    pub fn census(&self) -> watch::Receiver<Census> {
        self.census.subscribe()
    }

    /// Follows `wanted` until its sender is dropped. The entries of the maps then stay. This reads
    /// directories and writes maps, which takes milliseconds, on the thread that polls it.
    pub async fn run(mut self, mut wanted: watch::Receiver<Arc<Bypassed>>) {
        let (mut pause, mut thorough) = (SHORTEST, true);
        loop {
            let target = Arc::clone(&wanted.borrow_and_update());
            let done = self.update_map(&target, thorough);
            let without_notices = !self.notices.working();
            let wait = match (without_notices, done) {
                (true, _) => WITHOUT_NOTICES,
                (false, true) => CLUSTERS,
                (false, false) => pause,
            };
            tokio::select! {
                changed = wanted.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    (pause, thorough) = (SHORTEST, false);
                }
                () = self.notices.next() => (pause, thorough) = (SHORTEST, false),
                () = tokio::time::sleep(wait) => {
                    (pause, thorough) = ((pause * 2).min(LONGEST), without_notices || !done);
                }
            }
        }
    }

    /// Updates the maps to `wanted`. Returns whether no cgroup is missing.
    fn update_map(&mut self, wanted: &Bypassed, thorough: bool) -> bool {
        let result = self.try_update_map(wanted, thorough);
        self.count(wanted);
        let text = result
            .as_ref()
            .err()
            .map(|error| error as &dyn std::error::Error)
            .map_or_else(String::new, |error| {
                error.source().map_or_else(|| error.to_string(), |source| format!("{error}: {source}"))
            });
        if !text.is_empty() && text != self.complaint {
            warn!(error = text, "some pods opted out, but their sockets are not left alone; trying again");
        }
        self.complaint = text;
        result.unwrap_or(false)
    }

    fn try_update_map(&mut self, wanted: &Bypassed, thorough: bool) -> Result<bool, Error> {
        let look = self.look(thorough)?;
        if look.levels.is_empty() {
            // The kubelet may not have started yet, so nothing is removed.
            let root = self.cgroups.root().display().to_string();
            return if wanted.pods.is_empty() { Ok(true) } else { Err(Error::NoPods { root }) };
        }
        let clusters = look.with_clusters().map_err(|source| self.unreadable(source))?;
        let clusters = clusters.into_iter().filter_map(|uid| {
            let name = wanted.undecided.get(uid)?.clone();
            Some((uid, BypassedPod { name, reason: Reason::Cluster }))
        });
        let clusters: BTreeMap<&str, BypassedPod> = clusters.collect();
        let pods = wanted.pods.iter().map(|(uid, pod)| (&**uid, pod));
        let all = pods.chain(clusters.iter().map(|(uid, pod)| (*uid, pod)));
        let target: BTreeMap<u64, &BypassedPod> =
            all.filter_map(|(uid, pod)| Some((*look.ids.get(uid)?, pod))).collect();
        // A removal makes room for additions. A failure of one does not prevent the other.
        let removed = self.remove(|id| target.contains_key(&id), wanted.complete, &look);
        self.add(&target)?;
        removed?;
        let missing = wanted.pods.keys().any(|uid| !look.ids.contains_key(&**uid));
        self.clusters = clusters.into_values().map(|pod| pod.name).collect();
        Ok(!missing)
    }

    /// Reads the tree until every directory was watched before it was read.
    fn look(&mut self, thorough: bool) -> Result<Look, Error> {
        loop {
            let look = self.cgroups.look(thorough).map_err(|source| self.unreadable(source))?;
            if !self.notices.attach(&look.levels) {
                return Ok(look);
            }
        }
    }

    fn unreadable(&self, source: io::Error) -> Error {
        Error::Cgroups { root: self.cgroups.root().display().to_string(), source }
    }

    /// Adds ids first and then raises the number of entries. An id that cannot be added does not prevent
    /// others.
    fn add(&mut self, target: &BTreeMap<u64, &BypassedPod>) -> Result<(), Error> {
        let mut result = Ok(());
        for (&id, pod) in target {
            if let Some(owner) = self.ids.get_mut(&id) {
                *owner = Some(pod.name.clone());
                continue;
            }
            match self.map.insert(id, 1, 0) {
                Ok(()) => {
                    info!(pod = %pod.name, reason = %pod.reason, cgroup = id, "leaving this pod's sockets alone");
                    self.ids.insert(id, Some(pod.name.clone()));
                }
                Err(source) => result = Err(Error::Pod { pod: pod.name.clone(), source }),
            }
        }
        self.set_count(self.ids.len())?;
        result
    }

    /// Lowers the number of entries first and then removes ids. As long as the state of all pods is not
    /// complete, this removes only entries that this process has assigned to a pod.
    fn remove(&mut self, stays: impl Fn(u64) -> bool, complete: bool, look: &Look) -> Result<(), Error> {
        let all = self.ids.iter();
        let gone = all.filter(|(id, owner)| !stays(**id) && (complete || owner.is_some()));
        let gone: Vec<u64> = gone.map(|(id, _)| *id).collect();
        self.set_count(self.ids.len() - gone.len())?;
        let mut result = Ok(());
        for id in gone {
            match self.map.remove(&id) {
                Err(source) if !is_absent(&source) => result = Err(Error::Map { map: "bypassed", source }),
                _ => {
                    let pod = self.ids.remove(&id).flatten().map(tracing::field::display);
                    if look.ids.values().any(|there| *there == id) {
                        info!(pod, cgroup = id, "translating this pod's new sockets again");
                    } else {
                        debug!(pod, cgroup = id, "removed a pod whose sockets were left alone");
                    }
                }
            }
        }
        self.set_count(self.ids.len())?;
        result
    }

    fn set_count(&mut self, count: usize) -> Result<(), Error> {
        let failed = |source| Error::Map { map: "settings", source };
        let settings = self.settings.get(&Settings::PODS, 0).map_err(failed)?;
        let bypassed = u32::try_from(count).unwrap_or(u32::MAX);
        if settings.bypassed == bypassed {
            return Ok(());
        }
        self.settings.set(Settings::PODS, Settings { bypassed, ..settings }, 0).map_err(failed)
    }

    fn count(&self, wanted: &Bypassed) {
        let in_force: BTreeSet<_> = self.ids.values().flatten().collect();
        let mut census = Census::default();
        for pod in wanted.pods.values() {
            if in_force.contains(&pod.name) {
                *census.pods.entry(pod.reason.as_str()).or_default() += 1;
            } else {
                census.waiting += 1;
            }
        }
        let clusters = self.clusters.iter().filter(|name| in_force.contains(name)).count();
        if clusters > 0 {
            census.pods.insert(Reason::Cluster.as_str(), clusters);
        }
        self.census.send_if_modified(|known| {
            let changed = *known != census;
            *known = census;
            changed
        });
    }
}

/// Whether an entry to remove does not exist.
fn is_absent(error: &MapError) -> bool {
    match error {
        MapError::KeyNotFound => true,
        MapError::SyscallError(error) => error.io_error.raw_os_error() == Some(libc::ENOENT),
        _ => false,
    }
}
