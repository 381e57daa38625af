//! The names of programs and maps in the BPF file system.
//!
//! ```text
//! <bpf-root>/services-5/current → g2   the maps of Services: the next agent finds them as they are
//! <bpf-root>/services-5/g2/frontends, …
//! <bpf-root>/sockets-5/origins, …      the Services that sockets asked for, and all else that does not depend on Services
//! <bpf-root>/link-connect4, …          the links: programs stay attached while no agent runs
//! ```
//! Each of the two groups has its own version, so the agent keeps the entries of sockets when the layout of the maps of
//! Services changes. weir removes only names of this form, and only in a BPF file system.

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

/// Every hook that weir attaches a program to.
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

/// The maps of layouts `v1` to `v5`, which had one directory for all maps.
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

/// The two directories that the socket plane uses.
#[derive(Clone, Debug)]
pub struct Place {
    /// A directory in a BPF file system, for weir alone.
    pub bpf_root: PathBuf,
    /// A cgroup v2 directory. The programs see the sockets of the processes below it.
    pub cgroup_root: PathBuf,
}

impl Place {
    /// The directory of the current maps of Services. It changes when the maps grow.
    #[must_use]
    pub fn services(&self) -> PathBuf {
        self.generations().join("current")
    }

    /// The directory of all generations of the maps of Services.
    pub(super) fn generations(&self) -> PathBuf {
        self.bpf_root.join(format!("services-{SERVICES_VERSION}"))
    }

    /// The directory of the maps of sockets, which never grow.
    #[must_use]
    pub fn sockets(&self) -> PathBuf {
        self.bpf_root.join(format!("sockets-{SOCKETS_VERSION}"))
    }

    pub(super) fn link(&self, program: &str) -> PathBuf {
        self.bpf_root.join(format!("link-{program}"))
    }

    /// Whether there are maps of this layout. If so, missing links are made again.
    #[must_use]
    pub fn is_in_use(&self) -> bool {
        self.services().join("frontends").exists()
    }

    /// Whether there are neither maps nor links, as after `weir cleanup`.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        !self.is_in_use() && !HOOKS.iter().any(|hook| self.link(hook).exists())
    }

    /// Makes the directories, and checks that no other user can write there.
    pub(super) fn make(&self, files: &mut Files) -> Result<(), Problem> {
        files.make_directory(&self.bpf_root)?;
        self.check().map_err(|error| Problem::file("using", &self.bpf_root, error))?;
        files.make_directory(&self.generations())?;
        files.make_directory(&self.sockets())
    }

    /// Fails outside of a BPF file system, and in a directory that other users may write: names there cannot
    /// be weir's, and are not removed.
    fn check(&self) -> io::Result<()> {
        let refuse = |why: String| Err(io::Error::other(why));
        if statfs(&self.bpf_root)?.filesystem_type() != BPF_FS_MAGIC {
            return refuse("it is not in a BPF file system; nothing was changed there".to_owned());
        }
        let directory = fs::metadata(&self.bpf_root)?;
        if directory.uid() != 0 && directory.uid() != geteuid().as_raw() {
            return refuse(format!("it belongs to user {}; nothing was changed there", directory.uid()));
        }
        if directory.mode() & 0o022 != 0 {
            return refuse("other users may write there; nothing was changed there".to_owned());
        }
        Ok(())
    }

    /// Whether the directory exists in a BPF file system, so that programs or maps can be there.
    ///
    /// # Errors
    ///
    /// When the kernel does not return its file system.
    pub fn is_on_bpffs(&self) -> io::Result<bool> {
        match statfs(&self.bpf_root) {
            Ok(found) => Ok(found.filesystem_type() == BPF_FS_MAGIC),
            Err(nix::Error::ENOENT | nix::Error::ENOTDIR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Removes the programs, then the maps, if there are any.
    ///
    /// # Errors
    ///
    /// When a name cannot be removed, or when the directory cannot be weir's.
    pub fn clear(&self) -> io::Result<()> {
        if !self.bpf_root.try_exists()? {
            return Ok(());
        }
        self.check()?;
        let mut files = Files::default();
        let (translating, others): (Vec<_>, Vec<_>) =
            HOOKS.into_iter().partition(|hook| translates_to_backends(hook));
        for link in translating.iter().chain(&others).map(|hook| self.link(hook)) {
            match fs::remove_file(&link) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        self.clear_layouts(&mut files, |_| false)?;
        match fs::remove_dir(&self.bpf_root) {
            // It is a mount point, or another program has something there.
            Err(error) if error.kind() != io::ErrorKind::NotFound => debug!(%error, "directory not removed"),
            _ => {}
        }
        Ok(())
    }

    /// Removes the maps of other layouts, which no program uses any more.
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

/// Whether a program translates sockets to backends. Such programs are attached last and detached first, so
/// that for each translated socket there is a program that translates back, and one that removes its entry.
pub(super) fn translates_to_backends(program: &str) -> bool {
    program.starts_with("connect") || program.starts_with("sendmsg")
}

/// The content of one of weir's directories, of any version.
enum Layout {
    /// All maps: of versions before there were two groups.
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
            .find(|(prefix, _)| number_after(name, prefix).is_some())
            .map(|(_, layout)| layout)
    }
}

pub(super) fn number_after(name: &str, prefix: &str) -> Option<u32> {
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
        debug!(%error, directory = %path.display(), "directory not removed, because it is not empty");
    }
    Ok(())
}

fn remove_generations(files: &mut Files, path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        let is_generation = entry.file_name().to_str().is_some_and(|name| number_after(name, "g").is_some());
        if is_generation && entry.file_type()?.is_dir() {
            files.remove_directory(&entry.path())?;
        }
    }
    // The link `current` remains, and possibly `next`.
    files.remove_directory(path)
}
