//! Whether a cluster would accept what the chart makes, and whether the chart refuses what cannot work.
//!
//! In: `charts/weir`, with a file of values in `ci` for each way of using it. Out: complaints of helm and kubeconform.

use std::{collections::BTreeSet, fs, path::PathBuf, process::Stdio};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::{
    places,
    rendered::{CHART, listed, named, pod, rendered},
};
use crate::{machine::Machine, process, setup};

/// Lints the chart and what it makes of the values in `ci`, and compares it with what it should make.
///
/// # Errors
///
/// With the values that fail, and why.
pub(crate) fn check(machine: &Machine) -> Result<()> {
    let mut cases = fs::read_dir(machine.workspace.join(CHART).join("ci"))?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<Vec<PathBuf>>>()?;
    cases.sort();
    ensure!(!cases.is_empty(), "{CHART}/ci has no files of values");
    let version = chart_version(&fs::read_to_string(machine.workspace.join(CHART).join("Chart.yaml"))?)?;
    ensure!(
        version == env!("CARGO_PKG_VERSION"),
        "{CHART}/Chart.yaml has version {version}, Cargo.toml has {}",
        env!("CARGO_PKG_VERSION")
    );
    for values in cases {
        accepted(machine, &values).with_context(|| format!("with {}", values.display()))?;
        println!("{}: fine", values.display());
    }
    refuses_nonsense(machine)?;
    another_configuration_reaches_new_pods_alone(machine)?;
    the_agent_alone_has_the_token(machine)?;
    releases_of_one_name_share_nothing(machine)?;
    places::check(machine)
}

fn accepted(machine: &Machine, values: &PathBuf) -> Result<()> {
    let [helm, kubeconform] = setup::chart_tools(machine);
    process::read(machine.command(&helm).args(["lint", "--strict", CHART, "--values"]).arg(values))?;
    let mut template = machine.command(&helm);
    template.args(["template", "weir", CHART, "--namespace", "kube-system", "--values"]).arg(values);
    let mut template = template.stdout(Stdio::piped()).spawn().context("starting helm")?;
    let schemas = setup::chart_schemas(machine).join("{{.ResourceKind}}{{.KindSuffix}}.json");
    let mut conform = machine.command(&kubeconform);
    conform.args(["--strict", "--summary", "--schema-location"]).arg(schemas).arg("-");
    conform.stdin(template.stdout.take().context("helm prints nothing")?);
    let output = conform.output().context("starting kubeconform")?;
    ensure!(template.wait()?.success(), "helm template failed");
    ensure!(output.status.success(), "kubeconform: {}", String::from_utf8_lossy(&output.stdout));
    Ok(())
}

/// The chart refuses unknown values, and values that cannot work together.
fn refuses_nonsense(machine: &Machine) -> Result<()> {
    let [helm, _] = setup::chart_tools(machine);
    let server = "apiServer=https://192.0.2.1:6443";
    for (settings, complaint) in [
        (vec![], "apiServer is not set"),
        (vec![server, "proxyMod=ebpf"], "proxyMod"),
        (vec![server, "proxyMode=ipvs"], "proxyMode"),
        (vec![server, "config.mode=ebpf"], "config.mode is set"),
        (vec![server, "config.metricsBindAddress=0.0.0.0"], "metrics.bindAddress"),
        (vec![server, "metrics.podMonitor.enabled=true"], "Prometheus cannot reach"),
        (vec![server, "metrics.serviceMonitor.enabled=true"], "Prometheus cannot reach"),
        (vec![server, "apiServers={https://192.0.2.2:6443}"], "apiServer and apiServers are both set"),
        (vec!["apiServers={in-cluster,https://192.0.2.2:6443}"], "/apiServers/0"),
        (vec![server, "clusterCIDR={10.0.0.0}"], "/clusterCIDR/0"),
        (
            vec![server, "clusterCIDR={10.0.0.0/8}", "config.clusterCIDR=10.0.0.0/8"],
            "config.clusterCIDR are both",
        ),
        (vec![server, "securityContext.capabilities.add={BPF}"], "Set capabilities"),
        (vec![server, "image.digest=latest"], "/image/digest"),
        (vec![server, "dns.tll=5"], "tll"),
        (vec![server, "dns.service=kube-dns"], "/dns/service"),
        (vec![server, "livenessProbe.periodSecond=5"], "periodSecond"),
        (vec![server, "fullnameOverride=Weir"], "/fullnameOverride"),
    ] {
        let mut command = machine.command(&helm);
        command.args(["template", "weir", CHART]);
        settings.iter().for_each(|setting| {
            command.args(["--set", setting]);
        });
        let output = command.output().context("starting helm")?;
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(
            !output.status.success() && error.contains(complaint),
            "the chart did not refuse {settings:?} with `{complaint}`, but: {error}"
        );
    }
    println!("values that cannot work: refused");
    Ok(())
}

/// The kubelet updates a ConfigMap in running pods, and these may lack the rights that a changed configuration needs. So
/// each configuration has a ConfigMap of its own.
fn another_configuration_reaches_new_pods_alone(machine: &Machine) -> Result<()> {
    let mut names = BTreeSet::new();
    let others = [
        "proxyMode=nftables",
        "proxyMode=ebpf",
        "clusterCIDR={10.0.0.0/9}",
        "config.clusterCIDR=10.0.0.0/8",
        "metrics.bindAddress=127.0.0.1:9",
    ];
    for setting in others {
        for same in ["image.tag=one", "image.tag=two"] {
            let objects = rendered(machine, "kube-system", &[setting, same])?;
            let (name, _) = named(&objects, "ConfigMap")?;
            let mounted = listed(pod(&objects)?, "volumes").iter().find(|volume| volume["name"] == "config");
            let mounted = mounted.map(|volume| volume["configMap"]["name"].clone());
            ensure!(
                mounted == Some(name.into()),
                "{setting}: the ConfigMap is {name}, pods mount {mounted:?}"
            );
            names.insert(name.to_owned());
        }
    }
    ensure!(names.len() == others.len(), "{} configurations have these names: {names:?}", others.len());
    println!("a changed configuration: reaches new pods only");
    Ok(())
}

/// Containers that prepare or clean a node do not call the API server.
fn the_agent_alone_has_the_token(machine: &Machine) -> Result<()> {
    const TOKEN: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
    for (setting, expected) in [("prepareNode=true", &["weir"][..]), ("cleanup=true", &[])] {
        let objects = rendered(machine, "kube-system", &[setting])?;
        let pod = pod(&objects)?;
        ensure!(pod["automountServiceAccountToken"] == false, "{setting}: every container has the token");
        let containers = ["initContainers", "containers"].map(|key| listed(pod, key)).concat();
        ensure!(containers.len() == 2, "{setting}: there are {} containers", containers.len());
        let has =
            |container: &&Value| listed(container, "volumeMounts").iter().any(|it| it["mountPath"] == TOKEN);
        let having: Vec<_> = containers.iter().filter(has).filter_map(|it| it["name"].as_str()).collect();
        ensure!(having == expected, "{setting}: {having:?} have the token, not {expected:?}");
    }
    println!("the ServiceAccount's token: mounted in the agent only");
    Ok(())
}

/// Cluster-scoped objects have no namespace, so their names must differ.
fn releases_of_one_name_share_nothing(machine: &Machine) -> Result<()> {
    let names = |namespace| -> Result<BTreeSet<String>> {
        let objects = rendered(machine, namespace, &[])?;
        let of = objects.iter().filter(|object| object["metadata"].get("namespace").is_none());
        let name = |object: &Value| format!("{} {}", object["kind"], object["metadata"]["name"]);
        let (role, _) = named(&objects, "ClusterRole")?;
        let (_, binding) = named(&objects, "ClusterRoleBinding")?;
        ensure!(binding["roleRef"]["name"] == role, "the binding is of another role than {role}");
        Ok(of.map(name).collect())
    };
    let (one, other) = (names("one")?, names("other")?);
    ensure!(!one.is_empty() && one.is_disjoint(&other), "two releases share {:?}", one.intersection(&other));
    println!("two releases with one name in two namespaces: share no object");
    Ok(())
}

fn chart_version(chart: &str) -> Result<String> {
    let chart: Value = serde_yaml_ng::from_str(chart)?;
    Ok(chart["version"].as_str().context("Chart.yaml has no version")?.to_owned())
}
