//! Clients that do more with their sockets than to connect and to ask, and other sockets that may have a
//! Service's address or its NodePort.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{self, ErrorKind},
    net::{SocketAddr, TcpListener, UdpSocket},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use nix::sched::{CloneFlags, setns};

use super::*;
use crate::{
    objects::{Slice, pod, service, slice},
    traffic::{Call, Datagrams, Flow, Outcome, PATIENCE, ask, bound},
    wait::await_that,
};

const INSIDE: [Location; 2] = [POD12, HOST];
const EVERYWHERE: [Target; 4] = [CLUSTER, NODE_PORT, EXTERNAL, BALANCER];

pub(super) fn cases() -> Vec<Case> {
    let four = || [pod(1, 1), pod(1, 2), pod(2, 1), pod(2, 2)];
    let datagram = [Transport::Datagram];
    let streams_and_datagrams = [Transport::Tcp, Transport::Udp];
    vec![
        case("R1", "IPv6 sockets reach IPv4 Services by mapped addresses", service([pod(1, 1)]).everywhere())
            .only(Family::V4)
            .step(Step::Run("ask by mapped addresses", mapped)),
        case("R1 R4", "an unconnected socket stays with one backend", service(four()).everywhere())
            .over(&datagram)
            .step(Step::Run("ask twenty times on each of several sockets", stay)),
        case("R1", "an unconnected socket speaks to several Services at a time", several())
            .over(&datagram)
            .step(Step::Run("ask all, then read all answers", at_a_time))
            .step(Step::Run("ask every address of a Service in turn", in_turn)),
        case(
            "R3",
            "any process may have the number of a NodePort",
            service([pod(1, 1)]).of(ServiceType::NodePort),
        )
        .over(&streams_and_datagrams)
        .step(Step::Run("bind addresses with the NodePort's number", binds))
        .check(HOST, NODE_PORT, any(&[POD11])),
        case("R3", "an answer goes to its client, whatever the number of the client's port", {
            service([pod(2, 1)]).of(ServiceType::NodePort)
        })
        .over(&datagram)
        .step(Step::Run("ask a pod from a port with the NodePort's number", answered_on_node_port)),
        // Nothing leaves the node with such a source, so no plane can serve it, and nothing listens there.
        case("R13", "a process bound to a loopback address is refused a NodePort there", {
            service([pod(1, 1), pod(2, 1)]).of(ServiceType::NodePort)
        })
        .step(Step::Run("ask from a loopback address", from_loopback)),
        // A packet to an address of its own does not leave a pod.
        case("R1", "a pod that listens on a Service's address speaks to itself", service([pod(1, 1)]))
            .over(&streams_and_datagrams)
            .step(Step::Run("give the pod the address", |run| own_address(run, true)))
            .step(Step::Run("listen there and ask", speaks_to_itself))
            .check(POD21, CLUSTER, any(&[POD11]))
            .step(Step::Run("take the address away", |run| own_address(run, false)))
            .check(POD22, CLUSTER, any(&[POD11])),
    ]
}

fn mapped(run: &CaseRun<'_>) -> Result<()> {
    let map = |address: IpAddr| match address {
        IpAddr::V4(address) => IpAddr::V6(address.to_ipv6_mapped()),
        IpAddr::V6(_) => address,
    };
    for (from, to) in INSIDE.into_iter().flat_map(|from| EVERYWHERE.map(|to| (from, to))) {
        let call = run.call(from, to);
        let to = SocketAddr::new(map(call.to.ip()), call.to.port());
        let call = Call { from: map(call.from), to, ..call };
        // The flow itself sees to it that its peer has the mapped address of the Service.
        let outcome = run.namespace(from).run(|| ask(&call));
        let served = matches!(&outcome, Outcome::Answer(answer) if answer.backend == "pod-1-1:8080");
        ensure!(served, "{from} to {to}: {outcome}");
    }
    Ok(())
}

fn stay(run: &CaseRun<'_>) -> Result<()> {
    let mut backends = BTreeSet::new();
    for (from, to) in [POD12, HOST, OUTSIDE].into_iter().flat_map(|from| EVERYWHERE.map(|to| (from, to))) {
        let (flow, first) = run.flow(from, to)?;
        for number in 2..=20 {
            let outcome = flow.ask(PATIENCE);
            let same = matches!(&outcome, Outcome::Answer(answer) if answer.backend == first.backend);
            ensure!(same, "{from} to {to:?}: {} first, and for datagram {number}: {outcome}", first.backend);
        }
        backends.insert(first.backend);
    }
    // Twelve sockets have one backend in common once in 4¹¹ times.
    ensure!(backends.len() > 1, "all sockets have {backends:?}");
    Ok(())
}

/// Ports that are each served by one pod, so that the answer shows the port.
fn several() -> Shape {
    let ports = [("first", 80, POD11), ("second", 81, POD12), ("third", 82, POD21)];
    let slices = ports.map(|(name, _, location)| Slice {
        ports: vec![(name, Transport::Udp, TARGET)],
        ..slice([crate::objects::at(location)])
    });
    service([]).everywhere().ports(&ports.map(|(name, port, _)| (name, Transport::Udp, port))).slices(slices)
}

const PORTS: [(u16, Location); 3] = [(80, POD11), (81, POD12), (82, POD21)];

fn at_a_time(run: &CaseRun<'_>) -> Result<()> {
    for from in [POD22, HOST] {
        for to in EVERYWHERE {
            let socket = run.datagrams(from, to)?;
            let targets =
                PORTS.map(|(port, location)| (run.address(to.port(port)), format!("{location}:{TARGET}")));
            for _ in 0..3 {
                for (target, _) in &targets {
                    socket.ask(*target)?;
                }
                let answers: BTreeMap<SocketAddr, String> =
                    (0..targets.len()).map(|_| next(&socket)).collect::<Result<_>>()?;
                ensure!(answers == targets.clone().into(), "{from}: expected {targets:?}, got {answers:?}");
            }
        }
    }
    Ok(())
}

fn next(socket: &Datagrams) -> Result<(SocketAddr, String)> {
    let (from, answer) = socket.next().context("an answer is missing")?;
    Ok((from, answer.backend))
}

/// The same backend behind every address: the sender of an answer is the address that was asked last.
fn in_turn(run: &CaseRun<'_>) -> Result<()> {
    for from in [POD22, HOST] {
        let socket = run.datagrams(from, CLUSTER)?;
        for to in [EVERYWHERE, EVERYWHERE].concat() {
            let to = run.address(to);
            socket.ask(to)?;
            let answer = next(&socket)?;
            ensure!(answer == (to, format!("{POD11}:{TARGET}")), "{from} asked {to} and heard {answer:?}");
        }
    }
    Ok(())
}

/// Binds in the host's namespace and in a pod's, to the number of a NodePort and to another one.
fn binds(run: &CaseRun<'_>) -> Result<()> {
    let node_port = run.address(NODE_PORT);
    let other = run.address(NODE_PORT.port(PORT + 5)).port();
    let loopback = run.address(Target { address: Address::Loopback, port: PORT }).ip();
    let any = match loopback {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    for (location, address, port) in [
        (HOST, any, node_port.port()),
        (HOST, loopback, node_port.port()),
        (HOST, node_port.ip(), node_port.port()),
        (HOST, any, other),
        (POD12, any, node_port.port()),
    ] {
        let at = SocketAddr::new(address, port);
        let outcome = run.namespace(location).run(|| bound(run.transport(), at)).map(drop);
        ensure!(outcome.is_ok(), "{location} binds {at} by {}: {outcome:?}", run.transport());
    }
    Ok(())
}

fn from_loopback(run: &CaseRun<'_>) -> Result<()> {
    let call = run.call(HOST, Target { address: Address::Loopback, port: NODE_PORT.port });
    let call = Call { from: call.to.ip(), ..call };
    let outcome = run.namespace(HOST).run(|| ask(&call));
    ensure!(outcome == Outcome::Refused, "{} to {} by {}: {outcome}", call.from, call.to, run.transport());
    Ok(())
}

/// Masquerading gives clients from outside such ports by chance; here it is a process that no group keeps from them.
fn answered_on_node_port(run: &CaseRun<'_>) -> Result<()> {
    let node_port = run.address(NODE_PORT);
    let pod = SocketAddr::new(POD11.server_address(Family::of(node_port.ip())), TARGET);
    let network = File::open(run.namespace(HOST).path())?;
    let outside_groups = || {
        setns(network, CloneFlags::CLONE_NEWNET)?;
        let socket = UdpSocket::from(bound(Transport::Udp, node_port)?);
        socket.set_nonblocking(false)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.send_to(b"who\n", pod)?;
        let from = socket.recv_from(&mut [0; 512]).context("no answer")?.1;
        ensure!(from == pod, "{from} answered, not {pod}");
        Ok(())
    };
    thread::scope(|scope| scope.spawn(outside_groups).join()).map_err(|_| anyhow!("the client died"))?
}

/// Gives the pod the Service's address, or takes it away; the scenes of both transports share it.
fn own_address(run: &CaseRun<'_>, own: bool) -> Result<()> {
    if run.transport() == Transport::Tcp {
        let (address, pod) = (run.address(CLUSTER).ip(), run.namespace(POD22));
        let at_once = if address.is_ipv6() { "nodad" } else { "" };
        let act = if own { "replace" } else { "del" };
        pod.ip(&[format!("addr {act} {address} dev lo {at_once}")])?;
        // The kernel makes the route of an IPv6 address a moment after the address: until then it is spoken to outside.
        let is_own =
            || pod.stdout("ip", &["route", "get", &address.to_string()]).map(|to| to.contains("local "));
        await_that("the pod has the route to its address", || is_own().is_ok_and(|is| is == own));
    }
    Ok(())
}

fn speaks_to_itself(run: &CaseRun<'_>) -> Result<()> {
    let call = Call { patience: Duration::from_secs(2), ..run.call(POD22, CLUSTER) };
    run.namespace(POD22).run(|| match call.transport {
        Transport::Tcp => {
            let listener = bound(call.transport, call.to)?;
            listener.listen(1)?;
            let listener = TcpListener::from(listener);
            let _flow = Flow::connect(&call)?;
            heard(call.from, || Ok(listener.accept()?.1))
        }
        _ => {
            let server = UdpSocket::from(bound(call.transport, call.to)?);
            for transport in [Transport::Udp, Transport::Datagram] {
                let flow = Flow::connect(&Call { transport, ..call })?;
                // No answer is expected: the test is which address was asked.
                let unanswered = flow.ask(Duration::from_millis(1));
                ensure!(unanswered == Outcome::Timeout, "{transport}: {unanswered}");
                heard(call.from, || Ok(server.recv_from(&mut [0; 64])?.1))?;
            }
            Ok(())
        }
    })
}

/// Checks the sender of the datagram sent before. It has arrived, because within a namespace nothing takes
/// time.
fn heard(from: IpAddr, hear: impl FnOnce() -> io::Result<SocketAddr>) -> Result<()> {
    match hear() {
        Ok(client) => ensure!(client.ip() == from, "{client} was heard, not {from}"),
        Err(error) if error.kind() == ErrorKind::WouldBlock => bail!("no datagram came"),
        Err(error) => return Err(error.into()),
    }
    Ok(())
}
