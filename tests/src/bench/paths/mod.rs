//! Traffic from a pod to a Service with endpoints on the same node, beside the same traffic straight to those endpoints.
//!
//! In: subjects and numbers of Services. Out: [`Sample`]s. Every subject has a topology of its own, wired the same, and
//! one more has no proxy at all. All of them are up in one run and take turns: each round measures every way once, one
//! after the other, and every other round goes backwards. What else the two cores do meets all of them.

use std::{net::SocketAddr, path::Path, time::Duration};

use anyhow::{Context as _, ensure};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use weir::model::Family;

use self::{
    client::{Crew, Traffic},
    server::WORKERS,
    topology::{LONE, SHARED, STRAIGHT, Topology, server_addresses},
};
use super::{
    cluster::Cluster,
    hooks::{self, Cost},
    process::Process,
    report::say,
    rig,
    subject::{Feed, Subject},
};
use crate::{bpffs::unpin_all, cgroup::Cgroup, netns::Namespace};

pub mod client;
mod server;
mod table;
mod target;
mod topology;

pub(super) use self::table::table;

/// Bytes of a request, and of its answer.
const MESSAGE: usize = 64;
/// The longest that a subject is waited for.
const PATIENCE: Duration = Duration::from_secs(600);
/// kube-proxy is not loaded with more Services than this here unless it is asked for: that alone would take minutes.
const KUBE_PROXY_UP_TO: u32 = 1000;

/// What is measured.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    /// Numbers of Services, ascending.
    pub(super) services: Vec<u32>,
    /// Which subjects; empty for all that can.
    pub(super) subjects: Vec<Subject>,
    /// How often each way is measured for each kind of traffic.
    pub(super) rounds: u32,
    /// For how long each time.
    pub(super) slot: Duration,
}

/// One kind of traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Load {
    /// What each client does.
    pub traffic: Traffic,
    /// How many there are.
    pub clients: usize,
    /// Whether by IPv6.
    pub v6: bool,
}

impl Load {
    const fn alone(traffic: Traffic, v6: bool) -> Self {
        Self { traffic, clients: 1, v6 }
    }

    /// All that are measured.
    const ALL: [Self; 9] = [
        Self::alone(Traffic::Connect, false),
        Self::alone(Traffic::Connect, true),
        Self { traffic: Traffic::Connect, clients: WORKERS, v6: false },
        Self::alone(Traffic::Request, false),
        Self::alone(Traffic::Request, true),
        Self::alone(Traffic::ConnectedDatagram, false),
        Self::alone(Traffic::ConnectedDatagram, true),
        Self::alone(Traffic::Datagram, false),
        Self::alone(Traffic::Datagram, true),
    ];

    /// How long a turn is. Many clients are at the scheduler's mercy, which evens out only with time.
    fn slot(self, one: Duration) -> Duration {
        if self.clients > 1 { one * 4 } else { one }
    }

    fn family(self) -> Family {
        if self.v6 { Family::V6 } else { Family::V4 }
    }

    fn port(self) -> u16 {
        if self.clients > 1 { SHARED } else { LONE }
    }

    fn targets(self, way: Way) -> Vec<SocketAddr> {
        match way {
            Way::Straight => {
                server_addresses(self.family()).map(|ip| SocketAddr::new(ip, self.port())).to_vec()
            }
            Way::Service => vec![target::service_address(self.family(), self.port())],
        }
    }
}

/// How clients reach the endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// By their own addresses.
    Straight,
    /// By the ClusterIP.
    Service,
}

/// One rate.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Sample {
    /// Services there were.
    pub services: u32,
    /// What was done.
    pub load: Load,
    /// Samples of one round belong together.
    pub round: u32,
    /// Whose topology; none for the one without a proxy.
    pub subject: Option<Subject>,
    /// Which address clients asked for.
    pub way: Way,
    /// Requests that were answered, a second.
    pub rate: f64,
}

/// One topology with everything in it.
struct Lane {
    subject: Option<Subject>,
    topology: Topology,
    crew: Crew,
}

/// What was measured.
#[derive(Debug, Default)]
pub(super) struct Measured {
    /// Rates.
    pub(super) samples: Vec<Sample>,
    /// What the socket programs took.
    pub(super) costs: Vec<Cost>,
}

/// Measures everything; `keep` is told all there is after each number of Services.
///
/// # Errors
///
/// When something cannot be set up, or a request is not answered.
pub(super) fn measure(
    plan: &Plan,
    keep: impl FnMut(&Measured) -> anyhow::Result<()> + Send,
) -> anyhow::Result<()> {
    let control_plane = rig::control_plane()?;
    // All threads of the runtime are in the namespace of the one that makes it.
    control_plane.run(|| {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        Paths::new(plan, &control_plane, &runtime)?.measure(keep)
    })
}

struct Paths<'a> {
    plan: &'a Plan,
    lanes: Vec<Lane>,
    cluster: Option<Cluster>,
    /// Services of the cluster so far, with the target.
    written: u32,
    runtime: &'a Runtime,
    _cgroup: Cgroup,
}

/// A subject that serves, and where its files are.
struct Serving {
    subject: Subject,
    process: Process,
    _directory: TempDir,
}

impl<'a> Paths<'a> {
    fn new(plan: &'a Plan, control_plane: &Namespace, runtime: &'a Runtime) -> anyhow::Result<Self> {
        let cgroup = Cgroup::new("paths")?;
        let subjects = if plan.subjects.is_empty() { Subject::ALL.to_vec() } else { plan.subjects.clone() };
        let lanes = lanes(&cgroup, control_plane, &subjects)?;
        let mut cluster = None;
        if subjects.contains(&Subject::KubeProxy) {
            let started = runtime.block_on(Cluster::start())?;
            runtime.block_on(started.create(&target::service()?, &target::slices()?))?;
            cluster = Some(started);
        }
        Ok(Self { plan, lanes, cluster, written: 1, runtime, _cgroup: cgroup })
    }

    fn measure(mut self, mut keep: impl FnMut(&Measured) -> anyhow::Result<()>) -> anyhow::Result<()> {
        let mut measured = Measured::default();
        for &services in &self.plan.services {
            ensure!(services > 0, "the target is a Service too: there is no measuring with 0 Services");
            let kube_proxy = self.grow(services)?;
            let manifests = tempfile::tempdir()?;
            target::write_manifests(manifests.path(), services)?;
            let takes_part = |lane: &&Lane| kube_proxy || lane.subject != Some(Subject::KubeProxy);
            let lanes: Vec<&Lane> = self.lanes.iter().filter(takes_part).collect();
            let mut serving = Vec::new();
            for lane in &lanes {
                serving.extend(lane.start(services, manifests.path(), self.cluster.as_ref())?);
            }
            rounds(self.plan, services, &lanes, &mut measured.samples)?;
            let sockets = lanes.iter().find(|lane| lane.subject == Some(Subject::WeirEbpf));
            let agent = serving.iter().find(|serving| serving.subject == Subject::WeirEbpf);
            if let Some((lane, agent)) = sockets.zip(agent) {
                let at = |way| Family::ALL.map(|family| lone_target(family, way));
                let (service, pod) = (at(Way::Service), at(Way::Straight));
                measured.costs.extend(hooks::measure(
                    services,
                    agent.process.id(),
                    &lane.crew,
                    service,
                    pod,
                )?);
            }
            drop(serving);
            lanes.iter().try_for_each(|lane| lane.clear())?;
            keep(&measured)?;
        }
        Ok(())
    }

    /// Brings the cluster to so many Services, unless that is too much for kube-proxy. Whether it takes part.
    fn grow(&mut self, services: u32) -> anyhow::Result<bool> {
        let Some(cluster) = &self.cluster else { return Ok(false) };
        if services > KUBE_PROXY_UP_TO && self.plan.subjects.is_empty() {
            say(format_args!("kube-proxy is left out beyond {KUBE_PROXY_UP_TO} Services"));
            return Ok(false);
        }
        self.runtime.block_on(cluster.grow(self.written, services))?;
        self.written = services;
        Ok(true)
    }
}

fn lone_target(family: Family, way: Way) -> SocketAddr {
    match way {
        Way::Straight => SocketAddr::new(server_addresses(family)[0], LONE + STRAIGHT),
        Way::Service => target::service_address(family, LONE),
    }
}

/// The topology without a proxy comes last: whoever reaches the API server is number 1.
fn lanes(all: &Cgroup, control_plane: &Namespace, subjects: &[Subject]) -> anyhow::Result<Vec<Lane>> {
    let mut order: Vec<Option<Subject>> = subjects.iter().copied().map(Some).collect();
    order.sort_by_key(|subject| *subject != Some(Subject::KubeProxy));
    order.push(None);
    let lane = |(number, subject): (u8, Option<Subject>)| -> anyhow::Result<Lane> {
        let topology = Topology::new(all, control_plane, number)?;
        server::start(&topology.server)?;
        let crew = Crew::start(&topology.client, 1 + WORKERS)?;
        Ok(Lane { subject, topology, crew })
    };
    (1..).zip(order).map(lane).collect()
}

impl Lane {
    /// Starts the subject and waits until it has come to rest and the target answers.
    fn start(
        &self,
        services: u32,
        manifests: &Path,
        cluster: Option<&Cluster>,
    ) -> anyhow::Result<Option<Serving>> {
        let Some(subject) = self.subject else { return Ok(None) };
        let directory = tempfile::tempdir()?;
        let feed = match (subject, cluster) {
            (Subject::KubeProxy, Some(cluster)) => Feed::ApiServer(cluster.kubeconfig()),
            _ => Feed::Manifests(manifests),
        };
        let mut process = subject.start(feed, &self.topology.node, &self.topology.roots, directory.path())?;
        process.settle(PATIENCE)?;
        // Connection tracking is there once somebody's rules want it.
        self.topology.node.sysctl("net/netfilter/nf_conntrack_tcp_timeout_close", "1")?;
        for load in Load::ALL {
            self.rate(load, Way::Service, Duration::from_millis(10))
                .with_context(|| format!("{} with {services} Services", subject.name()))?;
        }
        say(format_args!("{services} Services: {} serves", subject.name()));
        Ok(Some(Serving { subject, process, _directory: directory }))
    }

    /// Takes out what the subject programmed.
    fn clear(&self) -> anyhow::Result<()> {
        self.topology.node.stdout("nft", &["flush", "ruleset"])?;
        unpin_all(&self.topology.roots.bpf)
    }

    fn rate(&self, load: Load, way: Way, slot: Duration) -> anyhow::Result<f64> {
        self.crew.rate(load.traffic, load.clients, &load.targets(way), slot)
    }
}

fn rounds(plan: &Plan, services: u32, lanes: &[&Lane], samples: &mut Vec<Sample>) -> anyhow::Result<()> {
    let ways: Vec<(&Lane, Way)> = lanes
        .iter()
        .flat_map(|lane| [(*lane, Way::Straight), (*lane, Way::Service)])
        .filter(|(lane, way)| lane.subject.is_some() || *way == Way::Straight)
        .collect();
    for load in Load::ALL {
        for round in 0..plan.rounds {
            let mut turns: Vec<&(&Lane, Way)> = ways.iter().collect();
            if round % 2 == 1 {
                turns.reverse();
            }
            for (lane, way) in turns {
                let rate = lane.rate(load, *way, load.slot(plan.slot))?;
                samples.push(Sample { services, load, round, subject: lane.subject, way: *way, rate });
            }
        }
        say(format_args!(
            "{services} Services: {}, {} clients{}",
            load.traffic.name(),
            load.clients,
            if load.v6 { ", IPv6" } else { "" }
        ));
    }
    Ok(())
}
