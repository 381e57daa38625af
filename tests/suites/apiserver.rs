//! weir on both nodes, fed by a real API server: what is written there is followed, and an outage takes nothing away.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

use anyhow::Result;
use weir::model::Family;
use weir_tests::{
    node::{Location, Topology, node_address},
    objects::{Addresses, PORT, Shape, pod, service},
    runner::serve,
    subject::{Kind, Plane, Settings, Subject},
    traffic::{Call, Load, Outcome, SILENCE, Transport, ask},
    wait::{await_that, await_within},
};

const WEB: Addresses = Addresses::new(1).named("web");
/// How long flows may take to move (K2): less than they live by themselves.
const MOVE: Duration = Duration::from_secs(10);
/// So many calls in a row miss one of two backends once in 2³⁹ times.
const CALLS: usize = 40;
const TRANSPORTS: [Transport; 2] = [Transport::Tcp, Transport::Udp];

fn web(pods: &[(u8, u8)]) -> Shape {
    service(pods.iter().map(|&(node, number)| pod(node, number)).collect::<Vec<_>>()).everywhere()
}

fn to_cluster_ip(family: Family) -> SocketAddr {
    SocketAddr::new(WEB.cluster_ip(family), PORT)
}

fn to_node_port(family: Family) -> SocketAddr {
    SocketAddr::new(node_address(family, 1), WEB.node_port(PORT))
}

/// Ways to the Service over both nodes, both families and both transports.
fn calls() -> Vec<(Location, Call)> {
    let mut calls = Vec::new();
    for family in Family::ALL {
        for (from, to) in [
            (Location::Pod(1, 2), to_cluster_ip(family)),
            (Location::Host(1), to_cluster_ip(family)),
            (Location::Pod(2, 2), to_cluster_ip(family)),
            (Location::Outside(0), to_node_port(family)),
        ] {
            calls.extend(TRANSPORTS.map(|transport| (from, Call::new(from, to, transport))));
        }
    }
    calls
}

struct Cluster<'a> {
    topology: &'a Topology,
    subject: Subject<'a>,
}

impl<'a> Cluster<'a> {
    fn new(plane: Plane, topology: &'a Topology) -> Result<Self> {
        Ok(Self { topology, subject: Subject::of_cluster(Kind::Weir(plane), topology)? })
    }

    fn publish(&self, shape: &Shape) -> Result<()> {
        self.subject.publish(&WEB.name(), shape.objects(WEB))
    }

    fn ask(&self, from: Location, call: &Call) -> Outcome {
        self.topology.at(from).run(|| ask(call))
    }

    /// The backends that answer a row of calls, or the outcomes where none does.
    fn seen(&self, from: Location, call: &Call) -> BTreeSet<String> {
        let word = |outcome| match outcome {
            Outcome::Answer(answer) => answer.backend.split(':').next().unwrap_or_default().to_owned(),
            other => other.to_string(),
        };
        self.topology.at(from).run(|| (0..CALLS).map(|_| word(ask(call))).collect())
    }

    /// Every way leads to all of these pods and to nothing else.
    fn leads_to(&self, pods: &[Location]) {
        // The ports of earlier calls come up again, and their flows are cut only after the rules are in force (K1).
        await_within(MOVE, "no UDP flow is left that leads elsewhere", || self.others(pods).is_empty());
        let wanted: BTreeSet<String> = pods.iter().map(ToString::to_string).collect();
        for (from, call) in calls() {
            assert_eq!(self.seen(from, &call), wanted, "{from} to {} by {}", call.to, call.transport);
        }
    }

    /// The UDP flows of the Service that other pods than these answer.
    fn others(&self, pods: &[Location]) -> Vec<String> {
        let mut others = Vec::new();
        for (node, family) in [1, 2].into_iter().flat_map(|node| Family::ALL.map(|family| (node, family))) {
            let name = family.to_string().to_lowercase();
            let flows =
                self.topology.at(Location::Host(node)).stdout("conntrack", &["-L", "-p", "udp", "-f", &name]);
            let strangers = Location::PODS.into_iter().filter(|pod| !pods.contains(pod));
            let strangers: Vec<_> =
                strangers.map(|pod| format!("src={} ", pod.server_address(family))).collect();
            let ports = [PORT, WEB.node_port(PORT)].map(|port| format!("dport={port} "));
            others.extend(
                flows
                    .unwrap()
                    .lines()
                    .filter(|flow| {
                        // First the direction of the call, then that of the answer.
                        let (call, answer) = flow.split_at(flow.rfind("src=").unwrap_or_default());
                        ports.iter().any(|port| call.contains(port))
                            && strangers.iter().any(|stranger| answer.starts_with(stranger))
                    })
                    .map(str::to_owned),
            );
        }
        others
    }

    /// No Service has the addresses any more: F5 for the ClusterIP, and no process listens on the NodePort.
    fn leads_nowhere(&self) {
        for family in Family::ALL {
            for transport in TRANSPORTS {
                let from = Location::Pod(1, 2);
                let call = Call { patience: SILENCE, ..Call::new(from, to_cluster_ip(family), transport) };
                assert_eq!(self.ask(from, &call), Outcome::Timeout, "{} by {transport}", call.to);
                let from = Location::Outside(0);
                let call = Call::new(from, to_node_port(family), transport);
                assert_eq!(self.ask(from, &call), Outcome::Refused, "{} by {transport}", call.to);
            }
        }
    }

    fn loads(&self) -> Result<Vec<Load>> {
        let start = |(from, call)| {
            // A busy machine may answer late; what is asked here is whether it answers at all.
            let call = Call { patience: Duration::from_secs(5), ..call };
            Load::start(self.topology.at(from), call, Duration::from_millis(2))
        };
        calls().into_iter().map(start).collect()
    }

    fn log(&self, node: u8) -> String {
        std::fs::read_to_string(self.subject.log(node)).unwrap_or_default()
    }

    /// Starts an agent that finds no API server, and waits until it has noticed.
    fn start_alone(&self, node: u8) -> Result<()> {
        let before = self.log(node).len();
        self.subject.start_agent(node)?;
        await_that("the agent has looked for the API server in vain", || {
            self.log(node)[before..].contains("the API server does not answer")
        });
        Ok(())
    }
}

fn answered_more(loads: &[Load]) {
    let before: Vec<u64> = loads.iter().map(Load::answered).collect();
    await_that("every load is answered twenty times more", || {
        loads.iter().zip(&before).all(|(load, before)| load.answered() >= before + 20)
    });
}

fn without_failure(when: &str, loads: Vec<Load>) -> Result<()> {
    for ((from, call), load) in calls().into_iter().zip(loads) {
        let tally = load.stop()?;
        assert!(tally.failures.is_empty(), "{when}: {from} to {} by {}: {tally:?}", call.to, call.transport);
    }
    Ok(())
}

fn the_api_server_is_followed(plane: Plane) -> Result<()> {
    let topology = Topology::new()?;
    let _servers = serve(&topology)?;
    let cluster = Cluster::new(plane, &topology)?;
    cluster.subject.start(&Settings::default())?;
    cluster.leads_nowhere();
    cluster.publish(&web(&[(1, 1)]))?;
    cluster.leads_to(&[Location::Pod(1, 1)]);
    cluster.publish(&web(&[(1, 1), (2, 1)]))?;
    cluster.leads_to(&[Location::Pod(1, 1), Location::Pod(2, 1)]);
    cluster.publish(&web(&[(2, 1)]))?;
    cluster.leads_to(&[Location::Pod(2, 1)]);
    cluster.publish(&web(&[]))?;
    for (from, call) in calls() {
        // F1; a host's own datagram is denied instead of refused.
        let outcome = cluster.ask(from, &call);
        let refused = matches!(outcome, Outcome::Refused | Outcome::Denied);
        assert!(refused, "{from} to {} by {}: {outcome}", call.to, call.transport);
    }
    cluster.publish(&web(&[(1, 1), (2, 1)]))?;
    cluster.leads_to(&[Location::Pod(1, 1), Location::Pod(2, 1)]);

    let mut handed_over = web(&[(1, 1), (2, 1)]);
    handed_over.labels = vec![("service.kubernetes.io/service-proxy-name", "another")];
    cluster.publish(&handed_over)?;
    cluster.leads_nowhere();
    cluster.publish(&web(&[(1, 1)]))?;
    cluster.leads_to(&[Location::Pod(1, 1)]);
    cluster.subject.publish(&WEB.name(), Vec::new())?;
    cluster.leads_nowhere();
    Ok(())
}

#[test]
fn w1_e6_the_api_server_is_followed() -> Result<()> {
    the_api_server_is_followed(Plane::Nftables)
}

#[test]
fn w1_e6_the_api_server_is_followed_at_sockets() -> Result<()> {
    the_api_server_is_followed(Plane::Ebpf)
}

fn an_outage_takes_nothing_away(plane: Plane) -> Result<()> {
    let topology = Topology::new()?;
    let _servers = serve(&topology)?;
    let cluster = Cluster::new(plane, &topology)?;
    cluster.publish(&web(&[(1, 1), (2, 1)]))?;
    cluster.subject.start(&Settings::default())?;
    let loads = cluster.loads()?;
    answered_more(&loads);

    cluster.subject.stop_api_server()?;
    answered_more(&loads);
    without_failure("while the API server went", loads)?;

    // The agent that was connected has the objects, so it restores the rules.
    let all_answer =
        || calls().iter().all(|(from, call)| matches!(cluster.ask(*from, call), Outcome::Answer(_)));
    for theft in [&["flush", "ruleset"][..], &["flush", "table", "ip", "weir"]] {
        topology.at(Location::Host(1)).stdout("nft", theft)?;
        await_that(&format!("everything answers after nft {}", theft.join(" ")), all_answer);
    }

    // The one that starts now has no objects, and leaves alone what it finds.
    let loads = cluster.loads()?;
    answered_more(&loads);
    cluster.subject.kill_agent(1)?;
    cluster.start_alone(1)?;
    answered_more(&loads);
    without_failure("while an agent started alone", loads)?;
    cluster.leads_to(&[Location::Pod(1, 1), Location::Pod(2, 1)]);

    cluster.subject.restart_api_server()?;
    // A list that is taken again has no order: only what is published after it shows how far the agents have come.
    cluster.subject.settle()?;
    cluster.publish(&web(&[(2, 2)]))?;
    cluster.leads_to(&[Location::Pod(2, 2)]);
    Ok(())
}

#[test]
fn an_outage_of_the_api_server_takes_nothing_away() -> Result<()> {
    an_outage_takes_nothing_away(Plane::Nftables)
}

#[test]
fn an_outage_of_the_api_server_takes_nothing_away_from_sockets() -> Result<()> {
    an_outage_takes_nothing_away(Plane::Ebpf)
}

fn one_that_comes_later_is_followed(plane: Plane) -> Result<()> {
    let topology = Topology::new()?;
    let _servers = serve(&topology)?;
    let cluster = Cluster::new(plane, &topology)?;
    cluster.publish(&web(&[(1, 1), (2, 1)]))?;
    cluster.subject.stop_api_server()?;
    cluster.start_alone(1)?;
    cluster.start_alone(2)?;
    for (from, call) in calls() {
        let outcome = cluster.ask(from, &Call { patience: SILENCE, ..call });
        assert!(!matches!(outcome, Outcome::Answer(_)), "{from} to {}: {outcome}", call.to);
    }
    cluster.subject.restart_api_server()?;
    cluster.subject.settle()?;
    cluster.leads_to(&[Location::Pod(1, 1), Location::Pod(2, 1)]);
    Ok(())
}

#[test]
fn an_api_server_that_comes_later_than_weir_is_followed() -> Result<()> {
    one_that_comes_later_is_followed(Plane::Nftables)
}

#[test]
fn an_api_server_that_comes_later_than_weir_is_followed_at_sockets() -> Result<()> {
    one_that_comes_later_is_followed(Plane::Ebpf)
}
