//! The benchmark: weir's two data planes and kube-proxy with the same Services, in turn.
//!
//! In: [`Options`]. Out: tables, and every sample in a JSON file. There are three parts ([`Part`]):
//!
//! - `maps`: the eBPF plane's maps by themselves,
//! - `programming`: for each number of Services, and several rounds of it, each subject is started on the same API server
//!   in a fresh network namespace, and measured until every Service works (`start`), then for single changes (a Service
//!   with endpoints is added, then loses an endpoint), then for connecting through ClusterIPs, in turn with connecting
//!   directly,
//! - `paths`: traffic through a Service beside the same traffic straight to its endpoints,
//! - `dns`: names answered on the node beside a real CoreDNS's answers.
//!
//! Rounds alternate between the subjects, so that whatever else the machine does meets all.

use std::{
    collections::BTreeSet,
    net::SocketAddrV4,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use clap::Parser;

use self::{
    cluster::{Cluster, ENDPOINTS, Numbered},
    probe::ConnectTimes,
    process::Process,
    report::{Change, Machine, Report, Run, say},
    rig::Node,
    subject::Feed,
};
use crate::netns::Namespace;

pub use self::subject::Subject;

mod cluster;
pub mod dns;
pub mod hooks;
pub mod maps;
mod metrics;
pub mod paths;
pub mod probe;
pub mod process;
pub mod report;
mod rig;
mod statistics;
mod subject;

/// The longest that anything is waited for.
const PATIENCE: Duration = Duration::from_secs(900);
/// Services probed for being ready, spread over all; the others are counted in afterwards.
const PROBED: u32 = 64;
/// kube-proxy is not measured with more Services than this unless it is asked for: it does not finish in bounded time.
const KUBE_PROXY_UP_TO: u32 = 10_000;
/// Numbers of Services that come and go start here.
const CHANGING: u32 = 400_000;

/// A part of the benchmark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Part {
    /// The maps of the eBPF plane by themselves: filling, changes, memory.
    Maps,
    /// How fast Services of an API server are programmed.
    Programming,
    /// Traffic through a Service beside traffic straight to its endpoints, and what the socket programs take.
    Paths,
    /// Names: answers on the node beside CoreDNS's.
    Dns,
}

/// Measures how fast Services are programmed and reached: weir's data planes beside kube-proxy with nftables.
///
/// KUBEBUILDER_ASSETS names a directory with etcd and kube-apiserver; kube-proxy is there or in PATH. WEIR_BIN names a
/// release build of weir. `cargo xtask bench` sees to all that.
#[derive(Clone, Debug, Parser)]
#[command(version)]
pub struct Options {
    /// What to measure; without this all, kube-proxy only where it gets through in bounded time.
    #[arg(long = "subject", value_enum)]
    subjects: Vec<Subject>,
    /// Parts to measure; without this all.
    #[arg(long = "part", value_enum)]
    parts: Vec<Part>,
    /// Programming: numbers of Services.
    #[arg(long, value_delimiter = ',', default_values_t = [10, 100, 1000, 10_000])]
    services: Vec<u32>,
    /// Programming: also with 50,000 Services.
    #[arg(long)]
    large: bool,
    /// Programming and maps: how often each subject is started for each number of Services.
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Programming: changes measured after each start.
    #[arg(long, default_value_t = 7)]
    changes: u32,
    /// Programming: connections compared after each start.
    #[arg(long, default_value_t = 2000)]
    connects: usize,
    /// Maps: the number of Services.
    #[arg(long, default_value_t = 50_000)]
    map_services: u32,
    /// Paths: numbers of Services.
    #[arg(long, value_delimiter = ',', default_values_t = [10, 1000, 50_000])]
    path_services: Vec<u32>,
    /// Paths: how often each way takes its turn for each kind of traffic.
    #[arg(long, default_value_t = 40)]
    path_rounds: u32,
    /// Paths: how long a turn is, in milliseconds.
    #[arg(long, default_value_t = 60)]
    path_slot: u64,
    /// A first impression: one round, few changes, at most 1000 Services to program, paths beside 10.
    #[arg(long)]
    quick: bool,
    /// Where the samples go.
    #[arg(long, default_value = "bench.json")]
    output: PathBuf,
}

impl Options {
    fn settled(&self) -> Self {
        let mut services = self.services.clone();
        if self.large {
            services.push(50_000);
        }
        services.sort_unstable();
        services.dedup();
        let mut path_services = self.path_services.clone();
        path_services.sort_unstable();
        path_services.dedup();
        let settled = Self { services, path_services, ..self.clone() };
        if !self.quick {
            return settled;
        }
        let services = settled.services.into_iter().filter(|count| *count <= 1000).collect();
        Self {
            services,
            rounds: 1,
            changes: self.changes.min(3),
            connects: 500,
            path_services: vec![10],
            path_rounds: self.path_rounds.min(8),
            ..settled
        }
    }

    /// Changes to measure are cheap without an API server.
    fn map_changes(&self) -> u32 {
        self.changes * 100
    }

    fn has(&self, part: Part) -> bool {
        self.parts.is_empty() || self.parts.contains(&part)
    }

    fn names(&self) -> dns::Plan {
        dns::Plan {
            rounds: self.rounds,
            turn: Duration::from_millis(self.path_slot * 50),
            changes: self.changes * 3,
        }
    }

    fn paths(&self) -> paths::Plan {
        paths::Plan {
            services: self.path_services.clone(),
            subjects: self.subjects.clone(),
            rounds: self.path_rounds,
            slot: Duration::from_millis(self.path_slot),
        }
    }

    /// What is measured with so many Services.
    fn subjects(&self, services: u32) -> Vec<Subject> {
        match &self.subjects[..] {
            [] if services > KUBE_PROXY_UP_TO => vec![Subject::WeirEbpf, Subject::WeirNftables],
            [] => Subject::ALL.to_vec(),
            some => some.to_vec(),
        }
    }
}

/// Measures, reporting progress on standard error and the tables on standard output.
///
/// # Errors
///
/// When something needed is missing, or a subject never gets where it should.
pub fn run(options: &Options) -> anyhow::Result<()> {
    use std::io::Write as _;
    let options = options.settled();
    let subjects: BTreeSet<_> =
        if options.subjects.is_empty() { &Subject::ALL[..] } else { &options.subjects }
            .iter()
            .copied()
            .collect();
    let versions = subjects.into_iter().map(|subject| Ok((subject.name().to_owned(), subject.version()?)));
    let mut report = Report {
        machine: Machine::this()?,
        versions: versions.collect::<anyhow::Result<_>>()?,
        endpoints: ENDPOINTS,
        maps: Vec::new(),
        runs: Vec::new(),
        paths: Vec::new(),
        hooks: Vec::new(),
    };
    if options.has(Part::Maps) {
        report.maps = maps::measure(options.map_services, options.rounds, options.map_changes())?;
        report.save(&options.output)?;
    }
    if options.has(Part::Programming) {
        programming(&options, &mut report)?;
    }
    if options.has(Part::Paths) {
        paths::measure(&options.paths(), |measured| {
            report.paths.clone_from(&measured.samples);
            report.hooks.clone_from(&measured.costs);
            report.save(&options.output)
        })?;
    }
    if options.has(Part::Dns) {
        dns::run(&options.names(), &options.output)?;
        report.save(&options.output)?;
    }
    for table in report.tables() {
        writeln!(std::io::stdout(), "{table}")?;
    }
    Ok(())
}

fn programming(options: &Options, report: &mut Report) -> anyhow::Result<()> {
    let control_plane = rig::control_plane()?;
    // All threads of the runtime are in the namespace of the one that makes it.
    control_plane.run(|| {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let cluster = runtime.block_on(Cluster::start())?;
        Bench { cluster, runtime, control_plane: &control_plane, options: options.clone() }.measure(report)
    })
}

struct Bench<'a> {
    cluster: Cluster,
    runtime: tokio::runtime::Runtime,
    control_plane: &'a Namespace,
    options: Options,
}

impl Bench<'_> {
    fn measure(&self, report: &mut Report) -> anyhow::Result<()> {
        let mut existing = 0;
        let mut next = CHANGING;
        for &services in &self.options.services {
            say(format_args!("{services} Services: writing them to the API server"));
            let begin = Instant::now();
            self.runtime.block_on(self.cluster.grow(existing, services))?;
            say(format_args!("written in {:.1} s", begin.elapsed().as_secs_f64()));
            existing = services;
            let subjects = self.options.subjects(services);
            if self.options.subjects.is_empty() && !subjects.contains(&Subject::KubeProxy) {
                say(format_args!(
                    "kube-proxy is left out beyond {KUBE_PROXY_UP_TO} Services; --subject kube-proxy asks for it"
                ));
            }
            for round in 0..self.options.rounds {
                for &subject in &subjects {
                    report.runs.push(self.one(subject, services, round, &mut next).with_context(|| {
                        format!("{} with {services} Services, round {round}", subject.name())
                    })?);
                    report.save(&self.options.output)?;
                }
            }
        }
        Ok(())
    }

    fn one(&self, subject: Subject, services: u32, round: u32, next: &mut u32) -> anyhow::Result<Run> {
        let directory = tempfile::tempdir()?;
        let node = Node::new(self.control_plane)?;
        let begin = Instant::now();
        let feed = Feed::ApiServer(self.cluster.kubeconfig());
        let mut process = subject.start(feed, &node.namespace, &node.roots, directory.path())?;
        let label = format!("{services} Services, round {}: {}", round + 1, subject.name());

        let ready = all_work(&node.namespace, services, &mut process)?;
        let start_cpu = process.cpu()?;
        let settled_cpu = process.settle(PATIENCE)?;
        let memory = process.memory();
        say(format_args!(
            "{label} started in {:.2} s, {:.2} CPU s, {} MiB",
            (ready - begin).as_secs_f64(),
            settled_cpu.as_secs_f64(),
            memory.resident >> 20
        ));
        let mut changes = Vec::new();
        for _ in 0..self.options.changes {
            let change = self.change(&node.namespace, &mut process, Numbered(*next))?;
            *next += 1;
            say(format_args!(
                "{label} added in {:.1} ms (sync {:.1}), removed in {:.1} ms (sync {:.1}), {:.1} and {:.1} CPU ms",
                change.added_seconds * 1e3,
                change.added_sync_seconds * 1e3,
                change.removed_seconds * 1e3,
                change.removed_sync_seconds * 1e3,
                change.added_cpu_seconds * 1e3,
                change.removed_cpu_seconds * 1e3
            ));
            changes.push(change);
        }
        let memory_after_changes = (!changes.is_empty()).then(|| process.memory());
        Ok(Run {
            subject,
            services,
            round,
            start_seconds: (ready - begin).as_secs_f64(),
            start_cpu_seconds: start_cpu.as_secs_f64(),
            settled_cpu_seconds: settled_cpu.as_secs_f64(),
            memory,
            memory_after_changes,
            changes,
            connects: connects(&node.namespace, services, self.options.connects)?,
        })
    }

    fn change(&self, node: &Namespace, process: &mut Process, service: Numbered) -> anyhow::Result<Change> {
        process.settle(PATIENCE)?;
        let first_sync = metrics::sync_seconds(node)?;
        // Answering that is no part of what is measured.
        let at_rest = process.cpu()?;
        let answers = node.thread(move || probe::all_answer(&[service.cluster_ip()], PATIENCE))?;
        let written = self.runtime.block_on(self.cluster.add(service))?;
        let answered = join(answers)?;
        let added_cpu = process.settle(PATIENCE)?;
        let second_sync = metrics::sync_seconds(node)?;
        let at_rest_again = process.cpu()?;

        let mut endpoints = service.endpoints();
        let removed = endpoints.pop().context("a Service without endpoints")?;
        let is_written = Arc::new(AtomicBool::new(false));
        let last = node.thread({
            let is_written = Arc::clone(&is_written);
            move || probe::last_answer(service.cluster_ip(), *removed.ip(), &is_written, PATIENCE)
        })?;
        let unwritten = self.runtime.block_on(self.cluster.leave(service, &endpoints))?;
        is_written.store(true, Ordering::Release);
        let last = join(last)?;
        let removed_cpu = process.settle(PATIENCE)?;
        let third_sync = metrics::sync_seconds(node)?;

        self.runtime.block_on(self.cluster.delete(service))?;
        Ok(Change {
            added_seconds: answered.saturating_duration_since(written).as_secs_f64(),
            added_sync_seconds: second_sync - first_sync,
            added_cpu_seconds: added_cpu.saturating_sub(at_rest).as_secs_f64(),
            removed_seconds: last.saturating_duration_since(unwritten).as_secs_f64(),
            removed_sync_seconds: third_sync - second_sync,
            removed_cpu_seconds: removed_cpu.saturating_sub(at_rest_again).as_secs_f64(),
        })
    }
}

/// When every Service worked: a spread of them is probed until all do, then each of the rest is connected to once, and
/// waited for if it should not work yet.
fn all_work(node: &Namespace, services: u32, process: &mut Process) -> anyhow::Result<Instant> {
    let at = |numbers: &[u32]| -> Vec<SocketAddrV4> {
        numbers.iter().map(|number| Numbered(*number).cluster_ip()).collect()
    };
    let step = services.div_ceil(PROBED).max(1);
    let (mut probed, mut rest): (Vec<_>, Vec<_>) = (0..services).partition(|number| number % step == 0);
    // The last is among the first to be asked for.
    probed.extend(rest.pop());
    let probed = at(&probed);
    let waiting = node.thread(move || probe::all_answer(&probed, PATIENCE))?;
    while !waiting.is_finished() {
        process.check()?;
        std::thread::sleep(Duration::from_millis(50));
    }
    let ready = join(waiting)?;
    let rest = at(&rest);
    let late = join(node.thread(move || -> anyhow::Result<Option<Instant>> {
        let missing = rest.into_iter().filter(|target| !probe::answers(*target)).collect::<Vec<_>>();
        if missing.is_empty() { Ok(None) } else { probe::all_answer(&missing, PATIENCE).map(Some) }
    })?)?;
    if late.is_some() {
        say(format_args!("some Services came after those that were probed: the start is the last one's"));
    }
    Ok(late.unwrap_or(ready))
}

fn connects(node: &Namespace, services: u32, rounds: usize) -> anyhow::Result<ConnectTimes> {
    let step = services.div_ceil(100).max(1) as usize;
    let pairs: Vec<_> = (0..services)
        .step_by(step)
        .map(Numbered)
        .map(|service| (service.cluster_ip(), service.endpoints()[0]))
        .collect();
    ensure!(!pairs.is_empty(), "no Services to connect to");
    join(node.thread(move || probe::compare(&pairs, rounds))?)
}

fn join<T>(thread: std::thread::JoinHandle<anyhow::Result<T>>) -> anyhow::Result<T> {
    thread.join().map_err(|_| anyhow::anyhow!("a probe panicked"))?
}
