//! This node: addresses, zone, pod networks, eligibility, and the Services that a change of it affects.

use serde_json::{Value, json};

use super::super::{
    DetectLocal, LocalTraffic, Model, NodePortSetting, Settings,
    fixture::{model, named, node, service, service_cidr, settings, slice},
};
use crate::model::{Change, Kind};

fn node_a(labels: Value, spec: Value, addresses: Value) -> Change {
    node(json!({ "metadata": { "name": "node-a", "labels": labels }, "spec": spec,
                 "status": { "addresses": addresses } }))
}

#[test]
fn internal_node_ips_go_before_external_ones_and_the_bind_address_overrides_them() {
    let internal = |ip: &str| json!({ "type": "InternalIP", "address": ip });
    let external = |ip: &str| json!({ "type": "ExternalIP", "address": ip });
    for (bind, addresses, v4, v6) in [
        (None, json!([]), "127.0.0.1", "::1"),
        (None, json!([internal("192.0.2.1")]), "192.0.2.1", "::1"),
        (None, json!([internal("2001:db8::1")]), "127.0.0.1", "2001:db8::1"),
        (None, json!([internal("192.0.2.1"), internal("2001:db8::1")]), "192.0.2.1", "2001:db8::1"),
        (None, json!([external("198.51.100.1"), internal("192.0.2.1")]), "192.0.2.1", "::1"),
        (None, json!([external("198.51.100.1")]), "198.51.100.1", "::1"),
        (None, json!([internal("192.0.2.1"), internal("192.0.2.2")]), "192.0.2.1", "::1"),
        (None, json!([{ "type": "Hostname", "address": "192.0.2.9" }]), "127.0.0.1", "::1"),
        (Some("192.0.2.7"), json!([internal("192.0.2.1")]), "192.0.2.7", "::1"),
        (Some("2001:db8::7"), json!([internal("192.0.2.1")]), "192.0.2.1", "2001:db8::7"),
        (Some("192.0.2.7"), json!([internal("2001:db8::1")]), "192.0.2.7", "2001:db8::1"),
        (Some("0.0.0.0"), json!([internal("192.0.2.1")]), "192.0.2.1", "::1"),
        (Some("::"), json!([internal("192.0.2.1"), internal("2001:db8::1")]), "192.0.2.1", "2001:db8::1"),
    ] {
        let settings = Settings { bind_address: bind.map(|ip| ip.parse().unwrap()), ..settings() };
        let model = model(settings, [node_a(json!({}), json!({}), addresses.clone())]);
        let found = model.node_view().addresses;
        assert_eq!(
            (found.v4.to_string(), found.v6.to_string()),
            (v4.into(), v6.into()),
            "{bind:?} {addresses}"
        );
    }
}

#[test]
fn w3_other_nodes_are_ignored() {
    let model = model(
        settings(),
        [node(json!({ "metadata": { "name": "node-b", "labels": {
        "topology.kubernetes.io/zone": "z" } } }))],
    );
    assert_eq!(&*model.node_view().zone, "");
    assert!(!model.node_eligible());
}

#[test]
fn local_pods_are_recognized_in_four_ways() {
    let source = |net: &str| Some(LocalTraffic::Source(net.parse().unwrap()));
    let nets = |nets: &[&str]| nets.iter().map(|net| net.parse().unwrap()).collect();
    let bridge = Some(LocalTraffic::Interface("cni0".to_owned()));
    let prefix = Some(LocalTraffic::InterfacePrefix("veth".to_owned()));
    let cidr = |list: &[&str]| DetectLocal::ClusterCidr(nets(list));
    for (detect, pod_cidrs, v4, v6) in [
        (cidr(&[]), json!([]), None, None),
        (cidr(&["10.0.0.0/8"]), json!([]), source("10.0.0.0/8"), None),
        (cidr(&["fd00::/8"]), json!(["10.1.0.0/24"]), None, source("fd00::/8")),
        (cidr(&["10.0.0.0/8", "fd00::/8"]), json!([]), source("10.0.0.0/8"), source("fd00::/8")),
        // Only the first of each family counts.
        (cidr(&["10.0.0.0/8", "11.0.0.0/8"]), json!([]), source("10.0.0.0/8"), None),
        (DetectLocal::NodeCidr, json!([]), None, None),
        (
            DetectLocal::NodeCidr,
            json!(["10.1.0.0/24", "bad", "fd01::/64", "10.2.0.0/24"]),
            source("10.1.0.0/24"),
            source("fd01::/64"),
        ),
        (DetectLocal::Bridge("cni0".to_owned()), json!([]), bridge.clone(), bridge),
        (DetectLocal::InterfacePrefix("veth".to_owned()), json!([]), prefix.clone(), prefix),
        (DetectLocal::Bridge(String::new()), json!([]), None, None),
    ] {
        let settings = Settings { detect_local: detect.clone(), ..settings() };
        let model = model(settings, [node_a(json!({}), json!({ "podCIDRs": pod_cidrs }), json!([]))]);
        let found = &model.node_view().local_traffic;
        assert_eq!((&found.v4, &found.v6), (&v4, &v6), "{detect:?}");
    }
}

#[test]
fn p3_a_node_that_will_be_removed_is_not_eligible() {
    let mut model = model(settings(), []);
    assert!(!model.node_eligible(), "unknown");
    model.apply(node_a(
        json!({}),
        json!({ "taints": [{ "key": "other", "effect": "NoSchedule" }] }),
        json!([]),
    ));
    assert!(model.node_eligible());
    let taint =
        json!({ "taints": [{ "key": "ToBeDeletedByClusterAutoscaler", "effect": "PreferNoSchedule" }] });
    model.apply(node_a(json!({}), taint, json!([])));
    assert!(!model.node_eligible());
    model.apply(node(
        json!({ "metadata": { "name": "node-a", "deletionTimestamp": "2026-01-01T00:00:00Z" } }),
    ));
    assert!(!model.node_eligible());
    model.apply(node_a(json!({}), json!({}), json!([])));
    assert!(model.node_eligible());
    model.apply(Change::Delete(Kind::Node, crate::model::ObjectName::new("", "node-a")));
    assert!(!model.node_eligible());
}

/// A model with a plain Service, one with zone hints and one with source ranges. No Service is dirty.
fn model_of_three() -> Model {
    let ports = json!([{ "name": "", "port": 80 }]);
    let mut model = model(
        settings(),
        [
            service("plain", json!({ "clusterIP": "10.0.0.1" })),
            service("hinted", json!({ "clusterIP": "10.0.0.2" })),
            service(
                "guarded",
                json!({ "clusterIP": "10.0.0.3", "loadBalancerSourceRanges": ["192.0.2.0/24"] }),
            ),
            slice(
                "hinted-1",
                "hinted",
                ports.clone(),
                json!([
            { "addresses": ["10.244.0.1"], "hints": { "forZones": [{ "name": "a" }] } }]),
            ),
            slice("plain-1", "plain", ports, json!([{ "addresses": ["10.244.0.2"] }])),
            node_a(json!({}), json!({}), json!([])),
        ],
    );
    model.take_dirty();
    model
}

#[test]
fn e11_a_change_of_the_node_marks_the_services_that_depend_on_it() {
    let address = json!([{ "type": "InternalIP", "address": "192.0.2.1" }]);
    let zone = json!({ "topology.kubernetes.io/zone": "a" });
    let mut model = model_of_three();
    model.apply(node_a(json!({ "other": "label" }), json!({ "unschedulable": true }), json!([])));
    assert_eq!(model.take_dirty(), []);
    model.apply(node_a(zone.clone(), json!({}), json!([])));
    assert_eq!(model.take_dirty(), [named("hinted")]);
    model.apply(node_a(zone.clone(), json!({}), address.clone()));
    assert_eq!(model.take_dirty(), [named("guarded")]);
    model.apply(node_a(zone, json!({}), address));
    assert_eq!(model.take_dirty(), []);
}

#[test]
fn a_new_pod_network_marks_every_service() {
    let settings = Settings { detect_local: DetectLocal::NodeCidr, ..settings() };
    let mut model = model(settings, [service("web", json!({ "clusterIP": "10.0.0.1" }))]);
    model.take_dirty();
    model.apply(node_a(json!({}), json!({ "podCIDRs": ["10.1.0.0/24"] }), json!([])));
    assert_eq!(model.take_dirty(), [named("web")]);
}

#[test]
fn the_model_is_synced_once_every_needed_kind_is_listed() {
    let modes = [
        (NodePortSetting::ALL, DetectLocal::ClusterCidr(Vec::new()), false),
        (NodePortSetting::PRIMARY, DetectLocal::ClusterCidr(Vec::new()), true),
        (NodePortSetting::ALL, DetectLocal::NodeCidr, true),
    ];
    for (node_port_addresses, detect_local, needs_node) in modes {
        let mut model = Model::new(Settings { node_port_addresses, detect_local, ..settings() });
        assert!(!model.is_synced());
        model.apply(Change::Synced(Kind::Service));
        model.apply(Change::Synced(Kind::Service));
        assert!(!model.is_synced());
        model.apply(Change::Synced(Kind::EndpointSlice));
        assert_eq!(model.is_synced(), !needs_node);
        model.apply(Change::Synced(Kind::Node));
        assert!(model.is_synced(), "the list of Nodes may be empty");
    }
}

#[test]
fn w3_a_service_cidr_counts_until_it_is_deleted() {
    let mut model = model(
        settings(),
        [
            service_cidr("kubernetes", json!(["10.96.0.0/12", "nonsense"])),
            service_cidr("more", json!(["fd00:96::/112"])),
        ],
    );
    assert_eq!(model.service_cidrs().count(), 2);
    model.apply(Change::Delete(Kind::ServiceCidr, crate::model::ObjectName::new("", "kubernetes")));
    let left: Vec<String> = model.service_cidrs().map(|cidr| cidr.to_string()).collect();
    assert_eq!(left, ["fd00:96::/112"]);
}
