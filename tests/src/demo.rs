//! The demo: a small cluster of network namespaces, weir on its nodes, and real connections through it.
//!
//! In: [`Options`]. Out: a table on standard output, and an error if anything in it is not as it should be.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use comfy_table::{ContentArrangement, Table, presets::UTF8_FULL_CONDENSED};
use hickory_proto::rr::RecordType;
use k8s_openapi::{
    api::{
        core::v1::{Service, ServiceSpec},
        discovery::v1::{Endpoint, EndpointSlice},
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use tokio::signal::unix::{SignalKind, signal};
use weir::model::{Family, Object};

use crate::{
    names,
    node::{Location, Topology, node_address, pod_address},
    objects::{Addresses, NAMESPACE, PORT, Shape, TARGET, pod, service},
    runner::serve,
    subject::{Kind, Plane, Settings, Subject},
    traffic::{Call, Outcome, Transport, ask},
    wait::DEADLINE,
};

/// How to run the demo.
#[derive(Clone, Debug)]
pub struct Options {
    /// weir's data plane.
    pub plane: Plane,
    /// Whether to leave everything up afterwards, until told to stop.
    pub keep: bool,
}

const WEB: Addresses = Addresses::new(1).named("web");
const STICKY: Addresses = Addresses::new(2).named("sticky");
/// A headless Service: what routes to it is its name.
const DB: &str = "db";
/// Where each node answers names.
const NAMES: &str = "169.254.20.53";
const EMPTY: Addresses = Addresses::new(3).named("empty");
/// How often each call is made.
const CALLS: usize = 60;
/// The prefix of the namespaces' names while they have any.
const PREFIX: &str = "weir-demo";

/// Runs the demo.
///
/// # Errors
///
/// Without the privilege to make network namespaces, without a weir binary, when weir does not come up, or when a
/// connection does not go where it should.
pub fn run(options: &Options) -> Result<()> {
    let mut topology = Topology::new()?;
    if options.keep {
        topology.publish(PREFIX)?;
    }
    let _servers = serve(&topology)?;
    let subject = Subject::new(Kind::Weir(options.plane), &topology)?.with_arguments(&["--dns"]);
    let demo = Demo { topology: &topology, subject: &subject };
    let manifests = subject.manifests().context("weir reads no manifests")?;
    demo.publish(WEB, &web(true))?;
    demo.publish(STICKY, &service([pod(1, 1), pod(1, 2), pod(2, 1), pod(2, 2)]).sticky(3600))?;
    demo.publish(EMPTY, &service([]))?;
    subject.publish(DB, headless(&[(1, 1)]))?;
    subject.start(&Settings::default())?;
    say(&format!(
        "Two nodes with two pods each, a client outside, and weir ({}) on both nodes.\nServices come from {}.\n",
        subject.kind().mode(),
        manifests.display()
    ));
    say(&demo.table()?.to_string());
    if options.keep {
        say(&invitation(&manifests.display().to_string(), &subject));
        wait_for_signal()?;
    }
    Ok(())
}

/// The Service most of the demo is about, with or without its backend on node 2.
fn web(both: bool) -> Shape {
    let endpoints = if both { vec![pod(1, 1), pod(2, 1)] } else { vec![pod(1, 1)] };
    service(endpoints).everywhere()
}

/// The headless Service with these pods.
fn headless(pods: &[(u8, u8)]) -> Vec<Object> {
    let metadata = |name: &str| ObjectMeta {
        name: Some(name.to_owned()),
        namespace: Some(NAMESPACE.to_owned()),
        labels: Some([("kubernetes.io/service-name".to_owned(), DB.to_owned())].into()),
        ..ObjectMeta::default()
    };
    let spec = ServiceSpec { cluster_ip: Some("None".to_owned()), ..ServiceSpec::default() };
    let endpoints = pods.iter().map(|&(node, pod)| Endpoint {
        addresses: vec![pod_address(Family::V4, node, pod).to_string()],
        ..Endpoint::default()
    });
    let slice = EndpointSlice {
        metadata: metadata("db-1"),
        address_type: Family::V4.to_string(),
        endpoints: Some(endpoints.collect()),
        ..EndpointSlice::default()
    };
    let service = Service { metadata: metadata(DB), spec: Some(spec), ..Service::default() };
    vec![Object::Service(Box::new(service)), Object::EndpointSlice(Box::new(slice))]
}

struct Demo<'a, 'b> {
    topology: &'a Topology,
    subject: &'a Subject<'b>,
}

/// What a row of the table should show.
enum Expect {
    Each(&'static [Location]),
    OneEach,
    Refused,
}

const BOTH: Expect = Expect::Each(&[Location::Pod(1, 1), Location::Pod(2, 1)]);
const FIRST: Expect = Expect::Each(&[Location::Pod(1, 1)]);

impl Demo<'_, '_> {
    fn publish(&self, lot: Addresses, shape: &Shape) -> Result<()> {
        self.subject.publish(&lot.name(), shape.objects(lot))
    }

    fn table(&self) -> Result<Table> {
        let mut table = Table::new();
        table.load_style(UTF8_FULL_CONDENSED).set_content_arrangement(ContentArrangement::Dynamic);
        table.set_header(["What", "From", "To", "Answers"]);
        let from_pod = [Location::Pod(1, 2)];
        let outside = [Location::Outside(0)];
        let clients: Vec<Location> = (0..6).map(Location::Outside).collect();
        let cluster = |lot: Addresses| move |family| SocketAddr::new(lot.cluster_ip(family), PORT);
        let node_port = |family| SocketAddr::new(node_address(family, 1), WEB.node_port(PORT));
        let external = |family| SocketAddr::new(WEB.external_ip(family), PORT);
        self.rows(&mut table, "ClusterIP, from a pod", &from_pod, &cluster(WEB), &BOTH)?;
        self.rows(&mut table, "ClusterIP, from the node", &[Location::Host(1)], &cluster(WEB), &BOTH)?;
        self.rows(&mut table, "NodePort, from outside", &outside, &node_port, &BOTH)?;
        self.rows(&mut table, "external address, from outside", &outside, &external, &BOTH)?;
        self.rows(&mut table, "session affinity", &clients, &cluster(STICKY), &Expect::OneEach)?;
        self.rows(&mut table, "no endpoints", &from_pod, &cluster(EMPTY), &Expect::Refused)?;
        self.publish(WEB, &web(false))?;
        self.rows(&mut table, "pod-2-1 is scaled away", &from_pod, &cluster(WEB), &FIRST)?;
        self.publish(WEB, &web(true))?;
        self.rows(&mut table, "pod-2-1 is back", &from_pod, &cluster(WEB), &BOTH)?;
        self.names(&mut table, "a headless Service's name", &[(1, 1)])?;
        let all = [(1, 1), (2, 1), (2, 2)];
        self.subject.publish(DB, headless(&all))?;
        self.names(&mut table, "it is scaled up", &all)?;
        Ok(table)
    }

    /// One row for each family.
    fn rows(
        &self,
        table: &mut Table,
        what: &str,
        from: &[Location],
        to: &dyn Fn(Family) -> SocketAddr,
        expect: &Expect,
    ) -> Result<()> {
        for family in Family::ALL {
            let to = to(family);
            let mut answers = Vec::new();
            for &client in from {
                let seen = self.call(client, to);
                expect.check(&seen).with_context(|| format!("{what}: {client} to {to}"))?;
                let seen: Vec<_> = seen.iter().map(|(answer, times)| format!("{answer} {times}x")).collect();
                let client = if from.len() > 1 { format!("{client}: ") } else { String::new() };
                answers.push(format!("{client}{}", seen.join(", ")));
            }
            let label =
                if from.len() > 1 { format!("{} clients outside", from.len()) } else { from[0].to_string() };
            table.add_row([what, &label, &to.to_string(), &answers.join("\n")]);
        }
        Ok(())
    }

    /// A row for what the headless Service's name stands for, once these pods are it, and each was reached.
    fn names(&self, table: &mut Table, what: &str, pods: &[(u8, u8)]) -> Result<()> {
        let (from, name) = (Location::Pod(1, 2), format!("{DB}.{NAMESPACE}.svc.cluster.local."));
        let mut wanted: Vec<IpAddr> =
            pods.iter().map(|&(node, pod)| pod_address(Family::V4, node, pod)).collect();
        wanted.sort_unstable();
        let found = || {
            let said = names::ask(self.topology.at(from), NAMES.parse()?, &name, RecordType::A)?;
            anyhow::Ok(said.addresses())
        };
        let deadline = Instant::now() + DEADLINE;
        while found()? != wanted {
            ensure!(
                Instant::now() < deadline,
                "{what}: {name} stands for {:?} and not for {wanted:?}",
                found()?
            );
            sleep(Duration::from_millis(5));
        }
        let mut answers = Vec::new();
        for address in wanted {
            answers.extend(self.call(from, SocketAddr::new(address, TARGET)).into_keys());
        }
        table.add_row([what, &from.to_string(), name.trim_end_matches('.'), &answers.join(", ")]);
        Ok(())
    }

    /// Who answered how often, or what was seen instead.
    fn call(&self, from: Location, to: SocketAddr) -> BTreeMap<String, usize> {
        let call = Call::new(from, to, Transport::Tcp);
        let mut seen = BTreeMap::new();
        self.topology.at(from).run(|| {
            for _ in 0..CALLS {
                let answer = match ask(&call) {
                    Outcome::Answer(answer) => {
                        answer.backend.split(':').next().unwrap_or_default().to_owned()
                    }
                    other => other.to_string(),
                };
                *seen.entry(answer).or_default() += 1;
            }
        });
        seen
    }
}

impl Expect {
    fn check(&self, seen: &BTreeMap<String, usize>) -> Result<()> {
        let answers: BTreeSet<&str> = seen.keys().map(String::as_str).collect();
        let pods = |places: &[Location]| places.iter().map(ToString::to_string).collect::<Vec<_>>();
        let fits = match self {
            Self::Each(places) => answers == pods(places).iter().map(String::as_str).collect(),
            Self::OneEach => {
                answers.len() == 1 && pods(&Location::PODS).iter().any(|pod| answers.contains(pod.as_str()))
            }
            Self::Refused => answers == BTreeSet::from(["refused"]),
        };
        ensure!(fits, "unexpected answers: {seen:?}");
        Ok(())
    }
}

fn invitation(manifests: &str, subject: &Subject<'_>) -> String {
    let (v4, v6) = (WEB.cluster_ip(Family::V4), WEB.cluster_ip(Family::V6));
    let port = WEB.node_port(PORT);
    format!(
        "
Everything stays up until this is stopped. From another terminal:
  ip netns exec {PREFIX}-pod-1-2 curl -s http://{v4}/ http://[{v6}]/      the ClusterIP from a pod
  ip netns exec {PREFIX}-outside curl -s http://{}:{port}/      the NodePort from outside
  ip netns exec {PREFIX}-node-1 nft list table ip weir       what weir made of it
  $EDITOR {manifests}/web.yaml       change it; weir follows at once
  tail -f {} {}
To remove it all, press Ctrl-C here.",
        node_address(Family::V4, 1),
        subject.log(1).display(),
        subject.log(2).display(),
    )
}

fn wait_for_signal() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        tokio::select! {
            interrupted = tokio::signal::ctrl_c() => interrupted?,
            _ = terminate.recv() => {}
        }
        Ok(())
    })
}

#[expect(clippy::print_stdout, reason = "the demo is there to be read")]
fn say(text: &str) {
    println!("{text}");
}
