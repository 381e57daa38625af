//! When to look at the directory again.
//!
//! In: inotify events of the directory and of its parent. Out: the moment at which writers seem to have finished. The
//! parent is watched for a directory that is removed, replaced or not there yet.

use std::{
    collections::HashSet,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use notify::{
    Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher,
    event::{AccessKind, AccessMode, ModifyKind},
};
use tokio::{
    sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
    time::{Instant, timeout},
};
use tracing::{debug, warn};

/// So long nothing must happen before the directory is looked at.
const QUIET: Duration = Duration::from_millis(20);
/// So long a file that is being written is waited for.
const WRITER: Duration = Duration::from_secs(1);
/// So long a directory that never comes to rest is waited for.
const RESTLESS: Duration = Duration::from_secs(3);

/// One thing that happened.
enum Notice {
    /// The file was written to and is probably still open.
    Writing(PathBuf),
    /// The file was closed, moved or removed.
    Written(PathBuf),
    /// The directory itself came, went or was replaced.
    Directory,
    /// Something else.
    Other,
}

/// The watch on a directory that may not exist.
pub(super) struct Notices {
    directory: PathBuf,
    watcher: Option<RecommendedWatcher>,
    notices: UnboundedReceiver<Notice>,
    attached: Option<(u64, u64)>,
    parent: Option<(u64, u64)>,
}

impl Notices {
    pub(super) fn new(directory: &Path) -> Self {
        let directory = std::path::absolute(directory).unwrap_or_else(|_| directory.to_owned());
        let (sender, notices) = unbounded_channel();
        let about = directory.clone();
        let watcher = notify::recommended_watcher(move |event| note(&about, event, &sender));
        let watcher = watcher
            .inspect_err(
                |error| warn!(%error, "cannot watch for changed files; looking every second instead"),
            )
            .ok();
        Self { directory, watcher, notices, attached: None, parent: None }
    }

    /// Whether changes will be noticed by themselves.
    pub(super) fn working(&self) -> bool {
        self.attached.is_some()
    }

    /// Watches the directory that is there now. To be called before it is read, so that nothing is missed in between.
    pub(super) fn attach(&mut self) {
        let Some(watcher) = &mut self.watcher else { return };
        if let Some(parent) = self.directory.parent() {
            follow(watcher, parent, &mut self.parent);
        }
        follow(watcher, &self.directory, &mut self.attached);
    }

    /// Waits until something has happened and then nothing more for a while.
    pub(super) async fn settled(&mut self) {
        let mut writing = HashSet::new();
        let Some(first) = self.notices.recv().await else { return std::future::pending().await };
        self.take(first, &mut writing);
        let latest = Instant::now() + RESTLESS;
        while Instant::now() < latest {
            let patience = if writing.is_empty() { QUIET } else { WRITER };
            match timeout(patience, self.notices.recv()).await {
                Ok(Some(notice)) => self.take(notice, &mut writing),
                Ok(None) | Err(_) => return,
            }
        }
    }

    fn take(&mut self, notice: Notice, writing: &mut HashSet<PathBuf>) {
        match notice {
            Notice::Writing(path) => {
                writing.insert(path);
            }
            Notice::Written(path) => {
                writing.remove(&path);
            }
            Notice::Directory => self.attached = None,
            Notice::Other => {}
        }
    }
}

/// Moves the watch on `path` to what is there now. `to` is what it is on.
fn follow(watcher: &mut RecommendedWatcher, path: &Path, to: &mut Option<(u64, u64)>) {
    let there = fs::metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()));
    if there.is_some() && there == *to {
        return;
    }
    // Fails when it was not watched, or was and is gone.
    let _ = watcher.unwatch(path);
    *to = there.filter(|_| {
        let watched = watcher.watch(path, RecursiveMode::NonRecursive);
        watched.inspect_err(|error| debug!(path = %path.display(), %error, "cannot watch")).is_ok()
    });
}

/// Tells about an event, unless it is about reading or about something else in the parent directory.
fn note(directory: &Path, event: notify::Result<Event>, notices: &UnboundedSender<Notice>) {
    let Ok(Event { kind, mut paths, .. }) = event else {
        // Events were lost, so anything may have happened.
        let _ = notices.send(Notice::Directory);
        return;
    };
    let path = paths.pop();
    if path.as_ref().is_some_and(|path| !path.starts_with(directory)) {
        return;
    }
    let notice = match (kind, path) {
        (EventKind::Access(AccessKind::Close(AccessMode::Write)), Some(path)) => Notice::Written(path),
        (EventKind::Access(_), _) => return,
        (_, Some(path)) if path == directory => Notice::Directory,
        (EventKind::Modify(ModifyKind::Data(_)), Some(path)) => Notice::Writing(path),
        (EventKind::Remove(_) | EventKind::Modify(ModifyKind::Name(_)), Some(path)) => Notice::Written(path),
        _ => Notice::Other,
    };
    // Nobody listens any more when the source ends.
    let _ = notices.send(notice);
}
