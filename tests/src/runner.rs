//! Runs the cases: one topology, one subject, every case of a setting loaded at once and run side by side.
//!
//! In: the table of [`crate::cases`]. Out: a [`Report`] of every step that went wrong, by case.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fmt::Write as _,
    net::SocketAddr,
    panic::resume_unwind,
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use weir::model::Family;

use crate::{
    cases::{self, Case, Difference, Expect, Source, Step, Target},
    node::{Place, Topology, node_address, node_addresses},
    subject::{Kind, Settings, Subject},
    traffic::{Answer, Call, Flow, Outcome, PATIENCE, SILENCE, Server, Transport, ask},
};

/// How many cases run at a time: most of their time is waiting for what must not arrive.
const AT_ONCE: usize = 4;
/// How often a client calls where it should always get to the same backends.
const CALLS: usize = 16;
/// How often at most until every one of several backends has been seen.
const CALLS_FOR_ALL: usize = 200;
/// How long flows may take to move (K2).
const MOVE: Duration = Duration::from_secs(10);

/// What a run found.
#[derive(Debug, Default)]
pub struct Report {
    /// How many cases ran.
    pub cases: usize,
    /// How many steps they had, counted once for each family and transport.
    pub steps: usize,
    /// What went wrong, by case.
    pub failures: BTreeMap<String, Vec<String>>,
    /// Known differences that were seen.
    pub known: BTreeMap<String, Difference>,
    /// Known differences that were not seen: the list is out of date.
    pub stale: Vec<Difference>,
}

impl Report {
    /// Says what ran, and which known differences showed.
    #[expect(clippy::print_stdout, reason = "test output")]
    pub fn print(&self) {
        println!("{} cases with {} steps, {} failed", self.cases, self.steps, self.failures.len());
        for (case, difference) in &self.known {
            println!("known difference: {case}: {}", difference.reason);
        }
    }

    /// Fails with every failure, if there is any.
    ///
    /// # Errors
    ///
    /// When a case failed, or a known difference was not seen.
    pub fn verdict(&self) -> Result<()> {
        let mut text = String::new();
        for (case, failures) in &self.failures {
            writeln!(text, "\n{case}")?;
            for failure in failures {
                writeln!(text, "    {failure}")?;
            }
        }
        for difference in &self.stale {
            writeln!(text, "\nno longer different, take it off the list: {}", difference.case)?;
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
    let fixed = [Place::Host(1), Place::Host(2), Place::Router];
    let start = |place: Place| {
        let addresses = Family::ALL.map(|family| place.server_address(family));
        Server::start(topology.at(place), &place.to_string(), addresses)
    };
    fixed.into_iter().chain(Place::PODS).map(start).collect()
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
        self.subject.publish_all(cases.iter().map(|case| (case.lot.name(), case.shape.objects(case.lot))))?;
        self.subject.start(settings)?;
        let names: Vec<_> = cases.iter().map(|case| case.lot.name()).collect();
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
        for (number, step) in case.steps.iter().enumerate() {
            if let Err(error) = self.run_step(case, step, &mut flows) {
                failures.push(format!("step {}: {error:#}", number + 1));
            }
        }
        let mut report = self.report.lock().unwrap_or_else(PoisonError::into_inner);
        report.cases += 1;
        report.steps += case.steps.len() * case.families.len() * case.transports.len();
        match (cases::known(self.subject.kind(), case), failures.is_empty()) {
            (None, true) => {}
            (None, false) => drop(report.failures.insert(title(case), failures)),
            (Some(difference), false) => drop(report.known.insert(title(case), difference)),
            (Some(difference), true) => report.stale.push(difference),
        }
    }

    fn run_step(&self, case: &Case, step: &Step, flows: &mut Vec<OpenFlow>) -> Result<()> {
        match step {
            Step::Become(shape) => return self.subject.publish(&case.lot.name(), shape.objects(case.lot)),
            Step::Vanish => return self.subject.publish(&case.lot.name(), Vec::new()),
            Step::Stays(transport) => return stays(flows, *transport),
            Step::Moves(transport, place) => return moves(flows, *transport, *place),
            Step::Check(..) | Step::Open(..) | Step::Send(..) | Step::Run(..) => {}
        }
        let scenes = case.families.iter().flat_map(|&family| {
            case.transports.iter().map(move |&transport| Scene {
                topology: self.topology,
                case,
                family,
                transport,
            })
        });
        let done: Vec<_> = thread::scope(|scope| {
            let running: Vec<_> = scenes.map(|scene| scope.spawn(move || scene.take(step))).collect();
            running
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic)))
                .collect()
        });
        let mut failures = Vec::new();
        for taken in done {
            match taken {
                Ok(flow) => flows.extend(flow),
                Err(error) => failures.push(format!("{error:#}")),
            }
        }
        ensure!(failures.is_empty(), "{}", failures.join("\n            "));
        Ok(())
    }
}

fn next(queue: &Mutex<VecDeque<Case>>) -> Option<Case> {
    queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
}

/// A flow and who answered on it first, if anybody.
struct OpenFlow {
    label: String,
    transport: Transport,
    flow: Flow,
    backend: Option<String>,
}

fn stays(flows: &[OpenFlow], transport: Transport) -> Result<()> {
    for open in flows.iter().filter(|open| open.transport == transport) {
        let outcome = open.flow.ask(PATIENCE);
        let same =
            matches!(&outcome, Outcome::Answer(answer) if Some(&answer.backend) == open.backend.as_ref());
        ensure!(same, "{} did not stay with {:?}: {outcome}", open.label, open.backend);
    }
    Ok(())
}

fn moves(flows: &[OpenFlow], transport: Transport, place: Place) -> Result<()> {
    let prefix = format!("{place}:");
    for open in flows.iter().filter(|open| open.transport == transport) {
        let deadline = Instant::now() + MOVE;
        loop {
            let outcome = open.flow.ask(PATIENCE);
            if matches!(&outcome, Outcome::Answer(answer) if answer.backend.starts_with(&prefix)) {
                break;
            }
            ensure!(Instant::now() < deadline, "{} did not move to {place}: {outcome}", open.label);
            thread::sleep(Duration::from_millis(10));
        }
    }
    Ok(())
}

/// One case over one family and transport.
#[derive(Debug)]
pub struct Scene<'a> {
    topology: &'a Topology,
    case: &'a Case,
    family: Family,
    transport: Transport,
}

impl Scene<'_> {
    fn call(&self, from: Place, to: Target) -> Call {
        let to = to.resolve(self.case.lot, self.family);
        // A client that speaks to its own loopback address cannot do so from another.
        let own = to.ip().is_loopback().then(|| to.ip());
        let call = Call::new(from, to, self.transport);
        Call { from: own.unwrap_or(call.from), ..call }
    }

    fn label(&self, from: Place, to: Target) -> String {
        let to = to.resolve(self.case.lot, self.family);
        format!("{from} to {to} by {}", self.transport)
    }

    /// Takes a step that is the same in every scene; returns the flow it left open.
    fn take(&self, step: &Step) -> Result<Option<OpenFlow>> {
        match step {
            Step::Check(from, to, expect) => self.check(*from, *to, expect).map(|()| None),
            Step::Open(from, to) => self.open(*from, *to).map(Some),
            Step::Send(from, to) => self.send(*from, *to).map(Some),
            Step::Run(what, act) => {
                act(self).with_context(|| format!("{what} ({} {})", self.family, self.transport))?;
                Ok(None)
            }
            Step::Become(_) | Step::Vanish | Step::Stays(_) | Step::Moves(..) => {
                bail!("not a step of one scene")
            }
        }
    }

    /// The backend a new flow gets.
    ///
    /// # Errors
    ///
    /// When nobody answers.
    pub fn backend(&self, from: Place, to: Target) -> Result<String> {
        let call = self.call(from, to);
        match self.topology.at(from).run(|| ask(&call)) {
            Outcome::Answer(answer) => Ok(answer.backend),
            other => bail!("{}: {other}", self.label(from, to)),
        }
    }

    /// Checks that an address answers ICMP echo.
    ///
    /// # Errors
    ///
    /// When it does not.
    pub fn echo(&self, from: Place, to: Target) -> Result<()> {
        let backend = self.backend(from, to)?;
        ensure!(backend == "echo", "{}: {backend} answered", self.label(from, to));
        Ok(())
    }

    /// Checks that node 1's own server is reached at its address.
    ///
    /// # Errors
    ///
    /// When it is not.
    pub fn node_itself(&self, from: Place) -> Result<()> {
        let call = Call::new(from, SocketAddr::new(node_address(self.family, 1), 9999), self.transport);
        let outcome = self.topology.at(from).run(|| ask(&call));
        let own = matches!(&outcome, Outcome::Answer(answer) if answer.backend == "node-1:9999");
        ensure!(own, "{from} to {} by {}: {outcome}", call.to, self.transport);
        Ok(())
    }

    fn open(&self, from: Place, to: Target) -> Result<OpenFlow> {
        let call = self.call(from, to);
        let label = self.label(from, to);
        match self.topology.at(from).run(|| Flow::open(&call)) {
            Ok((flow, answer)) => {
                Ok(OpenFlow { label, transport: self.transport, flow, backend: Some(answer.backend) })
            }
            Err(outcome) => bail!("{label}: {outcome}"),
        }
    }

    fn send(&self, from: Place, to: Target) -> Result<OpenFlow> {
        let call = self.call(from, to);
        let label = self.label(from, to);
        let flow = self.topology.at(from).run(|| Flow::connect(&call))?;
        let outcome = flow.ask(PATIENCE);
        ensure!(!matches!(outcome, Outcome::Answer(_)), "{label}: {outcome}, too early");
        Ok(OpenFlow { label, transport: self.transport, flow, backend: None })
    }

    fn check(&self, from: Place, to: Target, expect: &Expect) -> Result<()> {
        let call = self.call(from, to);
        // All calls of a check on one thread: entering the namespace costs more than a call.
        let checked = self.topology.at(from).run(|| match expect {
            Expect::Served(places, source) => {
                let backends = names(places);
                self.served(&call, from, to, &backends, *source)
            }
            Expect::OneOf(places) => one_of(&call, &names(places)),
            Expect::Refused => lost(&call, from, &Outcome::Refused),
            Expect::Dropped => lost(&Call { patience: SILENCE, ..call }, from, &Outcome::Timeout),
        });
        checked.with_context(|| self.label(from, to))
    }

    fn served(
        &self,
        call: &Call,
        from: Place,
        to: Target,
        backends: &BTreeSet<String>,
        source: Source,
    ) -> Result<()> {
        let mut seen = BTreeSet::new();
        for number in 1..=CALLS_FOR_ALL {
            let answer = match ask(call) {
                Outcome::Answer(answer) => answer,
                other => bail!("expected {backends:?}, got: {other}"),
            };
            ensure!(backends.contains(&answer.backend), "expected {backends:?}, got {}", answer.backend);
            self.seen(call, &answer, source, to.handled_by(from))?;
            seen.insert(answer.backend);
            if number >= CALLS && seen.len() == backends.len() {
                return Ok(());
            }
        }
        bail!("expected {backends:?}, got only {seen:?} in {CALLS_FOR_ALL} calls")
    }

    fn seen(&self, call: &Call, answer: &Answer, source: Source, node: u8) -> Result<()> {
        let client = answer.client.ip();
        let kept = client == call.from;
        let fits = match source {
            Source::Any => true,
            Source::Kept => kept,
            Source::Masqueraded => !kept && node_addresses(self.family, node).contains(&client),
        };
        ensure!(fits, "expected the source {source:?}, {} saw {client}", answer.backend);
        Ok(())
    }
}

fn names(places: &[(Place, u16)]) -> BTreeSet<String> {
    places.iter().map(|(place, port)| format!("{place}:{port}")).collect()
}

fn one_of(call: &Call, backends: &BTreeSet<String>) -> Result<()> {
    let mut seen = BTreeSet::new();
    for _ in 0..CALLS {
        match ask(call) {
            Outcome::Answer(answer) => seen.insert(answer.backend),
            other => bail!("expected one of {backends:?}, got: {other}"),
        };
    }
    ensure!(seen.len() == 1 && seen.is_subset(backends), "expected one of {backends:?}, got {seen:?}");
    Ok(())
}

/// Checks for a call that nobody answers. A sender on the node itself learns of both verdicts as EPERM where the
/// protocol tells the sender at all; TCP does not, and waits for an answer like everybody else.
fn lost(call: &Call, from: Place, expected: &Outcome) -> Result<()> {
    let outcome = ask(call);
    let denied =
        outcome == Outcome::Denied && matches!(from, Place::Host(_)) && call.transport != Transport::Tcp;
    ensure!(outcome == *expected || denied, "expected: {expected}, got: {outcome}");
    Ok(())
}
