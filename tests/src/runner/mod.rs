//! Runs the cases: one topology, one subject, every case of a setting loaded at once and run side by side.
//!
//! In: the table of [`crate::cases`]. Out: a [`Report`] of every step that went wrong, by case.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fmt::Write as _,
    panic::resume_unwind,
    sync::{Mutex, PoisonError},
    thread::{self, ScopedJoinHandle},
};

use anyhow::{Context as _, Result, ensure};
use weir::model::Family;

use crate::{
    cases::{self, Case, Difference, Step},
    node::{Location, Topology},
    objects::Shape,
    subject::{Kind, Settings, Subject},
    traffic::{Server, Transport},
};

mod case_run;
mod flows;

pub use case_run::CaseRun;
use flows::OpenFlow;

/// How many cases run at a time: most of their time is waiting for what must not arrive.
const AT_ONCE: usize = 4;

#[derive(Debug, Default)]
pub struct Report {
    pub cases: usize,
    /// How many steps they had, counted once for each family and transport.
    pub steps: usize,
    /// By case.
    pub failures: BTreeMap<String, Vec<String>>,
    /// By how many steps each known difference was seen.
    pub differences: BTreeMap<Difference, usize>,
}

impl Report {
    /// Prints what ran, and which known differences showed.
    #[expect(clippy::print_stdout, reason = "test output")]
    pub fn print(&self) {
        println!("{} cases with {} steps, {} failed", self.cases, self.steps, self.failures.len());
        for (difference, steps) in &self.differences {
            println!("known difference, in {steps} steps: {difference}");
        }
    }

    /// Fails with every failure, if there is any.
    ///
    /// # Errors
    ///
    /// When a case failed.
    pub fn verdict(&self) -> Result<()> {
        let mut text = String::new();
        for (case, failures) in &self.failures {
            writeln!(text, "\n{case}")?;
            for failure in failures {
                writeln!(text, "    {failure}")?;
            }
        }
        ensure!(text.is_empty(), "{} of {} cases failed:\n{text}", self.failures.len(), self.cases);
        Ok(())
    }
}

/// Runs every case on a subject, in a topology of its own.
///
/// # Errors
///
/// When the topology or the subject does not come up. Failing cases are in the report.
pub fn run_cases(kind: Kind) -> Result<Report> {
    let report = Report::default();
    let mut by_settings: BTreeMap<Settings, Vec<Case>> = BTreeMap::new();
    let filter = std::env::var("WEIR_CASES").unwrap_or_default();
    for case in cases::all() {
        if title(&case).contains(&filter) {
            by_settings.entry(case.settings.clone()).or_default().push(case);
        }
    }
    let topology = Topology::new()?;
    let _servers = serve(&topology)?;
    let subject = Subject::new(kind, &topology)?;
    let runner = Runner { topology: &topology, subject: &subject, report: Mutex::new(report) };
    for (settings, cases) in by_settings {
        runner.run_group(&settings, cases).with_context(|| format!("with {settings:?}"))?;
    }
    Ok(runner.report.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// A server in every pod, on both nodes and on the router.
///
/// # Errors
///
/// When a port cannot be listened on.
pub fn serve(topology: &Topology) -> Result<Vec<Server>> {
    let fixed = [Location::Host(1), Location::Host(2), Location::Router];
    let start = |location: Location| {
        let addresses = Family::ALL.map(|family| location.server_address(family));
        Server::start(topology.at(location), &location.to_string(), addresses)
    };
    fixed.into_iter().chain(Location::PODS).map(start).collect()
}

fn title(case: &Case) -> String {
    format!("[{}] {}", case.rules, case.name)
}

struct Runner<'a, 'b> {
    topology: &'a Topology,
    subject: &'a Subject<'b>,
    report: Mutex<Report>,
}

impl Runner<'_, '_> {
    fn run_group(&self, settings: &Settings, cases: Vec<Case>) -> Result<()> {
        // Objects first: a start finds everything there, as it does after an upgrade.
        self.subject.publish_all(
            cases.iter().map(|case| (case.addresses.name(), case.shape.objects(case.addresses))),
        )?;
        self.subject.start(settings)?;
        let names: Vec<_> = cases.iter().map(|case| case.addresses.name()).collect();
        let queue = Mutex::new(VecDeque::from(cases));
        thread::scope(|scope| {
            for _ in 0..AT_ONCE {
                scope.spawn(|| {
                    while let Some(case) = next(&queue) {
                        self.run_case(&case);
                    }
                });
            }
        });
        self.subject.stop()?;
        self.subject.publish_all(names.into_iter().map(|name| (name, Vec::new())))
    }

    fn run_case(&self, case: &Case) {
        let mut flows = Vec::new();
        let mut failures = Vec::new();
        let mut differences = Vec::new();
        let mut shape = &case.shape;
        for (number, step) in case.steps.iter().enumerate() {
            if let Step::Become(next) = step {
                shape = next;
            }
            match self.run_step(case, shape, step, &mut flows) {
                Ok(seen) => differences.extend(seen),
                Err(error) => failures.push(format!("step {}: {error:#}", number + 1)),
            }
        }
        let mut report = self.report.lock().unwrap_or_else(PoisonError::into_inner);
        report.cases += 1;
        report.steps += case.steps.len() * case.families.len() * case.transports.len();
        if !failures.is_empty() {
            report.failures.insert(title(case), failures);
        }
        for difference in differences {
            *report.differences.entry(difference).or_default() += 1;
        }
    }

    /// Takes a step, with the Service as it is then; returns the differences that showed.
    fn run_step(
        &self,
        case: &Case,
        shape: &Shape,
        step: &Step,
        flows: &mut Vec<OpenFlow>,
    ) -> Result<BTreeSet<Difference>> {
        match step {
            Step::Become(shape) => {
                self.subject.publish(&case.addresses.name(), shape.objects(case.addresses))?;
                return Ok(BTreeSet::new());
            }
            Step::Vanish => {
                self.subject.publish(&case.addresses.name(), Vec::new())?;
                return Ok(BTreeSet::new());
            }
            Step::Stays => {
                flows.iter().try_for_each(OpenFlow::stays)?;
                return Ok(BTreeSet::new());
            }
            Step::Ends => {
                let kind = self.subject.kind();
                return flows.iter().filter_map(|flow| flow.ends(kind).transpose()).collect();
            }
            Step::Moves(location) => {
                flows.iter().try_for_each(|flow| flow.moves(*location))?;
                return Ok(BTreeSet::new());
            }
            Step::Check(..) | Step::Open(..) | Step::Send(..) | Step::Run(..) => {}
        }
        let mut done = Vec::new();
        for transports in rounds(case, shape) {
            let runs = case.families.iter().flat_map(|&family| {
                let subject = (self.topology, self.subject.kind());
                transports
                    .iter()
                    .map(move |&transport| CaseRun::new(subject, case, shape, (family, transport)))
            });
            thread::scope(|scope| {
                let running: Vec<_> = runs.map(|run| scope.spawn(move || run.take(step))).collect();
                let taken = |thread: ScopedJoinHandle<'_, _>| {
                    thread.join().unwrap_or_else(|panic| resume_unwind(panic))
                };
                done.extend(running.into_iter().map(taken));
            });
        }
        let (mut failures, mut differences) = (Vec::new(), BTreeSet::new());
        for taken in done {
            match taken {
                Ok((flow, seen)) => {
                    flows.extend(flow);
                    differences.extend(seen);
                }
                Err(error) => failures.push(format!("{error:#}")),
            }
        }
        ensure!(failures.is_empty(), "{}", failures.join("\n            "));
        Ok(differences)
    }
}

/// The case's transports, in the rounds they call in. Both kinds of UDP sockets are one client to a Service with session
/// affinity; calling at the same time for the first time, each would get a backend, and the later one counts.
fn rounds(case: &Case, shape: &Shape) -> [Vec<Transport>; 2] {
    let (later, first) =
        case.transports.iter().partition(|&&transport| shape.is_sticky() && transport == Transport::Datagram);
    [first, later]
}

fn next(queue: &Mutex<VecDeque<Case>>) -> Option<Case> {
    queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
}
