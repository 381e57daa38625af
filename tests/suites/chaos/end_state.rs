//! The conditions that must hold again after every act: every Service works, none reaches another, health is
//! right, names are answered, and the agent takes in changes.
//!
//! In: a [`Fixture`]. Out: how long that took, or what is still wrong at the deadline. An answer from an endpoint of another
//! Service is never waited for to end.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use hickory_proto::rr::RecordType;
use weir::model::Family;
use weir_tests::{
    names,
    node::{Location, node_address},
    traffic::{Call, Flow, Outcome, Transport},
};

use super::{
    cluster::{CLIENT, Expected, Probe, SERVICES, Service, marker},
    fixture::{DNS, Fixture},
    random::Random,
};

/// How long a client waits for one answer.
const PATIENCE: Duration = Duration::from_millis(400);
/// The pause before a failed probe is tried again.
const PAUSE: Duration = Duration::from_millis(10);
/// How many Services are tried in every way, besides the first ten, which are one of each kind.
const SAMPLE: usize = 6;

/// Waits until all of it is true.
pub(crate) fn reach(fixture: &mut Fixture, random: &mut Random, deadline: Duration) -> Result<Duration> {
    let begin = Instant::now();
    let until = begin + deadline;
    fixture.mark()?;
    let mut probes = sample(random);
    probes.extend(fixture.extra.iter().cloned());
    probes.extend(marker::ways(fixture.version()));
    loop {
        if Instant::now() < fixture.may_end_until {
            fixture.restart_if_dead()?;
        }
        fixture.alive()?;
        let found = ask_all(fixture, &probes).and_then(|()| health_is_right(fixture, random));
        match found {
            Ok(()) => break,
            Err(Wrong::Now(error)) => return Err(error),
            Err(Wrong::Yet(error)) if Instant::now() > until => {
                return Err(error.context(format!("not right within {deadline:?}")));
            }
            Err(Wrong::Yet(_)) => std::thread::sleep(PAUSE),
        }
    }
    Ok(begin.elapsed())
}

/// Looks at every Service once: what a sample missed is as wrong as what it found.
pub(crate) fn all_serve(fixture: &Fixture, random: &mut Random, deadline: Duration) -> Result<()> {
    let until = Instant::now() + deadline;
    let all = every_cluster_ip(random.below(2) as u16);
    loop {
        match ask_all(fixture, &all) {
            Ok(()) => return Ok(()),
            Err(Wrong::Now(error)) => return Err(error),
            Err(Wrong::Yet(error)) if Instant::now() > until => {
                return Err(error.context("a Service beside the sample does not work"));
            }
            Err(Wrong::Yet(_)) => std::thread::sleep(PAUSE),
        }
    }
}

enum Wrong {
    /// With time it may become right.
    Yet(anyhow::Error),
    /// It must never have been so.
    Now(anyhow::Error),
}

impl From<anyhow::Error> for Wrong {
    fn from(error: anyhow::Error) -> Self {
        Self::Yet(error)
    }
}

fn sample(random: &mut Random) -> Vec<Probe> {
    let chosen = (0..SAMPLE).map(|_| Service(random.below(SERVICES.into()) as u16)).collect::<Vec<_>>();
    (0..10).map(Service).chain(chosen).flat_map(Service::ways).collect()
}

/// Each ClusterIP once: at sockets or by packets, over one family or the other.
fn every_cluster_ip(turn: u16) -> Vec<Probe> {
    let one = |service: Service| {
        let family = if (service.0 / 10 + turn).is_multiple_of(2) { Family::V4 } else { Family::V6 };
        if (service.0 / 20 + turn).is_multiple_of(2) {
            service.to_cluster_ip(family, CLIENT, false, Transport::Tcp)
        } else {
            service.to_cluster_ip(family, Location::Host(1), true, Transport::Tcp)
        }
    };
    Service::all().map(one).collect()
}

/// Asks all of these, client by client; ends with the first that goes wrong.
fn ask_all(fixture: &Fixture, probes: &[Probe]) -> Result<(), Wrong> {
    let mut clients: Vec<(Location, bool)> =
        probes.iter().map(|probe| (probe.from, probe.by_packets)).collect();
    clients.sort_unstable();
    clients.dedup();
    for (from, by_packets) in clients {
        let own: Vec<Probe> = probes
            .iter()
            .filter(|probe| (probe.from, probe.by_packets) == (from, by_packets))
            .cloned()
            .collect();
        let namespace = fixture.topology.at(from);
        let work = move || own.iter().try_for_each(ask);
        let thread = if by_packets { namespace.thread_outside_group(work) } else { namespace.thread(work) }?;
        thread.join().map_err(|_| anyhow!("a client panicked"))??;
    }
    Ok(())
}

fn ask(probe: &Probe) -> Result<(), Wrong> {
    let Probe { from, by_packets, to, transport, expected } = probe;
    let call = Call { patience: PATIENCE, ..Call::new(*from, *to, *transport) };
    let outcome = match Flow::open(&call) {
        Ok((flow, answer)) => Outcome::Answer(flow.abort(answer)),
        Err(outcome) => outcome,
    };
    let told = |outcome: &Outcome| {
        let way = if *by_packets { " by packets" } else { "" };
        anyhow!("{from}{way} to {to} by {transport}: {outcome}, not {expected:?}")
    };
    match (expected, &outcome) {
        (Expected::Refused, Outcome::Refused | Outcome::Denied) => Ok(()),
        (Expected::Endpoints(own), Outcome::Answer(answer)) => {
            let right = answer.backend.parse().is_ok_and(|backend: IpAddr| own.contains(&backend));
            if right { Ok(()) } else { Err(Wrong::Now(told(&outcome).context("a Service reached another"))) }
        }
        (Expected::Marker(own), Outcome::Answer(answer)) if answer.backend == own.to_string() => Ok(()),
        _ => Err(Wrong::Yet(told(&outcome))),
    }
}

/// `/healthz` is 200, health checks of Services report how many endpoints are here, and names have their addresses.
fn health_is_right(fixture: &Fixture, random: &mut Random) -> Result<(), Wrong> {
    let health = get(fixture, 10256, "/healthz")?;
    if !health.starts_with("HTTP/1.1 200") && !health.starts_with("HTTP/1.0 200") {
        return Err(Wrong::Yet(anyhow!("everything works and /healthz says {}", first_line(&health))));
    }
    let checked: Vec<Service> = Service::all().filter(|service| service.health_port().is_some()).collect();
    for _ in 0..3 {
        let service = random.pick(&checked).context("no Service has a health check")?;
        let port = service.health_port().context("it has a health check")?;
        let said = get(fixture, port, "/")?;
        if !said.contains("\"localEndpoints\": 1,") {
            return Err(Wrong::Yet(anyhow!("the health check of {} says {said:?}", service.name())));
        }
    }
    let (name, address) = Fixture::name_of(Service(random.below(SERVICES.into()) as u16));
    for server in DNS {
        let said = names::ask(
            fixture.topology.at(CLIENT),
            server.parse().map_err(anyhow::Error::from)?,
            &name,
            RecordType::A,
        )?;
        if said.addresses() != [address] {
            return Err(Wrong::Yet(anyhow!("{name} is answered with {said:?}")));
        }
    }
    Ok(())
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or("nothing")
}

/// The answer of a port of node 1 to a GET from the node.
fn get(fixture: &Fixture, port: u16, path: &str) -> Result<String> {
    let to = SocketAddr::new(node_address(Family::V4, 1), port);
    fixture.topology.at(Location::Host(1)).run(|| {
        let mut stream =
            TcpStream::connect_timeout(&to, PATIENCE).with_context(|| format!("asking {to}{path}"))?;
        stream.set_read_timeout(Some(Duration::from_secs(1)))?;
        write!(stream, "GET {path} HTTP/1.0\r\nHost: node\r\n\r\n")?;
        let mut said = String::new();
        stream.read_to_string(&mut said).with_context(|| format!("reading what {to}{path} says"))?;
        ensure!(!said.is_empty(), "{to}{path} says nothing");
        Ok(said)
    })
}

/// The `/healthz` of an agent that is dead is not there.
pub(crate) fn is_silent(fixture: &Fixture) -> Result<()> {
    if let Ok(said) = get(fixture, 10256, "/healthz") {
        bail!("no agent runs, and /healthz says {}", first_line(&said));
    }
    Ok(())
}
