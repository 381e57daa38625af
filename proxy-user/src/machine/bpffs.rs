//! A bpffs where eBPF will want one, made by `--init-only` before the agent starts with fewer rights.
//!
//! In: the [`Config`]. Out: a mount, which a container with mount propagation has made for the host; or, for nftables
//! alone, a bpffs with nothing of ours.

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

/// Mounts a bpffs on the directory of our pins, if that is on none and eBPF may serve; nothing else is mounted over, except
/// the directory that the kernel has for that. Where it may not, what
/// an agent with eBPF left goes: the one with nftables alone may not have the right to.
///
/// # Errors
///
/// When it cannot be mounted and no other data plane would do, or something is left.
pub(crate) fn ensure(config: &Config) -> anyhow::Result<()> {
    if config.mode == ProxyMode::Nftables {
        let place = Place { bpf_root: config.bpf_root.clone(), cgroup_root: config.cgroup_root.clone() };
        let ours = place.is_on_bpffs().and_then(|may_be| if may_be { place.clear() } else { Ok(()) });
        return ours.with_context(|| format!("clearing {}", config.bpf_root.display()));
    }
    match (made(&config.bpf_root), config.mode) {
        (Err(error), ProxyMode::Ebpf) => Err(error),
        (Err(error), _) => {
            tracing::warn!(error = format!("{error:#}"), "there is no bpffs, so nftables will serve alone");
            Ok(())
        }
        (Ok(()), _) => Ok(()),
    }
}

/// A bpffs with our directory in it, so that the agent can be given that and nothing else of the file system.
fn made(bpf_root: &Path) -> anyhow::Result<()> {
    if let Some(place) = bpf_root.ancestors().find(|ancestor| is_kernels(ancestor)) {
        // In sysfs there can be no directory of ours to mount on.
        mount_at(place)?;
    }
    fs::create_dir_all(bpf_root).with_context(|| format!("making {}", bpf_root.display()))?;
    if file_system(bpf_root)? != BPF_FS_MAGIC {
        mount_at(bpf_root)?;
    }
    Ok(())
}

/// Whether this is the directory that the kernel has for a bpffs, below wherever its sysfs is mounted, and nothing is
/// mounted there.
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
