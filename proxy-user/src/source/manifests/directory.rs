//! The files of the directory.
//!
//! In: the file system. Out: for every manifest file what it last said rightly, and what is wrong with it now. A file is
//! read again only when its metadata says that it may have changed.

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
    kept::Kept,
    parse::{Item, Parsed, Unknown, parse},
};

/// A file changed so shortly before it was read may change again without its metadata showing it.
const TOO_FRESH: Duration = Duration::from_secs(2);

/// The most bytes of a file that are read: tens of thousands of Services. Beyond it a file could have the kernel kill other
/// processes for want of memory.
const LARGEST: u64 = 64 << 20;

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
    /// Whether it was ever right, in this process or, as far as is kept, in one before.
    known: bool,
    /// Whether what it says could not be kept.
    unkept: bool,
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
    kept: Kept,
    files: BTreeMap<Arc<str>, File>,
}

impl Directory {
    /// The directory of these settings, with what is kept of its files.
    pub(super) fn new(settings: &ManifestSource, kept: Kept) -> Self {
        let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        Self {
            path: absolute(&settings.directory),
            status_file: settings.status_file.as_deref().map(absolute),
            ranges: Ranges::new(&settings.service_ranges),
            kept,
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

    /// Looks at every file but those that are being written: these are as they were.
    ///
    /// # Errors
    ///
    /// When the directory cannot be listed; then everything is as it was.
    pub(super) fn look(&mut self, writing: &HashSet<PathBuf>) -> io::Result<()> {
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
            let refreshed = file.refresh(&name, &path, &self.ranges, &mut self.kept);
            file.recall(&name, &self.ranges, &self.kept);
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
        self.kept.retain(&there);
        self.keep_late(writing);
        Ok(())
    }

    /// Keeps what could not be kept before, because a disk that was full may have room again. Ends with the first file
    /// that still cannot be kept: the others would be read in vain at every look.
    fn keep_late(&mut self, writing: &HashSet<PathBuf>) {
        let Self { path, ranges, kept, files, .. } = self;
        for (name, file) in files.iter_mut().filter(|(_, file)| file.unkept && file.errors.is_empty()) {
            let path = path.join(&**name);
            if writing.contains(&path) {
                continue;
            }
            file.stamp = None;
            if file.refresh(name, &path, ranges, kept).is_err() || file.unkept {
                break;
            }
        }
    }
}

impl File {
    /// Reads the file if need be. Answers whether it is a file at all.
    fn refresh(
        &mut self,
        name: &Arc<str>,
        path: &Path,
        ranges: &Ranges,
        kept: &mut Kept,
    ) -> io::Result<bool> {
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
        let mut bytes = Vec::new();
        fs::File::open(path)?.take(LARGEST + 1).read_to_end(&mut bytes)?;
        self.stamp = stamp.is_settled().then_some(stamp);
        if bytes.len() as u64 > LARGEST {
            let reason =
                format!("has more than the {LARGEST} bytes that are read; divide it into several files");
            self.errors = vec![ManifestError::of_file(name, reason)];
            return Ok(true);
        }
        match String::from_utf8(bytes) {
            Ok(text) => {
                if self.take_over(name, parse(name, &text, ranges, Unknown::Refused)) {
                    self.unkept = !kept.keep(name, &text);
                }
            }
            Err(error) => {
                let at = error.utf8_error().valid_up_to();
                self.errors = vec![ManifestError::of_file(name, format!("is not UTF-8 text at byte {at}"))];
            }
        }
        Ok(true)
    }

    /// All of it or nothing. Answers whether it is right.
    fn take_over(&mut self, name: &str, parsed: Parsed) -> bool {
        self.errors = parsed.errors;
        if !self.errors.is_empty() {
            return false;
        }
        self.warnings = parsed.warnings;
        if parsed.items.is_empty() && !self.items.is_empty() {
            let lost = self.items.len();
            self.warnings.push(format!("{name}: has no object any more; the {lost} that it had are removed"));
        }
        self.items = parsed.items;
        self.known = true;
        true
    }

    /// Takes over what a file that is wrong said before this process began.
    fn recall(&mut self, name: &Arc<str>, ranges: &Ranges, kept: &Kept) {
        if std::mem::replace(&mut self.known, true) {
            return;
        }
        // What was kept was right for the agent that kept it, which may have known other fields.
        let again = |text: String| parse(name, &text, ranges, Unknown::PassedOver);
        let parsed = kept.text(name).map(again).unwrap_or_default();
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
