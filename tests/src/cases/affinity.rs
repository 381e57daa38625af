//! Session affinity: A1 to A5.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};

use super::*;
use crate::{
    node::OUTSIDE_CLIENTS,
    objects::{Slice, pod, service, slice},
};

pub(super) fn cases() -> Vec<Case> {
    let four = || [pod(1, 1), pod(1, 2), pod(2, 1), pod(2, 2)];
    let hour = 3600;
    vec![
        case("A1 A2", "each client stays with its backend, whichever address it calls", {
            service(four()).everywhere().sticky(hour)
        })
        .step(Step::Run("call every address of the Service from many clients", stay)),
        case("A1 A2 R6", "clients stay under external policy Local", {
            service([pod(1, 1), pod(1, 2), pod(2, 1)]).everywhere().sticky(hour).external_local()
        })
        .step(Step::Run("call from many clients outside", stay_local)),
        case("A2", "ports of one Service are remembered apart", {
            let ports = [("http", Transport::Tcp, 80), ("admin", Transport::Tcp, 81)];
            let slice = Slice {
                ports: vec![("http", Transport::Tcp, TARGET), ("admin", Transport::Tcp, TARGET)],
                ..slice(four())
            };
            service([]).ports(&ports).slices([slice]).sticky(hour)
        })
        .over(&[Transport::Tcp])
        .step(Step::Run("compare the backends of two ports", apart)),
        case(
            "A4 A5",
            "a client gets another backend when its own leaves, and stays there when the first comes back",
            service([pod(1, 1), pod(2, 1)]).sticky(hour),
        )
        .check(POD12, CLUSTER, any_of_two())
        .then(service([pod(2, 2)]).sticky(hour))
        .check(POD12, CLUSTER, any(&[POD22]))
        .then(service([pod(1, 1), pod(2, 1), pod(2, 2)]).sticky(hour))
        .check(POD12, CLUSTER, any(&[POD22])),
        case("A4", "a backend that is left out is not gone to", {
            service([pod(1, 1), pod(2, 1)]).sticky(hour)
        })
        .check(POD12, CLUSTER, any_of_two())
        .then(service([pod(1, 1).terminating(), pod(2, 1).terminating(), pod(2, 2)]).sticky(hour))
        .check(POD12, CLUSTER, any(&[POD22])),
        case("A1 A3", "a client is remembered for the timeout after its last new flow", {
            service(four()).sticky(TIMEOUT.as_secs() as i32)
        })
        // Both kinds of UDP sockets are the same client.
        .over(&[Transport::Tcp, Transport::Udp])
        .step(Step::Run("keep calling, then wait for the timeout", forget)),
        case("A1", "affinity ends when it is switched off, and starts when it is switched on", {
            service(four()).sticky(hour)
        })
        .step(Step::Run("stay with one backend", |run| one_each(run, CLUSTER).map(drop)))
        .then(service(four()))
        .check(POD12, CLUSTER, any(&Location::PODS))
        .then(service(four()).sticky(hour))
        .step(Step::Run("stay with one backend again", |run| one_each(run, CLUSTER).map(drop))),
    ]
}

const TIMEOUT: Duration = Duration::from_secs(3);

/// One of two, whichever: what a sticky client sees.
fn any_of_two() -> Expect {
    Expect::OneOf(vec![(POD11, TARGET), (POD21, TARGET)])
}

fn clients() -> impl Iterator<Item = Location> {
    (0..OUTSIDE_CLIENTS).map(Location::Outside)
}

/// The backend of every client outside, each asked more than once; that all have the same is a one in 4^15 chance.
fn one_each(run: &CaseRun<'_>, target: Target) -> Result<Vec<String>> {
    let mut backends = Vec::new();
    for client in clients() {
        let first = run.backend(client, target)?;
        for _ in 0..4 {
            let again = run.backend(client, target)?;
            ensure!(again == first, "{client} was sent to {first} and then to {again}");
        }
        backends.push(first);
    }
    ensure!(
        backends.iter().any(|backend| *backend != backends[0]),
        "all clients were sent to {}",
        backends[0]
    );
    Ok(backends)
}

fn stay(run: &CaseRun<'_>) -> Result<()> {
    let first = one_each(run, CLUSTER)?;
    for target in EXTERNALS {
        let others = one_each(run, target)?;
        ensure!(others == first, "backends by ClusterIP {first:?}, by {target:?} {others:?}");
    }
    for from in [POD12, HOST] {
        let first = run.backend(from, CLUSTER)?;
        for target in [CLUSTER, CLUSTER, NODE_PORT, EXTERNAL, BALANCER] {
            let other = run.backend(from, target)?;
            ensure!(other == first, "{from} was sent to {first} by ClusterIP and to {other} by {target:?}");
        }
    }
    Ok(())
}

fn stay_local(run: &CaseRun<'_>) -> Result<()> {
    for target in EXTERNALS {
        let backends = one_each(run, target)?;
        ensure!(backends.iter().all(|backend| backend.starts_with("pod-1-")), "not only local: {backends:?}");
    }
    Ok(())
}

fn apart(run: &CaseRun<'_>) -> Result<()> {
    let first = one_each(run, CLUSTER)?;
    let second = one_each(run, CLUSTER.port(81))?;
    ensure!(first != second, "both ports sent every client to the same backend: {first:?}");
    Ok(())
}

fn forget(run: &CaseRun<'_>) -> Result<()> {
    let first = one_each(run, CLUSTER)?;
    let mut called = vec![Instant::now(); first.len()];
    for _ in 0..4 {
        // Shorter than the timeout, and longer than it in sum: each new flow must have wound the clock again.
        thread::sleep(TIMEOUT * 2 / 5);
        for ((client, backend), called) in clients().zip(&first).zip(&mut called) {
            let again = run.backend(client, CLUSTER)?;
            // On a machine too busy to call in time the result means nothing.
            ensure!(
                again == *backend || called.elapsed() > TIMEOUT,
                "{client} was forgotten: {backend}, then {again}"
            );
            if again != *backend {
                return Ok(());
            }
            *called = Instant::now();
        }
    }
    thread::sleep(TIMEOUT + Duration::from_millis(500));
    let again = one_each(run, CLUSTER)?;
    ensure!(again != first, "all clients were remembered beyond the timeout");
    Ok(())
}
