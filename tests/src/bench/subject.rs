//! What is compared, and how each is started.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use super::{
    cluster::{NODE, POD_CIDR},
    process::Process,
};
use crate::{assets, netns::Namespace};

/// A service proxy, in nftables mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Subject {
    /// This project's agent.
    Weir,
    /// kube-proxy.
    KubeProxy,
}

impl Subject {
    /// Its name in tables.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Weir => "weir",
            Self::KubeProxy => "kube-proxy",
        }
    }

    fn program(self) -> anyhow::Result<PathBuf> {
        match self {
            Self::Weir => assets::weir(),
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

    /// Starts it in a node's namespace. Both get the same KubeProxyConfiguration.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub(super) fn start(
        self,
        kubeconfig: &Path,
        node: &Namespace,
        directory: &Path,
    ) -> anyhow::Result<Process> {
        let program = self.program()?;
        let config = directory.join("config.yaml");
        fs::write(&config, configuration(kubeconfig))?;
        let config = config.display();
        let line = match self {
            Self::Weir => format!("run --config {config} --hostname-override {NODE} --proxy-mode nftables"),
            Self::KubeProxy => format!("--config {config} --hostname-override {NODE}"),
        };
        let arguments: Vec<_> = line.split_whitespace().map(str::to_owned).collect();
        Process::start(node, &program, &arguments, directory)
    }
}

/// kube-proxy's defaults, less the sysctls that a network namespace does not let it write.
fn configuration(kubeconfig: &Path) -> String {
    serde_json::json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "clusterCIDR": POD_CIDR,
        "clientConnection": { "kubeconfig": kubeconfig },
        "conntrack": {
            "maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s",
        },
    })
    .to_string()
}
