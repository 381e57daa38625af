//! `cargo xtask kind`: weir in a real cluster of three nodes that kind makes, in kube-proxy's place.
//!
//! In: Docker, kind and kubectl. Out: a cluster that weir serves (`up`), the results of calls to Services of every type
//! and of agents replaced under load (`test`), and nothing left of it (`down`). docs/kind.md describes each step.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Subcommand;

use self::{
    cluster::{Cluster, text},
    install::Mode,
};
use crate::{image, machine::Machine, process, table};

mod checks;
mod cluster;
mod install;
mod load;

#[derive(clap::Args)]
pub(crate) struct Options {
    #[command(subcommand)]
    action: Action,
    /// Name of the cluster
    #[arg(long, global = true, default_value = "weir")]
    name: String,
}

#[derive(Subcommand)]
enum Action {
    /// Create a cluster, unless one of this name is there, and let weir take kube-proxy's place
    Up(Up),
    /// Call Services of every type; upgrade, roll back and swap back under load
    Test {
        /// Image of the servers and clients, with `netexec`, a shell, curl, dig and nc
        #[arg(long, default_value = "registry.k8s.io/e2e-test-images/agnhost:2.63.0")]
        test_image: String,
    },
    /// Delete the cluster
    Down,
}

#[derive(clap::Args)]
struct Up {
    /// How weir takes kube-proxy's place
    #[arg(long, value_enum, default_value_t = Mode::ImageSwap)]
    mode: Mode,
    /// Data plane: auto, ebpf or nftables
    #[arg(long, value_name = "MODE", default_value = "auto", value_parser = ["auto", "ebpf", "nftables"])]
    proxy_mode: String,
    /// Image of kind's nodes [default: the one that belongs to this kind]
    #[arg(long, value_name = "IMAGE")]
    node_image: Option<String>,
    /// Configuration of the cluster for kind, instead of one control plane and two workers
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// A weir binary to use [default: a release build]
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
}

const CONFIG: &str = "
kind: Cluster
apiVersion: kind.x-k8s.io/v1alpha4
nodes: [{role: control-plane}, {role: worker}, {role: worker}]
";

/// Runs the action.
///
/// # Errors
///
/// When a program is missing or fails, or when a test does.
pub(crate) fn run(machine: &Machine, options: &Options) -> Result<()> {
    let cluster = Cluster::new(machine, &options.name)?;
    match &options.action {
        Action::Up(up) => start(machine, &cluster, up),
        Action::Test { test_image } => test(machine, &cluster, test_image),
        Action::Down => process::run(&mut cluster.kind(&["delete", "cluster"])),
    }
}

fn start(machine: &Machine, cluster: &Cluster<'_>, up: &Up) -> Result<()> {
    let work = tempfile::tempdir()?;
    let archive = work.path().join("weir.tar");
    image::archive(machine, up.binary.as_deref(), install::TAGS[0], &archive)?;
    let again = work.path().join("again.tar");
    image::archive(machine, up.binary.as_deref(), install::TAGS[1], &again)?;
    if cluster.exists()? {
        println!("using the existing cluster {}", cluster.name());
    } else {
        let config = work.path().join("kind.yaml");
        std::fs::write(&config, CONFIG)?;
        let config = up.config.as_ref().unwrap_or(&config);
        let mut create = cluster.kind(&["create", "cluster", "--wait=180s", "--config", text(config)?]);
        if let Some(image) = &up.node_image {
            create.args(["--image", image]);
        }
        process::run(&mut create)?;
    }
    println!("loading the image into {}", cluster.nodes()?.join(", "));
    cluster.load(&archive)?;
    cluster.load(&again)?;
    match up.mode {
        Mode::ImageSwap => install::swap(cluster, &up.proxy_mode)?,
        Mode::Chart => install::chart(machine, cluster, &up.proxy_mode)?,
    }
    println!(
        "weir serves. `kubectl --context kind-{0} -n kube-system logs ds/{1}` shows its log; `cargo xtask kind test --name {0}` tests it",
        cluster.name(),
        if up.mode == Mode::Chart { "weir" } else { "kube-proxy" },
    );
    Ok(())
}

fn test(machine: &Machine, cluster: &Cluster<'_>, image: &str) -> Result<()> {
    let Some(mode) = install::installed(cluster)? else {
        bail!("weir serves no node of {}: run `cargo xtask kind up` first", cluster.name());
    };
    println!("\n{}", table::columns(&["NODE", "PROXY-MODE"], &install::data_planes(cluster)?));
    println!("starting servers and clients");
    checks::deploy(cluster, image)?;
    println!("Services of every type");
    checks::run(cluster)?;
    let mut load = load::Load::start(cluster, image)?;
    match mode {
        Mode::ImageSwap => install::exercise_swap(cluster, &mut load)?,
        Mode::Chart => install::exercise_chart(machine, cluster, &mut load)?,
    }
    let steps = load.end();
    install::nothing_left(cluster)?;
    println!("Services of every type, by kube-proxy again");
    checks::run(cluster)?;
    checks::remove(cluster)?;
    println!("\n{}", table::columns(&["STEP UNDER LOAD", "CONNECTIONS", "FAILED"], &steps));
    println!("all passed, and kube-proxy is back; `cargo xtask kind up` puts weir in its place again");
    Ok(())
}
