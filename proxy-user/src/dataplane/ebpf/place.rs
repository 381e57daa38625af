//! The names of our programs and maps in the BPF file system.
//!
//! ```text
//! <bpf-root>/services-5/current → g2   the maps of Services: the next agent finds them as they are
//! <bpf-root>/services-5/g2/frontends, …
//! <bpf-root>/sockets-5/origins, …      what sockets were told, and what else has nothing to do with Services
//! <bpf-root>/link-connect4, …          the links: programs stay attached while no agent runs
//! ```
//! Each group of maps has a version of its own, so that sockets are remembered when the maps of Services are laid out anew.
//! Only names of this form are ever removed, and only where a BPF file system is.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use nix::{
    sys::statfs::{BPF_FS_MAGIC, statfs},
    unistd::geteuid,
};
use proxy_ebpf::{SERVICES_VERSION, SOCKETS_VERSION};
use tracing::debug;

use super::{files::Files, problem::Problem};

/// Every hook that a program of ours is attached to.
pub(super) const HOOKS: [&str; 12] = [
    "connect4",
    "connect6",
    "sendmsg4",
    "sendmsg6",
    "recvmsg4",
    "recvmsg6",
    "getpeername4",
    "getpeername6",
    "post_bind4",
    "post_bind6",
    "sock_create",
    "sock_release",
];

/// The maps of layouts that had one directory for all of them, `v1` to `v5`.
const FORMER_MAPS: [&str; 18] = [
    "frontends",
    "ports",
    "records",
    "slots",
    "members",
    "affinities",
    "tallies",
    "settings",
    "troubles",
    "bypassed",
    "homes",
    "bound",
    "made",
    "origins",
    "seats",
    "flows",
    "crowds",
    "accounts",
];

/// Where things are.
#[derive(Clone, Debug)]
pub struct Place {
    /// A directory of ours in a BPF file system.
    pub bpf_root: PathBuf,
    /// The cgroup, of version 2, whose processes' sockets are served.
    pub cgroup_root: PathBuf,
}

impl Place {
    /// The directory of the maps of Services, as they are now: another one when they have grown.
    #[must_use]
    pub fn services(&self) -> PathBuf {
        self.generations().join("current")
    }

    /// The directory of all generations of those.
    pub(super) fn generations(&self) -> PathBuf {
        self.bpf_root.join(format!("services-{SERVICES_VERSION}"))
    }

    /// The directory of the maps of sockets, which never grow.
    #[must_use]
    pub fn sockets(&self) -> PathBuf {
        self.bpf_root.join(format!("sockets-{SOCKETS_VERSION}"))
    }

    /// The link of a program.
    pub(super) fn link(&self, program: &str) -> PathBuf {
        self.bpf_root.join(format!("link-{program}"))
    }

    /// Whether there are maps of this layout. Links that are missing are made anew.
    #[must_use]
    pub fn is_in_use(&self) -> bool {
        self.services().join("frontends").exists()
    }

    /// Whether neither maps nor links are there, as after `weir cleanup`.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        !self.is_in_use() && !HOOKS.iter().any(|hook| self.link(hook).exists())
    }

    /// Makes the directories, and sees that no other user can write there.
    pub(super) fn make(&self, files: &mut Files) -> Result<(), Problem> {
        files.make_directory(&self.bpf_root)?;
        self.check().map_err(|error| Problem::file("using", &self.bpf_root, error))?;
        files.make_directory(&self.generations())?;
        files.make_directory(&self.sockets())
    }

    /// Fails where names may not be touched, because they cannot be ours: outside of a BPF file system, or in a directory that
    /// others may write.
    fn check(&self) -> io::Result<()> {
        let refuse = |why: String| Err(io::Error::other(why));
        if statfs(&self.bpf_root)?.filesystem_type() != BPF_FS_MAGIC {
            return refuse("it is not in a BPF file system; nothing there was touched".to_owned());
        }
        let directory = fs::metadata(&self.bpf_root)?;
        if directory.uid() != 0 && directory.uid() != geteuid().as_raw() {
            return refuse(format!("it belongs to user {}; nothing there was touched", directory.uid()));
        }
        if directory.mode() & 0o022 != 0 {
            return refuse("others may write there; nothing there was touched".to_owned());
        }
        Ok(())
    }

    /// Whether the directory is there and programs or maps can be in it.
    ///
    /// # Errors
    ///
    /// When it cannot be looked at.
    pub fn is_on_bpffs(&self) -> io::Result<bool> {
        match statfs(&self.bpf_root) {
            Ok(found) => Ok(found.filesystem_type() == BPF_FS_MAGIC),
            Err(nix::Error::ENOENT | nix::Error::ENOTDIR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Takes the programs away, then the maps. Nothing there is fine.
    ///
    /// # Errors
    ///
    /// When something of ours cannot be removed, or when what is there cannot be ours.
    pub fn clear(&self) -> io::Result<()> {
        if !self.bpf_root.try_exists()? {
            return Ok(());
        }
        self.check()?;
        let mut files = Files::default();
        let (leading, others): (Vec<_>, Vec<_>) = HOOKS.into_iter().partition(|hook| leads(hook));
        for link in leading.iter().chain(&others).map(|hook| self.link(hook)) {
            match fs::remove_file(&link) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        self.clear_layouts(&mut files, |_| false)?;
        match fs::remove_dir(&self.bpf_root) {
            // It is a mount point, or another program keeps something there.
            Err(error) if error.kind() != io::ErrorKind::NotFound => debug!(%error, "the directory stays"),
            _ => {}
        }
        Ok(())
    }

    /// Removes the maps of other layouts, once nothing uses them.
    pub(super) fn clear_other_layouts(&self, files: &mut Files) -> io::Result<()> {
        let ours = [self.generations(), self.sockets()];
        self.clear_layouts(files, |path| ours.iter().any(|ours| ours == path))
    }

    fn clear_layouts(&self, files: &mut Files, stays: impl Fn(&Path) -> bool) -> io::Result<()> {
        for entry in fs::read_dir(&self.bpf_root)? {
            let path = entry?.path();
            let Some(layout) = Layout::of(&path).filter(|_| path.is_dir() && !stays(&path)) else { continue };
            match layout {
                Layout::Former => remove_former(files, &path)?,
                Layout::Services => remove_generations(files, &path)?,
                Layout::Sockets => files.remove_directory(&path)?,
            }
        }
        Ok(())
    }
}

/// Whether a program leads sockets to backends. Such are attached last and detached first, so that there is always one to
/// say what a socket asked for, and one to forget it.
pub(super) fn leads(program: &str) -> bool {
    program.starts_with("connect") || program.starts_with("sendmsg")
}

/// What a directory of ours holds, of whatever version.
enum Layout {
    /// All maps, before there were groups.
    Former,
    /// Generations of the maps of Services.
    Services,
    /// The maps of sockets.
    Sockets,
}

impl Layout {
    fn of(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_str()?;
        [("v", Self::Former), ("services-", Self::Services), ("sockets-", Self::Sockets)]
            .into_iter()
            .find(|(prefix, _)| numbered(name, prefix).is_some())
            .map(|(_, layout)| layout)
    }
}

/// The number behind a prefix.
pub(super) fn numbered(name: &str, prefix: &str) -> Option<u32> {
    name.strip_prefix(prefix)?.parse().ok()
}

fn remove_former(files: &mut Files, path: &Path) -> io::Result<()> {
    for name in FORMER_MAPS.iter().flat_map(|map| [(*map).to_owned(), format!("{map}-next")]) {
        let map = path.join(name);
        files.touch(&map);
        match fs::remove_file(&map) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    files.touch(path);
    if let Err(error) = fs::remove_dir(path) {
        debug!(%error, directory = %path.display(), "something else is in there; the directory stays");
    }
    Ok(())
}

fn remove_generations(files: &mut Files, path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        let is_generation = entry.file_name().to_str().is_some_and(|name| numbered(name, "g").is_some());
        if is_generation && entry.file_type()?.is_dir() {
            files.remove_directory(&entry.path())?;
        }
    }
    // What is left are the names that lead to one of them.
    files.remove_directory(path)
}
