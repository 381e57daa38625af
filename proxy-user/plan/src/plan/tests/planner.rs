//! How plans become deltas: what is told, what is not, in which slots and in which order.

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

/// A model with its planner; every step returns the delta that follows.
struct Rig {
    model: Model,
    planner: Planner,
}

impl Rig {
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

/// Each port's id with what happens to it.
fn told(delta: &Delta) -> Vec<String> {
    let kind = |port: &PortDelta| match (&port.before, &port.after) {
        (None, Some(_)) => "new",
        (Some(_), Some(_)) => "changed",
        (Some(_), None) => "gone",
        (None, None) => "nothing",
    };
    delta.ports.iter().map(|port| format!("{} {}", port.id().unwrap(), kind(port))).collect()
}

#[test]
fn a_delta_tells_what_changed_and_nothing_else() {
    let mut rig = Rig::new();
    let one = json!({ "name": "a", "port": 80 });
    let two = json!({ "name": "b", "port": 81 });
    let delta = rig.step([web(json!([one, two])), service("other", json!({ "clusterIP": "10.0.0.9" }))]);
    assert_eq!(told(&delta), ["ns/web:a/TCP (IPv4) new", "ns/web:b/TCP (IPv4) new"]);
    let added: Vec<_> = ["10.0.0.1", "10.0.0.9"].map(|ip| ClusterIpDelta::Add(ip.parse().unwrap())).into();
    assert_eq!(delta.cluster_ips, added);
    assert!(delta.node.is_none() && !delta.complete);

    let delta = rig.step([web(json!([one, { "name": "b", "port": 82 }]))]);
    assert_eq!(told(&delta), ["ns/web:b/TCP (IPv4) changed"]);
    assert_eq!(delta.cluster_ips, []);

    let delta = rig.step([web(json!([one]))]);
    assert_eq!(told(&delta), ["ns/web:b/TCP (IPv4) gone"]);

    // What changes back before anybody asks has not changed.
    rig.step([]);
    rig.model.apply(web(json!([two])));
    for name in rig.model.take_dirty() {
        rig.planner.update(&name, rig.model.plan(&name));
    }
    assert!(rig.step([web(json!([one]))]).is_empty());

    let delta = rig.step([Change::Delete(Kind::Service, named("web"))]);
    assert_eq!(told(&delta), ["ns/web:a/TCP (IPv4) gone"]);
    assert_eq!(delta.cluster_ips, [ClusterIpDelta::Remove("10.0.0.1".parse().unwrap())]);
    assert_eq!(rig.planner.services().len(), 1);
}

#[test]
fn f4_a_cluster_ip_is_known_as_long_as_any_service_has_it() {
    let mut rig = Rig::new();
    let at = |name: &str, ip: &str| service(name, json!({ "clusterIP": ip }));
    let ip = "10.0.0.1".parse().unwrap();
    assert_eq!(rig.step([at("a", "10.0.0.1"), at("b", "10.0.0.1")]).cluster_ips, [ClusterIpDelta::Add(ip)]);
    assert_eq!(rig.step([Change::Delete(Kind::Service, named("a"))]).cluster_ips, []);
    // It passes from one Service to another without ever being unknown.
    assert_eq!(rig.step([Change::Delete(Kind::Service, named("b")), at("c", "10.0.0.1")]).cluster_ips, []);
    assert_eq!(
        rig.step([at("c", "10.0.0.2")]).cluster_ips,
        [ClusterIpDelta::Remove(ip), ClusterIpDelta::Add("10.0.0.2".parse().unwrap())]
    );
}

#[test]
fn the_node_is_told_when_it_changed() {
    let mut rig = Rig::new();
    rig.planner.update_node(rig.model.node_plan());
    assert!(rig.planner.take_delta().node.is_some());
    rig.planner.update_node(rig.model.node_plan());
    assert!(rig.planner.take_delta().is_empty());
    let complete = rig.planner.complete();
    assert!(complete.complete && complete.node.is_some());
}

#[test]
fn an_endpoint_change_touches_the_slots_of_that_endpoint() {
    let mut rig = Rig::new();
    let mut addresses: Vec<String> = (0..200).map(|index| format!("10.244.1.{index}")).collect();
    let listed = |addresses: &[String]| ends(&addresses.iter().map(String::as_str).collect::<Vec<_>>());
    rig.step([web(json!([{ "port": 80 }])), listed(&addresses)]);
    // The first of them goes; sorted anew, every other one would move.
    addresses.remove(0);
    let delta = rig.step([listed(&addresses)]);
    let (before, after) = (delta.ports[0].before.clone().unwrap(), delta.ports[0].after.clone().unwrap());
    let touched = after.cluster.iter().zip(&before.cluster).filter(|(after, before)| after != before).count();
    assert_eq!((before.cluster.len(), after.cluster.len(), touched), (200, 199, 1));
}

#[test]
fn a_refused_port_is_told_again_when_asked_for_with_what_the_data_plane_still_has() {
    let mut rig = Rig::new();
    let (a, b) = (json!({ "name": "a", "port": 80 }), json!({ "name": "b", "port": 81 }));
    let first = rig.step([web(json!([a, b]))]);
    let failing: Vec<PortId> = first.ports[1].id().cloned().into_iter().collect();
    let fine = PerFamily::default();
    assert_eq!(rig.planner.settled(&first, &failing), fine);
    assert!(rig.planner.take_delta().is_empty() && rig.planner.has_waiting(), "other changes go without it");
    rig.planner.retry();
    assert_eq!(told(&rig.planner.take_delta()), ["ns/web:b/TCP (IPv4) new"]);

    // It changes again before it is told again: before is what was there before the failure.
    let second = rig.step([web(json!([a, { "name": "b", "port": 82 }]))]);
    rig.step([web(json!([a, { "name": "b", "port": 83 }]))]);
    assert_eq!(rig.planner.settled(&second, &failing), fine);
    rig.planner.retry();
    let third = rig.planner.take_delta();
    let numbers = |plan: &Option<Arc<PortPlan>>| plan.as_ref().map(|plan| plan.frontends[0].frontend.port);
    assert_eq!((numbers(&third.ports[0].before), numbers(&third.ports[0].after)), (Some(81), Some(83)));

    // A port that should go and could not is told again, too.
    let gone = rig.step([web(json!([a]))]);
    assert_eq!(rig.planner.settled(&gone, &failing), fine);
    rig.planner.retry();
    assert_eq!(told(&rig.planner.take_delta()), ["ns/web:b/TCP (IPv4) gone"]);
    assert!(rig.planner.take_delta().is_empty());
}

#[test]
fn a_refused_port_that_changes_is_told_at_once() {
    let mut rig = Rig::new();
    let first = rig.step([web(json!([{ "port": 80 }]))]);
    let ids: Vec<PortId> = first.ports.iter().filter_map(PortDelta::id).cloned().collect();
    rig.planner.settled(&first, &ids);
    let second = rig.step([web(json!([{ "port": 81 }]))]);
    assert_eq!(told(&second), ["ns/web/TCP (IPv4) new"], "the data plane never had it");
    assert!(!rig.planner.has_waiting());
}

#[test]
fn of_a_port_refused_at_a_start_the_data_plane_has_what_it_found() {
    let mut rig = Rig::new();
    rig.step([web(json!([{ "port": 80 }]))]);
    let complete = rig.planner.complete();
    let ids: Vec<PortId> = complete.ports.iter().filter_map(PortDelta::id).cloned().collect();
    assert_eq!(rig.planner.settled(&complete, &ids), PerFamily::default());
    rig.planner.retry();
    let again = rig.planner.take_delta();
    assert_eq!(told(&again), ["ns/web/TCP (IPv4) new"]);
    rig.planner.settled(&again, &ids);
    // Nothing names what was found any more, so only a comparison takes it away.
    assert!(rig.step([Change::Delete(Kind::Service, named("web"))]).ports.is_empty());
    assert_eq!(rig.planner.take_stray(), PerFamily { v4: true, v6: false });
    assert_eq!(rig.planner.take_stray(), PerFamily::default(), "it was told");

    // Once it is programmed it is a port like any other.
    rig.step([web(json!([{ "port": 80 }]))]);
    let complete = rig.planner.complete();
    rig.planner.settled(&complete, &ids);
    rig.planner.retry();
    let again = rig.planner.take_delta();
    rig.planner.settled(&again, &[]);
    assert_eq!(told(&rig.step([Change::Delete(Kind::Service, named("web"))])), ["ns/web/TCP (IPv4) gone"]);
    assert_eq!(rig.planner.take_stray(), PerFamily::default());
}

#[test]
fn everything_for_one_family_leaves_what_waits_for_the_other() {
    let mut rig = Rig::new();
    let both = json!({
        "clusterIP": "10.0.0.1", "clusterIPs": ["10.0.0.1", "fd00::1"], "ipFamilies": ["IPv4", "IPv6"],
        "ports": [{ "port": 80 }]
    });
    let delta = rig.step([service("web", both)]);
    let ids: Vec<PortId> = delta.ports.iter().filter_map(PortDelta::id).cloned().collect();
    assert_eq!(ids.len(), 2);
    rig.planner.settled(&delta, &ids);
    let everything = rig.planner.complete_for(PerFamily { v4: false, v6: true });
    assert_eq!(everything.ports.len(), 2, "it names both");
    rig.planner.retry();
    assert_eq!(told(&rig.planner.take_delta()), ["ns/web/TCP (IPv4) new"]);
}

#[test]
fn a_port_that_was_left_to_another_plane_is_told_again_as_it_is() {
    let mut rig = Rig::new();
    let delta = rig.step([web(json!([{ "port": 80 }]))]);
    let ids: Vec<PortId> = delta.ports.iter().filter_map(PortDelta::id).cloned().collect();
    rig.planner.left(ids.clone());
    assert!(rig.planner.take_delta().is_empty());
    rig.planner.retry();
    let again = rig.planner.take_delta();
    assert_eq!(
        again.ports,
        [PortDelta { before: delta.ports[0].after.clone(), after: delta.ports[0].after.clone() }]
    );
    rig.planner.left(ids);
    rig.step([Change::Delete(Kind::Service, named("web"))]);
    rig.planner.retry();
    assert!(rig.planner.take_delta().is_empty(), "it is gone");
}

#[test]
fn a_frontend_is_given_up_before_another_port_takes_it() {
    let mut rig = Rig::new();
    let ports = |numbers: &[(&str, u16)]| {
        web(numbers.iter().map(|(name, port)| json!({ "name": name, "port": port })).collect())
    };
    rig.step([ports(&[("a", 80), ("b", 81), ("c", 82)])]);
    // a takes b's port, b takes c's, c takes a new one: c must let go first, then b, then a.
    let delta = rig.step([ports(&[("a", 81), ("b", 82), ("c", 83)])]);
    assert_eq!(
        told(&delta),
        ["ns/web:c/TCP (IPv4) changed", "ns/web:b/TCP (IPv4) changed", "ns/web:a/TCP (IPv4) changed"]
    );
    // A swap has no such order; both are told, and whoever applies them ends up right.
    let mut applied = Applied::default();
    applied.apply(&rig.planner.complete());
    let delta = rig.step([ports(&[("a", 82), ("b", 81), ("c", 83)])]);
    assert_eq!(delta.ports.len(), 2);
    applied.apply(&delta);
    let mut rebuilt = Applied::default();
    rebuilt.apply(&rig.planner.complete());
    assert_eq!(applied, rebuilt);
}

#[test]
fn no_local_endpoints_are_counted_by_policy_and_family() {
    let mut rig = Rig::new();
    let both = |kind: &str| {
        json!({ "type": kind, "clusterIP": "10.0.0.1", "internalTrafficPolicy": "Local",
                "externalTrafficPolicy": "Local", "ports": [{ "port": 80, "nodePort": 30080 }] })
    };
    // Without any endpoint at all nothing is counted (F1).
    rig.step([service("web", both("NodePort"))]);
    assert_eq!(rig.planner.no_local_endpoints(), super::super::NoLocalEndpoints::default());
    rig.step([ends(&["10.244.1.1"])]);
    let count = rig.planner.no_local_endpoints();
    assert_eq!((count.internal, count.external), (PerFamily { v4: 1, v6: 0 }, PerFamily { v4: 1, v6: 0 }));
    rig.step([slice(
        "web-1",
        "web",
        json!([{ "name": "", "port": 80 }]),
        json!([{ "addresses": ["10.244.0.1"], "nodeName": "node-a" }]),
    )]);
    assert_eq!(rig.planner.no_local_endpoints(), super::super::NoLocalEndpoints::default());
}

#[test]
fn health_checks_are_listed() {
    let mut rig = Rig::new();
    let balanced = json!({ "type": "LoadBalancer", "clusterIP": "10.0.0.1", "externalTrafficPolicy": "Local",
                           "healthCheckNodePort": 32000 });
    rig.step([service("web", balanced), service("other", json!({ "clusterIP": "10.0.0.2" }))]);
    let listed: Vec<_> =
        rig.planner.health_checks().map(|(name, check)| (name.clone(), check.port)).collect();
    assert_eq!(listed, [(named("web"), 32000)]);
    assert_eq!(rig.planner.service(&named("web")).unwrap().health_check.unwrap().local_endpoints, 0);
    rig.planner.update(&named("web"), ServicePlan::default());
    assert_eq!(rig.planner.health_checks().count(), 0);
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
    fn settling_keeps_the_set_and_moves_no_more_than_what_changed(
        before in proptest::collection::hash_set(0_u32..60, 0..40),
        after in proptest::collection::hash_set(0_u32..60, 0..40),
    ) {
        // The order before is whatever history left; hash sets iterate in an order of their own.
        let old = port_of(before.iter().copied().map(backend).collect());
        let mut new = port_of(after.iter().copied().map(backend).collect());
        new.cluster.sort_unstable();
        new.local.sort_unstable();
        let wanted = new.clone();
        new.settle(&old);
        let mut sorted = new.clone();
        sorted.cluster.sort_unstable();
        sorted.local.sort_unstable();
        proptest::prop_assert_eq!(&sorted, &wanted);
        let touched = new.cluster.iter().enumerate().filter(|(slot, now)| old.cluster.get(*slot) != Some(now));
        let (gone, come) = (before.difference(&after).count(), after.difference(&before).count());
        proptest::prop_assert!(touched.count() <= gone.max(come));
    }
}
