//! Tests that `aya` does not have: of this process, its directories, links and sockets.
//!
//! In: paths. Out: [`Answer`]s.

use std::{error::Error, fs, io, net::UdpSocket, path::Path};

use crate::sys::bpf;
use nix::sys::statfs::{BPF_FS_MAGIC, CGROUP2_SUPER_MAGIC, FsType, statfs};

use super::{Answer, Finding};

// Bits of linux/capability.h.
const CAP_NET_ADMIN: u32 = 12;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_BPF: u32 = 39;

/// The running kernel's release; empty if weir cannot read it.
pub(super) fn release() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned()
}

/// Whether this process may load programs that act on sockets.
pub(super) fn permission() -> Answer {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    match effective.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()) {
        Some(mask) => allows(mask),
        None => Answer::Unknown("/proc/self/status has no capabilities".to_owned()),
    }
}

fn allows(capabilities: u64) -> Answer {
    let has = |bit: u32| capabilities >> bit & 1 == 1;
    let mut missing = Vec::new();
    if !has(CAP_BPF) && !has(CAP_SYS_ADMIN) {
        missing.push("CAP_BPF");
    }
    if !has(CAP_NET_ADMIN) {
        missing.push("CAP_NET_ADMIN");
    }
    if missing.is_empty() {
        Answer::Yes
    } else {
        Answer::No(format!("this process has no {}", missing.join(", no ")))
    }
}

/// Whether the two directories have the right file systems.
pub(super) fn directories(cgroup_root: &Path, bpf_root: &Path) -> [Finding; 2] {
    let finding = |kind: &str, directory: &Path, purpose, answer| Finding {
        feature: format!("{kind} at {}", directory.display()),
        since: "",
        needed: true,
        purpose,
        answer,
    };
    // weir creates the directory when it needs it, so the file system of its existing parent counts.
    let existing = bpf_root.ancestors().find(|directory| directory.exists()).unwrap_or(bpf_root);
    [
        finding(
            "cgroup v2",
            cgroup_root,
            "weir serves the sockets of its processes; --cgroup-root names another directory.",
            match on(cgroup_root, CGROUP2_SUPER_MAGIC) {
                Answer::Yes => serves_the_node(cgroup_root, &own_cgroup(), std::process::id()),
                other => other,
            },
        ),
        finding(
            "bpffs",
            bpf_root,
            "It keeps programs and maps while the agent is not running; `mount -t bpf bpf /sys/fs/bpf` mounts it, --bpf-root names another directory.",
            on(existing, BPF_FS_MAGIC),
        ),
    ]
}

fn on(directory: &Path, wanted: FsType) -> Answer {
    match statfs(directory) {
        Ok(found) if found.filesystem_type() == wanted && directory.is_dir() => Answer::Yes,
        Ok(_) => Answer::No(format!("{} is on another file system", directory.display())),
        Err(error) => Answer::No(format!("{}: {}", directory.display(), error.desc())),
    }
}

/// This process's cgroup in the tree of version 2.
fn own_cgroup() -> String {
    let cgroups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    cgroups.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or_default().to_owned()
}

/// Whether the cgroup is the node's and not that of weir's own container. Container runtimes give a container a
/// cgroup namespace, in which its own cgroup appears as the root of the tree, and programs attached there would serve
/// weir alone. The root of a node's tree has cgroups below it, also if the node is a container itself, as in kind.
/// The real root of all cgroups belongs to a node in any case; it is the only cgroup without a type.
fn serves_the_node(cgroup_root: &Path, own: &str, process: u32) -> Answer {
    let is_inside = || {
        let processes = fs::read_to_string(cgroup_root.join("cgroup.procs")).unwrap_or_default();
        processes.lines().any(|line| line.parse() == Ok(process))
    };
    let has_cgroups = || {
        let entries = fs::read_dir(cgroup_root).into_iter().flatten().flatten();
        entries.into_iter().any(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
    };
    if own == "/" && cgroup_root.join("cgroup.type").exists() && is_inside() && !has_cgroups() {
        let root = cgroup_root.display();
        return Answer::No(format!(
            "{root} is the cgroup of weir's own container; mount the node's /sys/fs/cgroup into the container"
        ));
    }
    Answer::Yes
}

/// Whether the kernel has links of cgroups, which outlive the agent when they are pinned.
pub(super) fn links() -> Answer {
    answer(bpf::knows_links())
}

/// Whether a socket returns the cookie of its network namespace.
pub(super) fn namespace_cookie() -> Answer {
    let cookie = UdpSocket::bind("127.0.0.1:0").and_then(bpf::namespace_cookie);
    match cookie {
        Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => Answer::No(String::new()),
        cookie => answer(cookie.map(|_| true)),
    }
}

/// The answer for the result of a test.
pub(super) fn answer(result: io::Result<bool>) -> Answer {
    match result {
        Ok(true) => Answer::Yes,
        Ok(false) => Answer::No(String::new()),
        Err(error) => Answer::Unknown(error.to_string()),
    }
}

/// An error with its causes, separated by colons.
pub(super) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loading_programs_takes_two_capabilities() {
        let [bpf, net, sys] = [CAP_BPF, CAP_NET_ADMIN, CAP_SYS_ADMIN].map(|bit| 1_u64 << bit);
        let no = |what: &str| Answer::No(format!("this process has no {what}"));
        for (mask, expected) in [
            (bpf | net, Answer::Yes),
            (sys | net, Answer::Yes),
            (u64::MAX, Answer::Yes),
            (net, no("CAP_BPF")),
            (bpf, no("CAP_NET_ADMIN")),
            (0, no("CAP_BPF, no CAP_NET_ADMIN")),
        ] {
            assert_eq!(allows(mask), expected, "{mask:x}");
        }
    }

    #[test]
    fn the_cgroup_of_a_container_is_not_the_nodes() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        fs::write(root.join("cgroup.procs"), "1\n4711\n").unwrap();
        assert_eq!(serves_the_node(root, "/", 4711), Answer::Yes, "the root of all cgroups");
        fs::write(root.join("cgroup.type"), "domain\n").unwrap();
        let answer = serves_the_node(root, "/", 4711);
        assert!(matches!(&answer, Answer::No(why) if why.contains("own container")), "{answer:?}");
        assert_eq!(serves_the_node(root, "/system.slice/weir.service", 4711), Answer::Yes, "a service");
        assert_eq!(
            serves_the_node(root, "/", 4712),
            Answer::Yes,
            "a container on a node that is a container"
        );
        fs::create_dir(root.join("kubepods.slice")).unwrap();
        assert_eq!(serves_the_node(root, "/", 4711), Answer::Yes, "a node that is a container");
    }

    #[test]
    fn a_directory_on_another_file_system_is_named() {
        let [_, bpffs] = directories(Path::new("/"), Path::new("/proc/weir"));
        assert_eq!(bpffs.feature, "bpffs at /proc/weir");
        assert_eq!(bpffs.answer, Answer::No("/proc is on another file system".to_owned()));
        let [cgroup, _] = directories(Path::new("/nowhere"), Path::new("/"));
        assert_eq!(cgroup.answer, Answer::No("/nowhere: No such file or directory".to_owned()));
    }
}
