//! Decides when to read the directory again.
//!
//! In: inotify events of the directory and of its parent. Out: the moment when writers seem to have finished.
//! The parent is watched for a directory that is deleted, replaced or created.

use std::{
    collections::{HashMap, HashSet},
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
    time::{Instant, timeout_at},
};
use tracing::{debug, warn};

/// The time without events before the directory is read.
const QUIET_TIME: Duration = Duration::from_millis(20);
/// How long weir waits for a file that is being written. Other files are read meanwhile.
const LONGEST_WRITE: Duration = Duration::from_secs(30);
/// How long weir waits for a directory with permanent events.
const LONGEST_WAIT: Duration = Duration::from_secs(3);

/// The meaning of an event.
enum Notice {
    /// The file was written to and is probably still open.
    Writing(PathBuf),
    /// The file was closed, moved or removed.
    Written(PathBuf),
    /// The directory itself was created, deleted or replaced.
    Directory,
    /// Any other change.
    Other,
}

/// The watch on a directory, which need not exist.
pub(super) struct Notices {
    directory: PathBuf,
    watcher: Option<RecommendedWatcher>,
    notices: UnboundedReceiver<Notice>,
    attached: Option<(u64, u64)>,
    parent: Option<(u64, u64)>,
    /// Files that are being written, each with the end of the wait for it.
    writing: HashMap<PathBuf, Instant>,
    longest: Duration,
}

impl Notices {
    pub(super) fn new(directory: &Path) -> Self {
        let directory = std::path::absolute(directory).unwrap_or_else(|_| directory.to_owned());
        let (sender, notices) = unbounded_channel();
        let about = directory.clone();
        let watcher = notify::recommended_watcher(move |event| note(&about, event, &sender));
        let watcher = watcher
            .inspect_err(
                |error| warn!(%error, "cannot watch for changed files; reading the directory every second instead"),
            )
            .ok();
        Self {
            directory,
            watcher,
            notices,
            attached: None,
            parent: None,
            writing: HashMap::new(),
            longest: LONGEST_WRITE,
        }
    }

    /// Whether the watch works, so that changes are reported.
    pub(super) fn working(&self) -> bool {
        self.attached.is_some()
    }

    /// Watches the present directory. Must be called before the directory is read, so that no change is
    /// missed in between.
    pub(super) fn attach(&mut self) {
        let Some(watcher) = &mut self.watcher else { return };
        if let Some(parent) = self.directory.parent() {
            follow(watcher, parent, &mut self.parent);
        }
        follow(watcher, &self.directory, &mut self.attached);
    }

    /// The files that are being written and must not be read yet.
    pub(super) fn writing(&mut self) -> HashSet<PathBuf> {
        while let Ok(notice) = self.notices.try_recv() {
            self.take(notice);
        }
        let now = Instant::now();
        self.writing.retain(|_, until| *until > now);
        self.writing.keys().cloned().collect()
    }

    /// Waits until there was an event and then none for a while, or until weir has waited long enough for a
    /// file that is being written. A write to a file does not end the wait.
    pub(super) async fn quiet(&mut self) {
        let mut latest: Option<Instant> = None;
        loop {
            let until =
                latest.map_or_else(|| self.longest_wait(), |latest| latest.min(Instant::now() + QUIET_TIME));
            match timeout_at(until, self.notices.recv()).await {
                Ok(Some(notice)) => {
                    if self.take(notice) {
                        latest.get_or_insert_with(|| Instant::now() + LONGEST_WAIT);
                    }
                }
                Ok(None) => return std::future::pending().await,
                Err(_) => return,
            }
        }
    }

    /// When the first file is read although it is still being written.
    fn longest_wait(&self) -> Instant {
        let never = Instant::now() + Duration::from_secs(86_400);
        self.writing.values().copied().min().unwrap_or(never)
    }

    /// Takes in an event. Returns whether there may be something new to read.
    fn take(&mut self, notice: Notice) -> bool {
        match notice {
            Notice::Writing(path) => {
                let until = Instant::now() + self.longest;
                self.writing.entry(path).or_insert(until);
                return false;
            }
            Notice::Written(path) => {
                self.writing.remove(&path);
            }
            Notice::Directory => self.attached = None,
            Notice::Other => {}
        }
        true
    }
}

/// Moves the watch to what `path` is now. `to` identifies the watched directory.
fn follow(watcher: &mut RecommendedWatcher, path: &Path, to: &mut Option<(u64, u64)>) {
    let there = fs::metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()));
    if there.is_some() && there == *to {
        return;
    }
    // Fails if it was not watched, or if the watched directory was deleted.
    let _ = watcher.unwatch(path);
    *to = there.filter(|_| {
        let watched = watcher.watch(path, RecursiveMode::NonRecursive);
        watched.inspect_err(|error| debug!(path = %path.display(), %error, "cannot watch")).is_ok()
    });
}

/// Sends the meaning of an event, unless it reports a read or another file of the parent directory.
fn note(directory: &Path, event: notify::Result<Event>, notices: &UnboundedSender<Notice>) {
    let Ok(Event { kind, mut paths, .. }) = event else {
        // The kernel lost events, so anything may have changed.
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
    // The receiver is dropped when the source ends.
    let _ = notices.send(notice);
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[tokio::test]
    async fn a_file_that_stays_open_is_read_after_a_while() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.yaml");
        let mut notices = Notices::new(directory.path());
        notices.longest = Duration::from_millis(300);
        notices.attach();
        let mut file = fs::File::create(&path).unwrap();
        file.write_all(b"# begun").unwrap();
        let open = async {
            while !notices.writing().contains(&path) {
                tokio::task::yield_now().await;
            }
            while !notices.writing().is_empty() {
                notices.quiet().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), open).await.expect("the file is read at last");

        file.write_all(b", and ended").unwrap();
        drop(file);
        let closed = async {
            notices.quiet().await;
            while !notices.writing().is_empty() {
                notices.quiet().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), closed).await.expect("the file is closed");
    }
}
