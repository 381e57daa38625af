//! When to look at the pods' cgroups again.
//!
//! In: inotify events of the directories in which they appear. Out: a word that something came or went there.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use notify::{Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher as _};
use tokio::sync::Notify;
use tracing::{debug, warn};

/// The watch on some directories.
pub(super) struct Notices {
    watcher: Option<RecommendedWatcher>,
    news: Arc<Notify>,
    /// Each with its inode number: one that was made anew is another.
    attached: BTreeMap<PathBuf, u64>,
    working: bool,
}

impl Notices {
    pub(super) fn new() -> Self {
        let news = Arc::new(Notify::new());
        let sender = Arc::clone(&news);
        let watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
            // An error, or an event of no kind, is lost events: anything may have happened.
            let matters = event.map_or(true, |event| {
                event.need_rescan()
                    || matches!(event.kind, EventKind::Create(_) | EventKind::Remove(_) | EventKind::Any)
            });
            if matters {
                sender.notify_one();
            }
        });
        let watcher = watcher
            .inspect_err(|error| warn!(%error, "cannot watch for new cgroups; looking every second instead"))
            .ok();
        Self { working: watcher.is_some(), watcher, news, attached: BTreeMap::new() }
    }

    /// Whether what comes into the directories last attached is noticed by itself.
    pub(super) fn working(&self) -> bool {
        self.working
    }

    /// Watches these directories and no others. Answers whether one of them is new, so that what happened in it before
    /// may have gone unnoticed.
    pub(super) fn attach(&mut self, directories: &BTreeMap<PathBuf, u64>) -> bool {
        let Some(watcher) = &mut self.watcher else { return false };
        self.attached.retain(|path, inode| {
            let stays = directories.get(path) == Some(inode);
            if !stays {
                // Fails where the directory has gone and the watch with it.
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

    /// Waits until something has come or gone since this was last asked.
    pub(super) async fn next(&self) {
        self.news.notified().await;
    }
}
