//! `weir probe` on this machine: with everything there, without privileges, and with nothing mounted. And what becomes of
//! a program that the kernel refuses.

use std::{
    fs::{self, Permissions},
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::Path,
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use aya::{EbpfError, EbpfLoader, programs::Program};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::Value;
use weir::{
    config::{Host, ProxyMode},
    dataplane::ebpf::PROGRAMS,
    machine::probe::Probe,
    run,
};
use weir_tests::assets;

/// A bpffs of its own, gone when this is dropped.
struct BpfFs(tempfile::TempDir);

impl BpfFs {
    fn new() -> Result<Self> {
        let directory = tempfile::tempdir()?;
        mount(Some("bpf"), directory.path(), Some("bpf"), MsFlags::empty(), None::<&str>)
            .context("mounting a bpffs needs root")?;
        Ok(Self(directory))
    }
}

impl Drop for BpfFs {
    fn drop(&mut self) {
        let unmounted = umount2(self.0.path(), MntFlags::MNT_DETACH);
        // A second panic would hide the first.
        assert!(unmounted.is_ok() || std::thread::panicking(), "{} stays mounted", self.0.path().display());
    }
}

/// `weir` as it was built, or a copy of it, asked to probe with a bpffs there.
fn weir(program: &Path, bpf_root: &Path) -> Command {
    let mut command = Command::new(program);
    command.args(["probe", "-o", "json", "--bpf-root"]).arg(bpf_root).current_dir("/");
    command
}

/// Its output as JSON.
fn output(command: &mut Command) -> Result<Value> {
    let output = command.output()?;
    ensure!(output.status.success(), "{}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// The features of which this was found, by name.
fn found(probe: &Value, answer: &str) -> Vec<String> {
    let findings = probe["findings"].as_array().into_iter().flatten();
    let those = findings.filter(|finding| finding["found"] == answer);
    those.map(|finding| finding["feature"].as_str().unwrap_or_default().to_owned()).collect()
}

#[test]
fn this_machine_has_what_the_plane_needs_once_a_bpffs_is_mounted() -> Result<()> {
    let mounted = BpfFs::new()?;
    let there = output(&mut weir(&assets::weir()?, &mounted.0.path().join("weir")))?;
    assert_eq!(there["usable"], true, "{there:#}");
    assert_eq!(found(&there, "unknown"), [""; 0], "{there:#}");

    let elsewhere = tempfile::tempdir()?;
    let without = output(&mut weir(&assets::weir()?, elsewhere.path()))?;
    assert_eq!(without["usable"], false);
    let lacking = format!("bpffs at {}", elsewhere.path().display());
    assert!(found(&without, "no").contains(&lacking), "{without:#}");
    Ok(())
}

#[test]
fn without_privileges_it_reports_what_it_may_not_ask() -> Result<()> {
    let mounted = BpfFs::new()?;
    // Its own copy, because the way to the built one may be closed to others.
    let place = tempfile::tempdir()?;
    fs::set_permissions(place.path(), Permissions::from_mode(0o755))?;
    let copy = place.path().join("weir");
    fs::copy(assets::weir()?, &copy)?;
    let there = output(weir(&copy, mounted.0.path()).gid(65534).uid(65534))?;
    assert_eq!(there["usable"], false, "{there:#}");
    assert!(found(&there, "no").contains(&"permission to load programs".to_owned()), "{there:#}");
    assert!(found(&there, "unknown").contains(&"cgroup sock_addr programs".to_owned()), "{there:#}");
    Ok(())
}

#[test]
fn without_any_cgroup_mounted_it_names_the_directory() -> Result<()> {
    let mounted = BpfFs::new()?;
    let without = output(weir(&assets::weir()?, mounted.0.path()).args(["--cgroup-root", "/nowhere"]))?;
    assert_eq!(found(&without, "no"), ["cgroup v2 at /nowhere"], "{without:#}");
    Ok(())
}

/// A container runtime gives a container a cgroup namespace with the container's own cgroup as root.
#[test]
fn in_a_container_it_reports_that_the_nodes_cgroups_are_missing() -> Result<()> {
    let mounted = BpfFs::new()?;
    let (outer, inner) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let root = inner.path().display().to_string();
    let probe = format!(
        "mount -t cgroup2 none {root}; exec {} probe -o json --bpf-root {} --cgroup-root {root}",
        assets::weir()?.display(),
        mounted.0.path().display()
    );
    let script = "mount -t cgroup2 none $OUTER; own=$OUTER/weir-container-$$; mkdir $own
        sh -ec \"echo 0 > $own/cgroup.procs; exec unshare --cgroup --mount sh -ec '$PROBE'\" || code=$?
        rmdir $own; exit $code";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-ec", script]).env("OUTER", outer.path()).env("PROBE", probe);
    let there = output(&mut command)?;
    assert_eq!(there["usable"], false, "{there:#}");
    assert_eq!(found(&there, "no"), [format!("cgroup v2 at {root}")], "{there:#}");
    ensure!(there.to_string().contains("is the cgroup of weir's own container"), "{there:#}");
    Ok(())
}

/// As in containers without the device, or without the right to use it, and on nodes without it.
#[test]
fn missing_needs_of_dns_are_reported_with_their_remedy() -> Result<()> {
    let mounted = BpfFs::new()?;
    let probe = |hide: &str| -> Result<Value> {
        let weir = assets::weir()?;
        let script = format!(
            "mount -t tmpfs -o nodev none /dev/net; {hide}; exec {} probe -o json --bpf-root {}",
            weir.display(),
            mounted.0.path().display()
        );
        output(Command::new("unshare").args(["--mount", "sh", "-ec", &script]))
    };
    for (hide, remedy) in [
        ("true", "/dev/net/tun does not exist: `modprobe tun` creates it on the node"),
        // The kernel opens no device of such a file system, as where a container may not have the device.
        ("mknod /dev/net/tun c 10 200", "the container runtime has to allow the device c 10:200"),
    ] {
        let told = probe(hide)?;
        assert_eq!(
            (&told["usable"], found(&told, "no")),
            (&Value::Bool(true), vec!["TUN devices".to_owned()])
        );
        assert!(told.to_string().contains(remedy), "{told:#}");
    }
    Ok(())
}

/// Loads weir's programs after what ends them has become a jump to nowhere.
fn load_broken() -> Result<(), EbpfError> {
    const EXIT: [u8; 8] = [0x95, 0, 0, 0, 0, 0, 0, 0];
    const JUMP: [u8; 8] = [0x05, 0, 0xff, 0x7f, 0, 0, 0, 0];
    let mut object = PROGRAMS.to_vec();
    for instruction in object.as_chunks_mut().0.iter_mut().filter(|instruction| **instruction == EXIT) {
        *instruction = JUMP;
    }
    let mut programs = EbpfLoader::new().load(&object)?;
    for (_, program) in programs.programs_mut() {
        match program {
            Program::CgroupSockAddr(program) => program.load()?,
            Program::CgroupSock(program) => program.load()?,
            _ => {}
        }
    }
    Ok(())
}

#[test]
fn the_verifiers_log_of_a_refused_program_is_reported_to_its_last_line() -> Result<()> {
    let mounted = BpfFs::new()?;
    let cgroups = Host::this().cgroup_root.context("no cgroup v2 hierarchy is mounted")?;
    let probe = || Probe::of(&cgroups, mounted.0.path());
    let auto = run::choose(ProxyMode::Auto, probe, |_| load_broken())?;
    assert!(auto.is_none(), "nftables serves");
    let error = run::choose(ProxyMode::Ebpf, probe, |_| load_broken()).unwrap_err().to_string();
    assert!(error.contains("jump out of range"), "{error}");
    assert!(error.lines().last().is_some_and(|line| line.starts_with("processed ")), "{error}");
    Ok(())
}
