//! How Services are read (W1, W4, W5, W9, R10, R11, E5, A1, H1), and which changes mark them.

use std::{net::IpAddr, time::Duration};

use serde_json::{Value, json};

use super::super::{
    Family, Model, PerFamily, Problem, Removal, Service, Settings,
    fixture::{full_service, model, named, object, service, settings, slice},
};
use crate::model::{Change, Kind};

fn read_with(settings: &Settings, value: Value) -> (Option<Service>, Vec<Problem>) {
    let mut problems = Vec::new();
    (Service::read(&object(value), settings, &mut problems), problems)
}

fn read(spec: Value) -> Service {
    let (service, problems) = read_with(&settings(), json!({ "metadata": { "name": "web" }, "spec": spec }));
    assert_eq!(problems, []);
    service.expect("the Service is served")
}

fn ips(texts: &[&str]) -> Vec<IpAddr> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

#[test]
fn w1_a_service_of_another_proxy_is_skipped_whatever_the_labels_value() {
    for label in ["", "other"] {
        let value = json!({
            "metadata": { "name": "web", "labels": { "service.kubernetes.io/service-proxy-name": label } },
            "spec": { "clusterIP": "10.0.0.1" },
        });
        assert_eq!(read_with(&settings(), value).0, None, "{label:?}");
    }
}

#[test]
fn w4_services_without_a_virtual_address_are_skipped() {
    for (spec, served) in [
        (json!({ "clusterIP": "10.0.0.1" }), true),
        (json!({ "clusterIP": "None" }), false),
        (json!({ "clusterIP": "" }), false),
        (json!({}), false),
        (json!({ "type": "ExternalName", "externalName": "example.org" }), false),
        (json!({ "type": "ExternalName", "clusterIP": "10.0.0.1" }), false),
        (json!({ "type": "NodePort", "clusterIP": "10.0.0.1" }), true),
        (json!({ "type": "LoadBalancer", "clusterIP": "None" }), false),
    ] {
        let value = json!({ "metadata": { "name": "web" }, "spec": spec });
        assert_eq!(read_with(&settings(), value.clone()).0.is_some(), served, "{value}");
    }
}

#[test]
fn w5_a_cluster_ip_belongs_to_the_family_at_its_index() {
    let v4 = Some("10.0.0.1");
    let v6 = Some("fd00::1");
    for (spec, expected) in [
        (json!({ "clusterIP": "10.0.0.1" }), (v4, None)),
        (json!({ "clusterIP": "fd00::1" }), (None, v6)),
        (json!({ "clusterIP": "10.0.0.1", "clusterIPs": ["10.0.0.1"], "ipFamilies": ["IPv4"] }), (v4, None)),
        (json!({ "clusterIP": "fd00::1", "clusterIPs": ["fd00::1"], "ipFamilies": ["IPv6"] }), (None, v6)),
        (
            json!({ "clusterIP": "10.0.0.1", "clusterIPs": ["10.0.0.1", "fd00::1"], "ipFamilies": ["IPv4", "IPv6"] }),
            (v4, v6),
        ),
        (
            json!({ "clusterIP": "fd00::1", "clusterIPs": ["fd00::1", "10.0.0.1"], "ipFamilies": ["IPv6", "IPv4"] }),
            (v4, v6),
        ),
        // Without ipFamilies only clusterIP counts.
        (json!({ "clusterIP": "10.0.0.1", "clusterIPs": ["10.0.0.1", "fd00::1"] }), (v4, None)),
        // W9: leading zeros are accepted.
        (json!({ "clusterIP": "010.000.0.1" }), (v4, None)),
    ] {
        let found = read(spec.clone()).cluster_ips;
        let expected = PerFamily {
            v4: expected.0.map(|ip| ip.parse().unwrap()),
            v6: expected.1.map(|ip| ip.parse().unwrap()),
        };
        assert_eq!(found, expected, "{spec}");
    }
}

#[test]
fn w5_a_service_without_a_served_family_is_skipped() {
    let only_v6 = Settings { families: PerFamily { v4: false, v6: true }, ..settings() };
    let single = json!({ "metadata": { "name": "web" }, "spec": { "clusterIP": "10.0.0.1" } });
    assert_eq!(read_with(&only_v6, single).0, None);
    let dual = json!({ "metadata": { "name": "web" }, "spec": {
        "clusterIP": "10.0.0.1", "clusterIPs": ["10.0.0.1", "fd00::1"], "ipFamilies": ["IPv4", "IPv6"] } });
    let families: Vec<Family> = read_with(&only_v6, dual).0.unwrap().families().collect();
    assert_eq!(families, [Family::V6]);
}

#[test]
fn w5_an_address_of_the_wrong_family_is_a_problem() {
    let (service, problems) = read_with(
        &settings(),
        json!({ "metadata": { "name": "web" }, "spec": {
            "clusterIP": "10.0.0.1", "clusterIPs": ["10.0.0.1", "10.0.0.2"], "ipFamilies": ["IPv4", "IPv6"] } }),
    );
    assert_eq!(service.unwrap().cluster_ips.v6, None);
    assert_eq!(problems[0].field, "spec.clusterIPs[1]");
}

#[test]
fn w9_wrong_addresses_and_ranges_are_problems_and_the_rest_is_kept() {
    let (service, problems) = read_with(
        &settings(),
        json!({
            "metadata": { "name": "web" },
            "spec": {
                "type": "LoadBalancer", "clusterIP": "10.0.0.1",
                "externalIPs": ["192.0.2.9", "nonsense", "192.0.2.010"],
                "loadBalancerSourceRanges": [" 203.0.113.000/025 ", "203.0.113.1", "2001:db8::/32"],
                "ports": [{ "port": 80 }, { "port": 81, "name": "b", "protocol": "ICMP" }, { "port": 0, "name": "c" },
                          { "port": 82 }],
            },
            "status": { "loadBalancer": { "ingress": [{ "ip": "198.51.100.1" }, { "ip": "bad" }] } },
        }),
    );
    let service = service.unwrap();
    assert_eq!(*service.external_ips, ips(&["192.0.2.9", "192.0.2.10"]));
    assert_eq!(*service.load_balancer_ips, ips(&["198.51.100.1"]));
    let ranges: Vec<String> = service.source_ranges.iter().map(ToString::to_string).collect();
    assert_eq!(ranges, ["203.0.113.0/25", "2001:db8::/32"]);
    assert_eq!(service.ports.len(), 1);
    let fields: Vec<&str> = problems.iter().map(|problem| problem.field.as_str()).collect();
    assert_eq!(
        fields,
        [
            "spec.externalIPs[1]",
            "status.loadBalancer.ingress[1].ip",
            "spec.loadBalancerSourceRanges[1]",
            "spec.ports[1].protocol",
            "spec.ports[2].port",
            "spec.ports[3].name",
        ]
    );
}

#[test]
fn r10_external_ips_can_be_switched_off() {
    let off = Settings { external_ips: false, ..settings() };
    let value = json!({ "metadata": { "name": "web" }, "spec": { "clusterIP": "10.0.0.1", "externalIPs": ["192.0.2.1"] } });
    assert_eq!(*read_with(&settings(), value.clone()).0.unwrap().external_ips, ips(&["192.0.2.1"]));
    assert!(read_with(&off, value).0.unwrap().external_ips.is_empty());
}

#[test]
fn r11_only_addresses_whose_traffic_the_node_delivers_are_served() {
    let (service, problems) = read_with(
        &settings(),
        json!({
            "metadata": { "name": "web" },
            "spec": { "type": "LoadBalancer", "clusterIP": "10.0.0.1" },
            "status": { "loadBalancer": { "ingress": [
                { "ip": "198.51.100.1" },
                { "ip": "198.51.100.2", "ipMode": "VIP" },
                { "ip": "198.51.100.3", "ipMode": "Proxy" },
                { "hostname": "lb.example.org" },
                { "ip": "2001:db8::9" },
            ] } },
        }),
    );
    assert_eq!(problems, []);
    assert_eq!(*service.unwrap().load_balancer_ips, ips(&["198.51.100.1", "198.51.100.2", "2001:db8::9"]));
}

#[test]
fn e5_policies_count_only_for_types_that_have_them() {
    for (spec, internal, external) in [
        (json!({}), false, false),
        (json!({ "internalTrafficPolicy": "Local" }), true, false),
        (json!({ "internalTrafficPolicy": "Cluster" }), false, false),
        (json!({ "externalTrafficPolicy": "Local" }), false, false),
        (json!({ "externalTrafficPolicy": "Local", "externalIPs": ["192.0.2.1"] }), false, true),
        (json!({ "externalTrafficPolicy": "Local", "type": "NodePort" }), false, true),
        (json!({ "externalTrafficPolicy": "Local", "type": "LoadBalancer" }), false, true),
        (json!({ "externalTrafficPolicy": "Cluster", "type": "LoadBalancer" }), false, false),
    ] {
        let mut full = spec.clone();
        full["clusterIP"] = json!("10.0.0.1");
        let service = read(full);
        assert_eq!((service.internal_local, service.external_local), (internal, external), "{spec}");
    }
}

#[test]
fn a1_affinity_is_by_client_address_with_a_default_timeout() {
    for (spec, seconds) in [
        (json!({}), None),
        (json!({ "sessionAffinity": "None" }), None),
        (json!({ "sessionAffinity": "ClientIP" }), Some(10_800)),
        (
            json!({ "sessionAffinity": "ClientIP", "sessionAffinityConfig": { "clientIP": { "timeoutSeconds": 7 } } }),
            Some(7),
        ),
        (json!({ "sessionAffinityConfig": { "clientIP": { "timeoutSeconds": 7 } } }), None),
    ] {
        let mut full = spec.clone();
        full["clusterIP"] = json!("10.0.0.1");
        assert_eq!(read(full).affinity, seconds, "{spec}");
    }
}

#[test]
fn h1_the_health_check_port_needs_a_load_balancer_with_local_policy() {
    for (kind, policy, port, expected) in [
        ("LoadBalancer", "Local", 30_000, Some(30_000)),
        ("LoadBalancer", "Local", 0, None),
        ("LoadBalancer", "Cluster", 30_000, None),
        ("NodePort", "Local", 30_000, None),
        ("ClusterIP", "Local", 30_000, None),
    ] {
        let service = read(json!({
            "clusterIP": "10.0.0.1", "type": kind, "externalTrafficPolicy": policy, "healthCheckNodePort": port }));
        assert_eq!(service.health_check_port, expected, "{kind} {policy} {port}");
    }
}

#[test]
fn a_service_without_a_creation_time_counts_as_the_youngest() {
    let value = json!({
        "metadata": { "name": "web", "creationTimestamp": "1970-01-01T00:01:00Z" },
        "spec": { "clusterIP": "10.0.0.1" } });
    assert_eq!(read_with(&settings(), value).0.unwrap().created, 60);
    assert_eq!(read(json!({ "clusterIP": "10.0.0.1" })).created, i64::MAX);
}

/// A Service with this annotation.
fn on_removal(text: &str) -> Value {
    json!({ "metadata": { "namespace": "ns", "name": "web",
            "annotations": { "weir.dev/on-backend-removal": text, "other.dev/on-backend-removal": "reset" } },
        "spec": { "clusterIP": "10.0.0.1" } })
}

#[test]
fn the_removal_annotation_decides_whether_and_when_connections_are_reset() {
    let reset = |seconds| Removal::Reset { after: Duration::from_secs(seconds) };
    for (text, expected) in [
        ("keep", Removal::Keep),
        ("reset", reset(0)),
        ("reset-after=30s", reset(30)),
        ("reset-after=1h30m", reset(5400)),
        ("reset-after=0", reset(0)),
    ] {
        let (service, problems) = read_with(&settings(), on_removal(text));
        assert_eq!((service.unwrap().on_removal, problems), (expected, vec![]), "{text}");
    }
    assert_eq!(read(json!({ "clusterIP": "10.0.0.1" })).on_removal, Removal::Keep);
}

#[test]
fn w9_a_wrong_removal_annotation_is_a_problem_and_keeps_connections() {
    for text in ["", "Reset", "reset-after", "reset-after=", "reset-after=30", "reset-after=-5s", "close"] {
        let (service, problems) = read_with(&settings(), on_removal(text));
        assert_eq!(service.unwrap().on_removal, Removal::Keep, "{text}");
        let [Problem { field, value, reason }] = &problems[..] else { panic!("{text}: {problems:?}") };
        assert_eq!(field, "metadata.annotations[weir.dev/on-backend-removal]");
        assert_eq!((&**value, *reason), (text, "not one of keep, reset and reset-after=30s"));
    }
}

#[test]
fn a_changed_removal_annotation_marks_the_service() {
    let mut model = model(settings(), [full_service(on_removal("keep"))]);
    assert_eq!(dirty(&mut model), ["ns/web"]);
    model.apply(full_service(on_removal("reset")));
    assert_eq!(dirty(&mut model), ["ns/web"]);
}

fn dirty(model: &mut Model) -> Vec<String> {
    model.take_dirty().iter().map(ToString::to_string).collect()
}

#[test]
fn a_service_is_marked_when_it_is_new_changes_or_is_deleted() {
    let mut model =
        model(settings(), [service("web", json!({ "clusterIP": "10.0.0.1", "ports": [{ "port": 80 }] }))]);
    assert_eq!(dirty(&mut model), ["ns/web"]);

    // A field that weir does not read makes no difference.
    model.apply(full_service(json!({
        "metadata": { "namespace": "ns", "name": "web", "labels": { "new": "label" }, "annotations": { "a": "b" } },
        "spec": { "clusterIP": "10.0.0.1", "selector": { "app": "web" }, "ports": [{ "port": 80 }] },
    })));
    assert_eq!(dirty(&mut model), Vec::<String>::new());

    model.apply(service("web", json!({ "clusterIP": "10.0.0.1", "ports": [{ "port": 81 }] })));
    assert_eq!(dirty(&mut model), ["ns/web"]);

    model.apply(Change::Delete(Kind::Service, named("web")));
    assert_eq!(dirty(&mut model), ["ns/web"]);
    model.apply(Change::Delete(Kind::Service, named("web")));
    assert_eq!(dirty(&mut model), Vec::<String>::new());
    assert_eq!(model.service_names().count(), 0);
}

#[test]
fn w4_a_service_can_become_headless_or_external_and_change_back() {
    for spec in
        [json!({ "clusterIP": "None" }), json!({ "type": "ExternalName", "externalName": "example.org" })]
    {
        let mut model = model(settings(), [service("web", json!({ "clusterIP": "10.0.0.1" }))]);
        model.take_dirty();
        model.apply(service("web", spec.clone()));
        assert_eq!(dirty(&mut model), ["ns/web"], "{spec}");
        assert_eq!(model.service(&named("web")), None);
        model.apply(service("web", json!({ "clusterIP": "10.0.0.2" })));
        assert_eq!(dirty(&mut model), ["ns/web"], "{spec}");
    }
}

#[test]
fn w2_slices_mark_no_service_until_their_service_arrives() {
    let ports = json!([{ "name": "", "port": 8080 }]);
    let mut model =
        model(settings(), [slice("web-1", "web", ports, json!([{ "addresses": ["10.244.0.1"] }]))]);
    assert_eq!(dirty(&mut model), Vec::<String>::new());
    model.apply(service("web", json!({ "clusterIP": "10.0.0.1", "ports": [{ "port": 80 }] })));
    assert_eq!(dirty(&mut model), ["ns/web"]);
    let (_, endpoints) = model.service(&named("web")).unwrap();
    assert!(!endpoints.is_empty());

    // A Service may be deleted and created while its slices stay.
    model.apply(Change::Delete(Kind::Service, named("web")));
    model.apply(service("web", json!({ "clusterIP": "10.0.0.1", "ports": [{ "port": 80 }] })));
    assert!(!model.service(&named("web")).unwrap().1.is_empty());
}

#[test]
fn unusable_addresses_are_left_out_and_the_rest_of_the_service_works() {
    let (service, problems) = read_with(
        &settings(),
        json!({
            "metadata": { "name": "web", "uid": "0b3c1f2e-0000-4abc-8def-00000000000a" },
            "spec": {
                "clusterIP": "10.0.0.1", "clusterIPs": ["10.0.0.1", "::1"], "ipFamilies": ["IPv4", "IPv6"],
                "type": "LoadBalancer", "ports": [{ "port": 80 }],
                "externalIPs": ["192.0.2.1", "0.0.0.0", "169.254.169.254", "224.0.0.1", "::ffff:127.0.0.1"],
            },
            "status": { "loadBalancer": { "ingress": [
                { "ip": "127.0.0.1" }, { "ip": "198.51.100.1" }, { "ip": "::" }, { "ip": "fe80::1" },
                { "ip": "255.255.255.255" },
            ] } },
        }),
    );
    let service = service.unwrap();
    assert_eq!(service.cluster_ips, PerFamily { v4: Some("10.0.0.1".parse().unwrap()), v6: None });
    assert_eq!(&*service.external_ips, ips(&["192.0.2.1"]));
    assert_eq!(&*service.load_balancer_ips, ips(&["198.51.100.1"]));
    let fields: Vec<&str> = problems.iter().map(|problem| problem.field.as_str()).collect();
    assert_eq!(
        fields,
        [
            "spec.clusterIPs[1]",
            "spec.externalIPs[1]",
            "spec.externalIPs[2]",
            "spec.externalIPs[3]",
            "spec.externalIPs[4]",
            "status.loadBalancer.ingress[0].ip",
            "status.loadBalancer.ingress[2].ip",
            "status.loadBalancer.ingress[3].ip",
            "status.loadBalancer.ingress[4].ip",
        ]
    );
    assert_eq!(
        problems[5].to_string(),
        "`status.loadBalancer.ingress[0].ip` is ignored: `127.0.0.1` is a loopback address, which no Service can have"
    );
}

#[test]
fn the_note_about_ignored_values_has_a_bounded_length() {
    let web = |ips: Vec<String>| {
        service("web", json!({ "clusterIP": "10.0.0.1", "ports": [{ "port": 80 }], "externalIPs": ips }))
    };
    let many = (0..8000).map(|number| format!("127.0.{}.{}", number / 256, number % 256)).collect();
    let mut model = model(settings(), [web(many)]);
    let ignored = model.take_ignored();
    let (_, note) = &ignored[&named("web")];
    assert!(
        note.starts_with("`spec.externalIPs[0]` is ignored: `127.0.0.0` is a loopback address"),
        "{note}"
    );
    assert!(note.ends_with("and 7995 more"), "{note}");
    assert!(model.take_ignored().is_empty());

    model.apply(web(vec!["x".repeat(100_000)]));
    model.apply(web(vec!["192.0.2.1".to_owned()]));
    assert!(model.take_ignored().is_empty(), "the Service is correct now");
    model.apply(web(vec!["x".repeat(100_000)]));
    let ignored = model.take_ignored();
    assert!(ignored[&named("web")].1.len() < 300, "{ignored:?}");
}
