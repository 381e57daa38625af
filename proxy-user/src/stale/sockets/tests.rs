//! Which sockets go and when (K2, K3), by the clock of the test.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use super::{
    judge::{Judge, Led},
    suspect::Suspects,
};
use crate::{
    model::{Family, ObjectName, PerFamily, Protocol},
    plan::{
        Backend, Delta, Destination, Frontend, FrontendPlan, NodePlan, NodePortAddresses, PortDelta, PortId,
        PortPlan, Removal, Route, Target, Treatment,
    },
};

const SECOND: u64 = 1_000_000_000;
const AT_ONCE: Removal = Removal::Reset { after: Duration::ZERO };
const LATER: Removal = Removal::Reset { after: Duration::from_secs(30) };

const VIP: &str = "10.96.0.10:53";
const VIP6: &str = "[fd00::10]:53";
const NODE: &str = "node:30053";
const A: &str = "10.1.0.1:53";
const B: &str = "10.1.0.2:53";

fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// `address:port`, `node:port` or `node6:port`.
fn frontend(protocol: Protocol, text: &str) -> FrontendPlan {
    let (destination, port) = match text.rsplit_once(':') {
        Some(("node", port)) => (Destination::NodePort(Family::V4), port.parse().unwrap()),
        Some(("node6", port)) => (Destination::NodePort(Family::V6), port.parse().unwrap()),
        _ => (Destination::Address(at(text).ip()), at(text).port()),
    };
    FrontendPlan {
        frontend: Frontend { destination, protocol, port },
        route: Route::uniform(Treatment { target: Target::Cluster, masquerade: false }),
        allowed_sources: None,
        answered_here: false,
    }
}

/// The port of the Service `name` with these frontends and serving endpoints.
fn port(
    name: &str,
    protocol: Protocol,
    on_removal: Removal,
    frontends: &[&str],
    serving: &[&str],
) -> Option<Arc<PortPlan>> {
    let backend = |text: &&str| Backend { address: at(text).ip(), port: at(text).port(), local: true };
    let mut serving: Vec<_> = serving.iter().map(backend).collect();
    serving.sort();
    let frontends: Vec<_> = frontends.iter().map(|text| frontend(protocol, text)).collect();
    let family = frontends.first().map_or(Family::V4, |planned| planned.frontend.destination.family());
    let id = PortId { service: ObjectName::new("default", name), port: "dns".into(), protocol, family };
    let watched = on_removal != Removal::Keep;
    Some(Arc::new(PortPlan {
        id,
        cluster: serving.clone(),
        local: Vec::new(),
        frontends,
        affinity: None,
        on_removal,
        serving: if watched { serving } else { Vec::new() },
    }))
}

fn udp(frontends: &[&str], serving: &[&str]) -> Option<Arc<PortPlan>> {
    port("dns", Udp, AT_ONCE, frontends, serving)
}

fn tcp(on_removal: Removal, serving: &[&str]) -> Option<Arc<PortPlan>> {
    port("web", Tcp, on_removal, &[VIP, NODE], serving)
}

/// A judge, the plans it knows, and a clock in seconds.
struct Court {
    judge: Judge,
    now: u64,
}

impl Court {
    /// At second 100, with these ports in force.
    fn with(ports: impl IntoIterator<Item = Option<Arc<PortPlan>>>) -> Self {
        let mut court = Self { judge: Judge::default(), now: 100 };
        court.complete(ports);
        court.judge.take_due(court.now * SECOND + 2 * SECOND);
        court
    }

    fn complete(&mut self, ports: impl IntoIterator<Item = Option<Arc<PortPlan>>>) {
        let ports = ports.into_iter().map(|after| PortDelta { before: None, after }).collect();
        self.tell(&Delta { ports, complete: true, ..Delta::default() });
    }

    fn change(&mut self, before: Option<Arc<PortPlan>>, after: Option<Arc<PortPlan>>) {
        self.tell(&Delta { ports: vec![PortDelta { before, after }], ..Delta::default() });
    }

    fn tell(&mut self, delta: &Delta) {
        let suspects = Suspects { at: self.now * SECOND, ..Suspects::of(delta) };
        assert!(!suspects.is_empty());
        self.judge.take_in(suspects);
    }

    /// The seconds at which sockets are to be looked at from now on.
    fn looks(&mut self) -> Vec<u64> {
        let mut looks = Vec::new();
        while let Some(next) = self.judge.next() {
            self.judge.take_due(next);
            looks.push(next / SECOND);
        }
        looks
    }

    /// Whether a socket goes that was led to `backend` at second 50.
    fn goes(&self, protocol: Protocol, service: &str, backend: &str) -> bool {
        self.led(50, protocol, service, backend)
    }

    fn led(&self, since: u64, protocol: Protocol, service: &str, backend: &str) -> bool {
        let (service, backend) = (at(service), at(backend));
        let led = Led { since: since * SECOND, protocol, service, backend };
        self.judge.condemns(&led, self.now * SECOND)
    }
}

use Protocol::{Tcp, Udp};

#[test]
fn udp_sockets_of_a_lost_backend_go_at_once_and_are_looked_at_twice_k2() {
    let mut court = Court::with([udp(&[VIP, NODE], &[A, B]), udp(&[VIP6], &["[fd01::1]:53"])]);
    court.now = 110;
    court.change(udp(&[VIP, NODE], &[A, B]), udp(&[VIP, NODE], &[B]));
    assert_eq!(court.looks(), [110, 111]);
    for (service, backend, goes) in [
        (VIP, A, true),
        (VIP, B, false),
        ("192.0.2.1:30053", A, true),
        ("127.0.0.1:30053", A, true),
        ("192.0.2.1:30053", B, false),
        (VIP6, "[fd01::1]:53", false),
        (VIP6, "[fd01::2]:53", true),
    ] {
        assert_eq!(court.goes(Udp, service, backend), goes, "{service} to {backend}");
    }
    assert!(!court.goes(Tcp, VIP, A), "TCP is another service port");
}

#[test]
fn udp_sockets_go_when_no_endpoint_is_left_and_when_the_service_is_deleted() {
    let mut court = Court::with([udp(&[VIP], &[A])]);
    court.change(udp(&[VIP], &[A]), udp(&[VIP], &[]));
    assert_eq!(court.looks(), [100, 101]);
    assert!(court.goes(Udp, VIP, A));

    let mut court = Court::with([udp(&[VIP], &[A])]);
    court.change(udp(&[VIP], &[A]), None);
    assert_eq!(court.looks(), [100, 101]);
    assert!(court.goes(Udp, VIP, A));
    court.judge.tidy(101 * SECOND);
    assert!(court.goes(Udp, VIP, A), "also once the Service is forgotten");
}

#[test]
fn endpoints_that_join_have_no_socket_looked_at() {
    let mut court = Court::with([udp(&[VIP], &[A])]);
    court.change(udp(&[VIP], &[A]), udp(&[VIP], &[A, B]));
    assert_eq!(court.looks(), [0; 0]);
    assert!(!court.goes(Udp, VIP, A) && !court.goes(Udp, VIP, B));
}

#[test]
fn sockets_that_were_led_nowhere_stay() {
    let court = Court::with([udp(&[VIP], &[B])]);
    assert!(court.goes(Udp, VIP, A));
    assert!(!court.led(0, Udp, VIP, A));
}

#[test]
fn sockets_that_saw_newer_plans_than_the_judge_stay() {
    let mut court = Court::with([udp(&[VIP], &[A])]);
    court.now = 110;
    court.change(udp(&[VIP], &[A]), udp(&[VIP], &[B]));
    court.now = 120;
    let led = |since, service, backend| court.led(since, Udp, service, backend);
    assert!(led(109, VIP, A) && led(110, VIP, A));
    assert!(!led(111, VIP, A), "led there after it was lost: it must serve again");
    assert!(!led(111, VIP, "10.1.0.3:53"), "an endpoint of later plans");
    assert!(led(109, "10.96.0.99:53", A));
    assert!(!led(111, "10.96.0.99:53", A), "a Service of later plans");
}

#[test]
fn before_everything_was_told_nothing_goes() {
    let mut court = Court { judge: Judge::default(), now: 100 };
    court.change(udp(&[VIP], &[A]), udp(&[VIP], &[B]));
    assert!(!court.goes(Udp, VIP, A) && !court.goes(Udp, "10.96.0.99:53", A));
}

#[test]
fn endpoints_that_are_led_to_without_serving_keep_their_sockets_e2() {
    let mut plan = PortPlan::clone(&udp(&[VIP], &[A, B]).unwrap());
    plan.serving.clear();
    plan.local = vec![plan.cluster.remove(1)];
    let court = Court::with([Some(Arc::new(plan))]);
    assert!(!court.goes(Udp, VIP, A) && !court.goes(Udp, VIP, B));
    assert!(court.goes(Udp, VIP, "10.1.0.3:53"));
}

#[test]
fn tcp_sockets_go_at_once_later_or_never_as_the_service_says() {
    for (on_removal, looks, goes) in [
        (Removal::Keep, vec![], [false, false]),
        (AT_ONCE, vec![100, 101], [true, true]),
        (LATER, vec![130, 131], [false, true]),
    ] {
        let mut court = Court::with([tcp(on_removal, &[A, B])]);
        court.looks();
        let delta = PortDelta { before: tcp(on_removal, &[A, B]), after: tcp(on_removal, &[B]) };
        let delta = Delta { ports: vec![delta], ..Delta::default() };
        assert_eq!(Suspects::of(&delta).is_empty(), on_removal == Removal::Keep);
        court.judge.take_in(Suspects { at: court.now * SECOND, ..Suspects::of(&delta) });
        assert_eq!(court.looks(), looks, "{on_removal:?}");
        assert_eq!(court.goes(Tcp, VIP, A), goes[0], "{on_removal:?}");
        court.now = 130;
        assert_eq!(court.goes(Tcp, VIP, A), goes[1], "{on_removal:?}");
        assert_eq!(court.goes(Tcp, "127.0.0.1:30053", A), goes[1], "{on_removal:?}");
        assert!(!court.goes(Tcp, VIP, B), "{on_removal:?}");
    }
}

#[test]
fn a_backend_that_came_back_within_the_time_keeps_its_connections() {
    let mut court = Court::with([tcp(LATER, &[A, B])]);
    court.looks();
    court.change(tcp(LATER, &[A, B]), tcp(LATER, &[B]));
    court.now = 120;
    court.change(tcp(LATER, &[B]), tcp(LATER, &[A]));
    assert_eq!(court.looks(), [130, 131, 150, 151]);
    court.now = 130;
    assert!(!court.goes(Tcp, VIP, A), "it is back");
    assert!(!court.goes(Tcp, VIP, B), "its time has not come");
    court.now = 150;
    assert!(!court.goes(Tcp, VIP, A));
    assert!(court.goes(Tcp, VIP, B));
}

#[test]
fn connections_of_a_deleted_service_go_in_their_time_unless_it_comes_back() {
    for comes_back in [false, true] {
        let mut court = Court::with([tcp(LATER, &[A])]);
        court.looks();
        court.change(tcp(LATER, &[A]), None);
        assert_eq!(court.looks(), [130, 131]);
        court.now = 120;
        if comes_back {
            court.change(None, tcp(LATER, &[A]));
        }
        court.judge.tidy(120 * SECOND);
        assert!(!court.goes(Tcp, VIP, A));
        court.now = 130;
        assert_eq!(court.goes(Tcp, VIP, A), !comes_back);
        court.judge.tidy(131 * SECOND);
        court.now = 150;
        assert!(!court.goes(Tcp, VIP, A), "of a Service that nobody knows TCP connections stay");
    }
}

#[test]
fn connections_through_a_young_service_stay_while_the_old_one_is_remembered() {
    let mut court = Court::with([tcp(AT_ONCE, &[A])]);
    court.change(tcp(AT_ONCE, &[A]), None);
    court.now = 110;
    // Another Service has the address now and keeps its connections: it is not told of.
    assert!(court.goes(Tcp, VIP, A));
    assert!(!court.led(105, Tcp, VIP, A));
    assert!(!court.led(105, Tcp, VIP, B));
}

#[test]
fn an_annotation_that_comes_is_obeyed_from_then_on_and_one_that_goes_no_more() {
    let mut court = Court::with([tcp(Removal::Keep, &[A])]);
    court.looks();
    court.change(tcp(Removal::Keep, &[A]), tcp(LATER, &[A]));
    assert_eq!(court.looks(), [130, 131]);
    assert!(!court.goes(Tcp, VIP, B));
    court.now = 130;
    assert!(court.goes(Tcp, VIP, B), "lost before anybody asked");
    court.change(tcp(LATER, &[A]), tcp(Removal::Keep, &[]));
    assert_eq!(court.looks(), [0; 0]);
    assert!(!court.goes(Tcp, VIP, B) && !court.goes(Tcp, VIP, A));
}

#[test]
fn a_frontend_that_another_service_takes_is_judged_by_that_r12() {
    let mut court = Court::with([udp(&[VIP, NODE], &[A])]);
    let other = |serving| port("other", Udp, AT_ONCE, &[NODE], serving);
    court.tell(&Delta {
        ports: vec![
            PortDelta { before: udp(&[VIP, NODE], &[A]), after: udp(&[VIP], &[A]) },
            PortDelta { before: None, after: other(&[B]) },
        ],
        ..Delta::default()
    });
    assert_eq!(court.looks(), [100, 101]);
    assert!(court.goes(Udp, "192.0.2.1:30053", A));
    assert!(!court.goes(Udp, "192.0.2.1:30053", B));
    assert!(!court.goes(Udp, VIP, A));
}

#[test]
fn a_udp_frontend_that_is_given_up_takes_its_sockets_along_until_it_comes_back() {
    let mut court = Court::with([udp(&[VIP, NODE], &[A])]);
    court.change(udp(&[VIP, NODE], &[A]), udp(&[VIP], &[A]));
    assert_eq!(court.looks(), [100, 101]);
    assert!(
        court.goes(Udp, "192.0.2.1:30053", A),
        "the backend serves, and the client may not come any more"
    );
    assert!(!court.goes(Udp, VIP, A));
    court.change(udp(&[VIP], &[A]), udp(&[VIP, NODE], &[A]));
    assert!(!court.goes(Udp, "192.0.2.1:30053", A));
}

#[test]
fn a_tcp_frontend_that_is_given_up_keeps_its_connections() {
    let mut court = Court::with([port("web", Tcp, AT_ONCE, &[VIP, NODE], &[A])]);
    let after = port("web", Tcp, AT_ONCE, &[VIP], &[A]);
    court.change(port("web", Tcp, AT_ONCE, &[VIP, NODE], &[A]), after);
    assert_eq!(court.looks(), [0; 0]);
    assert!(!court.goes(Tcp, "192.0.2.1:30053", A) && !court.goes(Tcp, VIP, A));
}

#[test]
fn only_clients_that_source_ranges_shut_out_lose_their_sockets_f7() {
    let guarded = |networks: &[&str]| {
        let mut plan = PortPlan::clone(&udp(&[VIP], &[A]).unwrap());
        let networks: Vec<_> = networks.iter().map(|network| network.parse().unwrap()).collect();
        plan.frontends[0].allowed_sources = Some(networks.into());
        Some(Arc::new(plan))
    };
    let mut court = Court::with([udp(&[VIP], &[A])]);
    court.change(udp(&[VIP], &[A]), guarded(&["10.1.7.0/24", "192.0.2.1/32"]));
    assert_eq!(court.looks(), [100, 101]);
    court.tell(&Delta { node: Some(node("192.0.2.1", &["10.1.9.1", "192.0.2.1"])), ..Delta::default() });
    let led = |protocol, since| Led { since: since * SECOND, protocol, service: at(VIP), backend: at(A) };
    assert!(!court.judge.condemns(&led(Udp, 50), court.now * SECOND));
    let guard = court.judge.guard_of(&led(Udp, 50), court.now * SECOND).unwrap();
    for (client, stays) in [
        ("10.1.7.7", true),
        ("10.1.8.8", false),
        ("192.0.2.1", true),
        ("10.1.9.1", true),
        ("192.0.2.2", false),
    ] {
        assert_eq!(guard.lets_in(client.parse().unwrap()), stays, "{client}");
    }
    assert!(court.judge.guard_of(&led(Udp, 101), court.now * SECOND).is_none(), "led by a newer plan");
    assert!(court.judge.guard_of(&led(Tcp, 50), court.now * SECOND).is_none());
    court.change(guarded(&["10.1.7.0/24", "192.0.2.1/32"]), udp(&[VIP], &[A]));
    assert!(court.judge.guard_of(&led(Udp, 50), court.now * SECOND).is_none());
}

/// A node that serves NodePorts at one of its addresses.
fn node(serving: &str, addresses: &[&str]) -> Arc<NodePlan> {
    let only = |address: &str| NodePortAddresses::Only(vec![address.parse().unwrap()]);
    Arc::new(NodePlan {
        local_traffic: PerFamily::default(),
        node_port_addresses: PerFamily { v4: only(serving), v6: only("::1") },
        host_addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
        loopback_node_ports: PerFamily::default(),
        masquerade_mark: 0,
        service_cidrs: Vec::new(),
        answers_names: false,
        name_clients: None,
        drops_out_of_window: true,
    })
}

#[test]
fn a_tcp_address_that_is_not_this_nodes_is_no_node_port_k3_r1() {
    let mut court = Court::with([tcp(AT_ONCE, &[B])]);
    court.tell(&Delta { node: Some(node("192.0.2.1", &["192.0.2.1"])), ..Delta::default() });
    assert!(court.goes(Tcp, "192.0.2.1:30053", A));
    assert!(court.goes(Tcp, "127.0.0.1:30053", A));
    assert!(!court.goes(Tcp, "10.96.0.99:30053", A), "a Service that keeps its connections");
}

#[test]
fn a_restart_looks_at_everything_at_once_and_starts_the_time_of_reset_after_anew() {
    let mut court = Court { judge: Judge::default(), now: 100 };
    court.complete([udp(&[VIP], &[A]), tcp(LATER, &[A])]);
    assert_eq!(court.looks(), [100, 101, 130, 131]);
    assert!(court.goes(Udp, VIP, B));
    assert!(court.goes(Udp, "10.96.0.99:53", B), "a Service deleted meanwhile");
    assert!(!court.goes(Tcp, VIP, B) && !court.goes(Tcp, "10.96.0.99:53", B));
    court.now = 130;
    assert!(court.goes(Tcp, VIP, B));
    assert!(!court.goes(Tcp, "10.96.0.99:53", B), "nobody knows what its Service asked for");
}

#[test]
fn a_later_complete_delta_keeps_the_times_and_forgets_what_it_does_not_name() {
    let mut court = Court::with([tcp(LATER, &[A, B]), udp(&[VIP], &[A])]);
    court.change(tcp(LATER, &[A, B]), tcp(LATER, &[B]));
    court.now = 120;
    court.complete([tcp(LATER, &[B])]);
    assert_eq!(court.looks(), [120, 121, 130, 131]);
    court.now = 130;
    assert!(court.goes(Tcp, VIP, A));
    assert!(court.goes(Udp, VIP, A));
}

#[test]
fn what_has_been_looked_at_twice_is_not_remembered_one_by_one() {
    let mut court = Court::with([udp(&[VIP], &[A, B])]);
    court.now = 110;
    court.change(udp(&[VIP], &[A, B]), udp(&[VIP], &[B]));
    court.judge.tidy(111 * SECOND);
    assert!(court.led(105, Udp, VIP, A), "one that was missed is found by the next look");
    assert!(!court.led(111, Udp, VIP, A));
}
