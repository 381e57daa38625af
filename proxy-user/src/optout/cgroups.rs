//! Finds the cgroups of pods.
//!
//! In: the root of the cgroup v2 tree. Out: the ids of the pods' cgroups, and the directories in which the
//! kubelet will create the next ones.
//!
//! ```text
//! driver     below --cgroup-root, at any depth         directly in it, or one level down (QoS class)
//! cgroupfs   kubepods                                  [burstable/|besteffort/]pod<uid>
//! systemd    kubepods.slice                            [kubepods-burstable.slice/]kubepods-burstable-pod<uid>.slice
//! kind       …/kubelet.slice/kubelet-kubepods.slice    [kubelet-kubepods-….slice/]kubelet-kubepods-…-pod<uid>.slice
//! ```

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::unix::fs::{DirEntryExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

/// How deep below the root the search for `kubepods` goes. Clusters in containers have it at depths of 4 to
/// 7.
const DEPTH: u32 = 8;

/// How deep below a pod's cgroup the search for another `kubepods` goes. A kubelet in a container has it at a
/// depth of 2, one in a container in a pod at 4 or 5.
const DEPTH_IN_POD: u32 = 8;

/// The part of a cgroup tree that has the pods.
pub(super) struct Cgroups {
    root: PathBuf,
    /// The `kubepods` directories found; a host that is several nodes has several.
    kubepods: BTreeSet<PathBuf>,
}

/// The result of one search.
#[derive(Debug, Default)]
pub(super) struct Look {
    /// The id of each pod's cgroup, by the pod's UID.
    pub ids: BTreeMap<String, u64>,
    /// The path of each pod's cgroup, by the pod's UID.
    paths: BTreeMap<String, PathBuf>,
    /// The directories in which pods' cgroups appear, with their inode numbers.
    pub levels: BTreeMap<PathBuf, u64>,
}

impl Cgroups {
    pub(super) fn new(root: &Path) -> Self {
        Self { root: root.to_owned(), kubepods: BTreeSet::new() }
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// Reads the part with the pods. Searches the whole tree for that part only if `thorough`, or until it is
    /// found.
    ///
    /// # Errors
    ///
    /// When a directory cannot be read. A directory that is removed meanwhile is no error.
    pub(super) fn look(&mut self, thorough: bool) -> io::Result<Look> {
        if thorough || self.kubepods.is_empty() {
            self.kubepods.clear();
            find(&self.root, DEPTH, &mut self.kubepods)?;
        }
        let mut look = Look::default();
        for directory in self.kubepods.clone() {
            if !look.level(&directory)? {
                self.kubepods.remove(&directory);
            }
        }
        Ok(look)
    }
}

impl Look {
    /// The UIDs of pods in which another kubelet has a directory for pods, as in test clusters that run in a
    /// pod.
    ///
    /// # Errors
    ///
    /// When a directory cannot be read.
    pub(super) fn with_clusters(&self) -> io::Result<BTreeSet<&str>> {
        let mut found = BTreeSet::new();
        for (uid, path) in &self.paths {
            if has_kubepods(path, DEPTH_IN_POD)? {
                found.insert(&**uid);
            }
        }
        Ok(found)
    }

    /// Adds the pods and QoS classes of one directory. Returns whether the directory exists.
    fn level(&mut self, directory: &Path) -> io::Result<bool> {
        let Some(metadata) = present(fs::metadata(directory))? else { return Ok(false) };
        let Some(children) = children(directory)? else { return Ok(false) };
        self.levels.insert(directory.to_owned(), metadata.ino());
        for (name, id) in children {
            if let Some(uid) = pod_uid(&name) {
                self.paths.insert(uid.clone().into_owned(), directory.join(&name));
                self.ids.insert(uid.into_owned(), id);
            } else if is_qos_class(&name) {
                self.level(&directory.join(&name))?;
            }
        }
        Ok(true)
    }
}

/// Adds the `kubepods` directories in `directory` and below. Directories inside of them belong to pods.
fn find(directory: &Path, depth: u32, found: &mut BTreeSet<PathBuf>) -> io::Result<()> {
    for (name, _) in children(directory)?.into_iter().flatten() {
        let child = directory.join(&name);
        if is_kubepods(&name) {
            found.insert(child);
        } else if depth > 1 {
            find(&child, depth - 1, found)?;
        }
    }
    Ok(())
}

/// Whether there is a `kubepods` directory below. The number of links of a directory shows that most cgroups
/// have none below.
fn has_kubepods(directory: &Path, depth: u32) -> io::Result<bool> {
    const LINKS_OF_A_LEAF: u64 = 2;
    let Some(metadata) = present(fs::metadata(directory))? else { return Ok(false) };
    if depth == 0 || metadata.nlink() == LINKS_OF_A_LEAF {
        return Ok(false);
    }
    for (name, _) in children(directory)?.into_iter().flatten() {
        if is_kubepods(&name) || has_kubepods(&directory.join(&name), depth - 1)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The directories in a directory with their inode numbers, which are the ids of cgroups. `None` if it does
/// not exist.
fn children(directory: &Path) -> io::Result<Option<Vec<(String, u64)>>> {
    let Some(entries) = present(fs::read_dir(directory))? else { return Ok(None) };
    let mut children = Vec::new();
    for entry in entries {
        let Some(entry) = present(entry)? else { continue };
        if entry.file_type()?.is_dir()
            && let Ok(name) = entry.file_name().into_string()
        {
            children.push((name, entry.ino()));
        }
    }
    Ok(Some(children))
}

/// Cgroups are created and removed during a search; a read of one that is being removed returns ENODEV.
fn present<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(it) => Ok(Some(it)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
        Err(error) => Err(error),
    }
}

fn is_kubepods(name: &str) -> bool {
    name == "kubepods" || last_part(name) == Some("kubepods")
}

fn is_qos_class(name: &str) -> bool {
    ["burstable", "besteffort"].contains(&last_part(name).unwrap_or(name))
}

/// The UID of the pod whose cgroup has this name. systemd treats `-` as a separator, so the kubelet replaces
/// it with `_`.
fn pod_uid(name: &str) -> Option<Cow<'_, str>> {
    let uid = last_part(name).unwrap_or(name).strip_prefix("pod").filter(|uid| !uid.is_empty())?;
    Some(if name.ends_with(".slice") { uid.replace('_', "-").into() } else { uid.into() })
}

/// The part of a slice's name behind the name of its parent.
fn last_part(name: &str) -> Option<&str> {
    name.strip_suffix(".slice")?.rsplit('-').next()
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "0f5e1c6a-5d0e-4b1f-9a6e-3a3f7e0d2b11";
    const STATIC: &str = "d41d8cd98f00b204e9800998ecf8427e";

    /// The pods found in `directories`, by UID.
    fn seen(directories: &[&str]) -> Vec<(String, bool)> {
        let root = tempfile::tempdir().unwrap();
        let path = |directory: &str| root.path().join(directory);
        directories.iter().for_each(|directory| fs::create_dir_all(path(directory)).unwrap());
        let inodes: Vec<_> =
            directories.iter().map(|directory| fs::metadata(path(directory)).unwrap().ino()).collect();
        let look = Cgroups::new(root.path()).look(false).unwrap();
        look.ids.into_iter().map(|(uid, id)| (uid, inodes.contains(&id))).collect()
    }

    fn pods(uids: &[&str]) -> Vec<(String, bool)> {
        uids.iter().map(|uid| ((*uid).to_owned(), true)).collect()
    }

    #[test]
    fn the_cgroupfs_driver_writes_the_uid_as_it_is() {
        for class in ["", "burstable/", "besteffort/"] {
            assert_eq!(seen(&[&format!("kubepods/{class}pod{UID}")]), pods(&[UID]), "{class}");
        }
        assert_eq!(seen(&[&format!("kubepods/burstable/pod{STATIC}")]), pods(&[STATIC]));
    }

    #[test]
    fn the_systemd_driver_writes_underscores_and_all_parents() {
        let escaped = UID.replace('-', "_");
        for path in [
            format!("kubepods.slice/kubepods-pod{escaped}.slice"),
            format!("kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{escaped}.slice"),
            format!("kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{escaped}.slice"),
        ] {
            assert_eq!(seen(&[&path]), pods(&[UID]), "{path}");
        }
        let mirrored =
            format!("kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{STATIC}.slice");
        assert_eq!(seen(&[&mirrored]), pods(&[STATIC]));
    }

    #[test]
    fn nodes_in_containers_have_their_pods_deeper_and_there_may_be_several() {
        let escaped = UID.replace('-', "_");
        let systemd = format!(
            "system.slice/docker-1f.scope/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/\
             kubelet-kubepods-burstable-pod{escaped}.slice"
        );
        let cgroupfs = format!("docker/2e/kubelet/kubepods/besteffort/pod{STATIC}");
        assert_eq!(seen(&[&systemd, &cgroupfs]), pods(&[UID, STATIC]));
    }

    #[test]
    fn cgroups_of_containers_and_other_services_are_no_pods() {
        let directories = [
            "kubepods/burstable/podA/podB".to_owned(),
            "kubepods/burstable/podA/cri-containerd-1.scope".to_owned(),
            "kubepods/burstable/podA/kubelet/kubepods/podC".to_owned(),
            "kubepods/pod".to_owned(),
            "system.slice/podman.service".to_owned(),
            format!("system.slice/pod{UID}"),
        ];
        let directories: Vec<_> = directories.iter().map(String::as_str).collect();
        let uids: Vec<_> = seen(&directories).into_iter().map(|(uid, _)| uid).collect();
        assert_eq!(uids, ["A"]);
    }

    #[test]
    fn the_directories_to_watch_are_kubepods_and_the_qos_classes() {
        let root = tempfile::tempdir().unwrap();
        let mut cgroups = Cgroups::new(root.path());
        assert!(cgroups.look(false).unwrap().levels.is_empty());
        for class in ["burstable", "besteffort", "podA"] {
            fs::create_dir_all(root.path().join("kubepods").join(class)).unwrap();
        }
        let levels =
            |cgroups: &mut Cgroups| cgroups.look(false).unwrap().levels.into_keys().collect::<Vec<_>>();
        let expected = ["kubepods", "kubepods/besteffort", "kubepods/burstable"];
        assert_eq!(levels(&mut cgroups), expected.map(|level| root.path().join(level)));
        fs::remove_dir_all(root.path().join("kubepods")).unwrap();
        assert!(levels(&mut cgroups).is_empty());
    }
}
