//! The agent is killed and restarted, and its rules are removed, while clients connect (R1, A5).

use std::{net::SocketAddr, time::Duration};

use anyhow::{Result, anyhow, bail};
use weir::model::Family;
use weir_tests::{
    node::{Location, OUTSIDE_CLIENTS, Topology},
    objects::{Addresses, PORT, Shape, pod, service},
    runner::serve,
    subject::{Kind, Plane, Settings, Subject},
    traffic::{Call, Flow, Load, Outcome, PATIENCE, Transport, ask, await_answers, every_way},
    wait::await_that,
};

const WEB: Addresses = Addresses::new(1).named("web");
const STICKY: Addresses = Addresses::new(2).named("sticky");

fn web() -> Shape {
    service([pod(1, 1), pod(2, 1)]).everywhere()
}

/// Every way to the Service that the tests keep under load.
fn calls() -> Vec<(Location, Call)> {
    every_way(WEB, &[Transport::Tcp, Transport::Udp, Transport::Datagram])
}

/// The backends of a sticky Service. nftables stores affinity for clients outside the node; eBPF, if it runs, stores it for clients
/// on the node.
fn sticky_backends(topology: &Topology) -> Result<Vec<String>> {
    let inside = [Location::Host(1), Location::Host(2)].into_iter().chain(Location::PODS);
    let clients = (0..OUTSIDE_CLIENTS).map(Location::Outside).chain(inside);
    let ask = |from| {
        let call = Call::new(from, SocketAddr::new(STICKY.cluster_ip(Family::V4), PORT), Transport::Tcp);
        match topology.at(from).run(|| ask(&call)) {
            Outcome::Answer(answer) => Ok(answer.backend),
            other => bail!("{from}: {other}"),
        }
    };
    clients.map(ask).collect()
}

fn killed_and_restarted_under_traffic(kind: Kind) -> Result<()> {
    let topology = Topology::new()?;
    let _servers = serve(&topology)?;
    let subject = Subject::new(kind, &topology)?;
    subject.publish(&WEB.name(), web().objects(WEB))?;
    let all = [pod(1, 1), pod(1, 2), pod(2, 1), pod(2, 2)];
    subject.publish(&STICKY.name(), service(all.clone()).sticky(3600).objects(STICKY))?;
    subject.start(&Settings::default())?;

    let remembered = sticky_backends(&topology)?;
    let flows: Vec<_> = calls()
        .into_iter()
        .map(|(from, call)| {
            topology
                .at(from)
                .run(|| Flow::open(&call))
                .map_err(|outcome| anyhow!("{from} to {}: {outcome}", call.to))
        })
        .collect::<Result<_>>()?;
    let loads: Vec<_> = calls()
        .into_iter()
        .map(|(from, call)| Load::start(topology.at(from), call, Duration::from_millis(2)))
        .collect::<Result<_>>()?;
    await_answers(&loads, 20);

    for round in 0..3 {
        subject.kill_agent(1)?;
        subject.kill_agent(2)?;
        await_answers(&loads, 20);
        // The next agent finds at its start what changed meanwhile.
        let endpoints = if round % 2 == 0 { all.to_vec() } else { vec![pod(1, 1), pod(2, 1)] };
        subject.publish(&WEB.name(), service(endpoints).everywhere().objects(WEB))?;
        subject.start_agent(1)?;
        subject.start_agent(2)?;
        subject.settle()?;
        await_answers(&loads, 20);
    }

    for ((from, call), load) in calls().into_iter().zip(loads) {
        let tally = load.stop()?;
        // Flows of datagrams to an endpoint that left are cut (K2), and an answer that is under way at that moment is lost. A
        // load has one call under way at a time, and endpoints leave once.
        let cut = if call.transport == Transport::Tcp { 0 } else { 1 };
        let failed: u64 = tally.failures.values().sum();
        assert!(failed <= cut, "{from} to {} by {}: {tally:?}", call.to, call.transport);
        let newcomer = tally.answers.keys().any(|backend| backend.starts_with("pod-2-2"));
        assert!(
            newcomer,
            "{from} to {} never saw the endpoint that came while the agent was down: {tally:?}",
            call.to
        );
    }
    for (flow, answer) in flows {
        let outcome = flow.ask(PATIENCE);
        assert!(
            matches!(&outcome, Outcome::Answer(now) if now.backend == answer.backend),
            "{answer:?}, then {outcome}"
        );
    }
    assert_eq!(sticky_backends(&topology)?, remembered, "session affinity did not outlive the agent (A5)");
    Ok(())
}

#[test]
fn weir_killed_and_restarted_under_traffic_fails_no_connection() -> Result<()> {
    killed_and_restarted_under_traffic(Kind::Weir(Plane::Nftables))
}

#[test]
fn weir_at_sockets_killed_and_restarted_under_traffic_fails_no_connection() -> Result<()> {
    killed_and_restarted_under_traffic(Kind::Weir(Plane::Ebpf))
}

/// The same on kube-proxy: it proves that the test asks for nothing that kube-proxy does not do.
#[test]
fn kube_proxy_killed_and_restarted_under_traffic_fails_no_connection() -> Result<()> {
    killed_and_restarted_under_traffic(Kind::KubeProxy)
}

/// Clients keep sending to a Service that was deleted while no agent ran: nothing serves them any more (K6).
fn deleted_while_no_agent_runs(plane: Plane) -> Result<()> {
    let topology = Topology::new()?;
    let _servers = serve(&topology)?;
    let subject = Subject::new(Kind::Weir(plane), &topology)?;
    subject.publish(&WEB.name(), web().objects(WEB))?;
    subject.start(&Settings::default())?;
    let flows: Vec<_> = every_way(WEB, &[Transport::Udp, Transport::Datagram])
        .into_iter()
        .map(|(from, call)| {
            let flow = topology.at(from).run(|| Flow::open(&call));
            flow.map(|(flow, _)| (from, call, flow))
                .map_err(|outcome| anyhow!("{from} to {}: {outcome}", call.to))
        })
        .collect::<Result<_>>()?;
    subject.kill_agent(1)?;
    subject.kill_agent(2)?;
    subject.publish(&WEB.name(), Vec::new())?;
    subject.start_agent(1)?;
    subject.start_agent(2)?;
    subject.settle()?;
    for (from, call, flow) in flows {
        let what = format!("{from} to {} by {} ends", call.to, call.transport);
        await_that(&what, || !matches!(flow.ask(PATIENCE), Outcome::Answer(_)));
    }
    Ok(())
}

#[test]
fn udp_flows_of_a_service_deleted_while_no_agent_ran_end() -> Result<()> {
    deleted_while_no_agent_runs(Plane::Nftables)
}

#[test]
fn udp_flows_of_a_service_deleted_while_no_agent_ran_end_with_sockets_in_front() -> Result<()> {
    deleted_while_no_agent_runs(Plane::Ebpf)
}

fn removed_rules_are_restored(plane: Plane) -> Result<()> {
    let topology = Topology::new()?;
    let _servers = serve(&topology)?;
    let subject = Subject::new(Kind::Weir(plane), &topology)?;
    subject.publish(&WEB.name(), web().objects(WEB))?;
    subject.start(&Settings::default())?;
    let answered = || {
        calls().iter().all(|(from, call)| {
            let call = Call { patience: PATIENCE, ..*call };
            matches!(topology.at(*from).run(|| ask(&call)), Outcome::Answer(_))
        })
    };
    await_that("everything answers", answered);
    for removal in [
        &["flush", "ruleset"][..],
        &["delete", "table", "ip", "weir"],
        &["delete", "table", "ip6", "weir"],
        &["flush", "table", "ip", "weir"],
    ] {
        topology.at(Location::Host(1)).stdout("nft", removal)?;
        await_that(&format!("everything answers after nft {}", removal.join(" ")), answered);
    }
    // The agent still follows changes afterwards.
    subject.publish(&WEB.name(), service([pod(2, 2)]).everywhere().objects(WEB))?;
    let (from, call) = calls()[0];
    let outcome = topology.at(from).run(|| ask(&call));
    assert!(
        matches!(&outcome, Outcome::Answer(answer) if answer.backend.starts_with("pod-2-2")),
        "{outcome}"
    );
    Ok(())
}

#[test]
fn weir_restores_removed_rules() -> Result<()> {
    removed_rules_are_restored(Plane::Nftables)
}

#[test]
fn weir_at_sockets_restores_removed_rules() -> Result<()> {
    removed_rules_are_restored(Plane::Ebpf)
}
