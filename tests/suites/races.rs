//! Connections while backends change as fast as they can: each goes to an old backend or to a new one, and none is
//! refused or lost.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, ensure};
use weir::{
    dataplane::{
        Dataplane, Stack,
        ebpf::{Ebpf, Place as EbpfPlace},
        nftables::Nftables,
    },
    model::{Change, DetectLocal, Family, NodePortSetting, PerFamily, Settings},
};
use weir_tests::{
    agent::Agent,
    node::{CLUSTER_CIDRS, Location, Topology, node_name},
    objects::{Addresses, Endpoint, PORT, Shape, Slice, node, pod, service, service_cidr, slice},
    runner::serve,
    traffic::{Call, Load, Tally, Transport},
};

const WEB: Addresses = Addresses::new(1).named("web");
/// Services with slots and sets that change next to those of the one under test.
const NEIGHBOURS: [Addresses; 2] = [Addresses::new(2), Addresses::new(3)];
/// How long each data plane is put to the test.
const DURATION: Duration = Duration::from_secs(8);
/// The clients need the processors as well.
const PAUSE: Duration = Duration::from_micros(500);

/// A Service by its endpoints and by the port they serve, which is another for each set.
fn shape(target: u16, endpoints: Vec<Endpoint>) -> Shape {
    let slice = Slice { ports: vec![("stream", Transport::Tcp, target)], ..slice(endpoints) };
    service([]).ports(&[("stream", Transport::Tcp, PORT)]).slices([slice])
}

/// The two sets of the Service, of different sizes, and those of a neighbour, none of which may ever show.
fn sets() -> [[Shape; 2]; 2] {
    let few = || vec![pod(1, 1), pod(2, 1)];
    let many = || vec![pod(1, 1), pod(1, 2), pod(2, 1), pod(2, 2)];
    [[shape(8080, few()), shape(8081, many())], [shape(8082, many()), shape(9999, few())]]
}

fn backends() -> BTreeSet<String> {
    let [sets, _] = sets();
    let slices = sets.iter().flat_map(|shape| &shape.slices);
    slices
        .flat_map(|slice| {
            let port = slice.ports[0].2;
            slice.endpoints.iter().map(move |endpoint| format!("{}:{port}", endpoint.location))
        })
        .collect()
}

fn settings() -> Result<Settings> {
    let networks = CLUSTER_CIDRS.iter().map(|cidr| cidr.parse()).collect::<Result<_, _>>()?;
    Ok(Settings {
        node_name: node_name(1),
        detect_local: DetectLocal::ClusterCidr(networks),
        node_port_addresses: NodePortSetting::ALL,
        ..Settings::default()
    })
}

fn publish<D: Dataplane>(agent: &mut Agent<D>, addresses: Addresses, shape: &Shape) {
    shape.objects(addresses).into_iter().for_each(|object| agent.take_in(Change::Apply(object)));
}

fn begin<D: Dataplane>(plane: D) -> Result<Agent<D>> {
    let mut agent = Agent::new(settings()?, plane);
    agent.take_in(Change::Apply(node(1)));
    agent.take_in(Change::Apply(service_cidr()));
    let [[web, _], [neighbour, _]] = sets();
    publish(&mut agent, WEB, &web);
    NEIGHBOURS.iter().for_each(|addresses| publish(&mut agent, *addresses, &neighbour));
    agent.bring_up_to_date()?;
    Ok(agent)
}

/// Goes from one set to the other and back until `stop`; returns how often.
fn flip<D: Dataplane>(agent: &mut Agent<D>, stop: &AtomicBool) -> Result<u64> {
    let [web, neighbour] = sets();
    for flips in 1.. {
        if stop.load(Ordering::Relaxed) {
            return Ok(flips - 1);
        }
        let next = usize::from(flips % 2 == 1);
        publish(agent, WEB, &web[next]);
        publish(agent, NEIGHBOURS[next], &neighbour[usize::from(flips % 4 > 1)]);
        agent.bring_up_to_date().with_context(|| format!("change {flips}"))?;
        thread::sleep(PAUSE);
    }
    Ok(0)
}

fn loads(topology: &Topology) -> Result<Vec<(String, Load)>> {
    let mut loads = Vec::new();
    for family in Family::ALL {
        for from in [Location::Pod(1, 1), Location::Pod(1, 2), Location::Host(1)] {
            let to = SocketAddr::new(WEB.cluster_ip(family), PORT);
            // A busy machine may answer late; what is asked here is whether it answers at all.
            let call = Call { patience: Duration::from_secs(5), ..Call::new(from, to, Transport::Tcp) };
            loads.push((format!("{from} to {to}"), Load::start(topology.at(from), call, Duration::ZERO)?));
        }
    }
    Ok(loads)
}

#[expect(clippy::print_stdout, reason = "test output")]
fn goes_to_old_or_new<D: Dataplane + 'static>(
    open: impl FnOnce(&Topology) -> Result<D> + Send,
) -> Result<()> {
    let topology = Topology::new()?;
    let _servers = serve(&topology)?;
    let on_node = topology.at(Location::Host(1));
    let mut agent = on_node.run(|| begin(open(&topology)?))?;
    let stop = Arc::new(AtomicBool::new(false));
    let loads = loads(&topology)?;
    let start = Instant::now();
    let flips = thread::scope(|scope| {
        let flipping = scope.spawn(|| on_node.run(|| flip(&mut agent, &stop)));
        thread::sleep(DURATION);
        stop.store(true, Ordering::Relaxed);
        flipping.join().map_err(|_| anyhow!("the agent died"))?
    })?;
    let stop = |(label, load): (String, Load)| Ok((label, load.stop()?));
    let tallies: Vec<(String, Tally)> = loads.into_iter().map(stop).collect::<Result<_>>()?;
    let connects: u64 = tallies.iter().map(|(_, tally)| tally.answered()).sum();
    let rate = connects as f64 / start.elapsed().as_secs_f64() / 1000.0;
    println!("{connects} connects, {rate:.1} in a millisecond, over {flips} changes");
    for (label, tally) in tallies {
        ensure!(tally.failures.is_empty(), "{label}: {tally:?}");
        let seen: BTreeSet<String> = tally.answers.into_keys().collect();
        ensure!(seen == backends(), "{label}: expected each of {:?}, got {seen:?}", backends());
    }
    ensure!(flips > 100, "only {flips} changes");
    Ok(())
}

fn families() -> PerFamily<bool> {
    PerFamily { v4: true, v6: true }
}

#[test]
fn packets_go_to_old_or_new_backends() -> Result<()> {
    goes_to_old_or_new(|_| Ok(Nftables::open(families())?))
}

#[test]
fn sockets_go_to_old_or_new_backends() -> Result<()> {
    goes_to_old_or_new(|topology| {
        let location =
            EbpfPlace { bpf_root: topology.bpf_root(1)?, cgroup_root: topology.cgroup_root(1).to_owned() };
        Ok(Stack::new(Nftables::open(families())?, Ebpf::open(location, true)?))
    })
}
