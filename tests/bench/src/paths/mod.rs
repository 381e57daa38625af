//! Traffic to Services, beside the same traffic straight to their endpoints.
//!
//! In: a cluster with a number of Services, subjects. Out: [`Series`]. Every subject has a topology of its
//! own, wired the same, and one more has no proxy at all. All of them are up at the same time and take turns:
//! each round measures every way once, one after the other, and every other round goes backwards. Other work
//! of the cores meets all of them.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;
use weir::model::Family;

use self::{
    client::Crew,
    cpu::CpuClock,
    server::WORKERS,
    target::Target,
    topology::{Endpoints, From, Topology},
};
use super::{
    bound::Deadline,
    hooks::{self, Cost},
    metered::Metered,
    options::Selection,
    report::say,
    statistics::quantiles,
    subject::Subject,
};
use weir_tests::{cgroup::Cgroup, netns::Namespace, subject::Plane};

mod cases;
pub mod client;
mod cpu;
mod iperf;
mod load;
mod server;
mod target;
mod topology;

pub(super) use self::cases::{cases, ratio};
pub use self::load::{Load, Route, Traffic, Way};

/// Bytes of a request, and of its answer.
const MESSAGE: usize = 64;
/// The longest that a subject is waited for to come to rest, and its Services to answer.
const PATIENCE: Duration = Duration::from_secs(300);
/// How long a case is tried to see whether it works.
const TRIAL: Duration = Duration::from_millis(5);

#[derive(Clone, Debug)]
pub(super) struct Plan {
    /// Measurements of each way for each kind of traffic.
    pub(super) rounds: u32,
    /// For how long each time.
    pub(super) slot: Duration,
    pub(super) selection: Selection,
}

/// Turns of one way of one subject: all that is known of them.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Series {
    pub services: u32,
    pub route: Route,
    pub load: Load,
    /// The subject of the topology; none for the one without a proxy.
    pub subject: Option<Subject>,
    /// Which address clients asked for.
    pub way: Way,
    /// [`Traffic::unit`]s in a second, one figure for each round.
    pub rates: Vec<f64>,
    /// CPU time of one of them on both sides and in between, in nanoseconds, one figure for each round.
    pub cpu_nanoseconds: Vec<f64>,
    /// Latencies of all rounds, in nanoseconds: the values that the parts of [`super::statistics::PARTS`] of them do not
    /// exceed. Of a connect, of a request. iperf3 has none.
    pub latencies: Vec<f64>,
    /// Why there are no more rounds, where a turn failed.
    pub failed: Option<String>,
}

/// One topology with everything in it.
struct Lane {
    subject: Option<Subject>,
    crews: BTreeMap<From, Crew>,
    serving: RefCell<Option<Serving>>,
    _servers: Vec<iperf::Server>,
    /// Last: nothing is left in it when it goes.
    topology: Topology,
}

/// A subject that serves, and where its files are.
struct Serving {
    process: Metered,
    _directory: TempDir,
}

#[derive(Debug, Default)]
pub(super) struct Measured {
    pub(super) series: Vec<Series>,
    /// The costs of the socket programs.
    pub(super) costs: Vec<Cost>,
}

/// The Services that traffic goes to, to be in the cluster while it is measured.
pub(super) fn targets() -> Result<Vec<(k8s_openapi::api::core::v1::Service, Slices)>> {
    Target::ALL.into_iter().map(|target| Ok((target.service()?, target.slices()?))).collect()
}

type Slices = Vec<k8s_openapi::api::discovery::v1::EndpointSlice>;

/// Measures all cases with what the cluster has now; `keep` gets the result of each.
pub(super) fn measure(
    plan: &Plan,
    services: u32,
    subjects: &[Subject],
    (control_plane, kubeconfig): (&Namespace, &std::path::Path),
    mut keep: impl FnMut(Measured) -> Result<()>,
) -> Result<()> {
    let cgroup = Cgroup::new("paths")?;
    let lanes = lanes(&cgroup, control_plane, subjects)?;
    for lane in &lanes {
        lane.start(services, kubeconfig)?;
    }
    let clock = CpuClock::new()?;
    let cases: Vec<(Route, Load)> = plan.selection.cases(services);
    for (number, (route, load)) in cases.iter().enumerate() {
        let begin = Instant::now();
        let series = case(plan, services, *route, *load, &lanes, &clock)?;
        say(format_args!(
            "{services} Services, case {} of {}: {}/{load} in {:.1} s",
            number + 1,
            cases.len(),
            route.id(),
            begin.elapsed().as_secs_f64()
        ));
        keep(Measured { series, costs: Vec::new() })?;
    }
    let at_sockets = lanes.iter().filter(|lane| lane.subject.and_then(Subject::plane) == Some(Plane::Ebpf));
    at_sockets.filter(|_| plan.selection.hooks(services)).try_for_each(|lane| {
        let other = lane.subject.filter(|subject| *subject != Subject::WeirEbpf);
        let mut costs = lane.costs(services)?;
        costs.iter_mut().for_each(|cost| cost.other = other);
        keep(Measured { series: Vec::new(), costs })
    })
}

/// The topology without a proxy comes last.
fn lanes(all: &Cgroup, control_plane: &Namespace, subjects: &[Subject]) -> Result<Vec<Lane>> {
    let order = subjects.iter().copied().map(Some).chain([None]);
    let lane = |(number, subject): (u8, Option<Subject>)| -> Result<Lane> {
        let topology = Topology::new(all, control_plane, number)?;
        let mut servers = server::start(topology.servers(Endpoints::Near), Endpoints::Near)?;
        servers.extend(server::start(topology.servers(Endpoints::Far), Endpoints::Far)?);
        let crews = [From::Pod, From::Host, From::Outside]
            .map(|from| Ok((from, Crew::start(topology.clients(from), 1 + WORKERS)?)));
        Ok(Lane {
            subject,
            crews: crews.into_iter().collect::<Result<_>>()?,
            serving: RefCell::new(None),
            _servers: servers,
            topology,
        })
    };
    (1..).zip(order).map(lane).collect()
}

impl Lane {
    /// Starts the subject and waits until it has come to rest and every case works.
    fn start(&self, services: u32, kubeconfig: &std::path::Path) -> Result<()> {
        let Some(subject) = self.subject else { return Ok(()) };
        let directory = tempfile::tempdir()?;
        let node = &self.topology.node;
        let mut process = subject.start(kubeconfig, node, &self.topology.roots, directory.path())?;
        process.settle(Deadline::after(PATIENCE))?;
        let deadline = Deadline::after(PATIENCE);
        for route in Route::ALL {
            for load in Load::ALL.into_iter().filter(|load| !load.traffic.is_flood() && route.takes(*load)) {
                while let Err(error) = self.turn(route, load, Way::Service, TRIAL, None) {
                    process.check()?;
                    deadline
                        .check()
                        .with_context(|| format!("{}/{load} by {}: {error:#}", route.id(), subject.name()))?;
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
        }
        process.settle(Deadline::after(PATIENCE))?;
        // Connection tracking is there once rules need it.
        node.sysctl("net/netfilter/nf_conntrack_tcp_timeout_close", "1")?;
        // Looking at memory takes CPU time, too.
        process.stop_sampling();
        say(format_args!("{services} Services: {} serves", subject.name()));
        *self.serving.borrow_mut() = Some(Serving { process, _directory: directory });
        Ok(())
    }

    /// One turn: rate, CPU time of a unit, latencies.
    fn turn(
        &self,
        route: Route,
        load: Load,
        way: Way,
        slot: Duration,
        clock: Option<&CpuClock>,
    ) -> Result<(f64, f64, Vec<u32>)> {
        let to: Vec<SocketAddr> = route.targets(load, way);
        let from = route.from();
        if load.traffic.is_flood() {
            let to = *to.first().context("no address to flood")?;
            let flood = iperf::flood(self.topology.clients(from), load.traffic, to, slot)?;
            return Ok((flood.rate, flood.cpu_nanoseconds, Vec::new()));
        }
        let crew = self.crews.get(&from).context("no client is there")?;
        // Many clients are at the scheduler's mercy, which evens out only with time.
        let slot = if load.clients > 1 { slot * 4 } else { slot };
        let before = clock.map(CpuClock::now).transpose()?;
        let turn = crew.turn(load.traffic, load.clients, &to, slot)?;
        let after = clock.map(CpuClock::now).transpose()?;
        let cpu = before.zip(after).map_or(Duration::ZERO, |(before, after)| after.saturating_sub(before));
        Ok((turn.rate, cpu.as_nanos() as f64 / turn.requests.max(1) as f64, turn.latencies))
    }

    fn costs(&self, services: u32) -> Result<Vec<Cost>> {
        let serving = self.serving.borrow();
        let agent = serving.as_ref().context("the subject does not run")?.process.id();
        let crew = self.crews.get(&From::Pod).context("no client is there")?;
        let at = |way| {
            Family::ALL.map(|family| {
                let load = Load::alone(Traffic::Connect, family == Family::V6);
                Route::PodSameNode.targets(load, way).first().copied()
            })
        };
        let both = |[v4, v6]: [Option<SocketAddr>; 2]| v4.zip(v6).map(|(v4, v6)| [v4, v6]);
        let service = both(at(Way::Service)).context("no Service to ask")?;
        let pod = both(at(Way::Straight)).context("no pod to ask")?;
        hooks::measure(services, agent, crew, service, pod)
    }
}

/// All rounds of one case.
fn case(
    plan: &Plan,
    services: u32,
    route: Route,
    load: Load,
    lanes: &[Lane],
    clock: &CpuClock,
) -> Result<Vec<Series>> {
    let mut ways = ways(services, route, load, lanes);
    // A turn of iperf3 has more around it.
    let rounds = if load.traffic.is_flood() { plan.rounds.div_ceil(2) } else { plan.rounds };
    for round in 0..rounds {
        let mut turns: Vec<usize> = (0..ways.len()).collect();
        if round % 2 == 1 {
            turns.reverse();
        }
        for turn in turns {
            let (lane, series, latencies) = &mut ways[turn];
            if series.failed.is_some() {
                continue;
            }
            match lane.turn(route, load, series.way, plan.slot, Some(clock)) {
                Ok((rate, cpu, took)) => {
                    series.rates.push(rate);
                    series.cpu_nanoseconds.push(cpu);
                    latencies.extend(took.into_iter().map(f64::from));
                }
                // The others go on; what was measured for hours would be lost.
                Err(error) => {
                    let subject = lane.subject.map_or("no proxy", Subject::name);
                    say(format_args!("{subject} failed in {}/{load}: {error:#}", route.id()));
                    series.failed = Some(format!("{error:#}"));
                }
            }
        }
    }
    Ok(ways
        .into_iter()
        .map(|(_, series, latencies)| Series { latencies: quantiles(latencies), ..series })
        .collect())
}

/// The subjects that take part in a case, and their ways.
fn ways(services: u32, route: Route, load: Load, lanes: &[Lane]) -> Vec<(&Lane, Series, Vec<f64>)> {
    let both = lanes.iter().flat_map(|lane| [(lane, Way::Straight), (lane, Way::Service)]);
    let takes_part = |lane: &Lane, way: Way| match way {
        Way::Straight => lane.subject.is_none() || route.is_compared_in_place(),
        Way::Service => lane.subject.is_some(),
    };
    both.filter(|(lane, way)| takes_part(lane, *way))
        .map(|(lane, way)| {
            let series = Series {
                services,
                route,
                load,
                subject: lane.subject,
                way,
                rates: Vec::new(),
                cpu_nanoseconds: Vec::new(),
                latencies: Vec::new(),
                failed: None,
            };
            (lane, series, Vec::new())
        })
        .collect()
}
