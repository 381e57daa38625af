//! How slices are read, stored and merged (W2, W6 to W8, E1 to E3, H2).

use serde_json::{Value, json};

use super::super::{
    Endpoint, Family, Model, ObjectName, Protocol, Slice,
    fixture::{full_slice, model, named, object, service, settings, slice},
};
use crate::model::{Change, Kind};

fn read(value: Value) -> (Option<(ObjectName, Slice)>, usize) {
    let mut problems = Vec::new();
    (Slice::read(&object(value), "node-a", &mut problems), problems.len())
}

fn one(endpoint: Value) -> Endpoint {
    let (slice, problems) = read(json!({
        "metadata": { "namespace": "ns", "name": "web-1", "labels": { "kubernetes.io/service-name": "web" } },
        "addressType": "IPv4", "endpoints": [endpoint] }));
    assert_eq!(problems, 0);
    slice.unwrap().1.endpoints[0].clone()
}

/// A model with the Service `ns/web` and these slices.
fn web(slices: impl IntoIterator<Item = Change>) -> Model {
    model(settings(), slices.into_iter().chain([service("web", json!({ "clusterIP": "10.0.0.1" }))]))
}

fn ports() -> Value {
    json!([{ "name": "http", "port": 8080 }])
}

/// The endpoints of the port `http`, each with its flags: r(eady), s(erving), t(erminating), l(ocal).
fn http(model: &Model) -> Vec<String> {
    listed(model, "http", Protocol::Tcp, Family::V4)
}

fn listed(model: &Model, port: &str, protocol: Protocol, family: Family) -> Vec<String> {
    let Some((_, endpoints)) = model.service(&named("web")) else { return Vec::new() };
    let all = endpoints.of(port, protocol, family).into_iter();
    all.map(|candidate| {
        let endpoint = candidate.endpoint;
        let flags = [
            (endpoint.ready, 'r'),
            (endpoint.serving, 's'),
            (endpoint.terminating, 't'),
            (endpoint.local, 'l'),
        ];
        let flags: String = flags.into_iter().filter(|(set, _)| *set).map(|(_, flag)| flag).collect();
        format!("{}:{} {flags}", endpoint.address, candidate.port)
    })
    .collect()
}

#[test]
fn w2_w7_slices_that_are_headless_or_without_a_service_are_ignored() {
    for (labels, kind, ours) in [
        (json!({ "kubernetes.io/service-name": "web" }), "IPv4", true),
        (json!({ "kubernetes.io/service-name": "web" }), "IPv6", true),
        (json!({ "kubernetes.io/service-name": "web" }), "FQDN", false),
        (json!({ "kubernetes.io/service-name": "web", "service.kubernetes.io/headless": "" }), "IPv4", false),
        // W2: slices of another proxy are read but not used.
        (
            json!({ "kubernetes.io/service-name": "web", "service.kubernetes.io/service-proxy-name": "x" }),
            "IPv4",
            true,
        ),
        (json!({ "kubernetes.io/service-name": "" }), "IPv4", false),
        (json!({}), "IPv4", false),
    ] {
        let value =
            json!({ "metadata": { "namespace": "ns", "name": "s", "labels": labels }, "addressType": kind });
        let (slice, problems) = read(value.clone());
        assert_eq!(slice.is_some(), ours, "{value}");
        let nameless = labels.get("kubernetes.io/service-name").is_none_or(|name| name == "");
        assert_eq!(problems > 0, nameless, "{value}");
    }
}

#[test]
fn e1_endpoints_that_name_this_node_are_local() {
    for (endpoint, local, unplaced) in [
        (json!({ "addresses": ["10.244.0.1"], "nodeName": "node-a" }), true, false),
        (json!({ "addresses": ["10.244.0.1"], "nodeName": "node-b" }), false, false),
        (json!({ "addresses": ["10.244.0.1"], "nodeName": "" }), false, true),
        (json!({ "addresses": ["10.244.0.1"] }), false, true),
    ] {
        let read = one(endpoint.clone());
        assert_eq!((read.local, read.unplaced), (local, unplaced), "{endpoint}");
    }
    let mut problems = Vec::new();
    let value = json!({ "metadata": { "labels": { "kubernetes.io/service-name": "web" } }, "addressType": "IPv4",
        "endpoints": [{ "addresses": ["10.244.0.1"], "nodeName": "" }] });
    let nameless = Slice::read(&object(value), "", &mut problems).unwrap().1;
    assert!(!nameless.endpoints[0].local, "a node without a name has no local endpoints");
}

#[test]
fn e2_missing_conditions_have_defaults() {
    for (conditions, expected) in [
        (json!(null), (true, true, false)),
        (json!({}), (true, true, false)),
        (json!({ "ready": false }), (false, true, false)),
        (json!({ "ready": false, "serving": false }), (false, false, false)),
        (json!({ "ready": false, "serving": true, "terminating": true }), (false, true, true)),
        (json!({ "ready": true, "serving": true, "terminating": true }), (true, true, true)),
    ] {
        let endpoint = one(json!({ "addresses": ["10.244.0.1"], "conditions": conditions }));
        assert_eq!((endpoint.ready, endpoint.serving, endpoint.terminating), expected, "{conditions}");
    }
}

#[test]
fn e9_hints_are_sets_and_empty_sets_count_as_missing() {
    let endpoint = one(json!({ "addresses": ["10.244.0.1"], "hints": {
        "forNodes": [{ "name": "node-b" }, { "name": "node-a" }], "forZones": [{ "name": "z" }, { "name": "a" }] } }));
    assert_eq!(endpoint.node_hint, Some(true));
    assert_eq!(endpoint.zones.unwrap().iter().map(|zone| &**zone).collect::<Vec<_>>(), ["a", "z"]);
    let endpoint =
        one(json!({ "addresses": ["10.244.0.1"], "hints": { "forNodes": [{ "name": "node-b" }] } }));
    assert_eq!((endpoint.node_hint, endpoint.zones), (Some(false), None));
    let endpoint = one(json!({ "addresses": ["10.244.0.1"], "hints": { "forNodes": [], "forZones": [] } }));
    assert_eq!((endpoint.node_hint, endpoint.zones), (None, None));
}

#[test]
fn w6_endpoints_join_by_port_name_and_protocol() {
    let ports = json!([
        { "name": "http", "port": 8080 },
        { "name": "dns", "port": 53, "protocol": "TCP" },
        { "name": "dns", "port": 5353, "protocol": "UDP" },
        { "name": "", "port": 9000, "protocol": "SCTP" },
    ]);
    let model = web([slice("web-1", "web", ports, json!([{ "addresses": ["10.244.0.1"] }]))]);
    for (port, protocol, expected) in [
        ("http", Protocol::Tcp, vec!["10.244.0.1:8080 rs"]),
        ("http", Protocol::Udp, vec![]),
        ("dns", Protocol::Tcp, vec!["10.244.0.1:53 rs"]),
        ("dns", Protocol::Udp, vec!["10.244.0.1:5353 rs"]),
        ("", Protocol::Sctp, vec!["10.244.0.1:9000 rs"]),
        ("", Protocol::Tcp, vec![]),
    ] {
        assert_eq!(listed(&model, port, protocol, Family::V4), expected, "{port} {protocol}");
        assert!(listed(&model, port, protocol, Family::V6).is_empty(), "{port} {protocol}");
    }
}

#[test]
fn w8_ports_without_name_or_number_and_endpoints_without_address_are_skipped() {
    let ports = json!([
        { "port": 1 }, { "name": "http" }, { "name": "http", "port": 0 }, { "name": "http", "port": 8080 }]);
    let endpoints = json!([{ "addresses": [] }, { "addresses": ["10.244.0.2", "10.244.0.9"] }]);
    let model = web([slice("web-1", "web", ports, endpoints)]);
    assert_eq!(http(&model), ["10.244.0.2:8080 rs"]);
    assert!(listed(&model, "", Protocol::Tcp, Family::V4).is_empty());
}

#[test]
fn w9_an_endpoint_with_a_bad_address_is_left_out() {
    let (slice, problems) = read(json!({
        "metadata": { "namespace": "ns", "name": "web-1", "labels": { "kubernetes.io/service-name": "web" } },
        "addressType": "IPv4",
        "endpoints": [{ "addresses": ["x"] }, { "addresses": ["fd00::1"] }, { "addresses": ["10.244.000.1"] }] }));
    assert_eq!(problems, 2);
    assert_eq!(slice.unwrap().1.endpoints.len(), 1);
}

#[test]
fn merged_slices_are_sorted_in_any_order_of_arrival() {
    let first = || {
        slice(
            "web-1",
            "web",
            ports(),
            json!([{ "addresses": ["10.244.0.9"], "nodeName": "node-a" },
                                               { "addresses": ["10.244.0.10"] }]),
        )
    };
    let second = || {
        slice(
            "web-2",
            "web",
            json!([{ "name": "http", "port": 9090 }]),
            json!([{ "addresses": ["10.244.0.1"] }]),
        )
    };
    let expected = ["10.244.0.1:9090 rs", "10.244.0.9:8080 rsl", "10.244.0.10:8080 rs"];
    let (forth, back) = (web([first(), second()]), web([second(), first()]));
    assert_eq!(http(&forth), expected);
    assert_eq!(http(&back), expected);
}

#[test]
fn e3_the_listing_that_is_not_terminating_and_ready_counts() {
    let ready = json!([{ "addresses": ["10.244.0.1"], "nodeName": "node-a" }]);
    let leaving = json!([{ "addresses": ["10.244.0.1"],
        "conditions": { "ready": false, "serving": true, "terminating": true } }]);
    let unready =
        json!([{ "addresses": ["10.244.0.1"], "conditions": { "ready": false, "serving": false } }]);
    for (a, b, expected) in [
        (&ready, &leaving, "10.244.0.1:8080 rsl"),
        (&leaving, &ready, "10.244.0.1:8080 rsl"),
        (&leaving, &leaving, "10.244.0.1:8080 st"),
        (&ready, &ready, "10.244.0.1:8080 rsl"),
        (&leaving, &unready, "10.244.0.1:8080 "),
    ] {
        for reverse in [false, true] {
            let mut slices =
                vec![slice("web-1", "web", ports(), a.clone()), slice("web-2", "web", ports(), b.clone())];
            if reverse {
                slices.reverse();
            }
            assert_eq!(http(&web(slices)), [expected], "{a} {b}");
        }
    }
    // If neither terminates, the ready listing counts, then the serving one, in either order.
    let silent = json!([{ "addresses": ["10.244.0.1"], "conditions": { "ready": true, "serving": false } }]);
    let serving = json!([{ "addresses": ["10.244.0.1"], "conditions": { "ready": false, "serving": true } }]);
    let gone = json!([{ "addresses": ["10.244.0.1"],
        "conditions": { "ready": false, "serving": false, "terminating": true } }]);
    for (more, less, expected) in [
        (&ready, &unready, "10.244.0.1:8080 rsl"),
        (&ready, &serving, "10.244.0.1:8080 rsl"),
        (&ready, &silent, "10.244.0.1:8080 rsl"),
        (&silent, &serving, "10.244.0.1:8080 r"),
        (&serving, &unready, "10.244.0.1:8080 s"),
        (&leaving, &gone, "10.244.0.1:8080 st"),
    ] {
        for (a, b) in [(more, less), (less, more)] {
            let slices =
                [slice("web-1", "web", ports(), a.clone()), slice("web-2", "web", ports(), b.clone())];
            assert_eq!(http(&web(slices)), [expected], "{a} {b}");
        }
    }
    // An endpoint with another port number is another endpoint.
    let other = slice("web-2", "web", json!([{ "name": "http", "port": 8081 }]), ready.clone());
    assert_eq!(http(&web([slice("web-1", "web", ports(), ready), other])).len(), 2);
}

#[test]
fn slices_can_change_be_deleted_and_move_to_another_service() {
    let endpoints = |ip: &str| json!([{ "addresses": [ip] }]);
    let mut model = web([slice("web-1", "web", ports(), endpoints("10.244.0.1"))]);
    model.apply(service("api", json!({ "clusterIP": "10.0.0.2" })));
    let dirty =
        |model: &mut Model| -> Vec<String> { model.take_dirty().iter().map(ToString::to_string).collect() };
    dirty(&mut model);

    model.apply(slice("web-1", "web", ports(), endpoints("10.244.0.1")));
    assert!(dirty(&mut model).is_empty(), "an equal slice changes nothing");

    model.apply(slice("web-1", "web", ports(), endpoints("10.244.0.2")));
    assert_eq!(dirty(&mut model), ["ns/web"]);
    assert_eq!(http(&model), ["10.244.0.2:8080 rs"]);

    model.apply(slice("web-1", "api", ports(), endpoints("10.244.0.2")));
    assert_eq!(dirty(&mut model), ["ns/api", "ns/web"]);
    assert!(http(&model).is_empty());

    model.apply(Change::Delete(Kind::EndpointSlice, named("web-1")));
    assert_eq!(dirty(&mut model), ["ns/api"]);
    model.apply(Change::Delete(Kind::EndpointSlice, named("web-1")));
    assert!(dirty(&mut model).is_empty());
}

#[test]
fn w2_a_slice_that_becomes_headless_loses_its_endpoints() {
    let mut model = web([slice("web-1", "web", ports(), json!([{ "addresses": ["10.244.0.1"] }]))]);
    model.take_dirty();
    model.apply(full_slice(json!({
        "metadata": { "namespace": "ns", "name": "web-1", "labels": {
            "kubernetes.io/service-name": "web", "service.kubernetes.io/headless": "" } },
        "addressType": "IPv4", "ports": ports(), "endpoints": [{ "addresses": ["10.244.0.1"] }] })));
    assert_eq!(model.take_dirty(), [named("web")]);
    assert!(http(&model).is_empty());
}

#[test]
fn h2_local_ready_addresses_count_once_over_all_ports() {
    let two_ports =
        json!([{ "name": "http", "port": 8080 }, { "name": "dns", "port": 53, "protocol": "UDP" }]);
    let here = |ip: &str, ready: bool, terminating: bool| {
        json!({ "addresses": [ip], "nodeName": "node-a",
                "conditions": { "ready": ready, "serving": true, "terminating": terminating } })
    };
    for (slices, expected) in [
        (vec![], 0),
        (vec![slice("a", "web", two_ports.clone(), json!([here("10.244.0.1", true, false)]))], 1),
        (
            vec![
                slice("a", "web", two_ports.clone(), json!([here("10.244.0.1", true, false)])),
                slice(
                    "b",
                    "web",
                    ports(),
                    json!([here("10.244.0.1", true, false), here("10.244.0.2", true, false)]),
                ),
            ],
            2,
        ),
        (vec![slice("a", "web", ports(), json!([{ "addresses": ["10.244.0.1"], "nodeName": "node-b" }]))], 0),
        (vec![slice("a", "web", ports(), json!([here("10.244.0.1", false, true)]))], 0),
        (vec![slice("a", "web", json!([]), json!([here("10.244.0.1", true, false)]))], 0),
    ] {
        let model = web(slices);
        let (_, endpoints) = model.service(&named("web")).unwrap();
        assert_eq!(endpoints.local_ready(Family::V4), expected);
        assert_eq!(endpoints.local_ready(Family::V6), 0);
    }
}

#[test]
fn an_endpoint_is_small_because_a_cluster_has_many() {
    // 10,000 Services with five endpoints each must fit in 15 MiB, with everything around them.
    assert!(size_of::<Endpoint>() <= 40);
    assert!(size_of::<super::super::Service>() <= 200);
}

proptest::proptest! {
    /// The result does not depend on how endpoints are spread over slices and ports.
    #[test]
    fn h2_local_ready_counts_endpoints_that_are_ready_for_any_port(
        slices in proptest::collection::vec(
            (
                proptest::collection::vec((0..3_u8, 1..3_u16), 0..3),
                proptest::collection::vec((0..3_u8, 0..16_u8), 0..4),
            ),
            1..4,
        )
    ) {
        let slices = slices.iter().enumerate().map(|(at, (ports, endpoints))| {
            let ports = ports.iter().map(|(name, port)| json!({ "name": name.to_string(), "port": port }));
            let endpoints = endpoints.iter().map(|(address, flags)| json!({
                "addresses": [format!("10.1.0.{address}")],
                "nodeName": if flags & 1 == 0 { "node-a" } else { "node-b" },
                "conditions": { "ready": flags & 2 == 0, "terminating": flags & 4 == 0, "serving": flags & 8 == 0 },
            }));
            slice(&format!("web-{at}"), "web", ports.collect(), endpoints.collect())
        });
        let model = web(slices);
        let (_, endpoints) = model.service(&named("web")).unwrap();
        let mut wanted = std::collections::BTreeSet::new();
        for name in ["0", "1", "2"] {
            let candidates = endpoints.of(name, Protocol::Tcp, Family::V4).into_iter();
            let local = candidates.filter(|candidate| candidate.endpoint.local && candidate.endpoint.ready);
            wanted.extend(local.map(|candidate| candidate.endpoint.address));
        }
        proptest::prop_assert_eq!(endpoints.local_ready(Family::V4), wanted.len());
    }
}
