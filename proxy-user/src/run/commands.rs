//! The commands beside `weir run`: each does its work once and ends.
//!
//! In: the configuration or some of its flags. Out: a plan, a file, a prepared machine, or a kernel without what was removed.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use ipnet::IpNet;

use super::{left_out, lock::Holder, signalled, sources::manifest_source};
use crate::{
    config::{KernelArgs, Loaded, LogArgs},
    dataplane::{
        Dataplane as _, Memory, Stack, State,
        ebpf::{LeftoverPlane, Place},
        nftables::Nftables,
    },
    machine,
    model::{Model, PerFamily},
    observe::{Events, Telemetry},
    plan::{Frontend, Planner, PortId},
    source::manifests,
    takeover,
};

/// The state that weir would program from a directory of manifests, and the owner of each frontend. Needs no kernel.
///
/// # Errors
///
/// When the source is not a directory of manifests, or naming the wrong object.
pub fn plan(loaded: Loaded) -> anyhow::Result<(State, BTreeMap<Frontend, PortId>)> {
    let Loaded { config, warnings, document: _ } = loaded;
    Telemetry::init(config.log)?;
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    let mut model = Model::new(config.model.clone());
    for change in manifests::load_once(&manifest_source(&config)?)? {
        model.apply(change);
    }
    let mut planner = Planner::default();
    for name in model.take_dirty() {
        planner.update(&name, model.plan(&name));
    }
    left_out::tell(&mut model, &mut planner, &Events::logged());
    planner.update_node(model.node_plan());
    let mut memory = Memory::default();
    memory.apply(&planner.complete())?;
    let mut owners = BTreeMap::new();
    for port in planner.services().flat_map(|(_, plan)| &plan.ports) {
        owners.extend(port.frontends.iter().map(|planned| (planned.frontend, port.id.clone())));
    }
    Ok((memory.dump()?, owners))
}

/// Sets up connection tracking and a bpffs, so that the agent can run with fewer privileges afterwards.
///
/// # Errors
///
/// When logging cannot be set up, or the bpffs cannot be mounted and the mode needs it.
pub fn init_only(loaded: &Loaded) -> anyhow::Result<()> {
    let Loaded { config, warnings, document: _ } = loaded;
    Telemetry::init(config.log)?;
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    machine::prepare(&config.conntrack, config.oom_score_adj);
    machine::ensure_bpffs(config)
}

/// Writes the whole configuration, defaults and all, to a file.
///
/// # Errors
///
/// When the file cannot be written.
pub fn write_config(loaded: &Loaded, path: &Path) -> anyhow::Result<()> {
    let text = serde_yaml_ng::to_string(&loaded.document)?;
    std::fs::write(path, text).with_context(|| format!("cannot write `{}`", path.display()))
}

/// Removes kube-proxy's rules from the kernel, except virtual servers of IPVS in the `excluded` networks.
///
/// # Errors
///
/// Naming each thing that could not be removed.
pub fn cleanup_kube_proxy(excluded: &[IpNet], log: &LogArgs) -> anyhow::Result<()> {
    Telemetry::init(log.config())?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (removed, failed) = runtime.block_on(takeover::remove(excluded));
    takeover::log_removed(&removed);
    let failed: Vec<String> =
        failed.into_iter().map(|error| format!("{:#}", anyhow::Error::from(error))).collect();
    if failed.is_empty() { Ok(()) } else { bail!("{}", failed.join("\n")) }
}

/// Removes weir's tables, programs and maps from the kernel. With `stay` the process then waits for a signal, because the kubelet
/// restarts pods that end.
///
/// # Errors
///
/// Naming each thing that could not be removed.
pub fn cleanup(kernel: &KernelArgs, log: &LogArgs, stay: bool) -> anyhow::Result<()> {
    Telemetry::init(log.config())?;
    if let Some(Holder { process }) = Holder::of_this_node() {
        tracing::warn!(process, "an agent serves this node and will program everything again; stop it first");
    }
    let place = Place { bpf_root: kernel.bpf_root.clone(), cgroup_root: PathBuf::new() };
    let packets = Nftables::open(PerFamily { v4: true, v6: true })?;
    Stack::new(packets, LeftoverPlane::new(place)).remove()?;
    tracing::info!(
        bpf_root = %kernel.bpf_root.display(),
        "removed weir's tables of both families, and the kernel programs with their maps"
    );
    if stay { ended() } else { Ok(()) }
}

/// Waits for a signal.
fn ended() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let name = runtime.block_on(signalled())?;
    tracing::info!(signal = name, "stopping");
    Ok(())
}
