//! Stores the resource version of each kind on disk, for the next start of the agent.
//!
//! In: the resource version of everything that is passed on. Out: the versions that the previous agent had.
//! The API server answers a list that may be as old as such a version from memory; for the newest state,
//! servers before Kubernetes 1.31 read etcd. Such a list is never older than what the previous agent
//! programmed.
//!
//! The version is written before its object is processed, so an agent that is killed at any moment never
//! leaves a version that is too old. A version that is too new only costs a second list.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
};

use tracing::{info, warn};

use crate::model::Kind;

/// The number of lines in the file, one a kind.
const KINDS: usize = Kind::ALL.len() + Kind::PODS.len();
/// The length of a line: the digits of the largest number, and a newline.
const LINE: usize = 21;

/// The number of files, one for each cluster and node. A machine has one, and may move to another cluster.
const MOST_CLUSTERS: usize = 16;

/// The versions of all kinds in one cluster.
#[derive(Debug, Default)]
pub(super) struct Versions {
    file: Option<(File, PathBuf)>,
    /// Whether versions cannot be stored any more.
    broken: AtomicBool,
    /// The versions in the file at the start; 0 if there was none, or once it is not needed any more.
    before: [AtomicU64; KINDS],
}

/// The version of one kind.
#[derive(Clone, Debug)]
pub(super) struct Version {
    versions: Arc<Versions>,
    kind: Kind,
}

impl Versions {
    /// Opens the file in `directory` for the cluster and node that `identity` describes. Without a directory,
    /// or if the file cannot be written, versions are neither stored nor read.
    pub(super) fn open(directory: Option<&Path>, identity: &[&[u8]]) -> Self {
        let Some(directory) = directory else { return Self::default() };
        let path = directory.join(format!("{:016x}", hash(identity)));
        let before = read(&path);
        match open(directory, &path, before.is_some()) {
            Ok(file) => Self {
                file: Some((file, path)),
                broken: AtomicBool::new(false),
                before: before.unwrap_or_default().map(AtomicU64::new),
            },
            Err(error) => {
                info!(
                    file = %path.display(), %error,
                    "cannot store resource versions; the next start reads the newest list"
                );
                Self::default()
            }
        }
    }

    fn keep(&self, kind: Kind, version: &str) {
        let Some((file, path)) = &self.file else { return };
        // Only the server needs to understand a version. One that is not a number is not stored.
        let number: u64 = version.parse().unwrap_or_default();
        if self.broken.load(Relaxed) {
            return;
        }
        let line = format!("{number:020}\n");
        let Err(error) = file.write_all_at(line.as_bytes(), (kind as usize * LINE) as u64) else { return };
        self.broken.store(true, Relaxed);
        // The content would be too old for the next agent.
        let removed = fs::remove_file(path);
        warn!(
            file = %path.display(), %error, removed = removed.is_ok(),
            "cannot store resource versions any more; the next start reads the newest list"
        );
    }
}

impl Version {
    pub(super) const fn of(kind: Kind, versions: Arc<Versions>) -> Self {
        Self { versions, kind }
    }

    fn before(&self) -> &AtomicU64 {
        &self.versions.before[self.kind as usize]
    }

    /// The version that the previous agent had, until [`Version::forget`].
    pub(super) fn previous(&self) -> Option<String> {
        Some(self.before().load(Relaxed)).filter(|version| *version > 0).map(|version| version.to_string())
    }

    /// Drops the version of the previous agent.
    pub(super) fn forget(&self) {
        self.before().store(0, Relaxed);
    }

    /// Stores the version of the kind.
    pub(super) fn keep(&self, version: &str) {
        self.versions.keep(self.kind, version);
    }
}

/// FNV-1a, written out, because the result must be the same in every version of weir.
fn hash(parts: &[&[u8]]) -> u64 {
    let mix = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
    parts.iter().fold(0xcbf2_9ce4_8422_2325, |hash, part| {
        let length = (part.len() as u64).to_le_bytes();
        length.iter().chain(*part).copied().fold(hash, mix)
    })
}

/// The content of a file; `None` if there is no file or its content is malformed.
fn read(path: &Path) -> Option<[u64; KINDS]> {
    let content = File::open(path).and_then(|file| {
        // One byte more than needed, to detect a file that is too long.
        let mut bytes = [0; KINDS * LINE + 1];
        let mut length = 0;
        loop {
            match file.read_at(&mut bytes[length..], length as u64)? {
                0 => break,
                more => length += more,
            }
        }
        parse(&bytes[..length]).ok_or_else(|| io::Error::other("it does not contain versions"))
    });
    match content {
        Ok(versions) => Some(versions),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => {
            warn!(file = %path.display(), %error, "cannot use the stored resource versions; reading the newest list");
            None
        }
    }
}

fn parse(bytes: &[u8]) -> Option<[u64; KINDS]> {
    if bytes.len() != KINDS * LINE {
        return None;
    }
    let mut versions = [0; KINDS];
    for (line, version) in bytes.chunks(LINE).zip(&mut versions) {
        let digits = line.strip_suffix(b"\n")?;
        *version = std::str::from_utf8(digits)
            .ok()
            .filter(|_| digits.iter().all(u8::is_ascii_digit))?
            .parse()
            .ok()?;
    }
    Some(versions)
}

/// Opens the file for writing. Creates it again if it is malformed.
fn open(directory: &Path, path: &Path, right: bool) -> io::Result<File> {
    if !right {
        fs::create_dir_all(directory)?;
        make_room(directory)?;
        let beside = path.with_extension("new");
        fs::write(&beside, format!("{:020}\n", 0).repeat(KINDS))?;
        fs::rename(&beside, path)?;
    }
    File::options().write(true).open(path)
}

/// Removes the files that were written longest ago if there are too many.
fn make_room(directory: &Path) -> io::Result<()> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        files.push((entry.metadata()?.modified()?, entry.path()));
    }
    files.sort();
    let many = files.len().saturating_sub(MOST_CLUSTERS - 1);
    files.iter().take(many).try_for_each(|(_, path)| fs::remove_file(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLUSTER: &[&[u8]] = &[b"https://api.example", b"n1"];

    fn of(directory: &Path, identity: &[&[u8]], kind: Kind) -> Version {
        Version::of(kind, Arc::new(Versions::open(Some(directory), identity)))
    }

    fn only_file(directory: &Path) -> PathBuf {
        let mut files = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
        let file = files.next().unwrap();
        assert_eq!(files.next(), None);
        file
    }

    #[test]
    fn the_next_agent_reads_the_last_version_of_each_kind_until_it_has_its_own() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path().join("of/weir");
        let first = of(&directory, CLUSTER, Kind::Service);
        assert_eq!(first.previous(), None);
        for version in ["9", "18446744073709551615", "12"] {
            first.keep(version);
        }
        let namespaces = Version::of(Kind::Namespace, Arc::clone(&first.versions));
        namespaces.keep("7");
        // The first agent was not stopped in an orderly way.
        let second = of(&directory, CLUSTER, Kind::Service);
        assert_eq!(second.previous().as_deref(), Some("12"));
        assert_eq!(of(&directory, CLUSTER, Kind::Namespace).previous().as_deref(), Some("7"));
        assert_eq!(of(&directory, CLUSTER, Kind::EndpointSlice).previous(), None);
        second.forget();
        assert_eq!(second.previous(), None);
        assert_eq!(of(&directory, CLUSTER, Kind::Service).previous().as_deref(), Some("12"));
        only_file(&directory);
    }

    #[test]
    fn versions_of_another_cluster_are_not_read() {
        let directory = tempfile::tempdir().unwrap();
        of(directory.path(), CLUSTER, Kind::Service).keep("12");
        for other in [&[&b"https://api.example"[..], b"n2"][..], &[b"https://api.examplen1"], &[b"n1", b""]] {
            assert_eq!(of(directory.path(), other, Kind::Service).previous(), None);
        }
        assert_eq!(of(directory.path(), CLUSTER, Kind::Service).previous().as_deref(), Some("12"));
    }

    #[test]
    fn the_number_of_files_is_limited() {
        let directory = tempfile::tempdir().unwrap();
        for cluster in 0..3 * MOST_CLUSTERS {
            of(directory.path(), &[cluster.to_string().as_bytes()], Kind::Service).keep("12");
        }
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), MOST_CLUSTERS);
        let last = (3 * MOST_CLUSTERS - 1).to_string();
        assert!(of(directory.path(), &[last.as_bytes()], Kind::Service).previous().is_some());
    }

    #[test]
    fn a_version_that_is_not_a_number_is_not_stored_and_no_older_one_is_left() {
        let directory = tempfile::tempdir().unwrap();
        let version = of(directory.path(), CLUSTER, Kind::Service);
        for text in ["", "12a", "-1", "18446744073709551616"] {
            version.keep("12");
            version.keep(text);
            assert_eq!(of(directory.path(), CLUSTER, Kind::Service).previous(), None, "{text}");
        }
    }

    #[test]
    fn a_malformed_file_is_created_again() {
        let directory = tempfile::tempdir().unwrap();
        of(directory.path(), CLUSTER, Kind::Service).keep("12");
        let file = only_file(directory.path());
        let right = fs::read(&file).unwrap();
        let longer = [&right[..], b"x"].concat();
        let signed = [b"+", &right[1..]].concat();
        for wrong in [&b""[..], b"12\n", &right[1..], &longer, &signed, &[0xff; KINDS * LINE]] {
            fs::write(&file, wrong).unwrap();
            let version = of(directory.path(), CLUSTER, Kind::Service);
            assert_eq!(version.previous(), None, "{wrong:?}");
            version.keep("13");
            assert_eq!(of(directory.path(), CLUSTER, Kind::Service).previous().as_deref(), Some("13"));
        }
    }

    #[test]
    fn without_a_directory_nothing_is_stored_and_nothing_fails() {
        let version = Version::of(Kind::Service, Arc::default());
        version.keep("12");
        assert_eq!(version.previous(), None);
        let version = of(Path::new("/proc/nowhere"), CLUSTER, Kind::Service);
        version.keep("12");
        assert_eq!(version.previous(), None);
    }
}
