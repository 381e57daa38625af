//! The benchmark: weir's two data planes and kube-proxy's with the same Services, in turn.
//!
//! In: [`Options`]. Out: tables, every sample in a JSON file, and of a full run a page with plots. There are these parts:
//!
//! - [`maps`]: the socket plane's maps by themselves,
//! - [`programming`]: how fast the Services of an API server are programmed, and what it costs; how long it takes to serve
//!   again after a hostile act,
//! - [`paths`]: traffic through Services beside the same traffic straight to their endpoints,
//! - [`hooks`]: what the socket programs take,
//! - [`dns`]: names answered on the node beside a real CoreDNS's answers, with an API server of their own.
//!
//! One API server with its etcd feeds all subjects of `programming`, `paths` and `hooks`; its Services grow in number, and what is
//! measured with one number is measured before it grows on.

#![deny(unsafe_code)]
#![expect(missing_docs, reason = "nothing but the suites uses it, and most names need no words")]

use std::{
    cell::{Cell, RefCell},
    collections::BTreeSet,
    io::Write as _,
    time::Instant,
};

use anyhow::{Context as _, Result};
use tokio::runtime::Runtime;

use self::{
    cluster::{Cluster, ENDPOINTS},
    profile::Profiler,
    programming::{Act, Programming},
    report::{Report, say},
    workload::Workload,
};
use weir_tests::netns::Namespace;

pub use self::{options::Options, subject::Subject};

mod bound;
mod cluster;
pub mod dns;
pub mod hooks;
pub mod kernel;
pub mod maps;
pub mod metered;
mod metrics;
mod node;
mod options;
pub mod paths;
mod probe;
mod profile;
pub mod programming;
pub mod report;
mod seed;
pub mod statistics;
mod subject;
mod text;
pub mod workload;

/// kube-proxy's paths are not measured with more Services than this unless it is asked for: that alone takes minutes.
const KUBE_PROXY_UP_TO: u32 = 10_000;

/// Measures, reporting progress on standard error and the tables on standard output, and publishes a full run; or does with
/// samples what the options demand.
///
/// # Errors
///
/// When something needed is missing, or a subject ends by itself.
pub fn run(options: &Options) -> Result<()> {
    let options = options.settled();
    let mut out = std::io::stdout();
    if let Some(samples) = &options.render {
        return publish(&Report::load(samples)?, &options);
    }
    if options.list {
        return options.names().into_iter().try_for_each(|name| Ok(writeln!(out, "{name}")?));
    }
    let report = measure(&options)?;
    for (title, table) in report.parts().into_iter().flat_map(|part| part.tables) {
        writeln!(out, "{title}\n\n{}", report::columns(&table))?;
    }
    writeln!(out, "Verdicts\n\n{}", report::columns(&report.verdicts()))?;
    for (subject, why) in &report.absent {
        writeln!(out, "{subject}: not run, {why}")?;
    }
    if options.is_full() { publish(&report, &options) } else { Ok(()) }
}

fn publish(report: &Report, options: &Options) -> Result<()> {
    let directory = report::page::write(report, options.render.as_deref(), &options.docs)?;
    say(format_args!("{} has the page", directory.display()));
    Ok(())
}

fn measure(options: &Options) -> Result<Report> {
    let begin = Instant::now();
    let mut subjects = if options.subjects.is_empty() { Subject::every() } else { options.subjects.clone() };
    let mut report = Report::new(options, &subjects)?;
    subjects.retain(|subject| subject.lacks().is_none());
    if options.selection().has("maps") {
        report.maps = maps::measure(options.map_services, options.rounds, options.map_changes())?;
        report.save(&options.output)?;
    }
    let counts = path_counts(options);
    let programmed = options.workloads().len() + options.hostile().len();
    if programmed > 0 || !counts.is_empty() {
        let control_plane = node::control_plane()?;
        // All threads of the runtime are in the namespace of the one that makes it.
        control_plane.run(|| {
            let runtime =
                tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
            let cluster = runtime.block_on(Cluster::start())?;
            let profiler = options.profile.as_deref().map(Profiler::new).transpose()?;
            let bench = Bench {
                options,
                subjects: &subjects,
                counts,
                cluster: &cluster,
                runtime: &runtime,
                control_plane: &control_plane,
                profiler: profiler.as_ref(),
                used: Cell::new(0),
                report: RefCell::new(&mut report),
                begin,
            };
            bench.measure()
        })?;
    }
    if options.selection().has(options::NAMES) {
        report.names = dns::run(&options.dns())?;
    }
    report.seconds = begin.elapsed().as_secs_f64();
    report.save(&options.output)?;
    say(format_args!("{} has all samples, taken in {:.0} s", options.output.display(), report.seconds));
    Ok(report)
}

/// Numbers of Services that traffic is measured with.
fn path_counts(options: &Options) -> Vec<u32> {
    let selection = options.selection();
    let wanted = |services: &u32| !selection.cases(*services).is_empty() || selection.hooks(*services);
    options.path_services.iter().copied().filter(wanted).collect()
}

struct Bench<'a> {
    options: &'a Options,
    subjects: &'a [Subject],
    counts: Vec<u32>,
    cluster: &'a Cluster,
    runtime: &'a Runtime,
    control_plane: &'a Namespace,
    profiler: Option<&'a Profiler>,
    used: Cell<u32>,
    report: RefCell<&'a mut Report>,
    begin: Instant,
}

impl Bench<'_> {
    fn measure(&self) -> Result<()> {
        let (wide, many): (Vec<Workload>, Vec<Workload>) =
            self.options.workloads().into_iter().partition(|workload| workload.endpoints > ENDPOINTS);
        for workload in wide {
            self.grow(0, workload)?;
            self.program(workload)?;
            self.runtime.block_on(self.cluster.objects.shrink(workload))?;
        }
        let hostile = self.options.hostile();
        let programmed = many.iter().chain(&hostile).map(|workload| workload.services);
        let all: BTreeSet<u32> = programmed.chain(self.counts.iter().copied()).collect();
        let mut existing = 0;
        for services in all {
            self.grow(existing, Workload::many(services))?;
            existing = services;
            if many.contains(&Workload::many(services)) {
                self.program(Workload::many(services))?;
            }
            if hostile.contains(&Workload::many(services)) {
                self.hostile(Workload::many(services))?;
            }
            if self.counts.contains(&services) {
                self.paths(services)?;
            }
        }
        Ok(())
    }

    fn grow(&self, existing: u32, workload: Workload) -> Result<()> {
        say(format_args!("{workload}: writing Services and endpoints"));
        let begin = Instant::now();
        self.runtime.block_on(self.cluster.objects.grow(existing, workload))?;
        say(format_args!("written in {:.1} s", begin.elapsed().as_secs_f64()));
        Ok(())
    }

    fn keep(&self, add: impl FnOnce(&mut Report)) -> Result<()> {
        let mut report = self.report.borrow_mut();
        add(&mut report);
        report.seconds = self.begin.elapsed().as_secs_f64();
        report.save(&self.options.output)
    }

    fn program(&self, workload: Workload) -> Result<()> {
        let plan = self.options.programming();
        let keep = |run| self.keep(|report| report.programming.push(run));
        self.programming(&plan).measure(workload, self.subjects, keep)
    }

    fn hostile(&self, workload: Workload) -> Result<()> {
        let named = !self.options.subjects.is_empty();
        if !named {
            say(format_args!(
                "hostile acts to rules leave kube-proxy out, which looks at them only from time to time"
            ));
        }
        let takes_part = |act: Act, subject: Subject| {
            (named || subject.is_weir() || act.is_to_api_server())
                && !(act.is_long() && self.options.short_acts)
        };
        let plan = self.options.programming();
        let keep = |recovery| self.keep(|report| report.recoveries.push(recovery));
        self.programming(&plan).recoveries(workload, self.subjects, takes_part, keep)
    }

    fn programming<'a>(&'a self, plan: &'a programming::Plan) -> Programming<'a> {
        Programming {
            cluster: self.cluster,
            runtime: self.runtime,
            control_plane: self.control_plane,
            plan,
            profiler: self.profiler,
            used: &self.used,
        }
    }

    fn paths(&self, services: u32) -> Result<()> {
        let mut subjects = self.subjects.to_vec();
        if services > KUBE_PROXY_UP_TO && self.options.subjects.is_empty() {
            subjects.retain(|subject| subject.is_weir());
            say(format_args!("kube-proxy's paths are left out beyond {KUBE_PROXY_UP_TO} Services"));
        }
        let targets = paths::targets()?;
        for (service, slices) in &targets {
            self.runtime.block_on(self.cluster.objects.create(service, slices))?;
        }
        let at = (self.control_plane, self.cluster.kubeconfig());
        paths::measure(&self.options.paths(), services, &subjects, at, |measured| {
            self.keep(|report| {
                report.paths.extend(measured.series);
                report.hooks.extend(measured.costs);
            })
        })?;
        for (service, slices) in &targets {
            let removed = self.runtime.block_on(self.cluster.objects.remove(service, slices));
            removed.context("removing the Services that traffic went to")?;
        }
        Ok(())
    }
}
