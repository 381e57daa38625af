//! A bpffs where eBPF will want one, made by `--init-only` before the agent starts with fewer rights.
//!
//! In: the [`Config`]. Out: a mount, which a container with mount propagation has made for the host; or, for nftables
//! alone, a bpffs with nothing of ours.

use std::{fs, path::Path};

use anyhow::Context as _;
use nix::{
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

use crate::{
    config::{Config, ProxyMode},
    dataplane::ebpf::Place,
};

/// Mounts a bpffs where the directory of our pins is to be, if none is there and eBPF may serve. Where it may not, what
/// an agent with eBPF left goes: the one with nftables alone may not have the right to.
///
/// # Errors
///
/// When it cannot be mounted and no other data plane would do, or something is left.
pub(super) fn ensure(config: &Config) -> anyhow::Result<()> {
    if config.mode == ProxyMode::Nftables {
        let place = Place { bpf_root: config.bpf_root.clone(), cgroup_root: config.cgroup_root.clone() };
        return place.clear().with_context(|| format!("clearing {}", config.bpf_root.display()));
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
    mounted(bpf_root)?;
    fs::create_dir_all(bpf_root).with_context(|| format!("making {}", bpf_root.display()))
}

fn mounted(bpf_root: &Path) -> anyhow::Result<()> {
    // The directory above ours is the kernel's `/sys/fs/bpf`, or one that somebody chose.
    let existing = if bpf_root.exists() { bpf_root } else { bpf_root.parent().unwrap_or(bpf_root) };
    let kind = statfs(existing).with_context(|| format!("looking at {}", existing.display()))?;
    if kind.filesystem_type() == BPF_FS_MAGIC {
        return Ok(());
    }
    mount(Some("bpf"), existing, Some("bpf"), MsFlags::empty(), Some("mode=0700"))
        .with_context(|| format!("mounting a bpffs at {}", existing.display()))?;
    tracing::info!(directory = %existing.display(), "mounted a bpffs");
    Ok(())
}
