//! What is compared, and how each is started.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use super::{
    cluster::{CLUSTER_CIDRS, NODE},
    process::Process,
};
use crate::{assets, netns::Namespace};

/// A service proxy in one of its modes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Subject {
    /// This project's agent, Services at the socket (and nftables behind that).
    WeirEbpf,
    /// This project's agent with nftables alone.
    WeirNftables,
    /// kube-proxy with nftables.
    KubeProxyNftables,
    /// kube-proxy with whatever `iptables` is in `PATH`.
    KubeProxyIptables,
    /// kube-proxy with IPVS, where the kernel has it.
    KubeProxyIpvs,
}

/// Where the socket programs go.
#[derive(Clone, Debug)]
pub(super) struct Roots {
    /// weir's `--cgroup-root`.
    pub(super) cgroup: PathBuf,
    /// weir's `--bpf-root`.
    pub(super) bpf: PathBuf,
}

impl Subject {
    /// All of them.
    pub(super) const ALL: [Self; 5] = [
        Self::WeirEbpf,
        Self::WeirNftables,
        Self::KubeProxyNftables,
        Self::KubeProxyIptables,
        Self::KubeProxyIpvs,
    ];

    /// Its name in tables.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::WeirEbpf => "weir eBPF",
            Self::WeirNftables => "weir nftables",
            Self::KubeProxyNftables => "kube-proxy nftables",
            Self::KubeProxyIptables => "kube-proxy iptables",
            Self::KubeProxyIpvs => "kube-proxy ipvs",
        }
    }

    /// Whether it is this project's.
    #[must_use]
    pub fn is_weir(self) -> bool {
        matches!(self, Self::WeirEbpf | Self::WeirNftables)
    }

    /// Why it cannot be measured on this machine, if the kernel lacks what it needs.
    #[must_use]
    pub(super) fn lacks(self) -> Option<&'static str> {
        if self != Self::KubeProxyIpvs {
            return None;
        }
        // It may be a module that nobody has asked for yet; where that fails, the file is not there either.
        let _ = Command::new("modprobe").arg("ip_vs").output();
        (!Path::new("/proc/net/ip_vs").exists()).then_some("this kernel has no ip_vs")
    }

    fn program(self) -> Result<PathBuf> {
        if self.is_weir() { assets::weir() } else { assets::kubernetes("kube-proxy") }
    }

    /// kube-proxy's `mode`; weir takes its own from a flag.
    fn mode(self) -> &'static str {
        match self {
            Self::KubeProxyIptables => "iptables",
            Self::KubeProxyIpvs => "ipvs",
            Self::WeirEbpf | Self::WeirNftables | Self::KubeProxyNftables => "nftables",
        }
    }

    /// What it says its version is, and that of the tool it programs the kernel with.
    ///
    /// # Errors
    ///
    /// When one of them cannot be run.
    pub(super) fn version(self) -> Result<String> {
        let own = version(&self.program()?)?;
        let tool = match self {
            Self::WeirEbpf | Self::WeirNftables => return Ok(own),
            Self::KubeProxyNftables => "nft",
            Self::KubeProxyIptables => "iptables",
            Self::KubeProxyIpvs => "ipset",
        };
        Ok(format!("{own}, {}", version(Path::new(tool))?))
    }

    /// Starts it in a node's namespace. All get the same KubeProxyConfiguration, but for the mode.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub(super) fn start(
        self,
        kubeconfig: &Path,
        node: &Namespace,
        roots: &Roots,
        directory: &Path,
    ) -> Result<Process> {
        let config = directory.join("config.yaml");
        fs::write(&config, configuration(self.mode(), kubeconfig))?;
        let mut arguments =
            vec![format!("--config={}", config.display()), format!("--hostname-override={NODE}")];
        if self.is_weir() {
            arguments.insert(0, "run".to_owned());
        }
        match self {
            Self::WeirEbpf => arguments.extend([
                "--proxy-mode=ebpf".to_owned(),
                format!("--cgroup-root={}", roots.cgroup.display()),
                format!("--bpf-root={}", roots.bpf.display()),
            ]),
            Self::WeirNftables => arguments.push("--proxy-mode=nftables".to_owned()),
            Self::KubeProxyNftables | Self::KubeProxyIptables | Self::KubeProxyIpvs => {}
        }
        Process::start(node, &self.program()?, &arguments, directory)
    }
}

/// The first line that a program says of its version.
///
/// # Errors
///
/// When it cannot be run.
pub(super) fn version(program: &Path) -> Result<String> {
    let output = Command::new(program).arg("--version").output();
    let output = output.with_context(|| format!("running {}", program.display()))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(text.lines().next().unwrap_or_default().trim().to_owned())
}

/// kube-proxy's defaults, less the sysctls that a network namespace does not let it write.
fn configuration(mode: &str, kubeconfig: &Path) -> String {
    serde_json::json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": mode,
        "clusterCIDR": CLUSTER_CIDRS,
        "clientConnection": { "kubeconfig": kubeconfig },
        "conntrack": {
            "maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s",
        },
    })
    .to_string()
}
