//! The basis of the other tests: control groups and BPF file systems that exist, and are gone afterwards.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    collections::BTreeSet,
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
};

use anyhow::Result;
use weir_tests::{
    bpffs::{BpfFs, unpin_all},
    cgroup::{self, Cgroup},
    node::{Location, Topology},
    process::end,
    wait::await_that,
};

/// The group of the calling thread, or of another process.
fn group(process: &str) -> PathBuf {
    let groups = fs::read_to_string(format!("/proc/{process}/cgroup")).unwrap();
    let path = groups.lines().find_map(|line| line.strip_prefix("0::/")).unwrap();
    cgroup::root().unwrap().join(path)
}

const PLACES: [Location; 8] = [
    Location::Host(1),
    Location::Host(2),
    Location::Pod(1, 1),
    Location::Pod(1, 2),
    Location::Pod(2, 1),
    Location::Pod(2, 2),
    Location::Outside(0),
    Location::Router,
];

/// The nodes with a group that holds a location's threads.
fn inside(topology: &Topology, location: Location) -> Vec<u8> {
    let here = topology.at(location).run(|| group("thread-self"));
    let started = topology.at(location).thread(|| group("thread-self")).unwrap();
    assert_eq!(here, started.join().unwrap(), "{location}");
    let mut child = topology
        .at(location)
        .spawn(Path::new("sleep"), |sleep| {
            sleep.arg("60");
        })
        .unwrap();
    assert_eq!(here, group(&child.id().to_string()), "{location}");
    end(&mut child);
    [1, 2].into_iter().filter(|node| here.starts_with(topology.cgroup_root(*node))).collect()
}

#[test]
fn threads_and_programs_are_in_the_group_of_their_node() -> Result<()> {
    let [one, two] = [Topology::new()?, Topology::new()?];
    for topology in [&one, &two] {
        for location in PLACES {
            let expected = match location {
                Location::Host(node) | Location::Pod(node, _) => vec![node],
                Location::Outside(_) | Location::Router => vec![],
            };
            assert_eq!(inside(topology, location), expected, "{location}");
        }
    }
    for node in [1, 2] {
        assert_ne!(one.cgroup_root(node), two.cgroup_root(node));
    }
    Ok(())
}

/// The network namespaces of all processes, as an agent finds those of pods.
fn namespaces() -> BTreeSet<PathBuf> {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    processes.filter_map(|process| fs::read_link(process.path().join("ns/net")).ok()).collect()
}

#[test]
fn the_namespace_of_every_pod_is_that_of_a_process() -> Result<()> {
    let topology = Topology::new()?;
    let own: Vec<_> = Location::PODS
        .map(|pod| topology.at(pod).run(|| fs::read_link("/proc/thread-self/ns/net").unwrap()))
        .to_vec();
    let found = namespaces();
    assert!(own.iter().all(|namespace| found.contains(namespace)), "{own:?} not in {found:?}");
    drop(topology);
    let left = namespaces();
    assert!(!own.iter().any(|namespace| left.contains(namespace)), "{left:?} has one of {own:?}");
    Ok(())
}

#[test]
fn groups_go_with_their_owner_even_if_it_panics() -> Result<()> {
    let before = group("self");
    let topology = Topology::new()?;
    let own = group("self");
    assert_ne!(own, before);
    // A thread that goes on, and a program, must not keep a group.
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let left = topology.at(Location::Pod(1, 1)).thread(move || stopped.recv())?;
    let mut program = topology.at(Location::Host(2)).spawn(Path::new("sleep"), |sleep| {
        sleep.arg("60");
    })?;
    let root = topology.cgroup_root(1).to_owned();
    let panicked = catch_unwind(AssertUnwindSafe(move || {
        let _gone = topology;
        panic!("as a failing test does");
    }));
    assert!(panicked.is_err());
    assert!(!root.exists() && !own.exists(), "{} is left", own.display());
    assert_eq!(group("self"), before);
    drop(stop);
    assert!(left.join().unwrap().is_err());
    end(&mut program);
    Ok(())
}

#[test]
fn leftovers_of_a_killed_process_are_removed() -> Result<()> {
    // A process that has ended: no other process gets its id for long.
    let mut child = Command::new("true").stdin(Stdio::null()).spawn()?;
    let left = cgroup::root()?.join(format!("weir-test-{}", child.id()));
    child.wait()?;
    fs::create_dir_all(left.join("1-topology/node-1"))?;
    let _group = Cgroup::new("any")?;
    assert!(!left.exists());
    Ok(())
}

#[test]
fn several_threads_make_and_drop_groups_at_the_same_time() {
    let before = group("self");
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..20 {
                    let outer = Cgroup::new("outer").unwrap();
                    let inner = outer.child("inner").unwrap();
                    inner.enter().unwrap();
                    assert_eq!(group("thread-self"), inner.path());
                    drop((outer, inner));
                }
            });
        }
    });
    assert_eq!(group("self"), before);
}

#[test]
fn a_bpf_file_system_is_open_to_other_processes_and_mounted_nowhere() -> Result<()> {
    let mounts = fs::read_to_string("/proc/mounts")?;
    let file_system = BpfFs::new()?;
    assert_eq!(fs::read_to_string("/proc/mounts")?, mounts);
    let directory = file_system.directory("node-1")?;
    let status = Command::new("sh")
        .args(["-ec", "[ $(stat -f -c %T \"$1\") = bpf_fs ]; mkdir -p \"$1/a/b\"", "sh"])
        .arg(&directory)
        .status()?;
    assert!(status.success());
    assert!(directory.join("a/b").is_dir());
    unpin_all(&directory)?;
    assert_eq!(fs::read_dir(&directory)?.count(), 0);
    drop(file_system);
    await_that("the directory is gone", || !directory.exists());
    Ok(())
}
