//! Which flows are stale after which changes (K2 to K7).

use std::{collections::BTreeSet, net::SocketAddr, sync::Arc};

use ipnet::IpNet;

use super::{AnnouncedPorts, Flow, Suspects};
use crate::{
    model::{Family, ObjectName, PerFamily, Protocol},
    plan::{
        Backend, Destination, Frontend, FrontendPlan, NodePlan, NodePortAddresses, PortDelta, PortId,
        PortPlan, Removal, Route, Target, Treatment,
    },
};

const CLUSTER: Target = Target::Cluster;

fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// `address:port`, or `node4:port` and `node6:port` for a NodePort.
fn frontend(text: &str, protocol: Protocol) -> Frontend {
    let node = |port: &str, family| Frontend {
        destination: Destination::NodePort(family),
        protocol,
        port: port.parse().unwrap(),
    };
    if let Some(port) = text.strip_prefix("node4:") {
        return node(port, Family::V4);
    }
    if let Some(port) = text.strip_prefix("node6:") {
        return node(port, Family::V6);
    }
    let address = at(text);
    Frontend { destination: Destination::Address(address.ip()), protocol, port: address.port() }
}

fn plan(protocol: Protocol, frontends: &[(&str, Target)], serving: &[&str]) -> Arc<PortPlan> {
    let mut frontends: Vec<_> = frontends
        .iter()
        .map(|(text, target)| FrontendPlan {
            frontend: frontend(text, protocol),
            route: Route::uniform(Treatment { target: *target, masquerade: false }),
            allowed_sources: None,
            answered_here: false,
        })
        .collect();
    frontends.sort_by_key(|planned| planned.frontend);
    let mut serving: Vec<_> = serving
        .iter()
        .map(|text| Backend { address: at(text).ip(), port: at(text).port(), local: false })
        .collect();
    serving.sort();
    Arc::new(PortPlan {
        id: PortId {
            service: ObjectName::new("default", "dns"),
            port: "dns".into(),
            protocol,
            family: frontends.first().map_or(Family::V4, |plan| plan.frontend.destination.family()),
        },
        cluster: serving.clone(),
        local: Vec::new(),
        frontends,
        affinity: None,
        on_removal: Removal::Keep,
        serving,
    })
}

fn udp(frontends: &[&str], serving: &[&str]) -> Option<Arc<PortPlan>> {
    let frontends: Vec<_> = frontends.iter().map(|text| (*text, CLUSTER)).collect();
    Some(plan(Protocol::Udp, &frontends, serving))
}

/// The node of the flows below.
fn node() -> Arc<NodePlan> {
    let addresses = ["192.0.2.4", "192.0.2.5", "2001:db8::99"];
    Arc::new(NodePlan {
        local_traffic: PerFamily::default(),
        node_port_addresses: PerFamily { v4: NodePortAddresses::AnyLocal, v6: NodePortAddresses::AnyLocal },
        loopback_node_ports: PerFamily::default(),
        host_addresses: addresses.map(|address| address.parse().unwrap()).to_vec(),
        masquerade_mark: 0x4000,
        service_cidrs: Vec::new(),
        answers_names: false,
        name_clients: None,
        drops_out_of_window: true,
    })
}

fn of(ports: &[PortDelta]) -> Suspects {
    Suspects::of(ports).on(Some(&node()), |_| false)
}

fn picked(before: Option<Arc<PortPlan>>, after: Option<Arc<PortPlan>>) -> Vec<String> {
    let suspects = of(&[PortDelta { before, after }]);
    let mut names: Vec<_> = suspects.frontends().map(ToString::to_string).collect();
    names.sort();
    names
}

fn stale(suspects: &Suspects, destination: &str, answers: &str) -> bool {
    stale_of("10.1.7.7", suspects, destination, answers)
}

fn stale_of(client: &str, suspects: &Suspects, destination: &str, answers: &str) -> bool {
    let client = client.parse().unwrap();
    suspects.is_stale(Flow { client, destination: at(destination), answers: at(answers) })
}

/// The same port with source ranges.
fn only_from(networks: &[&str], port: Option<Arc<PortPlan>>) -> Option<Arc<PortPlan>> {
    let mut port = PortPlan::clone(&port.unwrap());
    let networks: Vec<IpNet> = networks.iter().map(|network| network.parse().unwrap()).collect();
    for planned in &mut port.frontends {
        planned.allowed_sources = Some(networks.clone().into());
    }
    Some(Arc::new(port))
}

const A: &str = "10.1.0.1:53";
const B: &str = "10.1.0.2:53";
const VIP: &str = "10.96.0.10:53";
const NODE: &str = "node4:30053";

#[test]
fn a_port_that_lost_a_serving_endpoint_has_all_its_frontends_checked_k2_k3() {
    let before = udp(&[VIP, NODE], &[A, B]);
    assert_eq!(picked(before, udp(&[VIP, NODE], &[B])), ["10.96.0.10:53/UDP", "node:30053/UDP"]);
}

#[test]
fn a_changed_target_port_counts_as_a_lost_endpoint() {
    assert_eq!(picked(udp(&[VIP], &[A]), udp(&[VIP], &["10.1.0.1:54"])), ["10.96.0.10:53/UDP"]);
}

#[test]
fn joining_endpoints_and_unchanged_ports_make_no_flow_stale() {
    assert!(picked(udp(&[VIP], &[A]), udp(&[VIP], &[A, B])).is_empty());
    assert!(picked(udp(&[VIP], &[A]), udp(&[VIP], &[A])).is_empty());
}

#[test]
fn a_port_that_lost_its_last_endpoint_has_all_its_frontends_checked_k7() {
    let none = || udp(&[VIP, NODE], &[]);
    assert_eq!(picked(udp(&[VIP, NODE], &[A]), none()), ["10.96.0.10:53/UDP", "node:30053/UDP"]);
    // The agent may have started after the endpoint left.
    assert_eq!(picked(None, none()), ["10.96.0.10:53/UDP", "node:30053/UDP"]);
    assert!(picked(none(), udp(&[VIP, NODE], &[])).is_empty(), "nothing changed for flows");
    let suspects = of(&[PortDelta { before: None, after: none() }]);
    assert!(stale(&suspects, VIP, A) && stale(&suspects, "192.0.2.4:30053", A));
    assert!(stale(&suspects, VIP, VIP), "an untranslated flow is stale too");
}

#[test]
fn with_a_port_its_own_flows_become_stale_and_no_others_k6() {
    let before = || udp(&[VIP, "203.0.113.7:53", NODE], &[A, B]);
    assert_eq!(picked(before(), None), ["10.96.0.10:53/UDP", "203.0.113.7:53/UDP", "node:30053/UDP"]);
    let suspects = of(&[PortDelta { before: before(), after: None }]);
    for to in [VIP, "203.0.113.7:53", "192.0.2.4:30053"] {
        assert!(stale(&suspects, to, A) && stale(&suspects, to, B), "{to}");
        assert!(!stale(&suspects, to, to), "a process that listens at {to} itself");
        assert!(!stale(&suspects, to, "10.1.0.9:53"), "another program translated {to}");
    }
}

#[test]
fn an_address_that_another_service_takes_over_keeps_only_that_services_flows_k6() {
    let gone = || PortDelta { before: udp(&[VIP], &[A]), after: None };
    let come = |before, serving: &[&str]| {
        let mut plan = PortPlan::clone(&plan(Protocol::Udp, &[(VIP, CLUSTER)], serving));
        plan.id.service = ObjectName::new("default", "other");
        PortDelta { before, after: Some(Arc::new(plan)) }
    };
    // In one change, in either order, and in two changes that are checked together.
    let mut apart = of(&[gone()]);
    apart.extend(of(&[come(None, &[B])]));
    for suspects in [of(&[gone(), come(None, &[B])]), of(&[come(None, &[B]), gone()]), apart] {
        assert!(stale(&suspects, VIP, A) && stale(&suspects, VIP, VIP));
        assert!(!stale(&suspects, VIP, B));
    }
}

#[test]
fn endpoints_lost_before_the_deletion_of_their_service_stay_suspect() {
    let mut suspects = of(&[PortDelta { before: udp(&[VIP], &[A, B]), after: udp(&[VIP], &[B]) }]);
    suspects.extend(of(&[PortDelta { before: udp(&[VIP], &[B]), after: None }]));
    assert!(stale(&suspects, VIP, A) && stale(&suspects, VIP, B));
    assert!(!stale(&suspects, VIP, VIP));
}

#[test]
fn flows_to_an_endpoint_that_joined_before_the_sweep_stay() {
    let mut suspects = of(&[PortDelta { before: udp(&[VIP], &[A, B]), after: udp(&[VIP], &[B]) }]);
    let joined = "10.1.0.3:53";
    suspects.extend(of(&[PortDelta { before: udp(&[VIP], &[B]), after: udp(&[VIP], &[B, joined]) }]));
    assert!(stale(&suspects, VIP, A));
    assert!(!stale(&suspects, VIP, B) && !stale(&suspects, VIP, joined));
}

#[test]
fn new_ports_and_ports_that_had_no_endpoint_are_checked() {
    assert_eq!(picked(None, udp(&[VIP], &[A])), ["10.96.0.10:53/UDP"]);
    assert_eq!(picked(udp(&[VIP], &[]), udp(&[VIP], &[A])), ["10.96.0.10:53/UDP"]);
}

#[test]
fn of_other_ports_only_a_frontend_that_gets_backends_is_checked() {
    assert_eq!(picked(udp(&[VIP], &[A]), udp(&[VIP, NODE], &[A])), ["node:30053/UDP"]);
    let dropped = plan(Protocol::Udp, &[(VIP, CLUSTER), (NODE, Target::Drop)], &[A]);
    assert_eq!(picked(Some(dropped), udp(&[VIP, NODE], &[A])), ["node:30053/UDP"]);
}

#[test]
fn a_frontend_without_backends_is_checked_only_when_an_endpoint_was_lost() {
    let after = |serving| plan(Protocol::Udp, &[(VIP, CLUSTER), (NODE, Target::Drop)], serving);
    assert!(picked(udp(&[VIP, NODE], &[A]), Some(after(&[A]))).is_empty());
    assert_eq!(
        picked(udp(&[VIP, NODE], &[A, B]), Some(after(&[A]))),
        ["10.96.0.10:53/UDP", "node:30053/UDP"]
    );
}

#[test]
fn tcp_and_sctp_are_never_touched_k4() {
    for protocol in [Protocol::Tcp, Protocol::Sctp] {
        let before = plan(protocol, &[(VIP, CLUSTER)], &[A, B]);
        assert!(picked(Some(Arc::clone(&before)), Some(plan(protocol, &[(VIP, CLUSTER)], &[A]))).is_empty());
        assert!(picked(Some(before), None).is_empty());
    }
}

#[test]
fn later_suspects_win_over_earlier_ones() {
    let of = |after| of(&[PortDelta { before: None, after }]);
    let mut suspects = of(udp(&[VIP], &[A]));
    suspects.extend(of(udp(&[VIP], &[B])));
    assert_eq!(suspects.len(), 1);
    assert!(stale(&suspects, VIP, A));
    assert!(!stale(&suspects, VIP, B));
}

/// Destination and source of answers of each flow. Every address of the plans below has flows to serving and to removed
/// backends, untranslated flows, and flows to a wrong port or to another Service's backend.
#[test]
fn flows_to_backends_that_do_not_serve_are_stale_and_no_others_k2_k3_r1() {
    let suspects = of(&[
        PortDelta {
            before: None,
            after: udp(&[VIP, "203.0.113.7:53", "198.51.100.9:5353", NODE], &[A, "10.1.0.2:5300"]),
        },
        PortDelta {
            before: None,
            after: udp(&["[fd00::10]:53", "[2001:db8::7]:53", "node6:30053"], &["[fd01::1]:53"]),
        },
        // A ClusterIP on a port that is another Service's NodePort.
        PortDelta { before: None, after: udp(&["10.96.0.11:30053"], &["10.1.0.9:9"]) },
    ]);
    let gone = [
        (VIP, "10.1.0.3:53"),
        (VIP, VIP),
        (VIP, B),
        (VIP, "10.1.0.1:5300"),
        ("203.0.113.7:53", "10.1.0.3:53"),
        ("203.0.113.7:53", "203.0.113.7:53"),
        ("198.51.100.9:5353", "10.1.0.3:53"),
        ("192.0.2.4:30053", "10.1.0.3:53"),
        ("192.0.2.5:30053", "192.0.2.5:30053"),
        ("127.0.0.1:30053", "10.1.0.1:9"),
        ("10.96.0.11:30053", A),
        ("[fd00::10]:53", "[fd01::2]:53"),
        ("[fd00::10]:53", "[fd00::10]:53"),
        ("[2001:db8::7]:53", "[fd01::1]:54"),
        ("[2001:db8::99]:30053", "[fd01::2]:53"),
        ("[2001:db8::99]:30053", "[2001:db8::99]:30053"),
    ];
    let kept = [
        (VIP, A),
        (VIP, "10.1.0.2:5300"),
        ("203.0.113.7:53", A),
        ("198.51.100.9:5353", A),
        ("192.0.2.4:30053", A),
        ("192.0.2.5:30053", "10.1.0.2:5300"),
        ("10.96.0.11:30053", "10.1.0.9:9"),
        // Other Services, other ports of the same addresses, pods' own addresses, the internet.
        ("10.96.0.10:54", "10.1.0.3:53"),
        ("10.96.0.99:53", "10.1.0.3:53"),
        ("198.51.100.9:53", "198.51.100.9:53"),
        ("192.0.2.4:30054", "10.1.0.3:53"),
        (A, A),
        (B, B),
        ("10.1.0.3:53", "10.1.0.3:53"),
        ("9.9.9.9:53", "9.9.9.9:53"),
        ("[fd00::10]:53", "[fd01::1]:53"),
        ("[2001:db8::7]:53", "[fd01::1]:53"),
        ("[2001:db8::99]:30053", "[fd01::1]:53"),
        ("[fd00::11]:53", "[fd01::2]:53"),
        ("[fd00::10]:54", "[fd01::2]:53"),
        ("[2001:db8::99]:30054", "[fd01::2]:53"),
        ("[fd01::2]:53", "[fd01::2]:53"),
    ];
    for (flows, expected) in [(&gone[..], true), (&kept[..], false)] {
        for (destination, answers) in flows {
            assert_eq!(
                stale(&suspects, destination, answers),
                expected,
                "{destination} answered by {answers}"
            );
        }
    }
}

#[test]
fn a_node_port_of_one_family_does_not_affect_the_other() {
    let suspects = of(&[PortDelta { before: None, after: udp(&[NODE], &[A]) }]);
    let other = "[2001:db8::99]:30053";
    assert!(!stale(&suspects, other, other));
    assert_eq!(suspects.families(), BTreeSet::from([Family::V4]));
}

#[test]
fn a_node_port_is_a_port_of_this_node_and_flows_to_other_machines_stay() {
    let port = |serving: &[&str]| udp(&[NODE, "node6:30053"], serving);
    let lost = [PortDelta { before: port(&[A, B]), after: port(&[A]) }];
    let suspects = of(&lost);
    // Another machine, another node's NodePort, a process of this node on a loopback address.
    for to in ["198.51.100.7:30053", "192.0.2.6:30053", "127.0.0.1:30053", "[2001:db8::7]:30053"] {
        assert!(!stale(&suspects, to, to), "{to}");
        assert!(!stale(&suspects, to, A), "{to}");
    }
    // Another program translated the flow.
    assert!(!stale(&suspects, "198.51.100.7:30053", "198.51.100.8:9"));
    // weir translated the flow, because its backend is the Service's, whatever the destination.
    assert!(stale(&suspects, "198.51.100.7:30053", B));
    assert!(
        stale(&suspects, "[fe80::7]:30053", "[fd01::2]:53")
            && !stale(&suspects, "[fe80::7]:30053", "[fe80::7]:30053")
    );
    assert!(stale(&suspects, "192.0.2.4:30053", B) && stale(&suspects, "192.0.2.4:30053", "192.0.2.4:30053"));

    let some = NodePortAddresses::Only(vec!["192.0.2.5".parse().unwrap()]);
    let only = NodePlan {
        node_port_addresses: PerFamily { v4: some, v6: NodePortAddresses::AnyLocal },
        ..NodePlan::clone(&node())
    };
    let suspects = Suspects::of(&lost).on(Some(&Arc::new(only)), |_| false);
    assert!(!stale(&suspects, "192.0.2.4:30053", "192.0.2.4:30053"), "this address serves no NodePorts");
    assert!(stale(&suspects, "192.0.2.5:30053", "192.0.2.5:30053"));
}

#[test]
fn flows_of_an_address_and_a_number_that_a_port_loses_become_stale() {
    const BALANCER: &str = "203.0.113.7:53";
    let (before, after) = (udp(&[VIP, BALANCER, NODE], &[A]), udp(&[VIP, NODE], &[A]));
    assert_eq!(picked(before.clone(), after.clone()), ["203.0.113.7:53/UDP"]);
    let suspects = of(&[PortDelta { before, after }]);
    assert!(stale(&suspects, BALANCER, A) && !stale(&suspects, BALANCER, BALANCER));
    assert!(!stale(&suspects, VIP, A) && !stale(&suspects, "192.0.2.4:30053", A));

    let renumbered = PortDelta { before: udp(&[VIP], &[A]), after: udp(&["10.96.0.10:54"], &[A]) };
    let suspects = of(&[renumbered]);
    assert!(stale(&suspects, VIP, A) && !stale(&suspects, "10.96.0.10:54", A));
}

#[test]
fn only_clients_that_source_ranges_exclude_lose_their_flows_f7() {
    let port = || udp(&[VIP], &[A]);
    let some = |networks: &[&str]| only_from(networks, port());
    let few = || some(&["10.1.0.0/24", "10.1.7.0/24", "10.3.0.0/16"]);
    assert!(picked(few(), few()).is_empty());
    for before in [port(), some(&["10.0.0.0/8"]), few(), None] {
        let suspects = of(&[PortDelta { before, after: some(&["10.1.0.0/24", "10.3.0.0/16"]) }]);
        for (client, stays) in [
            ("10.0.255.255", false),
            ("10.1.0.0", true),
            ("10.1.0.255", true),
            ("10.1.7.7", false),
            ("10.3.4.5", true),
            ("192.0.2.77", false),
        ] {
            assert_eq!(stale_of(client, &suspects, VIP, A), !stays, "{client}");
            assert!(stale_of(client, &suspects, VIP, B), "the backend of {client} does not serve");
        }
    }
    // Without ranges again.
    let suspects = of(&[PortDelta { before: few(), after: port() }]);
    assert!(!stale_of("192.0.2.77", &suspects, VIP, A));
}

#[test]
fn translated_flows_of_an_earlier_agents_frontend_are_stale() {
    let left = || {
        Suspects::left_over([frontend(VIP, Protocol::Udp), frontend(NODE, Protocol::Udp)])
            .on(Some(&node()), |_| false)
    };
    for to in [VIP, "192.0.2.4:30053"] {
        assert!(stale(&left(), to, A) && !stale(&left(), to, to), "{to}");
    }
    assert!(!stale(&left(), "198.51.100.7:30053", A), "another machine");
    let mut taken = left();
    taken.extend(of(&[PortDelta { before: None, after: udp(&[VIP], &[A]) }]));
    assert!(!stale(&taken, VIP, A) && stale(&taken, VIP, B));
}

#[test]
fn an_external_ip_of_the_node_with_a_node_ports_number_keeps_its_own_flows_r1() {
    let lost = [PortDelta { before: udp(&[NODE], &[A, B]), after: udp(&[NODE], &[A]) }];
    let external = frontend("192.0.2.5:30053", Protocol::Udp);
    let suspects = Suspects::of(&lost).on(Some(&node()), |frontend| *frontend == external);
    assert!(!stale(&suspects, "192.0.2.5:30053", "10.1.0.9:53") && !stale(&suspects, "192.0.2.5:30053", B));
    assert!(stale(&suspects, "192.0.2.4:30053", "10.1.0.9:53"));
}

#[test]
fn flows_that_an_announced_port_serves_stay_while_a_sweep_has_older_suspects() {
    const VIP: &str = "10.96.0.10:53";
    const NODE: &str = "node4:30053";
    const A: &str = "10.1.0.1:53";
    const B: &str = "10.1.0.2:53";
    let known = AnnouncedPorts::default();
    let announced = &known;
    let change = |before: &Option<Arc<PortPlan>>, after: &Option<Arc<PortPlan>>| {
        let ports = [PortDelta { before: before.clone(), after: after.clone() }];
        announced.announce(&ports);
        move || of(&ports).with_announced(announced)
    };
    let (one, both) = (udp(&[VIP, NODE], &[A]), udp(&[VIP, NODE], &[A, B]));
    let gone = change(&one, &None)();
    assert!(stale(&gone, VIP, A), "the Service is gone");
    gone.begin();

    // It comes back during the sweep.
    let back = change(&None, &one);
    assert!(!stale(&gone, VIP, A) && !stale(&gone, "192.0.2.4:30053", A));
    let back = back();
    let joined = change(&one, &both);
    assert!(!stale(&back, VIP, B), "an endpoint joins during the sweep");
    assert!(stale(&back, VIP, "10.1.0.3:53"), "no port serves this endpoint");
    let mut all = gone;
    all.extend(back);
    all.extend(joined());
    all.begin();
    assert!(!stale(&all, VIP, A) && !stale(&all, VIP, B), "the later suspects have both endpoints");

    // `begin` drops older announcements: A is stale once it has left.
    let left = change(&both, &udp(&[VIP, NODE], &[B]))();
    assert!(stale(&left, VIP, A) && !stale(&left, VIP, B));
    left.begin();
    assert!(stale(&left, VIP, A));
}
