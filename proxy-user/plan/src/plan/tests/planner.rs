//! How plans become deltas: which changes, in which slots and in which order.

use std::{net::Ipv4Addr, sync::Arc};

use serde_json::{Value, json};

use super::applied::Applied;
use crate::{
    model::{Change, Kind},
    model::{
        Model, PerFamily,
        fixture::{model, named, service, settings, slice},
    },
    plan::{Backend, ClusterIpDelta, Delta, Planner, PortDelta, PortId, PortPlan, Removal, ServicePlan},
};

/// A model with its planner. Every step returns the delta of its changes.
struct Fixture {
    model: Model,
    planner: Planner,
}

impl Fixture {
    fn new() -> Self {
        Self { model: model(settings(), []), planner: Planner::default() }
    }

    fn step(&mut self, changes: impl IntoIterator<Item = Change>) -> Delta {
        changes.into_iter().for_each(|change| self.model.apply(change));
        for name in self.model.take_dirty() {
            self.planner.update(&name, self.model.plan(&name));
        }
        self.planner.take_delta()
    }
}

fn web(ports: Value) -> Change {
    service("web", json!({ "clusterIP": "10.0.0.1", "ports": ports }))
}

fn ends(addresses: &[&str]) -> Change {
    let endpoints = addresses.iter().map(|address| json!({ "addresses": [address] })).collect();
    slice("web-1", "web", json!([{ "name": "", "port": 8080 }]), endpoints)
}

/// The id of each port with the kind of its change.
fn changes_of(delta: &Delta) -> Vec<String> {
    let kind = |port: &PortDelta| match (&port.before, &port.after) {
        (None, Some(_)) => "new",
        (Some(_), Some(_)) => "changed",
        (Some(_), None) => "gone",
        (None, None) => "nothing",
    };
    delta.ports.iter().map(|port| format!("{} {}", port.id().unwrap(), kind(port))).collect()
}

#[test]
fn a_delta_has_the_changes_and_nothing_else() {
    let mut fixture = Fixture::new();
    let one = json!({ "name": "a", "port": 80 });
    let two = json!({ "name": "b", "port": 81 });
    let delta = fixture.step([web(json!([one, two])), service("other", json!({ "clusterIP": "10.0.0.9" }))]);
    assert_eq!(changes_of(&delta), ["ns/web:a/TCP (IPv4) new", "ns/web:b/TCP (IPv4) new"]);
    let added: Vec<_> = ["10.0.0.1", "10.0.0.9"].map(|ip| ClusterIpDelta::Add(ip.parse().unwrap())).into();
    assert_eq!(delta.cluster_ips, added);
    assert!(delta.node.is_none() && !delta.complete);

    let delta = fixture.step([web(json!([one, { "name": "b", "port": 82 }]))]);
    assert_eq!(changes_of(&delta), ["ns/web:b/TCP (IPv4) changed"]);
    assert_eq!(delta.cluster_ips, []);

    let delta = fixture.step([web(json!([one]))]);
    assert_eq!(changes_of(&delta), ["ns/web:b/TCP (IPv4) gone"]);

    // A change that is undone before the delta is taken is not in it.
    fixture.step([]);
    fixture.model.apply(web(json!([two])));
    for name in fixture.model.take_dirty() {
        fixture.planner.update(&name, fixture.model.plan(&name));
    }
    assert!(fixture.step([web(json!([one]))]).is_empty());

    let delta = fixture.step([Change::Delete(Kind::Service, named("web"))]);
    assert_eq!(changes_of(&delta), ["ns/web:a/TCP (IPv4) gone"]);
    assert_eq!(delta.cluster_ips, [ClusterIpDelta::Remove("10.0.0.1".parse().unwrap())]);
    assert_eq!(fixture.planner.services().len(), 1);
}

#[test]
fn f4_a_cluster_ip_stays_while_any_service_has_it() {
    let mut fixture = Fixture::new();
    let at = |name: &str, ip: &str| service(name, json!({ "clusterIP": ip }));
    let ip = "10.0.0.1".parse().unwrap();
    assert_eq!(
        fixture.step([at("a", "10.0.0.1"), at("b", "10.0.0.1")]).cluster_ips,
        [ClusterIpDelta::Add(ip)]
    );
    assert_eq!(fixture.step([Change::Delete(Kind::Service, named("a"))]).cluster_ips, []);
    // Another Service takes it over, so the delta does not remove it.
    assert_eq!(
        fixture.step([Change::Delete(Kind::Service, named("b")), at("c", "10.0.0.1")]).cluster_ips,
        []
    );
    assert_eq!(
        fixture.step([at("c", "10.0.0.2")]).cluster_ips,
        [ClusterIpDelta::Remove(ip), ClusterIpDelta::Add("10.0.0.2".parse().unwrap())]
    );
}

#[test]
fn a_delta_has_the_node_only_if_it_changed() {
    let mut fixture = Fixture::new();
    fixture.planner.update_node(fixture.model.node_plan());
    assert!(fixture.planner.take_delta().node.is_some());
    fixture.planner.update_node(fixture.model.node_plan());
    assert!(fixture.planner.take_delta().is_empty());
    let complete = fixture.planner.complete();
    assert!(complete.complete && complete.node.is_some());
}

#[test]
fn an_endpoint_change_touches_the_slots_of_that_endpoint() {
    let mut fixture = Fixture::new();
    let mut addresses: Vec<String> = (0..200).map(|index| format!("10.244.1.{index}")).collect();
    let listed = |addresses: &[String]| ends(&addresses.iter().map(String::as_str).collect::<Vec<_>>());
    fixture.step([web(json!([{ "port": 80 }])), listed(&addresses)]);
    // The first backend is removed. If the rest were sorted again, all would move.
    addresses.remove(0);
    let delta = fixture.step([listed(&addresses)]);
    let (before, after) = (delta.ports[0].before.clone().unwrap(), delta.ports[0].after.clone().unwrap());
    let touched = after.cluster.iter().zip(&before.cluster).filter(|(after, before)| after != before).count();
    assert_eq!((before.cluster.len(), after.cluster.len(), touched), (200, 199, 1));
}

#[test]
fn a_retried_port_has_the_plan_before_the_refusal() {
    let mut fixture = Fixture::new();
    let (a, b) = (json!({ "name": "a", "port": 80 }), json!({ "name": "b", "port": 81 }));
    let first = fixture.step([web(json!([a, b]))]);
    let failing: Vec<PortId> = first.ports[1].id().cloned().into_iter().collect();
    let fine = PerFamily::default();
    assert_eq!(fixture.planner.record_applied(&first, &failing), fine);
    assert!(
        fixture.planner.take_delta().is_empty() && fixture.planner.has_waiting(),
        "the next delta does not have it"
    );
    fixture.planner.retry();
    assert_eq!(changes_of(&fixture.planner.take_delta()), ["ns/web:b/TCP (IPv4) new"]);

    // It changes before the retry: `before` is still the plan from before the refusal.
    let second = fixture.step([web(json!([a, { "name": "b", "port": 82 }]))]);
    fixture.step([web(json!([a, { "name": "b", "port": 83 }]))]);
    assert_eq!(fixture.planner.record_applied(&second, &failing), fine);
    fixture.planner.retry();
    let third = fixture.planner.take_delta();
    let numbers = |plan: &Option<Arc<PortPlan>>| plan.as_ref().map(|plan| plan.frontends[0].frontend.port);
    assert_eq!((numbers(&third.ports[0].before), numbers(&third.ports[0].after)), (Some(81), Some(83)));

    // A refused removal is retried too.
    let gone = fixture.step([web(json!([a]))]);
    assert_eq!(fixture.planner.record_applied(&gone, &failing), fine);
    fixture.planner.retry();
    assert_eq!(changes_of(&fixture.planner.take_delta()), ["ns/web:b/TCP (IPv4) gone"]);
    assert!(fixture.planner.take_delta().is_empty());
}

#[test]
fn a_refused_port_that_changes_is_in_the_next_delta() {
    let mut fixture = Fixture::new();
    let first = fixture.step([web(json!([{ "port": 80 }]))]);
    let ids: Vec<PortId> = first.ports.iter().filter_map(PortDelta::id).cloned().collect();
    fixture.planner.record_applied(&first, &ids);
    let second = fixture.step([web(json!([{ "port": 81 }]))]);
    assert_eq!(changes_of(&second), ["ns/web/TCP (IPv4) new"], "the data plane never had it");
    assert!(!fixture.planner.has_waiting());
}

#[test]
fn a_port_refused_in_a_complete_delta_keeps_the_state_from_before_the_start() {
    let mut fixture = Fixture::new();
    fixture.step([web(json!([{ "port": 80 }]))]);
    let complete = fixture.planner.complete();
    let ids: Vec<PortId> = complete.ports.iter().filter_map(PortDelta::id).cloned().collect();
    assert_eq!(fixture.planner.record_applied(&complete, &ids), PerFamily::default());
    fixture.planner.retry();
    let again = fixture.planner.take_delta();
    assert_eq!(changes_of(&again), ["ns/web/TCP (IPv4) new"]);
    fixture.planner.record_applied(&again, &ids);
    // No port names the state from before the start any more, so only a complete delta removes it.
    assert!(fixture.step([Change::Delete(Kind::Service, named("web"))]).ports.is_empty());
    assert_eq!(fixture.planner.take_orphaned(), PerFamily { v4: true, v6: false });
    assert_eq!(fixture.planner.take_orphaned(), PerFamily::default(), "it was taken");

    // Once it is applied, it is a port like any other.
    fixture.step([web(json!([{ "port": 80 }]))]);
    let complete = fixture.planner.complete();
    fixture.planner.record_applied(&complete, &ids);
    fixture.planner.retry();
    let again = fixture.planner.take_delta();
    fixture.planner.record_applied(&again, &[]);
    assert_eq!(
        changes_of(&fixture.step([Change::Delete(Kind::Service, named("web"))])),
        ["ns/web/TCP (IPv4) gone"]
    );
    assert_eq!(fixture.planner.take_orphaned(), PerFamily::default());
}

#[test]
fn a_complete_delta_of_one_family_keeps_the_refused_ports_of_the_other() {
    let mut fixture = Fixture::new();
    let both = json!({
        "clusterIP": "10.0.0.1", "clusterIPs": ["10.0.0.1", "fd00::1"], "ipFamilies": ["IPv4", "IPv6"],
        "ports": [{ "port": 80 }]
    });
    let delta = fixture.step([service("web", both)]);
    let ids: Vec<PortId> = delta.ports.iter().filter_map(PortDelta::id).cloned().collect();
    assert_eq!(ids.len(), 2);
    fixture.planner.record_applied(&delta, &ids);
    let everything = fixture.planner.complete_for(PerFamily { v4: false, v6: true });
    assert_eq!(everything.ports.len(), 2, "both ports are in it");
    fixture.planner.retry();
    assert_eq!(changes_of(&fixture.planner.take_delta()), ["ns/web/TCP (IPv4) new"]);
}

#[test]
fn a_port_left_to_another_plane_is_sent_again_unchanged() {
    let mut fixture = Fixture::new();
    let delta = fixture.step([web(json!([{ "port": 80 }]))]);
    let ids: Vec<PortId> = delta.ports.iter().filter_map(PortDelta::id).cloned().collect();
    fixture.planner.record_left(ids.clone());
    assert!(fixture.planner.take_delta().is_empty());
    fixture.planner.retry();
    let again = fixture.planner.take_delta();
    assert_eq!(
        again.ports,
        [PortDelta { before: delta.ports[0].after.clone(), after: delta.ports[0].after.clone() }]
    );
    fixture.planner.record_left(ids);
    fixture.step([Change::Delete(Kind::Service, named("web"))]);
    fixture.planner.retry();
    assert!(fixture.planner.take_delta().is_empty(), "it is gone");
}

#[test]
fn a_frontend_is_released_before_another_port_takes_it() {
    let mut fixture = Fixture::new();
    let ports = |numbers: &[(&str, u16)]| {
        web(numbers.iter().map(|(name, port)| json!({ "name": name, "port": port })).collect())
    };
    fixture.step([ports(&[("a", 80), ("b", 81), ("c", 82)])]);
    // a takes b's port, b takes c's, c takes a new one: c must release first, then b, then a.
    let delta = fixture.step([ports(&[("a", 81), ("b", 82), ("c", 83)])]);
    assert_eq!(
        changes_of(&delta),
        ["ns/web:c/TCP (IPv4) changed", "ns/web:b/TCP (IPv4) changed", "ns/web:a/TCP (IPv4) changed"]
    );
    // A swap has no such order. Both are in the delta, and the result of applying it is right.
    let mut applied = Applied::default();
    applied.apply(&fixture.planner.complete());
    let delta = fixture.step([ports(&[("a", 82), ("b", 81), ("c", 83)])]);
    assert_eq!(delta.ports.len(), 2);
    applied.apply(&delta);
    let mut rebuilt = Applied::default();
    rebuilt.apply(&fixture.planner.complete());
    assert_eq!(applied, rebuilt);
}

#[test]
fn no_local_endpoints_are_counted_by_policy_and_family() {
    let mut fixture = Fixture::new();
    let both = |kind: &str| {
        json!({ "type": kind, "clusterIP": "10.0.0.1", "internalTrafficPolicy": "Local",
                "externalTrafficPolicy": "Local", "ports": [{ "port": 80, "nodePort": 30080 }] })
    };
    // Without endpoints on any node the port is not counted (F1).
    fixture.step([service("web", both("NodePort"))]);
    assert_eq!(fixture.planner.no_local_endpoints(), super::super::NoLocalEndpoints::default());
    fixture.step([ends(&["10.244.1.1"])]);
    let count = fixture.planner.no_local_endpoints();
    assert_eq!((count.internal, count.external), (PerFamily { v4: 1, v6: 0 }, PerFamily { v4: 1, v6: 0 }));
    fixture.step([slice(
        "web-1",
        "web",
        json!([{ "name": "", "port": 80 }]),
        json!([{ "addresses": ["10.244.0.1"], "nodeName": "node-a" }]),
    )]);
    assert_eq!(fixture.planner.no_local_endpoints(), super::super::NoLocalEndpoints::default());
}

#[test]
fn health_checks_are_listed() {
    let mut fixture = Fixture::new();
    let balanced = json!({ "type": "LoadBalancer", "clusterIP": "10.0.0.1", "externalTrafficPolicy": "Local",
                           "healthCheckNodePort": 32000 });
    fixture.step([service("web", balanced), service("other", json!({ "clusterIP": "10.0.0.2" }))]);
    let listed: Vec<_> =
        fixture.planner.health_checks().map(|(name, check)| (name.clone(), check.port)).collect();
    assert_eq!(listed, [(named("web"), 32000)]);
    assert_eq!(fixture.planner.service(&named("web")).unwrap().health_check.unwrap().local_endpoints, 0);
    fixture.planner.update(&named("web"), ServicePlan::default());
    assert_eq!(fixture.planner.health_checks().count(), 0);
}

fn backend(number: u32) -> Backend {
    Backend { address: Ipv4Addr::from_bits(0x0af4_0000 + number).into(), port: 80, local: false }
}

fn port_of(cluster: Vec<Backend>) -> PortPlan {
    let service = named("web");
    let id = PortId {
        service,
        port: Arc::default(),
        protocol: crate::model::Protocol::Tcp,
        family: crate::model::Family::V4,
    };
    PortPlan {
        id,
        local: cluster.clone(),
        cluster,
        frontends: vec![],
        affinity: None,
        on_removal: Removal::Keep,
        serving: vec![],
    }
}

proptest::proptest! {
    #[test]
    fn keeping_slots_keeps_the_set_and_moves_only_what_changed(
        before in proptest::collection::hash_set(0_u32..60, 0..40),
        after in proptest::collection::hash_set(0_u32..60, 0..40),
    ) {
        // Hash sets have an arbitrary order, as slots have after a history of changes.
        let old = port_of(before.iter().copied().map(backend).collect());
        let mut new = port_of(after.iter().copied().map(backend).collect());
        new.cluster.sort_unstable();
        new.local.sort_unstable();
        let wanted = new.clone();
        new.keep_slots(&old);
        let mut sorted = new.clone();
        sorted.cluster.sort_unstable();
        sorted.local.sort_unstable();
        proptest::prop_assert_eq!(&sorted, &wanted);
        let touched = new.cluster.iter().enumerate().filter(|(slot, now)| old.cluster.get(*slot) != Some(now));
        let (gone, come) = (before.difference(&after).count(), after.difference(&before).count());
        proptest::prop_assert!(touched.count() <= gone.max(come));
    }
}
