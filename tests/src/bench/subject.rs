//! What is compared, and how each is started.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Context as _;
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
    KubeProxy,
}

/// Where a subject learns of Services.
#[derive(Clone, Copy, Debug)]
pub(super) enum Feed<'a> {
    /// From an API server, by this kubeconfig.
    ApiServer(&'a Path),
    /// From the manifests in this directory, which only weir can read.
    Manifests(&'a Path),
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
    pub(super) const ALL: [Self; 3] = [Self::WeirEbpf, Self::WeirNftables, Self::KubeProxy];

    /// Its name in tables.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::WeirEbpf => "weir ebpf",
            Self::WeirNftables => "weir nftables",
            Self::KubeProxy => "kube-proxy",
        }
    }

    fn program(self) -> anyhow::Result<PathBuf> {
        match self {
            Self::WeirEbpf | Self::WeirNftables => assets::weir(),
            Self::KubeProxy => assets::kubernetes("kube-proxy"),
        }
    }

    /// What it says its version is.
    ///
    /// # Errors
    ///
    /// When it cannot be run.
    pub(super) fn version(self) -> anyhow::Result<String> {
        let program = self.program()?;
        let output = Command::new(&program).arg("--version").output();
        let output = output.with_context(|| format!("running {}", program.display()))?;
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    /// Starts it in a node's namespace. All get the same KubeProxyConfiguration.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub(super) fn start(
        self,
        feed: Feed<'_>,
        node: &Namespace,
        roots: &Roots,
        directory: &Path,
    ) -> anyhow::Result<Process> {
        let program = self.program()?;
        let config = directory.join("config.yaml");
        fs::write(&config, configuration(feed))?;
        let mut arguments =
            vec![format!("--config={}", config.display()), format!("--hostname-override={NODE}")];
        if self != Self::KubeProxy {
            arguments.insert(0, "run".to_owned());
        }
        if let Feed::Manifests(directory) = feed {
            arguments.push(format!("--source=manifests:{}", directory.display()));
        }
        match self {
            Self::WeirEbpf => arguments.extend([
                "--proxy-mode=ebpf".to_owned(),
                format!("--cgroup-root={}", roots.cgroup.display()),
                format!("--bpf-root={}", roots.bpf.display()),
            ]),
            Self::WeirNftables => arguments.push("--proxy-mode=nftables".to_owned()),
            Self::KubeProxy => {}
        }
        Process::start(node, &program, &arguments, directory)
    }
}

/// kube-proxy's defaults, less the sysctls that a network namespace does not let it write.
fn configuration(feed: Feed<'_>) -> String {
    let kubeconfig = match feed {
        Feed::ApiServer(kubeconfig) => Some(kubeconfig),
        Feed::Manifests(_) => None,
    };
    serde_json::json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "clusterCIDR": CLUSTER_CIDRS,
        "clientConnection": { "kubeconfig": kubeconfig },
        "conntrack": {
            "maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s",
        },
    })
    .to_string()
}
