//! Which sockets weir closes, and when (K2, K3), by the clock of the test.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use super::{
    close_policy::{ClosePolicy, ConnectedSocket},
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

/// A policy, and a clock in seconds.
struct Fixture {
    policy: ClosePolicy,
    now: u64,
}

impl Fixture {
    /// At second 100, with these ports in force and all their sockets checked.
    fn with(ports: impl IntoIterator<Item = Option<Arc<PortPlan>>>) -> Self {
        let mut fixture = Self { policy: ClosePolicy::default(), now: 100 };
        fixture.complete(ports);
        fixture.policy.take_due(fixture.now * SECOND + 2 * SECOND);
        fixture
    }

    fn complete(&mut self, ports: impl IntoIterator<Item = Option<Arc<PortPlan>>>) {
        let ports = ports.into_iter().map(|after| PortDelta { before: None, after }).collect();
        self.apply(&Delta { ports, complete: true, ..Delta::default() });
    }

    fn change(&mut self, before: Option<Arc<PortPlan>>, after: Option<Arc<PortPlan>>) {
        self.apply(&Delta { ports: vec![PortDelta { before, after }], ..Delta::default() });
    }

    fn apply(&mut self, delta: &Delta) {
        let suspects = Suspects { at: self.now * SECOND, ..Suspects::of(delta) };
        assert!(!suspects.is_empty());
        self.policy.take_in(suspects);
    }

    /// The seconds of all later checks.
    fn checks(&mut self) -> Vec<u64> {
        let mut checks = Vec::new();
        while let Some(next) = self.policy.next() {
            self.policy.take_due(next);
            checks.push(next / SECOND);
        }
        checks
    }

    /// Whether a socket is closed that connected to `backend` at second 50.
    fn must_close(&self, protocol: Protocol, service: &str, backend: &str) -> bool {
        self.must_close_since(50, protocol, service, backend)
    }

    fn must_close_since(&self, since: u64, protocol: Protocol, service: &str, backend: &str) -> bool {
        let (service, backend) = (at(service), at(backend));
        let socket = ConnectedSocket { since: since * SECOND, protocol, service, backend };
        self.policy.must_close(&socket, self.now * SECOND)
    }
}

use Protocol::{Tcp, Udp};

#[test]
fn udp_sockets_of_a_lost_backend_are_closed_at_once_and_checked_twice_k2() {
    let mut fixture = Fixture::with([udp(&[VIP, NODE], &[A, B]), udp(&[VIP6], &["[fd01::1]:53"])]);
    fixture.now = 110;
    fixture.change(udp(&[VIP, NODE], &[A, B]), udp(&[VIP, NODE], &[B]));
    assert_eq!(fixture.checks(), [110, 111]);
    for (service, backend, closed) in [
        (VIP, A, true),
        (VIP, B, false),
        ("192.0.2.1:30053", A, true),
        ("127.0.0.1:30053", A, true),
        ("192.0.2.1:30053", B, false),
        (VIP6, "[fd01::1]:53", false),
        (VIP6, "[fd01::2]:53", true),
    ] {
        assert_eq!(fixture.must_close(Udp, service, backend), closed, "{service} to {backend}");
    }
    assert!(!fixture.must_close(Tcp, VIP, A), "TCP is another service port");
}

#[test]
fn udp_sockets_are_closed_when_no_endpoint_is_left_and_when_the_service_is_deleted() {
    let mut fixture = Fixture::with([udp(&[VIP], &[A])]);
    fixture.change(udp(&[VIP], &[A]), udp(&[VIP], &[]));
    assert_eq!(fixture.checks(), [100, 101]);
    assert!(fixture.must_close(Udp, VIP, A));

    let mut fixture = Fixture::with([udp(&[VIP], &[A])]);
    fixture.change(udp(&[VIP], &[A]), None);
    assert_eq!(fixture.checks(), [100, 101]);
    assert!(fixture.must_close(Udp, VIP, A));
    fixture.policy.tidy(101 * SECOND);
    assert!(fixture.must_close(Udp, VIP, A), "also after the policy has dropped the Service");
}

#[test]
fn joining_endpoints_cause_no_check() {
    let mut fixture = Fixture::with([udp(&[VIP], &[A])]);
    fixture.change(udp(&[VIP], &[A]), udp(&[VIP], &[A, B]));
    assert_eq!(fixture.checks(), [0; 0]);
    assert!(!fixture.must_close(Udp, VIP, A) && !fixture.must_close(Udp, VIP, B));
}

#[test]
fn sockets_that_no_program_connected_stay() {
    let fixture = Fixture::with([udp(&[VIP], &[B])]);
    assert!(fixture.must_close(Udp, VIP, A));
    assert!(!fixture.must_close_since(0, Udp, VIP, A));
}

#[test]
fn sockets_that_connected_by_newer_plans_stay() {
    let mut fixture = Fixture::with([udp(&[VIP], &[A])]);
    fixture.now = 110;
    fixture.change(udp(&[VIP], &[A]), udp(&[VIP], &[B]));
    fixture.now = 120;
    let must_close = |since, service, backend| fixture.must_close_since(since, Udp, service, backend);
    assert!(must_close(109, VIP, A) && must_close(110, VIP, A));
    assert!(!must_close(111, VIP, A), "connected after the backend was lost, so it serves again");
    assert!(!must_close(111, VIP, "10.1.0.3:53"), "an endpoint of later plans");
    assert!(must_close(109, "10.96.0.99:53", A));
    assert!(!must_close(111, "10.96.0.99:53", A), "a Service of later plans");
}

#[test]
fn before_a_complete_delta_no_socket_is_closed() {
    let mut fixture = Fixture { policy: ClosePolicy::default(), now: 100 };
    fixture.change(udp(&[VIP], &[A]), udp(&[VIP], &[B]));
    assert!(!fixture.must_close(Udp, VIP, A) && !fixture.must_close(Udp, "10.96.0.99:53", A));
}

#[test]
fn tcp_sockets_are_closed_at_once_later_or_never_as_the_service_says() {
    for (on_removal, checks, closed) in [
        (Removal::Keep, vec![], [false, false]),
        (AT_ONCE, vec![100, 101], [true, true]),
        (LATER, vec![130, 131], [false, true]),
    ] {
        let mut fixture = Fixture::with([tcp(on_removal, &[A, B])]);
        fixture.checks();
        let delta = PortDelta { before: tcp(on_removal, &[A, B]), after: tcp(on_removal, &[B]) };
        let delta = Delta { ports: vec![delta], ..Delta::default() };
        assert_eq!(Suspects::of(&delta).is_empty(), on_removal == Removal::Keep);
        fixture.policy.take_in(Suspects { at: fixture.now * SECOND, ..Suspects::of(&delta) });
        assert_eq!(fixture.checks(), checks, "{on_removal:?}");
        assert_eq!(fixture.must_close(Tcp, VIP, A), closed[0], "{on_removal:?}");
        fixture.now = 130;
        assert_eq!(fixture.must_close(Tcp, VIP, A), closed[1], "{on_removal:?}");
        assert_eq!(fixture.must_close(Tcp, "127.0.0.1:30053", A), closed[1], "{on_removal:?}");
        assert!(!fixture.must_close(Tcp, VIP, B), "{on_removal:?}");
    }
}

#[test]
fn a_backend_that_comes_back_in_time_keeps_its_connections() {
    let mut fixture = Fixture::with([tcp(LATER, &[A, B])]);
    fixture.checks();
    fixture.change(tcp(LATER, &[A, B]), tcp(LATER, &[B]));
    fixture.now = 120;
    fixture.change(tcp(LATER, &[B]), tcp(LATER, &[A]));
    assert_eq!(fixture.checks(), [130, 131, 150, 151]);
    fixture.now = 130;
    assert!(!fixture.must_close(Tcp, VIP, A), "it is back");
    assert!(!fixture.must_close(Tcp, VIP, B), "its time has not come");
    fixture.now = 150;
    assert!(!fixture.must_close(Tcp, VIP, A));
    assert!(fixture.must_close(Tcp, VIP, B));
}

#[test]
fn connections_of_a_deleted_service_are_closed_when_due_unless_it_comes_back() {
    for comes_back in [false, true] {
        let mut fixture = Fixture::with([tcp(LATER, &[A])]);
        fixture.checks();
        fixture.change(tcp(LATER, &[A]), None);
        assert_eq!(fixture.checks(), [130, 131]);
        fixture.now = 120;
        if comes_back {
            fixture.change(None, tcp(LATER, &[A]));
        }
        fixture.policy.tidy(120 * SECOND);
        assert!(!fixture.must_close(Tcp, VIP, A));
        fixture.now = 130;
        assert_eq!(fixture.must_close(Tcp, VIP, A), !comes_back);
        fixture.policy.tidy(131 * SECOND);
        fixture.now = 150;
        assert!(!fixture.must_close(Tcp, VIP, A), "TCP connections of an unknown Service stay");
    }
}

#[test]
fn connections_through_a_new_service_stay_while_the_policy_has_the_old_one() {
    let mut fixture = Fixture::with([tcp(AT_ONCE, &[A])]);
    fixture.change(tcp(AT_ONCE, &[A]), None);
    fixture.now = 110;
    // Another Service has the address now and keeps its connections, so the policy does not have it.
    assert!(fixture.must_close(Tcp, VIP, A));
    assert!(!fixture.must_close_since(105, Tcp, VIP, A));
    assert!(!fixture.must_close_since(105, Tcp, VIP, B));
}

#[test]
fn a_changed_annotation_takes_effect_at_once() {
    let mut fixture = Fixture::with([tcp(Removal::Keep, &[A])]);
    fixture.checks();
    fixture.change(tcp(Removal::Keep, &[A]), tcp(LATER, &[A]));
    assert_eq!(fixture.checks(), [130, 131]);
    assert!(!fixture.must_close(Tcp, VIP, B));
    fixture.now = 130;
    assert!(fixture.must_close(Tcp, VIP, B), "lost before the annotation came");
    fixture.change(tcp(LATER, &[A]), tcp(Removal::Keep, &[]));
    assert_eq!(fixture.checks(), [0; 0]);
    assert!(!fixture.must_close(Tcp, VIP, B) && !fixture.must_close(Tcp, VIP, A));
}

#[test]
fn a_frontend_that_another_service_takes_follows_that_service_r12() {
    let mut fixture = Fixture::with([udp(&[VIP, NODE], &[A])]);
    let other = |serving| port("other", Udp, AT_ONCE, &[NODE], serving);
    fixture.apply(&Delta {
        ports: vec![
            PortDelta { before: udp(&[VIP, NODE], &[A]), after: udp(&[VIP], &[A]) },
            PortDelta { before: None, after: other(&[B]) },
        ],
        ..Delta::default()
    });
    assert_eq!(fixture.checks(), [100, 101]);
    assert!(fixture.must_close(Udp, "192.0.2.1:30053", A));
    assert!(!fixture.must_close(Udp, "192.0.2.1:30053", B));
    assert!(!fixture.must_close(Udp, VIP, A));
}

#[test]
fn sockets_of_a_lost_udp_frontend_are_closed_unless_it_comes_back() {
    let mut fixture = Fixture::with([udp(&[VIP, NODE], &[A])]);
    fixture.change(udp(&[VIP, NODE], &[A]), udp(&[VIP], &[A]));
    assert_eq!(fixture.checks(), [100, 101]);
    assert!(
        fixture.must_close(Udp, "192.0.2.1:30053", A),
        "the backend serves, but no longer at this frontend"
    );
    assert!(!fixture.must_close(Udp, VIP, A));
    fixture.change(udp(&[VIP], &[A]), udp(&[VIP, NODE], &[A]));
    assert!(!fixture.must_close(Udp, "192.0.2.1:30053", A));
}

#[test]
fn a_lost_tcp_frontend_keeps_its_connections() {
    let mut fixture = Fixture::with([port("web", Tcp, AT_ONCE, &[VIP, NODE], &[A])]);
    let after = port("web", Tcp, AT_ONCE, &[VIP], &[A]);
    fixture.change(port("web", Tcp, AT_ONCE, &[VIP, NODE], &[A]), after);
    assert_eq!(fixture.checks(), [0; 0]);
    assert!(!fixture.must_close(Tcp, "192.0.2.1:30053", A) && !fixture.must_close(Tcp, VIP, A));
}

#[test]
fn only_clients_that_source_ranges_exclude_lose_their_sockets_f7() {
    let guarded = |networks: &[&str]| {
        let mut plan = PortPlan::clone(&udp(&[VIP], &[A]).unwrap());
        let networks: Vec<_> = networks.iter().map(|network| network.parse().unwrap()).collect();
        plan.frontends[0].allowed_sources = Some(networks.into());
        Some(Arc::new(plan))
    };
    let mut fixture = Fixture::with([udp(&[VIP], &[A])]);
    fixture.change(udp(&[VIP], &[A]), guarded(&["10.1.7.0/24", "192.0.2.1/32"]));
    assert_eq!(fixture.checks(), [100, 101]);
    fixture.apply(&Delta { node: Some(node("192.0.2.1", &["10.1.9.1", "192.0.2.1"])), ..Delta::default() });
    let socket = |protocol, since| ConnectedSocket {
        since: since * SECOND,
        protocol,
        service: at(VIP),
        backend: at(A),
    };
    assert!(!fixture.policy.must_close(&socket(Udp, 50), fixture.now * SECOND));
    let allowed = fixture.policy.allowed_clients_of(&socket(Udp, 50), fixture.now * SECOND).unwrap();
    for (client, stays) in [
        ("10.1.7.7", true),
        ("10.1.8.8", false),
        ("192.0.2.1", true),
        ("10.1.9.1", true),
        ("192.0.2.2", false),
    ] {
        assert_eq!(allowed.lets_in(client.parse().unwrap()), stays, "{client}");
    }
    assert!(
        fixture.policy.allowed_clients_of(&socket(Udp, 101), fixture.now * SECOND).is_none(),
        "connected by a newer plan"
    );
    assert!(fixture.policy.allowed_clients_of(&socket(Tcp, 50), fixture.now * SECOND).is_none());
    fixture.change(guarded(&["10.1.7.0/24", "192.0.2.1/32"]), udp(&[VIP], &[A]));
    assert!(fixture.policy.allowed_clients_of(&socket(Udp, 50), fixture.now * SECOND).is_none());
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
    let mut fixture = Fixture::with([tcp(AT_ONCE, &[B])]);
    fixture.apply(&Delta { node: Some(node("192.0.2.1", &["192.0.2.1"])), ..Delta::default() });
    assert!(fixture.must_close(Tcp, "192.0.2.1:30053", A));
    assert!(fixture.must_close(Tcp, "127.0.0.1:30053", A));
    assert!(!fixture.must_close(Tcp, "10.96.0.99:30053", A), "a Service that keeps its connections");
}

#[test]
fn a_restart_checks_every_socket_at_once_and_starts_the_time_of_reset_after_again() {
    let mut fixture = Fixture { policy: ClosePolicy::default(), now: 100 };
    fixture.complete([udp(&[VIP], &[A]), tcp(LATER, &[A])]);
    assert_eq!(fixture.checks(), [100, 101, 130, 131]);
    assert!(fixture.must_close(Udp, VIP, B));
    assert!(fixture.must_close(Udp, "10.96.0.99:53", B), "a Service deleted meanwhile");
    assert!(!fixture.must_close(Tcp, VIP, B) && !fixture.must_close(Tcp, "10.96.0.99:53", B));
    fixture.now = 130;
    assert!(fixture.must_close(Tcp, VIP, B));
    assert!(!fixture.must_close(Tcp, "10.96.0.99:53", B), "the annotation of its Service is unknown");
}

#[test]
fn a_later_complete_delta_keeps_the_times_and_drops_ports_that_it_does_not_have() {
    let mut fixture = Fixture::with([tcp(LATER, &[A, B]), udp(&[VIP], &[A])]);
    fixture.change(tcp(LATER, &[A, B]), tcp(LATER, &[B]));
    fixture.now = 120;
    fixture.complete([tcp(LATER, &[B])]);
    assert_eq!(fixture.checks(), [120, 121, 130, 131]);
    fixture.now = 130;
    assert!(fixture.must_close(Tcp, VIP, A));
    assert!(fixture.must_close(Udp, VIP, A));
}

#[test]
fn checked_backends_are_not_kept_one_by_one() {
    let mut fixture = Fixture::with([udp(&[VIP], &[A, B])]);
    fixture.now = 110;
    fixture.change(udp(&[VIP], &[A, B]), udp(&[VIP], &[B]));
    fixture.policy.tidy(111 * SECOND);
    assert!(
        fixture.must_close_since(105, Udp, VIP, A),
        "the next check finds a socket that one check missed"
    );
    assert!(!fixture.must_close_since(111, Udp, VIP, A));
}
