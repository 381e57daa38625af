//! The files of the directory.
//!
//! In: the file system. Out: for every manifest file what it last said rightly, and what is wrong with it now. A file is
//! read again only when its metadata says that it may have changed.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use super::{
    ManifestError, ManifestSource,
    address::Ranges,
    parse::{Item, Parsed, parse},
};

/// A file changed so shortly before it was read may change again without its metadata showing it.
const TOO_FRESH: Duration = Duration::from_secs(2);

/// One file.
#[derive(Debug, Default)]
pub(super) struct File {
    /// What it last said rightly.
    pub(super) items: Vec<Item>,
    /// What is wrong with it now.
    pub(super) errors: Vec<ManifestError>,
    /// What is odd about it.
    pub(super) warnings: Vec<String>,
    stamp: Option<Stamp>,
}

/// What tells one content of a file from another without reading it.
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

    /// Whether a change from now on must show in another stamp.
    fn is_settled(self) -> bool {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        let changed = Duration::from_secs(u64::try_from(self.changed.0).unwrap_or(0));
        now.checked_sub(changed).is_some_and(|age| age > TOO_FRESH)
    }
}

/// The directory as it was at the last look.
#[derive(Debug)]
pub(super) struct Directory {
    path: PathBuf,
    status_file: Option<PathBuf>,
    ranges: Ranges,
    files: BTreeMap<Arc<str>, File>,
}

impl Directory {
    pub(super) fn new(settings: &ManifestSource) -> Self {
        let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        Self {
            path: absolute(&settings.directory),
            status_file: settings.status_file.as_deref().map(absolute),
            ranges: Ranges::new(&settings.service_ranges),
            files: BTreeMap::new(),
        }
    }

    /// The files by name.
    pub(super) fn files(&self) -> &BTreeMap<Arc<str>, File> {
        &self.files
    }

    /// What is wrong with any of them.
    pub(super) fn errors(&self) -> impl Iterator<Item = &ManifestError> {
        self.files.values().flat_map(|file| &file.errors)
    }

    /// Looks at every file.
    ///
    /// # Errors
    ///
    /// When the directory cannot be listed; then everything is as it was.
    pub(super) fn look(&mut self) -> io::Result<()> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            let path = entry?.path();
            if is_manifest(&path) && self.status_file.as_ref() != Some(&path) {
                names.push(path);
            }
        }
        let mut before = std::mem::take(&mut self.files);
        for path in names {
            let name: Arc<str> = path.file_name().unwrap_or_default().to_string_lossy().into();
            let mut file = before.remove(&name).unwrap_or_default();
            match file.refresh(&name, &path, &self.ranges) {
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
        Ok(())
    }
}

impl File {
    /// Reads the file if need be. Answers whether it is a file at all.
    fn refresh(&mut self, name: &Arc<str>, path: &Path, ranges: &Ranges) -> io::Result<bool> {
        let metadata = match fs::metadata(path) {
            // Gone since the directory was listed; a symlink that leads nowhere is there, though.
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
        let bytes = fs::read(path)?;
        self.stamp = stamp.is_settled().then_some(stamp);
        match String::from_utf8(bytes) {
            Ok(text) => self.take_over(parse(name, &text, ranges)),
            Err(error) => {
                let at = error.utf8_error().valid_up_to();
                self.errors = vec![ManifestError::of_file(name, format!("is not UTF-8 text at byte {at}"))];
            }
        }
        Ok(true)
    }

    /// All of it or nothing.
    fn take_over(&mut self, parsed: Parsed) {
        self.errors = parsed.errors;
        if self.errors.is_empty() {
            self.items = parsed.items;
            self.warnings = parsed.warnings;
        }
    }
}

fn is_manifest(path: &Path) -> bool {
    let hidden = path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
    !hidden
        && path.extension().and_then(OsStr::to_str).is_some_and(|end| matches!(end, "yaml" | "yml" | "json"))
}
