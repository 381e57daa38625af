//! Docker, kind, kubectl and helm, run for a kind cluster.
//!
//! In: the name of a cluster and arguments for these programs. Out: their output, or their error.

use std::{
    ffi::OsStr,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::{machine::Machine, process};

/// A cluster that kind made, or is to make.
pub(super) struct Cluster<'a> {
    machine: &'a Machine,
    name: &'a str,
}

impl<'a> Cluster<'a> {
    /// The cluster that kind calls `name`.
    ///
    /// # Errors
    ///
    /// When docker, kind or kubectl is missing.
    pub(super) fn new(machine: &'a Machine, name: &'a str) -> Result<Self> {
        for program in ["docker", "kind", "kubectl"] {
            ensure!(
                machine.find(program).is_some(),
                "{program} is missing; docs/kind.md lists what has to be installed"
            );
        }
        Ok(Self { machine, name })
    }

    pub(super) fn name(&self) -> &str {
        self.name
    }

    pub(super) fn exists(&self) -> Result<bool> {
        let names = process::read(self.machine.command("kind").args(["get", "clusters"]))?;
        Ok(names.lines().any(|name| name == self.name))
    }

    /// kind with arguments, for this cluster.
    pub(super) fn kind(&self, words: &[&str]) -> Command {
        let mut command = self.machine.command("kind");
        command.args(words).args(["--name", self.name]);
        command
    }

    fn kubectl_command(&self) -> Command {
        let mut command = self.machine.command("kubectl");
        command.args(["--context", &format!("kind-{}", self.name)]);
        command
    }

    /// Runs kubectl and returns its output.
    pub(super) fn kubectl(&self, words: &[&str]) -> Result<String> {
        process::read(self.kubectl_command().args(words))
    }

    /// [`Cluster::kubectl`] with `-o json`.
    pub(super) fn kubectl_json(&self, words: &[&str]) -> Result<Value> {
        serde_json::from_str(&self.kubectl(&[words, &["-o", "json"]].concat())?)
            .context("reading JSON of kubectl")
    }

    /// Gives `manifests` to `kubectl VERB -f -`.
    pub(super) fn kubectl_file(&self, verb: &str, manifests: &str) -> Result<()> {
        let mut command = self.kubectl_command();
        let mut child =
            command.args([verb, "-f", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).spawn()?;
        child.stdin.take().context("kubectl takes no input")?.write_all(manifests.as_bytes())?;
        ensure!(child.wait()?.success(), "kubectl {verb} failed");
        Ok(())
    }

    /// Runs helm for this cluster.
    pub(super) fn helm(&self, helm: &Path, words: &[&str]) -> Result<()> {
        let mut command = self.machine.command(helm);
        process::read(command.args(words).args(["--kube-context", &format!("kind-{}", self.name)]))?;
        Ok(())
    }

    /// The names of the nodes, which are also those of their containers.
    pub(super) fn nodes(&self) -> Result<Vec<String>> {
        let names = process::read(&mut self.kind(&["get", "nodes"]))?;
        let mut names = names.lines().map(str::to_owned).collect::<Vec<_>>();
        names.sort();
        Ok(names)
    }

    /// Runs a program on a node and returns its output.
    pub(super) fn on_node(&self, node: &str, words: &[&str]) -> Result<String> {
        process::read(self.machine.command("docker").args(["exec", node]).args(words))
    }

    /// Loads an image archive into every node.
    pub(super) fn load(&self, archive: &Path) -> Result<()> {
        process::read(self.kind(&["load", "image-archive"]).arg(archive)).map(drop)
    }

    /// The internal IPv4 or IPv6 address of every node, the control plane's first.
    pub(super) fn addresses(&self) -> Result<Vec<String>> {
        let nodes = self.kubectl_json(&["get", "nodes"])?;
        let mut found = Vec::new();
        for node in array(&nodes["items"]) {
            let address = array(&node["status"]["addresses"]).iter().find(|it| it["type"] == "InternalIP");
            let address =
                address.and_then(|it| it["address"].as_str()).context("a node without an address")?;
            let control = !node["metadata"]["labels"]["node-role.kubernetes.io/control-plane"].is_null();
            found.push((!control, address.to_owned()));
        }
        found.sort();
        Ok(found.into_iter().map(|(_, address)| address).collect())
    }

    /// Waits until the rollout of a workload such as `ds/weir` is complete.
    pub(super) fn rolled_out(&self, namespace: &str, workload: &str) -> Result<()> {
        self.kubectl(&["-n", namespace, "rollout", "status", workload, "--timeout=240s"]).map(drop)
    }
}

/// The elements of a JSON array; none where there is no array.
pub(super) fn array(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// The helm that is installed, else the one that setup builds.
pub(super) fn helm(machine: &Machine) -> Result<PathBuf> {
    if let Some(helm) = machine.find("helm") {
        return Ok(helm);
    }
    crate::setup::run(machine, crate::setup::Level::Check)?;
    let [helm, _] = crate::setup::chart_tools(machine);
    if !crate::machine::is_executable(&helm) {
        bail!("helm is neither installed nor in {}", helm.display());
    }
    Ok(helm)
}

/// `https://ADDRESS:PORT`, with brackets where the address needs them.
pub(super) fn url(scheme: &str, address: &str, port: u16) -> String {
    if address.contains(':') {
        format!("{scheme}://[{address}]:{port}")
    } else {
        format!("{scheme}://{address}:{port}")
    }
}

/// A file name as an argument.
pub(super) fn text(path: &(impl AsRef<OsStr> + ?Sized)) -> Result<&str> {
    path.as_ref().to_str().context("a path that is not UTF-8")
}
