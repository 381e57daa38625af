//! Which endpoints are in an answer when endpoints change, and in which order.

use serde_json::{Value, json};

use super::*;
use crate::{
    fixture::{full_slice, named, node, service},
    model::{Change, Kind},
};

fn slice(name: &str, endpoints: Value) -> Change {
    full_slice(json!({
        "metadata": { "namespace": "ns", "name": name, "labels": { "kubernetes.io/service-name": "db" } },
        "addressType": "IPv4", "ports": [{ "name": "sql", "port": 1 }], "endpoints": endpoints,
    }))
}

fn headless(more: Value) -> Change {
    let mut spec = json!({ "clusterIP": "None", "ports": [{ "name": "sql", "port": 1 }] });
    spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    service("db", spec)
}

fn addresses(names: &Names, topology: bool, rotation: u32) -> Vec<String> {
    let zone = Zone { topology, ..zone() };
    match resolve_in(names, &zone, "db.ns.svc.cluster.local.", RecordType::A, rotation) {
        Resolution::Answer(answer) => answer.answers.iter().map(|record| record.data.to_string()).collect(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn publish_not_ready_addresses_includes_all_endpoints() {
    let endpoints = json!([{ "addresses": ["10.1.0.1"], "conditions": { "ready": false } }, { "addresses": ["10.1.0.2"] }]);
    let ready = names([headless(json!({})), slice("a", endpoints.clone())]);
    assert_eq!(addresses(&ready, false, 0), ["10.1.0.2"]);
    let all = names([headless(json!({ "publishNotReadyAddresses": true })), slice("a", endpoints)]);
    assert_eq!(addresses(&all, false, 0), ["10.1.0.1", "10.1.0.2"]);
}

#[test]
fn each_endpoint_is_the_first_in_turn() {
    let names = names([
        headless(json!({})),
        slice(
            "a",
            json!([{ "addresses": ["10.1.0.1"] }, { "addresses": ["10.1.0.2"] }, { "addresses": ["10.1.0.3"] }]),
        ),
    ]);
    let first: Vec<String> = (0..4).map(|rotation| addresses(&names, false, rotation).remove(0)).collect();
    assert_eq!(first, ["10.1.0.1", "10.1.0.2", "10.1.0.3", "10.1.0.1"]);
    assert_eq!(addresses(&names, false, 2), ["10.1.0.3", "10.1.0.1", "10.1.0.2"]);
}

#[test]
fn names_follow_services_and_slices_in_any_order() {
    let one = || slice("a", json!([{ "addresses": ["10.1.0.1"] }, { "addresses": ["10.1.0.2"] }]));
    let other = || slice("b", json!([{ "addresses": ["10.1.0.2"] }, { "addresses": ["10.1.0.3"] }]));
    let mut known = names([one(), other(), headless(json!({}))]);
    assert_eq!(addresses(&known, false, 0), ["10.1.0.1", "10.1.0.2", "10.1.0.3"]);
    let pointer =
        |names: &Names, ip: &str| lines(names, &format!("{ip}.1.10.in-addr.arpa."), "PTR").join(" ");
    assert!(pointer(&known, "2.0").contains("10-1-0-2.db.ns.svc"));
    known.apply(&Change::Delete(Kind::EndpointSlice, named("a")));
    assert_eq!(addresses(&known, false, 0), ["10.1.0.2", "10.1.0.3"]);
    assert!(pointer(&known, "2.0").contains("10-1-0-2.db.ns.svc"), "the other slice still has it");
    assert_eq!(pointer(&known, "1.0"), "elsewhere");
    known.apply(&service("db", json!({ "clusterIP": "10.0.0.9", "ports": [{ "port": 1 }] })));
    assert_eq!(addresses(&known, false, 0), ["10.0.0.9"]);
    assert_eq!(pointer(&known, "2.0"), "elsewhere", "it is no longer headless");
    known.apply(&Change::Delete(Kind::Service, named("db")));
    known.apply(&Change::Delete(Kind::EndpointSlice, named("b")));
    assert_eq!(lines(&known, "db.ns.svc.cluster.local.", "A"), ["NXDOMAIN"]);
    assert!(!known.has_namespace("ns") && known.get("ns/db").is_none());
}

#[test]
fn answers_have_near_endpoints_only_if_the_service_and_the_operator_ask_for_it() {
    let zone = json!({ "metadata": { "name": "node-a", "labels": { "topology.kubernetes.io/zone": "z1" } } });
    let endpoints = || {
        slice(
            "a",
            json!([
                { "addresses": ["10.1.0.1"], "zone": "z2", "nodeName": "node-b" },
                { "addresses": ["10.1.0.2"], "zone": "z1", "nodeName": "node-c" },
                { "addresses": ["10.1.0.3"], "zone": "z1", "nodeName": "node-a" },
            ]),
        )
    };
    let with = |distribution: &str, more: Option<Change>| {
        let service = headless(json!({ "trafficDistribution": distribution }));
        names([service, endpoints(), node(zone.clone())].into_iter().chain(more))
    };
    assert_eq!(addresses(&with("PreferClose", None), true, 0), ["10.1.0.2", "10.1.0.3"]);
    assert_eq!(addresses(&with("PreferSameZone", None), true, 0), ["10.1.0.2", "10.1.0.3"]);
    assert_eq!(addresses(&with("PreferSameNode", None), true, 0), ["10.1.0.3"]);
    assert_eq!(addresses(&with("PreferSameNode", None), false, 0).len(), 3, "--dns-topology is off");
    let far = slice("a", json!([{ "addresses": ["10.1.0.1"], "zone": "z2" }]));
    assert_eq!(addresses(&with("PreferClose", Some(far)), true, 0), ["10.1.0.1"], "far is better than none");
}

#[test]
fn endpoints_of_a_service_with_a_cluster_ip_have_names_of_their_own_too() {
    let names = names([
        service("db", json!({ "clusterIP": "10.0.0.9", "ports": [{ "name": "sql", "port": 1 }] })),
        slice("a", json!([{ "addresses": ["10.1.0.1"], "hostname": "x" }])),
    ]);
    assert_eq!(
        lines(&names, "x.db.ns.svc.cluster.local.", "A"),
        ["x.db.ns.svc.cluster.local. 5 IN A 10.1.0.1"]
    );
}
