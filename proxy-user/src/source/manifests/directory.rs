//! The files of the directory.
//!
//! In: the file system. Out: the last valid content of each manifest file, and its present errors. A file is
//! read again only if its metadata show that it may have changed.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet, HashSet},
    ffi::OsStr,
    fs,
    io::{self, Read as _},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use super::{
    ManifestError, ManifestSource,
    address::Ranges,
    last_good::LastGood,
    parse::{Item, Parsed, Unknown, parse},
};

/// A file that changed this shortly before it was read may change again without a change of its metadata.
const TOO_FRESH: Duration = Duration::from_secs(2);

/// The most bytes of a file that weir reads, enough for tens of thousands of Services. A larger file could
/// use up the machine's memory, so that the kernel would kill other processes.
const LARGEST: u64 = 64 << 20;

/// A manifest file.
#[derive(Debug, Default)]
pub(super) struct File {
    /// The objects of its last valid content.
    pub(super) items: Vec<Item>,
    /// The errors of its present content.
    pub(super) errors: Vec<ManifestError>,
    /// The warnings of its present content.
    pub(super) warnings: Vec<String>,
    stamp: Option<Stamp>,
    /// Whether it was ever valid, in this process or in a previous one.
    known: bool,
    /// Whether its last valid content could not be stored on disk.
    not_stored: bool,
}

/// Metadata that differ between two versions of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(metadata: &fs::Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    /// Whether every later change will change the stamp.
    fn is_settled(self) -> bool {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        let changed = Duration::from_secs(u64::try_from(self.changed.0).unwrap_or(0));
        now.checked_sub(changed).is_some_and(|age| age > TOO_FRESH)
    }
}

/// The directory as it was last read.
#[derive(Debug)]
pub(super) struct Directory {
    path: PathBuf,
    status_file: Option<PathBuf>,
    ranges: Ranges,
    last_good: LastGood,
    files: BTreeMap<Arc<str>, File>,
}

impl Directory {
    /// The directory of these settings, with the stored content of its files.
    pub(super) fn new(settings: &ManifestSource, last_good: LastGood) -> Self {
        let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        Self {
            path: absolute(&settings.directory),
            status_file: settings.status_file.as_deref().map(absolute),
            ranges: Ranges::new(&settings.service_ranges),
            last_good,
            files: BTreeMap::new(),
        }
    }

    /// The files, by name.
    pub(super) fn files(&self) -> &BTreeMap<Arc<str>, File> {
        &self.files
    }

    /// The errors of all files.
    pub(super) fn errors(&self) -> impl Iterator<Item = &ManifestError> {
        self.files.values().flat_map(|file| &file.errors)
    }

    /// Reads all files except those that are being written; these stay as they were.
    ///
    /// # Errors
    ///
    /// When the directory cannot be listed. Then nothing changes.
    pub(super) fn reread(&mut self, writing: &HashSet<PathBuf>) -> io::Result<()> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            let path = entry?.path();
            if is_manifest(&path) && self.status_file.as_ref() != Some(&path) {
                names.push(path);
            }
        }
        let mut before = std::mem::take(&mut self.files);
        let there = names.iter().map(|path| file_name(path).into_owned()).collect::<BTreeSet<_>>();
        for path in names {
            let name: Arc<str> = file_name(&path).into();
            let before = before.remove(&name);
            if writing.contains(&path) {
                self.files.extend(before.map(|file| (name, file)));
                continue;
            }
            let mut file = before.unwrap_or_default();
            let refreshed = file.refresh(&name, &path, &self.ranges, &mut self.last_good);
            file.recall(&name, &self.ranges, &self.last_good);
            match refreshed {
                Ok(true) => {
                    self.files.insert(name, file);
                }
                Ok(false) => {}
                Err(error) => {
                    file.stamp = None;
                    file.errors = vec![ManifestError::of_file(&name, format!("cannot be read: {error}"))];
                    self.files.insert(name, file);
                }
            }
        }
        self.last_good.retain(&there);
        self.store_late(writing);
        Ok(())
    }

    /// Stores content that could not be stored before, because a full disk may have space again. Stops at the
    /// first failure, so that the remaining files are not read in vain each time.
    fn store_late(&mut self, writing: &HashSet<PathBuf>) {
        let Self { path, ranges, last_good, files, .. } = self;
        for (name, file) in files.iter_mut().filter(|(_, file)| file.not_stored && file.errors.is_empty()) {
            let path = path.join(&**name);
            if writing.contains(&path) {
                continue;
            }
            file.stamp = None;
            if file.refresh(name, &path, ranges, last_good).is_err() || file.not_stored {
                break;
            }
        }
    }
}

impl File {
    /// Reads the file if it may have changed. Returns whether it is a file.
    fn refresh(
        &mut self,
        name: &Arc<str>,
        path: &Path,
        ranges: &Ranges,
        last_good: &mut LastGood,
    ) -> io::Result<bool> {
        let metadata = match fs::metadata(path) {
            // The file was deleted after the directory was listed. A dangling symlink still exists, and gets
            // an error.
            Err(error) if error.kind() == io::ErrorKind::NotFound && fs::symlink_metadata(path).is_err() => {
                return Ok(false);
            }
            other => other?,
        };
        if !metadata.is_file() {
            return Ok(false);
        }
        let stamp = Stamp::of(&metadata);
        if self.stamp == Some(stamp) {
            return Ok(true);
        }
        let mut bytes = Vec::new();
        fs::File::open(path)?.take(LARGEST + 1).read_to_end(&mut bytes)?;
        self.stamp = stamp.is_settled().then_some(stamp);
        if bytes.len() as u64 > LARGEST {
            let reason = format!("is larger than the limit of {LARGEST} bytes; divide it into several files");
            self.errors = vec![ManifestError::of_file(name, reason)];
            return Ok(true);
        }
        match String::from_utf8(bytes) {
            Ok(text) => {
                if self.take_over(name, parse(name, &text, ranges, Unknown::Refused)) {
                    self.not_stored = !last_good.store(name, &text);
                }
            }
            Err(error) => {
                let at = error.utf8_error().valid_up_to();
                self.errors = vec![ManifestError::of_file(name, format!("is not UTF-8 text at byte {at}"))];
            }
        }
        Ok(true)
    }

    /// Takes over the new content if it has no errors. Returns whether it has none.
    fn take_over(&mut self, name: &str, parsed: Parsed) -> bool {
        self.errors = parsed.errors;
        if !self.errors.is_empty() {
            return false;
        }
        self.warnings = parsed.warnings;
        if parsed.items.is_empty() && !self.items.is_empty() {
            let lost = self.items.len();
            self.warnings.push(format!("{name}: has no objects any more; its previous {lost} are removed"));
        }
        self.items = parsed.items;
        self.known = true;
        true
    }

    /// Takes over the stored content of a file that has errors, if this process has no valid content of it.
    fn recall(&mut self, name: &Arc<str>, ranges: &Ranges, last_good: &LastGood) {
        if std::mem::replace(&mut self.known, true) {
            return;
        }
        // The stored content was valid for the agent that stored it, which may have known other fields.
        let again = |text: String| parse(name, &text, ranges, Unknown::Ignored);
        let parsed = last_good.text(name).map(again).unwrap_or_default();
        if parsed.errors.is_empty() {
            self.items = parsed.items;
        }
    }
}

fn file_name(path: &Path) -> Cow<'_, str> {
    path.file_name().unwrap_or_default().to_string_lossy()
}

fn is_manifest(path: &Path) -> bool {
    let hidden = path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
    !hidden
        && path.extension().and_then(OsStr::to_str).is_some_and(|end| matches!(end, "yaml" | "yml" | "json"))
}
