//! Connections of the demo, and what they should come to.
//!
//! In: a cluster with the Services of [`super::services`]. Out: rows of its table, and an error where an answer is wrong.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    panic::resume_unwind,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use hickory_proto::rr::RecordType;
use weir::model::Family;

use super::{
    interrupt,
    services::{DB, DB_PODS, EMPTY, STICKY, WEB, publish_web},
    serving::{Serving, Via},
};
use crate::{
    names,
    node::{Location, Topology, node_address, pod_address},
    objects::{Addresses, NAMESPACE, PORT, TARGET},
    subject::Subject,
    traffic::{Call, Outcome, Transport, ask},
};

/// How many connections a row is.
pub(super) const CALLS: usize = 60;
/// How long a change may take to show in both planes.
const PATIENCE: Duration = Duration::from_secs(10);
/// Where each node answers names.
const DNS_SERVER: &str = "169.254.20.53";
/// The text of a table cell without a value.
const NONE: &str = "<none>";

type Row = Vec<String>;

/// The number of answers of each pod, or of each other result.
type Answers = BTreeMap<String, usize>;

/// Makes connections.
pub(super) struct Caller<'a, 'b> {
    pub(super) topology: &'a Topology,
    pub(super) subject: &'a Subject<'b>,
    pub(super) planes: &'a [Via],
}

/// The expected answers of a row.
enum Expect {
    Each(&'static [Location]),
    One,
    Refused,
}

const BOTH: Expect = Expect::Each(&[Location::Pod(1, 1), Location::Pod(2, 1)]);
const FIRST: Expect = Expect::Each(&[Location::Pod(1, 1)]);
const POD: Location = Location::Pod(1, 2);

impl Caller<'_, '_> {
    /// The rows of the table, in its order.
    pub(super) fn rows(&self, serving: &Serving) -> Result<Vec<Row>> {
        let cluster = |service: Addresses| move |family| SocketAddr::new(service.cluster_ip(family), PORT);
        let node_port = |family| SocketAddr::new(node_address(family, 1), WEB.node_port(PORT));
        let external = |family| SocketAddr::new(WEB.external_ip(family), PORT);
        let mut rows = Vec::new();
        rows.extend(self.case("ClusterIP", POD, &cluster(WEB), &BOTH)?);
        rows.extend(self.case("ClusterIP", Location::Host(1), &cluster(WEB), &BOTH)?);
        rows.extend(self.case("NodePort", Location::Outside(0), &node_port, &BOTH)?);
        rows.extend(self.case("external IP", Location::Outside(0), &external, &BOTH)?);
        rows.extend(self.case("session affinity", POD, &cluster(STICKY), &Expect::One)?);
        rows.extend(self.case("no endpoints", POD, &cluster(EMPTY), &Expect::Refused)?);
        publish_web(self.subject, false)?;
        rows.extend(self.case("pod-2-1 removed", POD, &cluster(WEB), &FIRST)?);
        publish_web(self.subject, true)?;
        rows.push(match serving.without_names {
            None => self.headless()?,
            Some(_) => row("headless name", POD, &full_name(), NONE, NONE.to_owned()),
        });
        Ok(rows)
    }

    /// A row for each plane that serves this client. IPv6 is called too, and its row is left out.
    fn case(
        &self,
        case: &str,
        from: Location,
        to: &dyn Fn(Family) -> SocketAddr,
        expect: &Expect,
    ) -> Result<Vec<Row>> {
        let outside = matches!(from, Location::Outside(_));
        let planes = self.planes.iter().filter(|&&via| !outside || via == Via::Nftables);
        let mut rows = Vec::new();
        for &via in planes {
            for family in Family::ALL {
                let answers = self
                    .expected(via, from, to(family), expect)
                    .with_context(|| format!("{case}: {from} to {} by {}", to(family), via.name()))?;
                if family == Family::V4 {
                    let answers = answers.iter().map(|(answer, times)| format!("{answer} {times}"));
                    let answers = answers.collect::<Vec<_>>().join(", ");
                    rows.push(row(case, from, &to(family).to_string(), via.name(), answers));
                }
            }
        }
        Ok(rows)
    }

    /// Connects until the answers are as they should be.
    fn expected(&self, via: Via, from: Location, to: SocketAddr, expect: &Expect) -> Result<Answers> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let answers = self.call(via, from, to)?;
            interrupt::check()?;
            if expect.fits(&answers) {
                return Ok(answers);
            }
            ensure!(Instant::now() < deadline, "unexpected answers: {answers:?}");
        }
    }

    fn call(&self, via: Via, from: Location, to: SocketAddr) -> Result<Answers> {
        let call = Call::new(from, to, Transport::Tcp);
        let calls = move || {
            let mut answers = Answers::new();
            for _ in 0..CALLS {
                let answer = match ask(&call) {
                    Outcome::Answer(answer) => {
                        answer.backend.split(':').next().unwrap_or_default().to_owned()
                    }
                    other => other.to_string(),
                };
                *answers.entry(answer).or_default() += 1;
            }
            answers
        };
        let namespace = self.topology.at(from);
        match via {
            Via::Socket => Ok(namespace.run(calls)),
            Via::Nftables => {
                let thread = namespace.thread_outside_group(calls)?;
                Ok(thread.join().unwrap_or_else(|panic| resume_unwind(panic)))
            }
        }
    }

    /// A row for the addresses of the headless Service's name. A connection to each shows that it is a pod's.
    fn headless(&self) -> Result<Row> {
        let name = full_name();
        let mut wanted: Vec<IpAddr> =
            DB_PODS.iter().map(|&(node, pod)| pod_address(Family::V4, node, pod)).collect();
        wanted.sort_unstable();
        let deadline = Instant::now() + PATIENCE;
        loop {
            let found =
                names::ask(self.topology.at(POD), DNS_SERVER.parse()?, &name, RecordType::A)?.addresses();
            interrupt::check()?;
            if found == wanted {
                break;
            }
            if Instant::now() > deadline {
                bail!("{name} has the addresses {found:?} and not {wanted:?}");
            }
            sleep(Duration::from_millis(5));
        }
        let mut answers = Vec::new();
        for address in wanted {
            answers.extend(self.call(Via::Nftables, POD, SocketAddr::new(address, TARGET))?.into_keys());
        }
        Ok(row("headless name", POD, &name, NONE, answers.join(", ")))
    }
}

fn row(case: &str, from: Location, address: &str, plane: &str, answers: String) -> Row {
    let client = if let Location::Outside(_) = from { "outside".to_owned() } else { from.to_string() };
    let address = address.trim_end_matches('.').to_owned();
    vec![case.to_owned(), client, address, plane.to_owned(), answers]
}

fn full_name() -> String {
    format!("{DB}.{NAMESPACE}.svc.cluster.local.")
}

impl Expect {
    fn fits(&self, seen: &Answers) -> bool {
        let answers: BTreeSet<&str> = seen.keys().map(String::as_str).collect();
        let names = |places: &[Location]| places.iter().map(ToString::to_string).collect::<Vec<_>>();
        match self {
            Self::Each(places) => answers == names(places).iter().map(String::as_str).collect(),
            Self::One => {
                answers.len() == 1 && names(&Location::PODS).iter().any(|pod| answers.contains(pod.as_str()))
            }
            // A kernel without bpf_set_retval lets a hook refuse with EPERM only.
            Self::Refused => {
                answers == [Outcome::Refused.to_string().as_str()].into()
                    || answers == [Outcome::Denied.to_string().as_str()].into()
            }
        }
    }
}
