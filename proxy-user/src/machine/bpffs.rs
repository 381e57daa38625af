//! The BPF file system for weir's pins, which `--init-only` mounts before the agent starts with fewer rights.
//!
//! In: the [`Config`]. Out: a mount, which mount propagation makes visible on the host; or, for nftables alone, a bpffs without
//! weir's pins.

use std::{fs, path::Path};

use anyhow::{Context as _, bail};
use nix::{
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, FsType, SYSFS_MAGIC, statfs},
};

use crate::{
    config::{Config, ProxyMode},
    dataplane::ebpf::Place,
};

/// If the socket plane may serve, mounts a bpffs on the directory of weir's pins, unless that is on one. Only an empty directory or
/// the kernel's own mount point is mounted over. In nftables mode, removes the pins of an earlier agent, because the agent itself
/// may lack the right to.
///
/// # Errors
///
/// When the mount fails in mode ebpf, or a pin cannot be removed.
pub(crate) fn ensure(config: &Config) -> anyhow::Result<()> {
    if config.mode == ProxyMode::Nftables {
        let place = Place { bpf_root: config.bpf_root.clone(), cgroup_root: config.cgroup_root.clone() };
        let ours = place.is_on_bpffs().and_then(|may_be| if may_be { place.clear() } else { Ok(()) });
        return ours.with_context(|| format!("clearing {}", config.bpf_root.display()));
    }
    match (made(&config.bpf_root), config.mode) {
        (Err(error), ProxyMode::Ebpf) => Err(error),
        (Err(error), _) => {
            tracing::warn!(
                error = format!("{error:#}"),
                "cannot mount a bpffs, so nftables will serve alone"
            );
            Ok(())
        }
        (Ok(()), _) => Ok(()),
    }
}

/// Mounts a bpffs with weir's directory in it, so that the agent's container can mount that directory alone.
fn made(bpf_root: &Path) -> anyhow::Result<()> {
    if let Some(place) = bpf_root.ancestors().find(|ancestor| is_kernels(ancestor)) {
        // sysfs takes no new directories to mount on.
        mount_at(place)?;
    }
    fs::create_dir_all(bpf_root).with_context(|| format!("making {}", bpf_root.display()))?;
    if file_system(bpf_root)? != BPF_FS_MAGIC {
        mount_at(bpf_root)?;
    }
    Ok(())
}

/// Whether this is the kernel's own mount point for a bpffs in a sysfs, with nothing mounted on it.
fn is_kernels(directory: &Path) -> bool {
    directory.ends_with("fs/bpf") && file_system(directory).is_ok_and(|kind| kind == SYSFS_MAGIC)
}

fn file_system(directory: &Path) -> anyhow::Result<FsType> {
    let told = statfs(directory).with_context(|| format!("looking at {}", directory.display()))?;
    Ok(told.filesystem_type())
}

fn mount_at(directory: &Path) -> anyhow::Result<()> {
    let mut entries =
        fs::read_dir(directory).with_context(|| format!("looking at {}", directory.display()))?;
    if let Some(entry) = entries.next() {
        let name = entry.with_context(|| format!("looking at {}", directory.display()))?.file_name();
        bail!(
            "{} is on no bpffs and holds `{}`; a bpffs mounted there would hide it, so name an empty directory by --bpf-root",
            directory.display(),
            name.display()
        );
    }
    mount(Some("bpf"), directory, Some("bpf"), MsFlags::empty(), Some("mode=0700"))
        .with_context(|| format!("mounting a bpffs at {}", directory.display()))?;
    tracing::info!(directory = %directory.display(), "mounted a bpffs");
    Ok(())
}
