//! `weir run --init-only`, which containers and systemd run with all rights before the agent starts with few.
//!
//! Everything is in a mount namespace and a network namespace of its own, which end with it.

use std::{fs, process::Command};

use anyhow::{Result, ensure};
use weir_tests::assets;

/// Leaves connection tracking alone, which not all of a machine's namespaces have for themselves.
const CONFIG: &str = "apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
conntrack: {maxPerCore: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
";

/// The output of a script with `$PLACE`, a directory on a tmpfs, and `$WEIR`, the command that prepares a node for a mode.
fn prepared(script: &str) -> Result<String> {
    let directory = tempfile::tempdir()?;
    let config = directory.path().join("config.yaml");
    fs::write(&config, CONFIG)?;
    let place = directory.path().join("place");
    fs::create_dir(&place)?;
    let weir = format!(
        "{} run --init-only --config {} --bpf-root {}/weir --proxy-mode",
        assets::weir()?.display(),
        config.display(),
        place.display()
    );
    let mut command = Command::new("unshare");
    command.args(["--mount", "--net", "sh", "-ec"]).arg(format!("mount -t tmpfs none $PLACE\n{script}"));
    let output = command.env("PLACE", &place).env("WEIR", weir).output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "{}: {said}{}", output.status, String::from_utf8_lossy(&output.stderr));
    Ok(said)
}

#[test]
fn a_bpffs_is_mounted_once_where_there_is_none_with_our_directory_in_it() -> Result<()> {
    let said = prepared(
        "touch $PLACE/other; $WEIR auto >&2; $WEIR ebpf >&2; stat -f -c %T $PLACE/weir $PLACE; ls $PLACE;
         grep -c bpf.*$PLACE /proc/mounts",
    )?;
    assert_eq!(said, "bpf_fs\ntmpfs\nother\nweir\n1\n");
    Ok(())
}

#[test]
fn the_directory_that_the_kernel_has_for_a_bpffs_is_mounted_on_itself() -> Result<()> {
    let said = prepared(
        "mount -t sysfs none $PLACE; WEIR=$(echo \"$WEIR\" | sed s,$PLACE/weir,$PLACE/fs/bpf/weir,)
         $WEIR auto >&2; $WEIR ebpf >&2; cd $PLACE/fs/bpf; stat -f -c %T .; ls -d */; grep -c bpf.*$PLACE /proc/mounts",
    )?;
    assert_eq!(said, "bpf_fs\nweir/\n1\n");
    Ok(())
}

#[test]
fn no_bpffs_is_mounted_over_files_that_are_there() -> Result<()> {
    let said = prepared(
        "mkdir $PLACE/weir; touch $PLACE/weir/diary; ! $WEIR ebpf 2>&1; $WEIR auto 2>&1; ls $PLACE/weir; stat -f -c %T $PLACE/weir",
    )?;
    assert!(said.contains("is on no bpffs and holds `diary`"), "{said}");
    assert!(said.contains("cannot mount a bpffs, so nftables will serve alone"), "{said}");
    assert!(said.ends_with("\ndiary\ntmpfs\n"), "{said}");
    Ok(())
}

#[test]
fn leftovers_of_ebpf_are_removed_for_nftables_alone() -> Result<()> {
    let said = prepared(
        "$WEIR auto >&2; mkdir $PLACE/weir/v1 $PLACE/other; $WEIR nftables >&2; cd $PLACE; ls -d */; ls -d weir/*/ 2>/dev/null || true",
    )?;
    assert_eq!(said, "other/\nweir/\n");
    Ok(())
}

#[test]
fn for_nftables_alone_nothing_is_mounted() -> Result<()> {
    assert_eq!(prepared("$WEIR nftables >&2; stat -f -c %T $PLACE; ls $PLACE")?, "tmpfs\n");
    Ok(())
}

#[test]
fn without_the_right_to_mount_ebpf_fails_and_auto_leaves_it_to_nftables() -> Result<()> {
    let said = prepared(
        "limited='setpriv --bounding-set=-sys_admin'; $limited $WEIR auto 2>&1; ! $limited $WEIR ebpf 2>&1; stat -f -c %T $PLACE",
    )?;
    assert!(said.contains("cannot mount a bpffs, so nftables will serve alone"), "{said}");
    assert!(said.contains("weir: mounting a bpffs at"), "{said}");
    assert!(said.ends_with("\ntmpfs\n"), "{said}");
    Ok(())
}

#[test]
fn for_nftables_alone_files_that_are_on_no_bpffs_stay() -> Result<()> {
    let said = prepared("mkdir $PLACE/weir; touch $PLACE/weir/diary; $WEIR nftables >&2; ls $PLACE/weir")?;
    assert_eq!(said, "diary\n");
    Ok(())
}
