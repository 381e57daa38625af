//! The frontends of a Service, and the rest of its plan (W6, R11, R16, A1, F7, H1, H2, K2).

use std::time::Duration;

use serde_json::{Value, json};

use crate::{
    model::Change,
    model::{
        Family, Settings,
        fixture::{full_service, full_slice, model, named, node, service, settings, slice},
    },
    plan::{Destination, FrontendPlan, HealthCheck, MOST_FRONTENDS, Planner, PortPlan, Removal, ServicePlan},
};

fn plan(changes: impl IntoIterator<Item = Change>) -> ServicePlan {
    model(settings(), changes).plan(&named("web"))
}

fn frontends(plan: &ServicePlan) -> Vec<String> {
    let all = plan.ports.iter().flat_map(|port| &port.frontends);
    all.map(|planned| planned.frontend.to_string()).collect()
}

fn find<'a>(plan: &'a ServicePlan, frontend: &str) -> &'a FrontendPlan {
    let all = plan.ports.iter().flat_map(|port| &port.frontends);
    all.into_iter().find(|planned| planned.frontend.to_string() == frontend).unwrap()
}

fn backends(port: &PortPlan) -> Vec<String> {
    port.cluster.iter().map(ToString::to_string).collect()
}

/// A LoadBalancer Service with two VIPs of each family.
fn balanced(spec: Value) -> Change {
    let mut full = json!({
        "metadata": { "namespace": "ns", "name": "web" },
        "spec": {
            "type": "LoadBalancer", "clusterIP": "10.0.0.1", "clusterIPs": ["10.0.0.1", "fd00::1"],
            "ipFamilies": ["IPv4", "IPv6"], "ports": [{ "port": 80, "nodePort": 30080 }],
        },
        "status": { "loadBalancer": { "ingress": [
            { "ip": "198.51.100.1" }, { "ip": "198.51.100.2" }, { "ip": "2001:db8::1" }] } },
    });
    for (field, value) in spec.as_object().unwrap() {
        full["spec"][field] = value.clone();
    }
    full_service(full)
}

#[test]
fn every_address_of_every_port_in_every_family_is_a_frontend() {
    let plan = plan([balanced(json!({ "externalIPs": ["192.0.2.1", "2001:db8::2"] }))]);
    assert_eq!(
        frontends(&plan),
        [
            "10.0.0.1:80/TCP",
            "192.0.2.1:80/TCP",
            "198.51.100.1:80/TCP",
            "198.51.100.2:80/TCP",
            "node:30080/TCP",
            "[2001:db8::1]:80/TCP",
            "[2001:db8::2]:80/TCP",
            "[fd00::1]:80/TCP",
            "[node]:30080/TCP",
        ]
    );
    let ips: Vec<String> = plan.cluster_ips.iter().map(ToString::to_string).collect();
    assert_eq!(ips, ["10.0.0.1", "fd00::1"]);
    assert_eq!(
        plan.ports.iter().map(|port| port.id.to_string()).collect::<Vec<_>>(),
        ["ns/web/TCP (IPv4)", "ns/web/TCP (IPv6)"]
    );
}

#[test]
fn w5_w7_the_families_of_a_service_have_their_own_endpoints() {
    let v6 = full_slice(json!({
        "metadata": { "namespace": "ns", "name": "web-6", "labels": { "kubernetes.io/service-name": "web" } },
        "addressType": "IPv6", "ports": [{ "name": "", "port": 8080 }], "endpoints": [{ "addresses": ["fd00:10::1"] }] }));
    let v4 = slice(
        "web-4",
        "web",
        json!([{ "name": "", "port": 8080 }]),
        json!([{ "addresses": ["10.244.0.1"] }]),
    );
    let plan = plan([balanced(json!({})), v4, v6]);
    assert_eq!(backends(&plan.ports[0]), ["10.244.0.1:8080"]);
    assert_eq!(backends(&plan.ports[1]), ["[fd00:10::1]:8080"]);
    assert_eq!(plan.ports[1].id.family, Family::V6);
}

#[test]
fn r17_external_addresses_of_a_family_without_cluster_ip_are_not_served() {
    let plan = plan([service(
        "web",
        json!({
        "clusterIP": "10.0.0.1", "externalIPs": ["192.0.2.1", "2001:db8::2"], "ports": [{ "port": 80 }] }),
    )]);
    assert_eq!(frontends(&plan), ["10.0.0.1:80/TCP", "192.0.2.1:80/TCP"]);
}

#[test]
fn w6_r16_ports_join_by_name_and_protocol_and_one_number_may_serve_several() {
    let plan = plan([
        service(
            "web",
            json!({ "clusterIP": "10.0.0.1", "ports": [
            { "name": "dns", "port": 53, "protocol": "UDP" },
            { "name": "dns-tcp", "port": 53, "protocol": "TCP" },
            { "name": "sctp", "port": 53, "protocol": "SCTP" },
            { "name": "lonely", "port": 54 },
        ] }),
        ),
        slice(
            "web-1",
            "web",
            json!([
                { "name": "dns", "port": 1053, "protocol": "UDP" },
                { "name": "dns-tcp", "port": 2053, "protocol": "TCP" },
                { "name": "sctp", "port": 3053, "protocol": "SCTP" },
                { "name": "lonely", "port": 4053, "protocol": "UDP" },
            ]),
            json!([{ "addresses": ["10.244.0.1"] }]),
        ),
    ]);
    let listed: Vec<(String, Vec<String>)> =
        plan.ports.iter().map(|port| (port.id.to_string(), backends(port))).collect();
    assert_eq!(
        listed,
        [
            ("ns/web:dns/UDP (IPv4)".to_owned(), vec!["10.244.0.1:1053".to_owned()]),
            ("ns/web:dns-tcp/TCP (IPv4)".to_owned(), vec!["10.244.0.1:2053".to_owned()]),
            ("ns/web:lonely/TCP (IPv4)".to_owned(), vec![]),
            ("ns/web:sctp/SCTP (IPv4)".to_owned(), vec!["10.244.0.1:3053".to_owned()]),
        ]
    );
}

#[test]
fn one_address_in_several_roles_is_one_frontend() {
    let plan = plan([balanced(json!({
        "externalIPs": ["198.51.100.1", "10.0.0.1", "192.0.2.1"], "loadBalancerSourceRanges": ["203.0.113.0/24"],
        "internalTrafficPolicy": "Local" }))]);
    let v4: Vec<String> = frontends(&plan).into_iter().filter(|text| !text.starts_with('[')).collect();
    assert_eq!(
        v4,
        [
            "10.0.0.1:80/TCP",
            "192.0.2.1:80/TCP",
            "198.51.100.1:80/TCP",
            "198.51.100.2:80/TCP",
            "node:30080/TCP"
        ]
    );
    // F7: an address that is both a VIP and an external IP has source ranges.
    assert!(find(&plan, "198.51.100.1:80/TCP").allowed_sources.is_some());
    assert!(find(&plan, "192.0.2.1:80/TCP").allowed_sources.is_none());
}

#[test]
fn the_first_of_two_ports_owns_their_common_frontend() {
    let plan = plan([service(
        "web",
        json!({ "type": "NodePort", "clusterIP": "10.0.0.1", "ports": [
        { "name": "b", "port": 80, "nodePort": 30080 }, { "name": "a", "port": 80, "nodePort": 30081 }] }),
    )]);
    let of = |port: &PortPlan| -> Vec<String> {
        port.frontends.iter().map(|planned| planned.frontend.to_string()).collect()
    };
    assert_eq!(of(&plan.ports[0]), ["node:30081/TCP"]);
    assert_eq!(of(&plan.ports[1]), ["10.0.0.1:80/TCP", "node:30080/TCP"]);
}

#[test]
fn f7_source_ranges_apply_to_the_vips_of_their_family_only() {
    let guard = |ranges: Value| {
        let plan =
            plan([balanced(json!({ "externalIPs": ["192.0.2.1"], "loadBalancerSourceRanges": ranges }))]);
        for open in
            ["10.0.0.1:80/TCP", "192.0.2.1:80/TCP", "node:30080/TCP", "[fd00::1]:80/TCP", "[node]:30080/TCP"]
        {
            assert_eq!(find(&plan, open).allowed_sources, None, "{open}");
        }
        let listed = |frontend: &str| {
            let allowed = find(&plan, frontend).allowed_sources.clone();
            allowed.map(|all| all.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "))
        };
        assert_eq!(listed("198.51.100.1:80/TCP"), listed("198.51.100.2:80/TCP"));
        (listed("198.51.100.1:80/TCP"), listed("[2001:db8::1]:80/TCP"))
    };
    let some = |text: &str| Some(text.to_owned());
    assert_eq!(guard(json!([])), (None, None));
    assert_eq!(guard(json!(["203.0.113.0/24"])), (some("203.0.113.0/24"), None));
    assert_eq!(guard(json!(["2001:db8:5::/48"])), (None, some("2001:db8:5::/48")));
    assert_eq!(
        guard(json!(["203.0.113.128/25", "10.0.0.0/8", "203.0.113.0/25", "10.1.0.0/16", "2001:db8:5::/48"])),
        (some("10.0.0.0/8 203.0.113.0/24"), some("2001:db8:5::/48"))
    );
    assert_eq!(guard(json!(["203.0.113.0/24", "0.0.0.0/0", "::/0"])), (None, None));
    assert_eq!(guard(json!(["0.0.0.0/1", "128.0.0.0/1"])), (None, None));
    // W9: a list of wrong ranges counts as no list.
    assert_eq!(guard(json!(["nonsense"])), (None, None));
}

#[test]
fn f7_the_vips_are_allowed_sources_if_the_node_is_one() {
    let here = node(json!({ "metadata": { "name": "node-a" },
        "status": { "addresses": [{ "type": "InternalIP", "address": "203.0.113.7" }] } }));
    let allowed = |range: &str| {
        let plan = plan([balanced(json!({ "loadBalancerSourceRanges": [range] })), here.clone()]);
        let all = find(&plan, "198.51.100.2:80/TCP").allowed_sources.clone().unwrap();
        all.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(allowed("203.0.113.0/29"), ["198.51.100.1/32", "198.51.100.2/32", "203.0.113.0/29"]);
    assert_eq!(allowed("203.0.113.8/29"), ["203.0.113.8/29"]);
}

#[test]
fn f7_source_ranges_apply_without_endpoints_too() {
    let plan = plan([balanced(json!({ "loadBalancerSourceRanges": ["203.0.113.0/24"] }))]);
    assert!(plan.ports[0].cluster.is_empty());
    assert!(find(&plan, "198.51.100.1:80/TCP").allowed_sources.is_some());
}

#[test]
fn a1_affinity_holds_for_every_port() {
    let plan = plan([service(
        "web",
        json!({ "clusterIP": "10.0.0.1", "sessionAffinity": "ClientIP", "ports": [
        { "name": "a", "port": 1 }, { "name": "b", "port": 2 }] }),
    )]);
    assert_eq!(plan.ports.iter().map(|port| port.affinity).collect::<Vec<_>>(), [Some(10_800), Some(10_800)]);
}

#[test]
fn h1_h2_the_health_check_counts_local_ready_endpoints() {
    let local = json!({ "externalTrafficPolicy": "Local", "healthCheckNodePort": 32000 });
    let ends = slice(
        "web-1",
        "web",
        json!([{ "name": "", "port": 80 }]),
        json!([
            { "addresses": ["10.244.0.1"], "nodeName": "node-a" },
            { "addresses": ["10.244.0.2"], "nodeName": "node-a",
              "conditions": { "ready": false, "serving": true, "terminating": true } },
            { "addresses": ["10.244.1.1"], "nodeName": "node-b" },
        ]),
    );
    let found = plan([balanced(local.clone()), ends]).health_check;
    assert_eq!(found, Some(HealthCheck { port: 32000, local_endpoints: 1 }));
    assert_eq!(plan([balanced(local)]).health_check, Some(HealthCheck { port: 32000, local_endpoints: 0 }));
    assert_eq!(plan([balanced(json!({ "healthCheckNodePort": 32000 }))]).health_check, None);
}

#[test]
fn k2_k4_serving_endpoints_do_not_depend_on_policies_and_hints() {
    let serving = ["10.244.0.1:80", "10.244.0.2:80", "10.244.0.4:80", "10.244.1.1:80"];
    let reset = |seconds| Removal::Reset { after: Duration::from_secs(seconds) };
    for (protocol, annotation, on_removal) in [
        ("UDP", "keep", reset(0)),
        ("UDP", "reset-after=30s", reset(0)),
        ("TCP", "keep", Removal::Keep),
        ("TCP", "reset", reset(0)),
        ("TCP", "reset-after=30s", reset(30)),
        ("SCTP", "reset", Removal::Keep),
    ] {
        let plan = plan([
            full_service(json!({
                "metadata": { "namespace": "ns", "name": "web",
                    "annotations": { "weir.dev/on-backend-removal": annotation } },
                "spec": { "clusterIP": "10.0.0.1", "internalTrafficPolicy": "Local",
                    "ports": [{ "port": 80, "protocol": protocol }] },
            })),
            slice(
                "web-1",
                "web",
                json!([{ "name": "", "port": 80, "protocol": protocol }]),
                json!([
                    { "addresses": ["10.244.1.1"], "nodeName": "node-b", "hints": { "forZones": [{ "name": "x" }] } },
                    { "addresses": ["10.244.0.1"], "nodeName": "node-a" },
                    { "addresses": ["10.244.0.2"], "conditions": { "ready": false, "serving": true, "terminating": true } },
                    { "addresses": ["10.244.0.3"], "conditions": { "ready": false, "serving": false } },
                    // As with publishNotReadyAddresses.
                    { "addresses": ["10.244.0.4"], "conditions": { "ready": true, "serving": false } },
                ]),
            ),
        ]);
        assert_eq!(plan.ports[0].on_removal, on_removal, "{protocol}, {annotation}");
        let listed: Vec<String> = plan.ports[0].serving.iter().map(ToString::to_string).collect();
        let expected = if on_removal == Removal::Keep { &[][..] } else { &serving };
        assert_eq!(listed, expected, "{protocol}, {annotation}");
    }
}

#[test]
fn a_service_that_is_not_served_has_an_empty_plan() {
    let headless = service("web", json!({ "clusterIP": "None", "ports": [{ "port": 80 }] }));
    assert_eq!(plan([headless]), ServicePlan::default());
    assert_eq!(model(Settings::default(), []).plan(&named("web")), ServicePlan::default());
}

/// A LoadBalancer Service with these numbers of ports, external IPs and load balancer addresses.
fn large(ports: u16, external_ips: u32, load_balancer_ips: u32) -> Change {
    let address =
        |net: u32| move |number: u32| std::net::Ipv4Addr::from_bits((net << 24) + number).to_string();
    let port = |number: u16| json!({ "name": format!("p{number}"), "port": 1 + number, "nodePort": 30_000 + number });
    let ingress = (0..load_balancer_ips).map(address(44)).map(|ip| json!({ "ip": ip }));
    full_service(json!({
        "metadata": { "namespace": "ns", "name": "web" },
        "spec": {
            "type": "LoadBalancer", "clusterIP": "10.0.0.1", "ports": (0..ports).map(port).collect::<Vec<_>>(),
            "externalIPs": (0..external_ips).map(address(33)).collect::<Vec<_>>(),
        },
        "status": { "loadBalancer": { "ingress": ingress.collect::<Vec<_>>() } },
    }))
}

/// The numbers of frontends at ClusterIPs, NodePorts, load balancer addresses and external IPs.
fn sorts(plan: &ServicePlan) -> [usize; 4] {
    let mut count = [0; 4];
    for planned in plan.ports.iter().flat_map(|port| &port.frontends) {
        let sort = match planned.frontend.destination {
            Destination::NodePort(_) => 1,
            Destination::Address(ip) if ip.to_string().starts_with("44.") => 2,
            Destination::Address(ip) if ip.to_string().starts_with("33.") => 3,
            Destination::Address(_) => 0,
        };
        count[sort] += 1;
    }
    count
}

#[test]
fn the_number_of_frontends_is_limited_and_the_first_ones_are_served() {
    let small = plan([large(20, 100, 2)]);
    assert_eq!((sorts(&small), small.unserved), ([20, 20, 40, 2000], 0));

    let many = plan([large(20, 8000, 2)]);
    let addresses = (MOST_FRONTENDS - 40) / 20;
    assert_eq!(sorts(&many), [20, 20, 40, 20 * (addresses - 2)]);
    assert_eq!(many.unserved, 20 * (8000 + 2) - 20 * addresses);
    let first = "33.0.0.0:1/TCP".to_owned();
    assert!(frontends(&many).contains(&first), "the smallest addresses are served");

    let balanced = plan([large(20, 100, 8000)]);
    assert_eq!(sorts(&balanced), [20, 20, 20 * addresses, 0]);

    let ports = plan([large(20_000, 2, 2)]);
    assert_eq!(sorts(&ports), [MOST_FRONTENDS / 2, MOST_FRONTENDS / 2, 0, 0]);
    assert_eq!(ports.unserved, 20_000 * 6 - MOST_FRONTENDS);
}

#[test]
fn a_service_that_exceeds_the_limit_of_frontends_is_reported_once() {
    let mut model =
        model(settings(), [large(20, 8000, 0), service("db", json!({ "clusterIP": "10.0.0.2" }))]);
    let mut planner = Planner::default();
    let mut reported = |model: &mut crate::model::Model| {
        for name in model.take_dirty() {
            planner.update(&name, model.plan(&name));
        }
        planner.take_over_limit().collect::<Vec<_>>()
    };
    let unserved = model.plan(&named("web")).unserved;
    assert_eq!(reported(&mut model), [(named("web"), unserved)]);
    model.apply(slice(
        "web-1",
        "web",
        json!([{ "name": "p0", "port": 80 }]),
        json!([{ "addresses": ["10.1.0.1"] }]),
    ));
    assert_eq!(reported(&mut model), [], "a change of endpoints does not report it again");
    model.apply(large(20, 10, 0));
    assert_eq!(reported(&mut model), []);
    model.apply(large(20, 8000, 0));
    assert_eq!(reported(&mut model), [(named("web"), unserved)]);
}
