//! Where traffic goes and which address the backend sees: R2, R3, R5 to R7, R9 to R11, R13 to R15.

use super::*;
use crate::{
    objects::{ServiceType, Slice, pod, service, slice},
    subject::Detector,
};

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let detector = |detector| Settings { detector, ..Settings::default() };
    for (label, settings) in [
        ("by cluster CIDR", detector(Detector::ClusterCidr)),
        ("by node CIDR", detector(Detector::NodeCidr)),
        ("by interface", detector(Detector::InterfacePrefix)),
        ("masqueradeAll", Settings { masquerade_all: true, ..Settings::default() }),
    ] {
        let pods_see = if settings.masquerade_all { Masqueraded } else { Kept };
        cases.extend(detected(label, pods_see).map(|case| case.with(&settings)));
    }
    cases.extend(undetected().map(|case| case.with(&detector(Detector::None))));
    for kind in [Detector::NodeCidr, Detector::InterfacePrefix] {
        cases.push(other_nodes_pods().with(&detector(kind)));
    }
    cases.extend(special());
    cases.extend(node_port_addresses());
    cases
}

/// The matrix where pods are recognised.
fn detected(label: &str, pods_see: Source) -> [Case; 4] {
    let both = [POD11, POD21];
    let shape = || service([pod(1, 1), pod(2, 1)]).everywhere();
    let name = |text: &str| format!("{text} ({label})");
    [
        case("R2 R7", name("ClusterIP with internal policy Cluster"), shape())
            .check(POD12, CLUSTER, by(&both, pods_see))
            .check(POD22, CLUSTER, by(&both, pods_see))
            .checks(&[HOST, OUTSIDE], &[CLUSTER], &by(&both, Masqueraded)),
        case("R2 R7 E7", name("ClusterIP with internal policy Local"), shape().internal_local())
            .check(POD12, CLUSTER, by(&[POD11], pods_see))
            .check(POD22, CLUSTER, by(&[POD21], pods_see))
            .checks(&[HOST, OUTSIDE], &[CLUSTER], &by(&[POD11], Masqueraded)),
        case(
            "R3 R5 R10 R13",
            name("external destinations with external policy Cluster"),
            shape().internal_local(),
        )
        .checks(&[POD12, HOST, OUTSIDE], &EXTERNALS, &by(&both, Masqueraded)),
        case(
            "R3 R6 R10 E7",
            name("external destinations with external policy Local"),
            shape().external_local(),
        )
        .checks(&[POD12], &EXTERNALS, &by(&both, Kept))
        .checks(&[HOST], &EXTERNALS, &by(&both, Masqueraded))
        .checks(&[OUTSIDE], &EXTERNALS, &by(&[POD11], Kept)),
    ]
}

/// The matrix where pods are not recognised. Traffic from outside keeps its source, so only local backends can reply.
fn undetected() -> [Case; 3] {
    let shape = || service([pod(1, 1), pod(2, 1)]).everywhere();
    let both = [POD11, POD21];
    [
        case("R7", "no detector: sources are kept on the way to a ClusterIP", shape())
            .checks(&[POD12, HOST], &[CLUSTER], &by(&both, Kept))
            .checks(&[POD12, HOST, OUTSIDE], &EXTERNALS, &by(&both, Masqueraded)),
        case(
            "R7",
            "no detector: the internal policy Local changes nothing about that",
            shape().internal_local(),
        )
        .checks(&[POD12, HOST, OUTSIDE], &[CLUSTER], &by(&[POD11], Kept)),
        case("R6", "no detector: pods get local endpoints like all other clients", shape().external_local())
            .checks(&[POD12, OUTSIDE], &EXTERNALS, &by(&[POD11], Kept))
            .checks(&[HOST], &EXTERNALS, &by(&both, Masqueraded)),
    ]
}

/// Only detectors that recognise this node's pods see a difference between pods.
fn other_nodes_pods() -> Case {
    let shape = service([pod(1, 1), pod(2, 1)]).everywhere().external_local();
    case("R6", "pods of other nodes are outside where the detector knows this node's only", shape).check(
        POD22,
        NODE_PORT,
        by(&[POD11], Kept),
    )
}

/// At a port that no other case has as an endpoint: endpoints of all Services may be their own clients.
fn itself_unplaced() -> Case {
    const OWN: u16 = 8082;
    let own = |source| Expect::Served(vec![(POD12, OWN)], source);
    let ports = vec![("stream", Transport::Tcp, OWN), ("datagram", Transport::Udp, OWN)];
    let slice = Slice { ports, ..slice([pod(1, 2).unplaced()]) };
    case(
        "R9",
        "a pod reaches itself though its slice names no node",
        service([]).everywhere().slices([slice]),
    )
    // An unconnected socket receives what IPv6 lets a pod send to itself, from another address than the one it asked.
    .over(&[Transport::Tcp, Transport::Udp])
    .check(POD12, CLUSTER, Expect::Dropped.unless(Difference::Unplaced, &own(Masqueraded)))
    .checks(&[POD12], &EXTERNALS, &own(Masqueraded))
    .check(POD11, CLUSTER, own(Kept))
}

fn special() -> Vec<Case> {
    let alone = || service([pod(1, 1)]).everywhere();
    vec![
        case("R9", "a pod that reaches itself sees the node as its client", alone())
            .checks(&[POD11], &[CLUSTER, NODE_PORT, EXTERNAL, BALANCER], &by(&[POD11], Masqueraded))
            .check(POD12, CLUSTER, by(&[POD11], Kept)),
        itself_unplaced(),
        case(
            "R9",
            "a pod that reaches itself under both policies Local",
            alone().internal_local().external_local(),
        )
        .checks(&[POD11], &[CLUSTER, NODE_PORT, EXTERNAL, BALANCER], &by(&[POD11], Masqueraded)),
        case("R11", "a load balancer's address with ipMode VIP is captured", {
            let mut shape = alone();
            shape.balancer = Some(Some("VIP"));
            shape
        })
        .checks(&[POD12, OUTSIDE], &[BALANCER], &by(&[POD11], Masqueraded)),
        // The router answers on every balancer address: the case sees that the packet went out to it.
        case("R11", "a load balancer's address with ipMode Proxy is not captured", {
            let mut shape = alone().ports(&[("stream", Transport::Tcp, 9999)]);
            shape.balancer = Some(Some("Proxy"));
            shape
        })
        .over(&[Transport::Tcp])
        .checks(&[POD12, HOST], &[BALANCER.port(9999)], &router())
        .checks(&[POD12, HOST, OUTSIDE], &[EXTERNAL.port(9999)], &any(&[POD11])),
        case(
            "R10",
            "an external address works for a Service of type ClusterIP",
            service([pod(2, 1)]).external(),
        )
        .checks(&[POD12, HOST, OUTSIDE], &[EXTERNAL], &by(&[POD21], Masqueraded)),
        case(
            "R3",
            "backends in the host's network",
            service([crate::objects::at(Location::Host(2))]).everywhere(),
        )
        .checks(
            &[POD12, OUTSIDE],
            &[CLUSTER, NODE_PORT, EXTERNAL, BALANCER],
            &any(&[Location::Host(2)]),
        ),
    ]
}

pub(super) fn router() -> Expect {
    Expect::Served(vec![(Location::Router, 9999)], Source::Any)
}

fn node_port_addresses() -> Vec<Case> {
    let on = |address| Target { address, port: PORT };
    let shape = || service([pod(1, 1)]).of(ServiceType::NodePort);
    let settings = |addresses: &[&str]| Settings {
        node_port_addresses: addresses.iter().map(|&address| address.to_owned()).collect(),
        ..Settings::default()
    };
    let [first, second, loopback] = [Address::Node(1), Address::SecondNode(1), Address::Loopback].map(on);
    let on_loopback = settings(&["192.168.77.20/30", "fd00:192:168:77::20/126", "127.0.0.0/8", "::1/128"]);
    let refused = Expect::Refused;
    let served = any(&[POD11]);
    vec![
        case(
            "R13 R15 F6",
            "NodePorts answer on the node's primary address only, unless told otherwise",
            shape(),
        )
        .checks(&[POD12, HOST, OUTSIDE], &[first], &served)
        .checks(&[POD12, HOST, OUTSIDE], &[second], &refused.unless(Difference::EveryAddress, &served))
        .check(HOST, loopback, refused.unless(Difference::Loopback, &served))
        .check(POD12, loopback, refused.clone()),
        case("R13 R14", "NodePorts answer on addresses inside the given networks", shape())
            .with(&settings(&["192.168.77.20/30", "fd00:192:168:77::20/126"]))
            .checks(&[POD12, HOST, OUTSIDE], &[second], &served)
            .checks(&[POD12, HOST, OUTSIDE], &[first], &refused)
            .checks(&[POD12, HOST], &[loopback], &refused),
        case("R13", "NodePorts answer on every address but loopback ones if the network is zero", shape())
            .with(&settings(&["0.0.0.0/0", "::/0"]))
            .checks(&[POD12, HOST, OUTSIDE], &[first, second], &served)
            .check(HOST, loopback, refused.unless(Difference::Loopback, &served))
            .check(POD12, loopback, refused.clone()),
        case(
            "R18",
            "NodePorts answer the node's processes on loopback addresses if these are asked for",
            shape(),
        )
        .with(&on_loopback)
        .checks(&[POD12, HOST, OUTSIDE], &[second], &served)
        .check(HOST, loopback, refused.unless(Difference::AskedLoopback, &served))
        .checks(&[POD12], &[loopback], &refused)
        .checks(&[POD12, HOST, OUTSIDE], &[first], &refused)
        .then(service([pod(2, 1)]).of(ServiceType::NodePort))
        .check(HOST, loopback, refused.unless(Difference::AskedLoopback, &any(&[POD21])))
        .then(service([]).of(ServiceType::NodePort))
        .check(HOST, loopback, refused.clone()),
        case(
            "R18 R6",
            "NodePorts on loopback addresses serve the node itself whatever its policy",
            shape().external_local(),
        )
        .with(&on_loopback)
        .check(HOST, loopback, refused.unless(Difference::AskedLoopback, &served))
        .then(service([pod(2, 1)]).of(ServiceType::NodePort).external_local())
        .check(HOST, loopback, refused.unless(Difference::AskedLoopback, &any(&[POD21]))),
        case("R14", "networks of one family only leave the other open", shape())
            .with(&settings(&["192.168.77.20/30"]))
            .only(Family::V6)
            .checks(&[POD12, HOST, OUTSIDE], &[first, second], &served)
            .check(HOST, loopback, refused.unless(Difference::Loopback, &served)),
    ]
}
