//! The chart: what its values are called, and whether what it makes would be accepted by a cluster.
//!
//! In: `charts/weir`, with a file of values in `ci` for each way of using it. Out: its README, and complaints of helm and
//! kubeconform.

use std::{collections::BTreeSet, fs, path::PathBuf, process::Stdio};

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize as _;
use serde_json::Value;

use crate::{machine::Machine, process, setup};

mod places;

/// The chart's directory.
const CHART: &str = "charts/weir";
/// The generated file.
pub(crate) const README: &str = "charts/weir/README.md";

/// Lints the chart and everything that it makes of the values in `ci`.
///
/// # Errors
///
/// Naming the values with which something is wrong.
pub(crate) fn check(machine: &Machine) -> Result<()> {
    let mut cases = fs::read_dir(machine.workspace.join(CHART).join("ci"))?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<Vec<PathBuf>>>()?;
    cases.sort();
    ensure!(!cases.is_empty(), "{CHART}/ci holds no values to check with");
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

/// That a value with a wrong name is refused, and that what cannot work is.
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
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(
            !output.status.success() && said.contains(complaint),
            "the chart was to refuse {settings:?} with `{complaint}`, and said: {said}"
        );
    }
    println!("what cannot work: refused");
    Ok(())
}

/// What the chart makes of these settings for a release in a namespace.
fn rendered(machine: &Machine, namespace: &str, settings: &[&str]) -> Result<Vec<Value>> {
    let [helm, _] = setup::chart_tools(machine);
    let mut command = machine.command(&helm);
    command.args([
        "template",
        "weir",
        CHART,
        "--namespace",
        namespace,
        "--set",
        "apiServer=https://192.0.2.1:6443",
    ]);
    for setting in settings {
        command.args(["--set", setting]);
    }
    let text = process::read(&mut command)?;
    let documents = serde_yaml_ng::Deserializer::from_str(&text).map(Value::deserialize);
    let documents = documents.collect::<Result<Vec<_>, _>>().context("what helm prints")?;
    Ok(documents.into_iter().filter(|document| !document.is_null()).collect())
}

fn named<'a>(objects: &'a [Value], kind: &str) -> Result<(&'a str, &'a Value)> {
    let object = objects.iter().find(|object| object["kind"] == kind);
    let object = object.with_context(|| format!("the chart makes no {kind}"))?;
    let name = object["metadata"]["name"].as_str().with_context(|| format!("a {kind} has no name"))?;
    Ok((name, object))
}

fn pod(objects: &[Value]) -> Result<&Value> {
    Ok(&named(objects, "DaemonSet")?.1["spec"]["template"]["spec"])
}

fn listed<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value[key].as_array().map_or(&[], Vec::as_slice)
}

/// The kubelet brings what changes in a ConfigMap to the pods that have it, and these may lack the rights for it.
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
    println!("another configuration: for new pods alone");
    Ok(())
}

/// What prepares or cleans a node asks the API server nothing.
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
        ensure!(having == expected, "{setting}: {having:?} have the token, and {expected:?} are to have it");
    }
    println!("the ServiceAccount's token: for the agent alone");
    Ok(())
}

/// Objects of the whole cluster have no namespace to tell them apart.
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
    println!("releases of one name in two namespaces: share nothing");
    Ok(())
}

fn chart_version(chart: &str) -> Result<String> {
    let chart: Value = serde_yaml_ng::from_str(chart)?;
    Ok(chart["version"].as_str().context("Chart.yaml has no version")?.to_owned())
}

/// The README, from `Chart.yaml` and the comments in `values.yaml`.
///
/// # Errors
///
/// When a value has no comment, or one of the files is no YAML.
pub(crate) fn readme(machine: &Machine) -> Result<String> {
    let read = |name: &str| {
        let file = machine.workspace.join(CHART).join(name);
        fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))
    };
    let values = described(&read("values.yaml")?)?;
    let mut text = read("README.md.in")?;
    text.push_str("\n| value | default | meaning |\n| --- | --- | --- |\n");
    for Described { path, default, comment } in values {
        text.push_str(&format!("| `{path}` | `{default}` | {comment} |\n"));
    }
    Ok(text)
}

/// One value of the chart.
#[derive(Debug, PartialEq, Eq)]
struct Described {
    path: String,
    default: String,
    comment: String,
}

/// The values that have a comment beginning with `# --`, in the order of the file.
fn described(text: &str) -> Result<Vec<Described>> {
    let values: Value = serde_yaml_ng::from_str(text).context("values.yaml")?;
    let mut found = Vec::new();
    let mut comment: Option<String> = None;
    // The keys that the line is below, each with its indentation.
    let mut above: Vec<(usize, &str)> = Vec::new();
    // Lists and maps below a described value are its default, not values of their own.
    let mut inside: Option<usize> = None;
    for line in text.lines() {
        let indentation = line.len() - line.trim_start().len();
        if let Some(words) = line.trim_start().strip_prefix('#') {
            let words = words.trim();
            comment = match (comment, words.strip_prefix("--")) {
                (_, Some(first)) => Some(first.trim().to_owned()),
                (Some(before), None) => Some(format!("{before} {words}")),
                (None, None) => None,
            };
            continue;
        }
        let Some((key, _)) = line.trim_start().split_once(':').filter(|(key, _)| !key.starts_with('-'))
        else {
            continue;
        };
        if inside.is_some_and(|outer| indentation > outer) {
            continue;
        }
        inside = None;
        above.retain(|(outer, _)| *outer < indentation);
        above.push((indentation, key));
        let path = above.iter().map(|(_, key)| *key).collect::<Vec<_>>();
        let value = path.iter().fold(&values, |value, key| &value[*key]);
        match comment.take() {
            Some(comment) => {
                inside = Some(indentation);
                found.push(Described { path: path.join("."), default: value.to_string(), comment });
            }
            None => ensure!(value.is_object(), "values.yaml: {} has no comment", path.join(".")),
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_is_described_with_its_path_and_default() {
        let text = "image:\n  # -- Where it\n  # is.\n  name: weir\n# -- All of it.\nresources:\n  requests:\n    cpu: 1\n\
                    # -- Taints.\ntaints:\n  - operator: Exists\n";
        let one = |path: &str, default: &str, comment: &str| Described {
            path: path.to_owned(),
            default: default.to_owned(),
            comment: comment.to_owned(),
        };
        assert_eq!(
            described(text).unwrap(),
            [
                one("image.name", r#""weir""#, "Where it is."),
                one("resources", r#"{"requests":{"cpu":1}}"#, "All of it."),
                one("taints", r#"[{"operator":"Exists"}]"#, "Taints."),
            ]
        );
    }

    #[test]
    fn a_value_without_a_description_is_named() {
        let error = described("a:\n  b: 1\n").unwrap_err().to_string();
        assert_eq!(error, "values.yaml: a.b has no comment");
    }
}
