//! Facts about this machine that the configuration uses as defaults.
//!
//! In: files under `/proc`. Out: a [`Host`]; [`super::load`] uses it for what neither the file nor a flag
//! gives.

use std::{
    ffi::OsString,
    fs,
    os::unix::ffi::OsStringExt as _,
    path::{Component, Path, PathBuf},
};

use crate::model::PerFamily;

/// Facts about this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// The operating system's host name.
    pub name: String,
    /// The address families that the kernel supports (R17).
    pub families: PerFamily<bool>,
    /// The mount point of cgroup v2: `/sys/fs/cgroup`, or `/sys/fs/cgroup/unified` beside version 1. If there
    /// are several mounts, the one that shows most of the tree. `None` if there is none.
    pub cgroup_root: Option<PathBuf>,
}

impl Host {
    /// Reads the facts of this machine. A value that cannot be read is empty or `None`; [`super::load`]
    /// reports it only if it needs the value.
    #[must_use]
    pub fn this() -> Self {
        let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let v6 = Path::new("/proc/sys/net/ipv6").exists()
            && fs::read_to_string("/proc/sys/net/ipv6/conf/all/disable_ipv6")
                .map_or(true, |disabled| disabled.trim() != "1");
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        Self { name, families: PerFamily { v4: true, v6 }, cgroup_root: cgroup_root(&mounts) }
    }
}

/// The cgroup v2 mount that shows most of the tree, from the text of a `mountinfo` file (proc(5)).
fn cgroup_root(mounts: &str) -> Option<PathBuf> {
    let mount = |line: &str| {
        let (before, after) = line.split_once(" - ")?;
        let mut fields = before.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        (after.split(' ').next()? == "cgroup2").then(|| (depth(&unescaped(root)), unescaped(point)))
    };
    // `min_by_key` returns the first of equal mounts, which is the original and not a bind mount of it.
    mounts.lines().filter_map(mount).min_by_key(|(depth, _)| *depth).map(|(_, point)| point)
}

/// How far a directory is below the cgroup that this process takes for the root. Negative for one above it,
/// as a container sees in a mount of the host.
fn depth(root: &Path) -> isize {
    root.components().fold(0, |depth, component| match component {
        Component::ParentDir => depth - 1,
        Component::Normal(_) => depth + 1,
        _ => depth,
    })
}

/// A path of mountinfo, in which blanks and backslashes are three octal digits.
fn unescaped(field: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((plain, escaped)) = rest.split_once('\\') {
        bytes.extend(plain.as_bytes());
        match escaped.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &escaped[3..];
            }
            None => {
                bytes.push(b'\\');
                rest = escaped;
            }
        }
    }
    bytes.extend(rest.as_bytes());
    OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cgroup_root_is_the_mount_of_version_2_that_shows_most() {
        let proc = "22 1 0:20 / /proc rw - proc proc rw\n";
        let unified = "30 25 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";
        let legacy = "31 25 0:27 / /sys/fs/cgroup/memory rw shared:10 - cgroup cgroup rw,memory\n";
        let hybrid = "32 25 0:28 / /sys/fs/cgroup/unified rw shared:11 - cgroup2 cgroup rw\n";
        let own = "40 25 0:26 /kubepods/pod1 /sys/fs/cgroup ro - cgroup2 cgroup rw\n";
        let hosts = "41 25 0:26 / /host/cgroup rw master:9 - cgroup2 cgroup rw\n";
        let namespaced = "42 25 0:26 /../../.. /host\\040s/cg rw - cgroup2 cgroup rw\n";
        for (mounts, root) in [
            (vec![proc], None),
            (vec![proc, legacy], None),
            (vec![proc, unified], Some("/sys/fs/cgroup")),
            (vec![legacy, hybrid], Some("/sys/fs/cgroup/unified")),
            // A container that has its own mount and one of the host.
            (vec![own, hosts], Some("/host/cgroup")),
            (vec![unified, namespaced], Some("/host s/cg")),
            (vec![unified, hosts], Some("/sys/fs/cgroup")),
            (vec!["not a mount", " - cgroup2"], None),
        ] {
            assert_eq!(cgroup_root(&mounts.concat()), root.map(PathBuf::from), "{mounts:?}");
        }
    }

    #[test]
    fn backslashes_without_three_octal_digits_stay() {
        assert_eq!(unescaped(r"/a\040b\134c\9\"), Path::new(r"/a b\c\9\"));
    }
}
