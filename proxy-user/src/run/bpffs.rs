//! A bpffs where eBPF will want one, made by `--init-only` before the agent starts with fewer rights.
//!
//! In: the [`Config`]. Out: a mount, which a container with mount propagation has made for the host.

use std::path::Path;

use anyhow::Context as _;
use nix::{
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

use crate::config::{Config, ProxyMode};

/// Mounts a bpffs where the directory of our pins is to be, if none is there and eBPF may serve.
///
/// # Errors
///
/// When it cannot be mounted and no other data plane would do.
pub(super) fn ensure(config: &Config) -> anyhow::Result<()> {
    if config.mode == ProxyMode::Nftables {
        return Ok(());
    }
    match (mounted(&config.bpf_root), config.mode) {
        (Err(error), ProxyMode::Ebpf) => Err(error),
        (Err(error), _) => {
            tracing::warn!(error = format!("{error:#}"), "there is no bpffs, so nftables will serve alone");
            Ok(())
        }
        (Ok(()), _) => Ok(()),
    }
}

fn mounted(bpf_root: &Path) -> anyhow::Result<()> {
    // Our own directory is made by whoever pins; the one above is the kernel's `/sys/fs/bpf`, or one somebody chose.
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
