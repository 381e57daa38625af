//! A case over one family and transport, and what its steps are held to there.

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use weir::model::Family;

use super::OpenFlow;
use crate::{
    cases::{Case, Difference, Expect, Source, Step, Target, at_socket},
    netns::Namespace,
    node::{Location, Topology, node_address, node_addresses},
    objects::Shape,
    subject::Kind,
    traffic::{Answer, Call, Datagrams, Flow, Outcome, PATIENCE, SILENCE, Transport, ask},
};

/// Calls of a client that should always get the same backends.
const CALLS: usize = 16;
/// The most calls until every one of several backends has been seen.
const CALLS_FOR_ALL: usize = 200;
/// The most that a call without an answer may take, on a busy machine.
const AT_ONCE: Duration = Duration::from_millis(200);

/// One case over one family and transport.
#[derive(Debug)]
pub struct CaseRun<'a> {
    topology: &'a Topology,
    kind: Kind,
    case: &'a Case,
    /// The Service as it is now.
    shape: &'a Shape,
    family: Family,
    transport: Transport,
    /// The differences that showed.
    seen: Mutex<BTreeSet<Difference>>,
}

impl<'a> CaseRun<'a> {
    pub(super) fn new(
        (topology, kind): (&'a Topology, Kind),
        case: &'a Case,
        shape: &'a Shape,
        (family, transport): (Family, Transport),
    ) -> Self {
        Self { topology, kind, case, shape, family, transport, seen: Mutex::default() }
    }

    /// Whether the subject differs from others like this; if so it showed.
    pub fn differs(&self, difference: Difference) -> bool {
        let differs = difference.is_of(self.kind);
        if differs {
            self.seen.lock().unwrap_or_else(PoisonError::into_inner).insert(difference);
        }
        differs
    }

    /// By what this case_run calls.
    #[must_use]
    pub fn transport(&self) -> Transport {
        self.transport
    }

    #[must_use]
    pub fn address(&self, to: Target) -> SocketAddr {
        to.resolve(self.case.addresses, self.family)
    }

    #[must_use]
    pub fn namespace(&self, location: Location) -> &Namespace {
        self.topology.at(location)
    }

    /// The call by which a client reaches a target.
    #[must_use]
    pub fn call(&self, from: Location, to: Target) -> Call {
        let to = self.address(to);
        let call = Call::new(from, to, self.transport);
        // From which address a loopback address is spoken to is the kernel's choice: not from one of the network's, and
        // not to one of the network's from a loopback address.
        let any: IpAddr = match self.family {
            Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
            Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
        };
        Call { from: if to.ip().is_loopback() { any } else { call.from }, ..call }
    }

    fn at_socket(&self, from: Location, to: Target) -> bool {
        at_socket(self.kind, self.shape, from, to, self.transport)
    }

    fn label(&self, from: Location, to: Target) -> String {
        let to = to.resolve(self.case.addresses, self.family);
        format!("{from} to {to} by {}", self.transport)
    }

    /// Takes a step that is the same in every case_run; returns the flow it left open, and the differences that showed.
    pub(super) fn take(self, step: &Step) -> Result<(Option<OpenFlow>, BTreeSet<Difference>)> {
        let mut left = None;
        match step {
            Step::Check(from, to, expect) => self.check(*from, *to, expect)?,
            Step::Open(from, to) => left = Some(self.open(*from, *to)?),
            Step::Send(from, to) => left = Some(self.send(*from, *to)?),
            Step::Run(what, act) => {
                act(&self).with_context(|| format!("{what} ({} {})", self.family, self.transport))?;
            }
            Step::Become(_) | Step::Vanish | Step::Stays | Step::Ends | Step::Moves(_) => {
                bail!("not a step of one case_run")
            }
        }
        Ok((left, self.seen.into_inner().unwrap_or_else(PoisonError::into_inner)))
    }

    /// The backend a new flow gets.
    ///
    /// # Errors
    ///
    /// Without an answer.
    pub fn backend(&self, from: Location, to: Target) -> Result<String> {
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
    pub fn echo(&self, from: Location, to: Target) -> Result<()> {
        let backend = self.backend(from, to)?;
        ensure!(backend == "echo", "{}: {backend} answered", self.label(from, to));
        Ok(())
    }

    /// Checks that node 1's own server is reached at its address.
    ///
    /// # Errors
    ///
    /// When it is not.
    pub fn node_itself(&self, from: Location) -> Result<()> {
        let call = Call::new(from, SocketAddr::new(node_address(self.family, 1), 9999), self.transport);
        let outcome = self.topology.at(from).run(|| ask(&call));
        let own = matches!(&outcome, Outcome::Answer(answer) if answer.backend == "node-1:9999");
        ensure!(own, "{from} to {} by {}: {outcome}", call.to, self.transport);
        Ok(())
    }

    /// A socket in a location that may ask several targets.
    ///
    /// # Errors
    ///
    /// When there is none to be had.
    pub fn datagrams(&self, from: Location, to: Target) -> Result<Datagrams> {
        let call = self.call(from, to);
        Ok(self.topology.at(from).run(|| Datagrams::open(&call))?)
    }

    /// [`CaseRun::call`] with a flow left open.
    ///
    /// # Errors
    ///
    /// Without an answer.
    pub fn flow(&self, from: Location, to: Target) -> Result<(Flow, Answer)> {
        let call = self.call(from, to);
        let opened = self.topology.at(from).run(|| Flow::open(&call));
        opened.map_err(|outcome| anyhow!("{}: {outcome}", self.label(from, to)))
    }

    fn open(&self, from: Location, to: Target) -> Result<OpenFlow> {
        let (flow, answer) = self.flow(from, to)?;
        Ok(self.left_open(from, to, flow, Some(answer.backend)))
    }

    fn send(&self, from: Location, to: Target) -> Result<OpenFlow> {
        let call = self.call(from, to);
        let label = self.label(from, to);
        let flow = self.topology.at(from).run(|| Flow::connect(&call))?;
        let outcome = flow.ask(PATIENCE);
        ensure!(!matches!(outcome, Outcome::Answer(_)), "{label}: {outcome}, too early");
        Ok(self.left_open(from, to, flow, None))
    }

    fn left_open(&self, from: Location, to: Target, flow: Flow, backend: Option<String>) -> OpenFlow {
        OpenFlow { label: self.label(from, to), flow, backend }
    }

    fn check(&self, from: Location, to: Target, expect: &Expect) -> Result<()> {
        if let Expect::Unless(difference, other, usual) = expect {
            return self.check(from, to, if self.differs(*difference) { other } else { usual });
        }
        let call = self.call(from, to);
        // All calls of a check on one thread: entering the namespace costs more than a call.
        let checked = self.topology.at(from).run(|| match expect {
            Expect::Served(places, source) => {
                let backends = names(places);
                self.served(&call, from, to, &backends, *source)
            }
            Expect::OneOf(places) => one_of(&call, &names(places)),
            Expect::Refused if self.refuses_datagrams(from, to) => self.refused_at_once(&call),
            Expect::Refused => lost(&call, from, &Outcome::Refused),
            Expect::Unless(..) => bail!("a difference within a difference"),
            Expect::Dropped => lost(&Call { patience: SILENCE, ..call }, from, &Outcome::Timeout),
        });
        checked.with_context(|| self.label(from, to))
    }

    fn served(
        &self,
        call: &Call,
        from: Location,
        to: Target,
        backends: &BTreeSet<String>,
        source: Source,
    ) -> Result<()> {
        let masqueraded = source == Source::Masqueraded;
        let own_address = masqueraded && self.at_socket(from, to) && self.differs(Difference::OwnAddress);
        let source = if own_address { Source::Kept } else { source };
        let mut seen = BTreeSet::new();
        for number in 1..=CALLS_FOR_ALL {
            let answer = match ask(call) {
                Outcome::Answer(answer) => answer,
                other => bail!("expected {backends:?}, got: {other}"),
            };
            ensure!(backends.contains(&answer.backend), "expected {backends:?}, got {}", answer.backend);
            self.sees(call, &answer, source, to.handled_by(from))?;
            seen.insert(answer.backend);
            if number >= CALLS && seen.len() == backends.len() {
                return Ok(());
            }
        }
        bail!("expected {backends:?}, got only {seen:?} in {CALLS_FOR_ALL} calls")
    }

    /// Whether the Service refuses, and not the host that the datagram reaches instead.
    fn refuses_datagrams(&self, from: Location, to: Target) -> bool {
        let by_service = to.is_cluster_ip() || self.shape.is_empty();
        self.transport == Transport::Datagram && self.at_socket(from, to) && by_service
    }

    fn refused_at_once(&self, call: &Call) -> Result<()> {
        self.differs(Difference::AtOnce);
        let begin = Instant::now();
        let sent = Datagrams::open(call)?.ask(call.to);
        let refused = sent.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused);
        ensure!(refused, "expected to be refused at once, got: {sent:?}");
        ensure!(begin.elapsed() < AT_ONCE, "refused only after {:?}", begin.elapsed());
        Ok(())
    }

    fn sees(&self, call: &Call, answer: &Answer, source: Source, node: u8) -> Result<()> {
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

fn names(places: &[(Location, u16)]) -> BTreeSet<String> {
    places.iter().map(|(location, port)| format!("{location}:{port}")).collect()
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

/// Checks for a call without an answer. A sender on the node itself gets EPERM for both verdicts where the protocol reports
/// them to the sender; TCP does not, and waits for an answer as clients elsewhere do.
fn lost(call: &Call, from: Location, expected: &Outcome) -> Result<()> {
    let outcome = ask(call);
    let denied =
        outcome == Outcome::Denied && matches!(from, Location::Host(_)) && call.transport != Transport::Tcp;
    ensure!(outcome == *expected || denied, "expected: {expected}, got: {outcome}");
    Ok(())
}
