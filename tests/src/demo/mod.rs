//! The demo: a small cluster of network namespaces, weir on its nodes, and connections to its Services.
//!
//! In: [`Options`]. Out: on standard output which plane serves and why, and a table of answers; on standard error its
//! progress; an error where an answer is wrong. Everything it makes goes with it, also after an error or a signal.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use weir::{cli::columns, model::Family};

use crate::{
    assets,
    node::{Location, Topology, node_address},
    objects::PORT,
    runner::serve,
    subject::{Kind, Plane, Settings, Subject},
};

mod calls;
pub mod interrupt;
mod services;
mod serving;

use calls::{CALLS, Caller};
use services::WEB;
use serving::{Serving, Via};

/// How to run the demo.
#[derive(Clone, Debug)]
pub struct Options {
    /// `--proxy-mode` of the agents.
    pub mode: String,
    /// Whether the cluster stays until a signal comes.
    pub keep: bool,
}

/// The prefix of the namespaces' names while they have any.
const PREFIX: &str = "weir-demo";

/// Privileges that a machine must grant; a container grants them only on request.
const NEEDS: &str = "the demo makes network namespaces, so it needs root with the capabilities NET_ADMIN and SYS_ADMIN \
                     (a container has them with --privileged)";

/// Runs the demo.
///
/// # Errors
///
/// Without the privilege to make network namespaces, without a weir binary, when weir does not start, when a
/// connection gets another answer than it should, or after a signal.
pub fn run(options: &Options) -> Result<()> {
    interrupt::watch()?;
    let start = Instant::now();
    let (mut topology, obstacle) = step("making two nodes, four pods and a client outside", cluster)?;
    if options.keep {
        topology.publish(PREFIX)?;
    }
    show(options, &topology, obstacle.as_deref())?;
    drop(topology);
    if options.keep {
        say("Nothing of it is left on this machine.");
    } else {
        say(&closing(start.elapsed(), &assets::weir()?));
    }
    Ok(())
}

/// The namespaces, and why no socket plane can be tried in them where that is so.
fn cluster() -> Result<(Topology, Option<String>)> {
    match Topology::new() {
        Ok(topology) => Ok((topology, None)),
        Err(error) => Ok((Topology::without_sockets().context(NEEDS)?, Some(format!("{error:#}")))),
    }
}

fn show(options: &Options, topology: &Topology, obstacle: Option<&str>) -> Result<()> {
    let _servers = serve(topology)?;
    // The later of two flags counts.
    let mode = format!("--proxy-mode={}", options.mode);
    let subject = Subject::new(Kind::Weir(Plane::Nftables), topology)?.with_arguments(&["--dns", &mode]);
    services::publish_all(&subject)?;
    step("starting weir on both nodes", || subject.start(&Settings::default()))?;
    let serving = Serving::find(topology, &options.mode, obstacle, &subject.log(1))?;
    let caller = Caller { topology, subject: &subject, planes: &serving.planes };
    let rows = step("connecting to the Services", || caller.rows(&serving))?;
    say(&introduction(options, &serving));
    say(&columns(&["CASE", "CLIENT", "ADDRESS", "PLANE", "ANSWERS"], rows.into_iter()));
    say("The same connections over IPv6 had the same results.");
    if let Some(reason) = &serving.without_names {
        say(&format!("The headless name has no answer, because weir cannot answer DNS here: {reason}."));
    }
    if options.keep {
        let manifests = subject.manifests().context("weir reads no manifests")?;
        say(&invitation(topology, &serving, &manifests, [subject.log(1), subject.log(2)])?);
        interrupt::wait();
    }
    Ok(())
}

fn introduction(options: &Options, serving: &Serving) -> String {
    let mut text = format!(
        "Two nodes with two pods each, and a client outside: network namespaces of this machine.\n\
         weir runs on both nodes with --proxy-mode={}.\n{}\n\n\
         A row is {CALLS} TCP connections, and the pods that answered them.\n",
        options.mode, serving.reason
    );
    if serving.planes.contains(&Via::Socket) {
        text += "For the second row of a pod or node, its sockets are outside the cgroups with eBPF hooks, so that\n\
                 nftables translates the same connections.\n";
    }
    text
}

/// Commands for a cluster that stays.
fn invitation(
    topology: &Topology,
    serving: &Serving,
    manifests: &Path,
    logs: [PathBuf; 2],
) -> Result<String> {
    let [pod, node] =
        [Location::Pod(1, 2), Location::Host(1)].map(|place| format!("ip netns exec {PREFIX}-{place}"));
    let url = format!("http://{}/", WEB.cluster_ip(Family::V4));
    let node_port = format!("http://{}:{}/", node_address(Family::V4, 1), WEB.node_port(PORT));
    let (weir, manifests) = (shown(&assets::weir()?), manifests.display());
    let mut commands = vec![
        (
            "a client outside calls the NodePort",
            format!("ip netns exec {PREFIX}-outside curl -s {node_port}"),
        ),
        (
            "a pod calls the ClusterIP, by nftables, because the shell is in no pod's cgroup",
            format!("{pod} curl -s {url}"),
        ),
    ];
    if serving.planes.contains(&Via::Socket) {
        let group = topology.cgroup_root(1).join(Location::Pod(1, 2).to_string());
        commands.push((
            "the same in the pod's cgroup, by the socket plane",
            format!("sh -c 'echo $$ > {}/cgroup.procs; {pod} curl -s {url}'", group.display()),
        ));
    }
    commands.extend([
        ("node 1's rules", format!("{node} nft list table ip weir")),
        (
            "weir's plan for node 1",
            format!("{weir} plan --hostname-override=node-1 --source=manifests:{manifests}"),
        ),
        ("a Service to change; weir follows at once", format!("$EDITOR {manifests}/web.yaml")),
        ("the agents' logs", format!("tail -f {} {}", logs[0].display(), logs[1].display())),
    ]);
    let mut text = "\nThe cluster stays until you press Ctrl-C. In another terminal, as root:".to_owned();
    for (purpose, command) in commands {
        text += &format!("\n  # {purpose}\n  {command}");
    }
    Ok(text)
}

fn closing(took: Duration, weir: &Path) -> String {
    let probe = format!("{} probe", shown(weir));
    let next = [
        ["cargo xtask demo --keep", "the same cluster until Ctrl-C, to call and to change its Services"],
        [&probe, "the kernel features that the socket plane needs, and which are here"],
        ["cargo xtask kind up", "a Kubernetes cluster with weir in kube-proxy's place (docs/kind.md)"],
    ];
    let next =
        columns(&["NEXT", "WHAT IT SHOWS"], next.into_iter().map(|row| row.map(str::to_owned).to_vec()));
    format!(
        "It took {:.1} s, and nothing of it is left on this machine.\n\n{}",
        took.as_secs_f32(),
        next.trim_end()
    )
}

/// A path as one types it here.
fn shown(path: &Path) -> String {
    let here = std::env::current_dir().unwrap_or_default();
    path.strip_prefix(here).unwrap_or(path).display().to_string()
}

/// Does a part, and shows on standard error that it runs and how long it took.
#[expect(clippy::print_stderr, reason = "a person waits for it")]
fn step<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    eprint!("{what} ... ");
    std::io::stderr().flush()?;
    let start = Instant::now();
    let result = work();
    let end = if result.is_ok() { "done" } else { "failed" };
    eprintln!("{end} ({:.1} s)", start.elapsed().as_secs_f32());
    result
}

#[expect(clippy::print_stdout, reason = "a person reads it")]
fn say(text: &str) {
    println!("{text}");
}
