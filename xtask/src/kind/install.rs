//! Puts weir in kube-proxy's place, replaces its agents, and puts kube-proxy back.
//!
//! In: a cluster whose nodes have the image. Out: a cluster served by weir, or by kube-proxy again.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum;
use serde_json::{Value, json};

use super::{
    checks::NAMESPACE,
    cluster::{Cluster, array, helm, text, url},
    load::Load,
};
use crate::machine::Machine;

/// How weir takes kube-proxy's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Mode {
    /// Another image in kube-proxy's DaemonSet
    ImageSwap,
    /// The chart, with kube-proxy's DaemonSet on no node
    Chart,
}

/// Two names of the same image, for an upgrade from the first to the second.
pub(super) const TAGS: [&str; 2] = ["weir.local/weir:one", "weir.local/weir:two"];
const SYSTEM: &str = "kube-system";
const KUBE_PROXY: &str = "ds/kube-proxy";
const WEIR: &str = "ds/weir";
/// A label that no node has.
const NOWHERE: &str = r#"{"spec":{"template":{"spec":{"nodeSelector":{"weir.dev/kube-proxy":"none"}}}}}"#;
const EVERYWHERE: &str = r#"{"spec":{"template":{"spec":{"nodeSelector":{"weir.dev/kube-proxy":null}}}}}"#;
/// Bit of linux/capability.h.
const CAP_BPF: u32 = 39;

/// How weir is installed, or `None`.
pub(super) fn installed(cluster: &Cluster<'_>) -> Result<Option<Mode>> {
    if !cluster.kubectl(&["-n", SYSTEM, "get", WEIR, "--ignore-not-found", "-o", "name"])?.is_empty() {
        return Ok(Some(Mode::Chart));
    }
    let image = "jsonpath={.spec.template.spec.containers[0].image}";
    let image = cluster.kubectl(&["-n", SYSTEM, "get", KUBE_PROXY, "--ignore-not-found", "-o", image])?;
    Ok(TAGS.contains(&image.trim()).then_some(Mode::ImageSwap))
}

fn patch(cluster: &Cluster<'_>, kind: &str, patch: &str) -> Result<()> {
    cluster.kubectl(&["-n", SYSTEM, "patch", KUBE_PROXY, "--type", kind, "--patch", patch]).map(drop)
}

/// Puts weir's image into kube-proxy's DaemonSet.
///
/// # Errors
///
/// When the DaemonSet cannot be changed or does not become ready.
pub(super) fn swap(cluster: &Cluster<'_>, proxy_mode: &str) -> Result<()> {
    ensure!(
        installed(cluster)? != Some(Mode::Chart),
        "weir was installed from the chart; run `kind test` or `kind down`"
    );
    println!("changing the image of kube-proxy's DaemonSet");
    let before = installed(cluster)?;
    let set = cluster.kubectl_json(&["-n", SYSTEM, "get", KUBE_PROXY])?;
    let container = &set["spec"]["template"]["spec"]["containers"][0];
    let mut command = array(&container["command"]).to_vec();
    command.retain(|word| word.as_str().is_none_or(|word| !word.starts_with("--proxy-mode=")));
    command.push(json!(format!("--proxy-mode={proxy_mode}")));
    let mut changed = json!({"spec": {"template": {"spec": {
        "containers": [{"name": container["name"], "image": TAGS[0], "command": command}]}}}});
    if proxy_mode != "nftables" {
        merge_ebpf(&mut changed, container)?;
    }
    patch(cluster, "strategic", &changed.to_string())?;
    cluster.rolled_out(SYSTEM, KUBE_PROXY)?;
    if before.is_some() { restart(cluster, KUBE_PROXY) } else { Ok(()) }
}

/// Adds what eBPF needs and kubeadm's DaemonSet lacks, from the file of docs/migration.md.
fn merge_ebpf(changed: &mut Value, container: &Value) -> Result<()> {
    let text = include_str!("../../../packaging/kubeadm/ebpf.json").replace("WEIR_IMAGE", TAGS[0]);
    let more: Value = serde_json::from_str(&text).context("packaging/kubeadm/ebpf.json")?;
    let spec = &mut changed["spec"]["template"]["spec"];
    let more = &more["spec"]["template"]["spec"];
    ensure!(more["containers"][0]["name"] == container["name"], "the DaemonSet is not kubeadm's");
    spec["containers"][0]["volumeMounts"] = more["containers"][0]["volumeMounts"].clone();
    spec["initContainers"] = more["initContainers"].clone();
    spec["volumes"] = more["volumes"].clone();
    Ok(())
}

/// Installs the chart and takes kube-proxy off the nodes.
///
/// # Errors
///
/// When the chart cannot be installed or its pods do not become ready.
pub(super) fn chart(machine: &Machine, cluster: &Cluster<'_>, proxy_mode: &str) -> Result<()> {
    ensure!(
        installed(cluster)? != Some(Mode::ImageSwap),
        "kube-proxy's DaemonSet has weir's image; run `kind test` or `kind down`"
    );
    let helm = helm(machine)?;
    let settings = settings(cluster, proxy_mode)?;
    // kube-proxy's rules stay, and serve until weir's replace them.
    println!("taking kube-proxy off the nodes");
    patch(cluster, "merge", NOWHERE)?;
    cluster.rolled_out(SYSTEM, KUBE_PROXY)?;
    println!("installing the chart");
    let before = installed(cluster)?;
    release(cluster, &helm, machine, &settings)?;
    if before.is_some() { restart(cluster, WEIR) } else { Ok(()) }
}

/// Restarts every pod, because an image changed under the same name.
fn restart(cluster: &Cluster<'_>, set: &str) -> Result<()> {
    cluster.kubectl(&["-n", SYSTEM, "rollout", "restart", set])?;
    cluster.rolled_out(SYSTEM, set)
}

/// Each node, and the mode that its agent reports.
pub(super) fn data_planes(cluster: &Cluster<'_>) -> Result<Vec<Vec<String>>> {
    let curl = ["curl", "-sS", "--max-time", "5", "http://127.0.0.1:10249/proxyMode"];
    let row = |node: String| cluster.on_node(&node, &curl).map(|mode| vec![node, mode.trim().to_owned()]);
    cluster.nodes()?.into_iter().map(row).collect()
}

/// Checks that no node has anything of weir left.
///
/// # Errors
///
/// With the node and what is left there.
pub(super) fn nothing_left(cluster: &Cluster<'_>) -> Result<()> {
    for node in cluster.nodes()? {
        let tables = cluster.on_node(&node, &["nft", "list", "tables"])?;
        ensure!(!tables.contains(" weir"), "{node} still has weir's tables:\n{tables}");
        let pins = cluster.on_node(&node, &["sh", "-c", "ls -A /sys/fs/bpf/weir 2>/dev/null || true"])?;
        ensure!(pins.is_empty(), "{node} still has weir's pins: {pins}");
    }
    Ok(())
}

/// The chart's values for this cluster.
fn settings(cluster: &Cluster<'_>, proxy_mode: &str) -> Result<Vec<String>> {
    let addresses = cluster.addresses()?;
    let server = url("https", addresses.first().context("there are no nodes")?, 6443);
    let (repository, tag) = TAGS[0].rsplit_once(':').context("a tag")?;
    let mut settings = vec![
        format!("apiServer={server}"),
        format!("proxyMode={proxy_mode}"),
        format!("image.repository={repository}"),
        format!("image.tag={tag}"),
    ];
    // weir needs the pod networks that kube-proxy is configured with.
    let config = cluster.kubectl_json(&["-n", SYSTEM, "get", "configmap", "kube-proxy"])?;
    let config = config["data"]["config.conf"].as_str().unwrap_or_default();
    if let Some(cidr) = config.lines().find_map(|line| line.trim().strip_prefix("clusterCIDR: ")) {
        // helm ends a value at a comma.
        settings.push(format!("config.clusterCIDR={}", cidr.trim_matches('"').replace(',', "\\,")));
    }
    if proxy_mode != "nftables" && !nodes_know_bpf(cluster)? {
        println!("the nodes' container runtime does not know CAP_BPF, so the agent gets SYS_ADMIN");
        settings.push("capabilities={NET_ADMIN,SYS_ADMIN}".to_owned());
    }
    Ok(settings)
}

/// Whether the nodes, which are containers, have the capabilities for eBPF. Docker before version 23 does not give them.
fn nodes_know_bpf(cluster: &Cluster<'_>) -> Result<bool> {
    let nodes = cluster.nodes()?;
    let node = nodes.first().context("there are no nodes")?;
    let status = cluster.on_node(node, &["cat", "/proc/1/status"])?;
    let bounds = status.lines().find_map(|line| line.strip_prefix("CapBnd:")).context("no CapBnd")?;
    Ok(u64::from_str_radix(bounds.trim(), 16)? >> CAP_BPF & 1 == 1)
}

fn release(cluster: &Cluster<'_>, helm: &Path, machine: &Machine, settings: &[String]) -> Result<()> {
    let chart = machine.workspace.join("charts/weir");
    let mut words = vec!["upgrade", "--install", "weir", text(&chart)?, "-n", SYSTEM, "--reset-values"];
    for setting in settings {
        words.extend(["--set", setting]);
    }
    cluster.helm(helm, &words)?;
    cluster.rolled_out(SYSTEM, WEIR)
}

/// The settings with one value replaced.
fn with(settings: &[String], key: &str, value: &str) -> Vec<String> {
    let others = settings.iter().filter(|it| !it.starts_with(&format!("{key}="))).cloned();
    others.chain([format!("{key}={value}")]).collect()
}

/// Replaces the servers, because stale rules show only once backends change.
fn renew_servers(cluster: &Cluster<'_>) -> Result<()> {
    cluster.kubectl(&["-n", NAMESPACE, "rollout", "restart", "deployment/server"])?;
    cluster.rolled_out(NAMESPACE, "deployment/server")
}

/// Upgrades and rolls back agents in kube-proxy's DaemonSet, then puts kube-proxy back.
///
/// # Errors
///
/// When a step fails, or a connection during one.
pub(super) fn exercise_swap(cluster: &Cluster<'_>, load: &mut Load<'_>) -> Result<()> {
    let set_image = |image: &str| {
        let container = format!("kube-proxy={image}");
        cluster.kubectl(&["-n", SYSTEM, "set", "image", KUBE_PROXY, &container])?;
        cluster.rolled_out(SYSTEM, KUBE_PROXY)
    };
    load.during("new servers", || renew_servers(cluster))?;
    load.during("upgrade to another image", || set_image(TAGS[1]))?;
    load.during("rollback", || {
        cluster.kubectl(&["-n", SYSTEM, "rollout", "undo", KUBE_PROXY])?;
        cluster.rolled_out(SYSTEM, KUBE_PROXY)
    })?;
    let proxy = original(cluster)?;
    load.during("swap back to kube-proxy", || {
        cluster.kubectl(&["-n", SYSTEM, "rollout", "undo", KUBE_PROXY, &format!("--to-revision={proxy}")])?;
        cluster.rolled_out(SYSTEM, KUBE_PROXY)
    })?;
    load.during("weir's rules removed", || {
        let cleanup = include_str!("../../../packaging/kubeadm/cleanup.yaml").replace("WEIR_IMAGE", TAGS[0]);
        cluster.kubectl_file("apply", &cleanup)?;
        cluster.rolled_out(SYSTEM, "ds/weir-cleanup")?;
        cluster.kubectl_file("delete", &cleanup)
    })?;
    load.during("new servers, for kube-proxy", || renew_servers(cluster))
}

/// The newest revision of kube-proxy's DaemonSet that has kube-proxy's own image.
fn original(cluster: &Cluster<'_>) -> Result<i64> {
    let revisions =
        cluster.kubectl_json(&["-n", SYSTEM, "get", "controllerrevisions", "-l", "k8s-app=kube-proxy"])?;
    let own = array(&revisions["items"]).iter().filter(|revision| {
        let image = &revision["data"]["spec"]["template"]["spec"]["containers"][0]["image"];
        image.as_str().is_some_and(|image| !TAGS.contains(&image))
    });
    own.filter_map(|revision| revision["revision"].as_i64())
        .max()
        .context("no revision has kube-proxy's image")
}

/// Upgrades and rolls back agents of the chart, then puts kube-proxy back.
///
/// # Errors
///
/// When a step fails, or a connection during one.
pub(super) fn exercise_chart(machine: &Machine, cluster: &Cluster<'_>, load: &mut Load<'_>) -> Result<()> {
    let helm = helm(machine)?;
    let weir = cluster.kubectl_json(&["-n", SYSTEM, "get", "daemonset", "weir"])?;
    let volumes = weir["spec"]["template"]["spec"]["volumes"].as_array().context("weir has no volumes")?;
    let named = volumes.iter().find_map(|volume| volume["configMap"]["name"].as_str());
    let named = named.context("weir has no ConfigMap")?;
    let mode = cluster.kubectl_json(&["-n", SYSTEM, "get", "configmap", named])?;
    let config = mode["data"]["config.conf"].as_str().context("weir's ConfigMap has no configuration")?;
    let mode = config.lines().find_map(|line| line.strip_prefix("mode: ")).context("no mode")?;
    let settings = settings(cluster, mode)?;
    load.during("new servers", || renew_servers(cluster))?;
    load.during("rolling restart", || restart(cluster, WEIR))?;
    load.during("helm upgrade to another image", || {
        release(cluster, &helm, machine, &with(&settings, "image.tag", "two"))
    })?;
    load.during("helm rollback", || {
        cluster.helm(&helm, &["rollback", "weir", "-n", SYSTEM])?;
        cluster.rolled_out(SYSTEM, WEIR)
    })?;
    load.during("helm uninstall, with no other proxy", || {
        cluster.helm(&helm, &["uninstall", "weir", "-n", SYSTEM, "--wait"])
    })?;
    load.during("helm install", || release(cluster, &helm, machine, &settings))?;
    load.during("kube-proxy started beside weir", || {
        patch(cluster, "merge", EVERYWHERE)?;
        cluster.rolled_out(SYSTEM, KUBE_PROXY)
    })?;
    load.during("weir's rules removed", || {
        release(cluster, &helm, machine, &with(&settings, "cleanup", "true"))
    })?;
    load.during("helm uninstall", || cluster.helm(&helm, &["uninstall", "weir", "-n", SYSTEM, "--wait"]))?;
    load.during("new servers, for kube-proxy", || renew_servers(cluster))
}
