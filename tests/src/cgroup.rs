//! Control groups that threads enter one by one: one machine plays several nodes, and the clients on them are threads.
//!
//! In: labels. Out: [`Cgroup`]s, which are gone with their owner. A socket belongs to the group of the thread that makes
//! it, so a program attached to a node's group sees the sockets of that node and of its pods, and no others.
//!
//! ```text
//! weir-test-PID      this process, while there is any group; the kernel lets its threads spread below
//! └─ 1-topology
//!    ├─ node-1       a node's own threads, its agent and its servers
//!    │  └─ pod-1-1   those of a pod
//!    ├─ node-2 …
//!    └─ router, outside
//! ```

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
    process, slice,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use crate::mounted::Mounted;

/// The name of a process's group, before the process id.
const PREFIX: &str = "weir-test-";
/// How long threads that have ended may still count as inside.
const EMPTYING: Duration = Duration::from_secs(5);

/// A group of threads. The last copy of it takes it away.
#[derive(Clone, Debug)]
pub struct Cgroup(Arc<Group>);

#[derive(Debug)]
struct Group {
    path: PathBuf,
    /// `cgroup.threads`.
    threads: File,
    /// None for one right below the process's own.
    parent: Option<Cgroup>,
}

impl Cgroup {
    /// Makes a group for some threads of this process.
    ///
    /// # Errors
    ///
    /// Without cgroup v2, or without the right to make groups.
    pub fn new(label: &str) -> Result<Self> {
        let path = Own::join(label)?;
        Group::new(path, None).map(|group| Self(Arc::new(group))).inspect_err(|_| Own::leave())
    }

    /// Makes a group inside this one.
    ///
    /// # Errors
    ///
    /// As [`Cgroup::new`], and when the label is taken.
    pub fn child(&self, label: &str) -> Result<Self> {
        Ok(Self(Arc::new(Group::new(self.path().join(label), Some(self.clone()))?)))
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// A handle by which a thread enters the group, even a thread that outlives the caller.
    ///
    /// # Errors
    ///
    /// When there are no more file descriptors.
    pub fn door(&self) -> Result<Door> {
        Ok(Door(self.0.threads.try_clone()?))
    }

    /// Moves the calling thread into the group. Processes that it starts from now on belong there.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn enter(&self) -> io::Result<()> {
        enter(&self.0.threads)
    }
}

/// The way into a [`Cgroup`]; it does not keep the group.
#[derive(Debug)]
pub struct Door(File);

impl Door {
    /// As [`Cgroup::enter`].
    ///
    /// # Errors
    ///
    /// When the kernel refuses, or the group is gone.
    pub fn enter(&self) -> io::Result<()> {
        enter(&self.0)
    }
}

/// The kernel takes zero for the writing process.
fn enter(mut threads: &File) -> io::Result<()> {
    threads.write_all(b"0")
}

impl Group {
    fn new(path: PathBuf, parent: Option<Cgroup>) -> Result<Self> {
        let name = path.display().to_string();
        fs::create_dir(&path).with_context(|| format!("making {name} needs root"))?;
        let made = fs::write(path.join("cgroup.type"), "threaded")
            .and_then(|()| File::options().write(true).open(path.join("cgroup.threads")));
        match made {
            Ok(threads) => Ok(Self { path, threads, parent }),
            Err(error) => {
                let _ = fs::remove_dir(&path);
                Err(error).with_context(|| format!("making threads enter {name}"))
            }
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let above = self.path.parent().unwrap_or(&self.path);
        let removed = remove(&self.path, "cgroup.threads", slice::from_ref(&above.to_owned()));
        if self.parent.is_none() {
            Own::leave();
        }
        complain(&self.path, &removed);
    }
}

/// The group that the whole process is in while some of its threads are in groups of their own.
struct Own {
    path: PathBuf,
    /// Where the process came from, and where it goes if that is no longer there.
    back: [PathBuf; 2],
    /// How many [`Cgroup`]s are right below.
    users: usize,
    /// How many there have been.
    made: usize,
}

static OWN: Mutex<Option<Own>> = Mutex::new(None);

impl Own {
    /// The path of a new group below, for which [`Own::leave`] has to be called once.
    fn join(label: &str) -> Result<PathBuf> {
        let mut own = OWN.lock().unwrap_or_else(PoisonError::into_inner);
        if own.is_none() {
            *own = Some(Self::enter()?);
        }
        let own = own.as_mut().context("there is none")?;
        own.users += 1;
        own.made += 1;
        Ok(own.path.join(format!("{}-{label}", own.made)))
    }

    fn leave() {
        let mut own = OWN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(users) = own.as_mut().map(|own| &mut own.users) {
            *users -= 1;
            if *users > 0 {
                return;
            }
        }
        if let Some(Self { path, back, .. }) = own.take() {
            let removed = remove(&path, "cgroup.procs", &back);
            // The next test of the process makes another, and must be able to.
            drop(own);
            complain(&path, &removed);
        }
    }

    fn enter() -> Result<Self> {
        let root = root()?;
        clear(&root);
        let line = fs::read_to_string("/proc/self/cgroup")?;
        let before =
            line.lines().find_map(|line| line.strip_prefix("0::/")).context("no cgroup v2 has us")?;
        let back = [root.join(before), root.clone()];
        let path = root.join(format!("{PREFIX}{}", process::id()));
        fs::create_dir(&path).with_context(|| format!("making {} needs root", path.display()))?;
        let entered = fs::write(path.join("cgroup.procs"), "0");
        if entered.is_err() {
            let _ = fs::remove_dir(&path);
        }
        entered.with_context(|| format!("entering {}", path.display()))?;
        Ok(Self { path, back, users: 0, made: 0 })
    }
}

/// Where cgroup v2 is mounted and can be written to: not in the same place on hybrid and on unified systems. Where it is
/// not, as in a container, this process mounts it once for itself.
///
/// # Errors
///
/// When it cannot be mounted.
pub fn root() -> Result<PathBuf> {
    static OURS: Mutex<Option<Mounted>> = Mutex::new(None);
    if let Some(root) = mounted(&fs::read_to_string("/proc/mounts")?) {
        return Ok(root);
    }
    let mut ours = OURS.lock().unwrap_or_else(PoisonError::into_inner);
    if ours.is_none() {
        *ours = Some(Mounted::new("cgroup2")?);
    }
    ours.as_ref().map(Mounted::path).context("cgroup v2 was mounted")
}

/// The first writable cgroup v2 among these mounts.
fn mounted(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|mount| {
        let mut fields = mount.split(' ').skip(1);
        let (path, kind, options) = (fields.next()?, fields.next()?, fields.next()?);
        (kind == "cgroup2" && options.split(',').any(|option| option == "rw")).then(|| PathBuf::from(path))
    })
}

/// Takes away what processes left behind that were killed.
fn clear(root: &Path) {
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(id) = name.to_str().and_then(|name| name.strip_prefix(PREFIX)) else { continue };
        if id == process::id().to_string() || !Path::new("/proc").join(id).exists() {
            remove_tree(&entry.path());
        }
    }
}

fn remove_tree(group: &Path) {
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path());
        }
    }
    // It stays when anything is in it, which then is no leftover.
    let _ = fs::remove_dir(group);
}

/// Removes a group after moving what `members` lists to the first of `back` that takes it.
fn remove(group: &Path, members: &str, back: &[PathBuf]) -> io::Result<()> {
    let deadline = Instant::now() + EMPTYING;
    loop {
        for member in fs::read_to_string(group.join(members)).unwrap_or_default().lines() {
            // One that cannot be moved has just ended, or keeps the group busy.
            let _ = back.iter().any(|back| fs::write(back.join(members), member).is_ok());
        }
        match fs::remove_dir(group) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(1));
            }
            removed => return removed,
        }
    }
}

/// Fails the test that leaves something behind; a second panic would hide the first.
fn complain(group: &Path, removed: &io::Result<()>) {
    assert!(removed.is_ok() || thread::panicking(), "{} is left behind: {removed:?}", group.display());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_writable_cgroup_v2_is_used_and_a_read_only_one_is_not() {
        let mounts = "cgroup2 /sys/fs/cgroup cgroup2 ro,nosuid 0 0\ncgroup /c cgroup rw 0 0\ncgroup2 /v2 cgroup2 rw,nosuid 0 0\n";
        assert_eq!(mounted(mounts), Some("/v2".into()));
        assert_eq!(mounted("cgroup2 /sys/fs/cgroup cgroup2 ro,nosuid,rwish 0 0\n"), None);
    }
}
