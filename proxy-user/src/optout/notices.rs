//! Reports changes of the pods' cgroups.
//!
//! In: inotify events of the directories in which they appear. Out: a notification that an entry was created
//! or removed there.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use notify::{Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher as _};
use tokio::sync::Notify;
use tracing::{debug, warn};

pub(super) struct Notices {
    watcher: Option<RecommendedWatcher>,
    news: Arc<Notify>,
    /// By path, with the inode number: a directory that was removed and created again has another.
    attached: BTreeMap<PathBuf, u64>,
    working: bool,
}

impl Notices {
    pub(super) fn new() -> Self {
        let news = Arc::new(Notify::new());
        let sender = Arc::clone(&news);
        let watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
            // An error, or an event of no kind, means lost events, so any entry may have changed.
            let matters = event.map_or(true, |event| {
                event.need_rescan()
                    || matches!(event.kind, EventKind::Create(_) | EventKind::Remove(_) | EventKind::Any)
            });
            if matters {
                sender.notify_one();
            }
        });
        let watcher = watcher
            .inspect_err(
                |error| warn!(%error, "cannot watch for new cgroups; searching every second instead"),
            )
            .ok();
        Self { working: watcher.is_some(), watcher, news, attached: BTreeMap::new() }
    }

    /// Whether all directories of the last call of [`Notices::attach`] are watched.
    pub(super) fn working(&self) -> bool {
        self.working
    }

    /// Watches these directories and no others. Returns whether one of them is new, so that earlier events in
    /// it may be lost.
    pub(super) fn attach(&mut self, directories: &BTreeMap<PathBuf, u64>) -> bool {
        let Some(watcher) = &mut self.watcher else { return false };
        self.attached.retain(|path, inode| {
            let stays = directories.get(path) == Some(inode);
            if !stays {
                // Fails if the directory was removed, and with it the watch.
                let _ = watcher.unwatch(path);
            }
            stays
        });
        let before = self.attached.len();
        for (path, inode) in directories {
            if self.attached.contains_key(path) {
                continue;
            }
            match watcher.watch(path, RecursiveMode::NonRecursive) {
                Ok(()) => {
                    self.attached.insert(path.clone(), *inode);
                }
                Err(error) => debug!(path = %path.display(), %error, "cannot watch for new cgroups here"),
            }
        }
        self.working = self.attached.len() == directories.len();
        self.attached.len() > before
    }

    /// Waits for an event since the last call.
    pub(super) async fn next(&self) {
        self.news.notified().await;
    }
}
