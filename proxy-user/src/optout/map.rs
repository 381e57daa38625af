//! The pods whose sockets the programs leave alone.
//!
//! In: [`Bypassed`], by pod UID. Out: the ids of their cgroups in the pinned map `bypassed`, and how many these are in
//! `settings`. The programs look at all ancestors of the calling process's cgroup, so a pod's own cgroup stands for its
//! containers.
//!
//! ```text
//! Bypassed ──────────────▶ settle ──▶ bypassed (cgroup id), settings.bypassed
//! notices (inotify) ─────▶   ▲
//! cgroups (UID → id) ────────┘
//! ```
//!
//! The kubelet makes a pod's cgroup after it has heard of the pod, and so at about the time when the agent does. inotify
//! on the few directories in which such cgroups appear tells of a new one at once, long before a container's first
//! process is in it: a runtime makes the pod's sandbox and network first. A timer with growing pauses stands behind it
//! for as long as something is missing, for events that were lost and for directories that are not there yet.
//!
//! Nothing is wiped at a start: what the map holds stays in force until everything about pods is known.

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
/// The longest pause while something is missing.
const LONGEST: Duration = Duration::from_secs(5);
/// How often pods are looked at for clusters in them. Nothing tells of those, and a cluster takes longer to come up.
const CLUSTERS: Duration = Duration::from_secs(10);
/// Where nothing tells of new cgroups, the pause whether or not something is missing.
const BLIND: Duration = Duration::from_secs(1);

/// Why the maps cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A map is not pinned where it should be, or is of another kind.
    #[error("cannot open the pinned map `{path}`")]
    Open {
        /// Where it should be.
        path: String,
        /// What the kernel answered.
        #[source]
        source: MapError,
    },
    /// A pod's cgroup could not be written to the map.
    #[error("cannot add pod {pod} to the map `bypassed`")]
    Pod {
        /// The pod.
        pod: ObjectName,
        /// What the kernel answered; `E2BIG` says that the map is full.
        #[source]
        source: MapError,
    },
    /// The tree of cgroups could not be read.
    #[error("cannot read the cgroups below `{root}`")]
    Cgroups {
        /// Its root.
        root: String,
        /// What the kernel answered.
        #[source]
        source: io::Error,
    },
    /// There is no place for pods in the tree of cgroups.
    #[error("no directory of the kubelet's (`kubepods`) below `{root}`; is that the cgroup v2 tree?")]
    NoPods {
        /// Its root.
        root: String,
    },
    /// What a map holds could not be read or written.
    #[error("cannot use the map `{map}`")]
    Map {
        /// Its name.
        map: &'static str,
        /// What the kernel answered.
        #[source]
        source: MapError,
    },
}

/// How many pods are left alone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Census {
    /// Those in force, by [`crate::optout::Reason::as_str`].
    pub pods: BTreeMap<&'static str, usize>,
    /// Those whose cgroup is not there, or could not be written to the map.
    pub waiting: usize,
}

/// Keeps the map `bypassed` at what is to be in it.
pub struct Bypass {
    map: HashMap<MapData, u64, u32>,
    settings: Array<MapData, Settings>,
    cgroups: Cgroups,
    notices: Notices,
    /// What the map holds. Those that this run has given a pod have its name.
    ids: BTreeMap<u64, Option<ObjectName>>,
    /// Pods with clusters in them, as last seen.
    clusters: Vec<ObjectName>,
    census: watch::Sender<Census>,
    complaint: String,
}

impl Bypass {
    /// Opens the maps `bypassed` and `settings` pinned in the directory `maps`. Pods' cgroups are those below `cgroup_root`, a
    /// cgroup v2 tree.
    ///
    /// # Errors
    ///
    /// When a map is not there, or cannot be read.
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

    /// The same with maps that are open already.
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
        // Whoever made the maps, or was killed between two writes, may have left another count.
        bypass.set_count(bypass.ids.len())?;
        Ok(bypass)
    }

    /// How many pods are left alone, kept up to date.
    #[must_use]
    pub fn census(&self) -> watch::Receiver<Census> {
        self.census.subscribe()
    }

    /// Follows `wanted` until its sender is gone. What is in the maps then stays. Reads directories and writes maps,
    /// which takes milliseconds, on the thread that polls it.
    pub async fn run(mut self, mut wanted: watch::Receiver<Arc<Bypassed>>) {
        let (mut pause, mut thorough) = (SHORTEST, true);
        loop {
            let target = Arc::clone(&wanted.borrow_and_update());
            let done = self.settle(&target, thorough);
            let blind = !self.notices.working();
            let wait = match (blind, done) {
                (true, _) => BLIND,
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
                    (pause, thorough) = ((pause * 2).min(LONGEST), blind || !done);
                }
            }
        }
    }

    /// Makes the maps what `wanted` says. Answers whether nothing is missing.
    fn settle(&mut self, wanted: &Bypassed, thorough: bool) -> bool {
        let result = self.try_settle(wanted, thorough);
        self.count(wanted);
        let text = result
            .as_ref()
            .err()
            .map(|error| error as &dyn std::error::Error)
            .map_or_else(String::new, |error| {
                error.source().map_or_else(|| error.to_string(), |source| format!("{error}: {source}"))
            });
        if !text.is_empty() && text != self.complaint {
            warn!(error = text, "sockets of some pods are not left alone as they should be; trying again");
        }
        self.complaint = text;
        result.unwrap_or(false)
    }

    fn try_settle(&mut self, wanted: &Bypassed, thorough: bool) -> Result<bool, Error> {
        let look = self.look(thorough)?;
        if look.levels.is_empty() {
            // The kubelet may not have started yet. Nothing is known, so nothing is removed.
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
        // What goes makes room, and neither waits for the other.
        let removed = self.remove(|id| target.contains_key(&id), wanted.complete, &look);
        self.add(&target)?;
        removed?;
        let missing = wanted.pods.keys().any(|uid| !look.ids.contains_key(&**uid));
        self.clusters = clusters.into_values().map(|pod| pod.name).collect();
        Ok(!missing)
    }

    /// Looks until every directory was watched before it was read.
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

    /// Ids come before they count. One that cannot be added does not keep others out.
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

    /// Ids cease to count before they go. As long as not all is known, only what this run has seen in use goes.
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
                        info!(pod, cgroup = id, "leading this pod's new sockets to backends again");
                    } else {
                        debug!(pod, cgroup = id, "a pod whose sockets were left alone is gone");
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

/// What is to go has gone.
fn is_absent(error: &MapError) -> bool {
    match error {
        MapError::KeyNotFound => true,
        MapError::SyscallError(error) => error.io_error.raw_os_error() == Some(libc::ENOENT),
        _ => false,
    }
}
