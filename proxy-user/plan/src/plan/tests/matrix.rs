//! Which backends each source gets, and whether it is masqueraded: R2 to R7 under every setting, F1 to F3.

use serde_json::{Value, json};

use crate::{
    model::{
        DetectLocal, Settings,
        fixture::{full_service, model, named, settings, slice},
    },
    plan::{Destination, FrontendPlan, Target, Treatment},
};

const CLUSTER_IP: &str = "10.0.0.1";
const EXTERNAL_IP: &str = "192.0.2.1";
const VIP: &str = "198.51.100.1";

/// The nodes on which the Service under test has endpoints.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Backends {
    HereAndThere,
    There,
    Nowhere,
}

fn endpoints(backends: Backends) -> Value {
    let here = json!({ "addresses": ["10.244.0.1"], "nodeName": "node-a" });
    let there = json!({ "addresses": ["10.244.1.1"], "nodeName": "node-b" });
    let unready = json!({ "addresses": ["10.244.0.9"], "nodeName": "node-a",
                          "conditions": { "ready": false, "serving": false } });
    match backends {
        Backends::HereAndThere => json!([here, there, unready]),
        Backends::There => json!([there, unready]),
        Backends::Nowhere => json!([unready]),
    }
}

/// The treatments of a frontend as text: pod, host, outside.
fn cells(planned: &FrontendPlan) -> String {
    let cell = |treatment: Treatment| {
        let masquerade = if treatment.masquerade { "M" } else { "K" };
        match treatment.target {
            Target::Cluster => format!("Cluster {masquerade}"),
            Target::Local => format!("Local {masquerade}"),
            Target::Reject => "Reject".to_owned(),
            Target::Drop => "Drop".to_owned(),
        }
    };
    let route = planned.route;
    format!("{} | {} | {}", cell(route.pod), cell(route.host), cell(route.outside))
}

/// The cells of the ClusterIP, and those of NodePort, external IP and VIP, which must be equal.
fn plan(settings: &Settings, internal: &str, external: &str, backends: Backends) -> (String, String) {
    let service = full_service(json!({
        "metadata": { "namespace": "ns", "name": "web" },
        "spec": {
            "type": "LoadBalancer", "clusterIP": CLUSTER_IP, "externalIPs": [EXTERNAL_IP],
            "internalTrafficPolicy": internal, "externalTrafficPolicy": external,
            "ports": [{ "port": 80, "nodePort": 30080 }],
        },
        "status": { "loadBalancer": { "ingress": [{ "ip": VIP }] } },
    }));
    let slice = slice("web-1", "web", json!([{ "name": "", "port": 8080 }]), endpoints(backends));
    let plan = model(settings.clone(), [service, slice]).plan(&named("web"));
    let port = &plan.ports[0];
    let of = |wanted: &dyn Fn(Destination) -> bool| {
        cells(port.frontends.iter().find(|planned| wanted(planned.frontend.destination)).unwrap())
    };
    let at = |ip: &str| {
        let ip = ip.parse().unwrap();
        of(&move |destination| destination == Destination::Address(ip))
    };
    let node_port = of(&|destination| matches!(destination, Destination::NodePort(_)));
    assert_eq!(node_port, at(EXTERNAL_IP));
    assert_eq!(node_port, at(VIP));
    assert_eq!(port.frontends.len(), 4);
    (at(CLUSTER_IP), node_port)
}

fn with(detector: bool, masquerade_all: bool) -> Settings {
    let base = Settings { masquerade_all, ..settings() };
    if detector { base } else { Settings { detect_local: DetectLocal::ClusterCidr(Vec::new()), ..base } }
}

#[test]
fn r2_to_r7_every_source_by_every_destination_under_every_setting() {
    // Columns: detector, masqueradeAll; ClusterIP with ITP Cluster, Local; external with ETP Cluster, Local.
    for (detector, all, internal_cluster, internal_local, external_cluster, external_local) in [
        (
            true,
            false,
            "Cluster K | Cluster M | Cluster M",
            "Local K | Local M | Local M",
            "Cluster M | Cluster M | Cluster M",
            "Cluster K | Cluster M | Local K",
        ),
        (
            false,
            false,
            "Cluster K | Cluster K | Cluster K",
            "Local K | Local K | Local K",
            "Cluster M | Cluster M | Cluster M",
            "Local K | Cluster M | Local K",
        ),
        (
            true,
            true,
            "Cluster M | Cluster M | Cluster M",
            "Local M | Local M | Local M",
            "Cluster M | Cluster M | Cluster M",
            "Cluster K | Cluster M | Local K",
        ),
        (
            false,
            true,
            "Cluster M | Cluster M | Cluster M",
            "Local M | Local M | Local M",
            "Cluster M | Cluster M | Cluster M",
            "Local K | Cluster M | Local K",
        ),
    ] {
        let settings = with(detector, all);
        for (internal, inside) in [("Cluster", internal_cluster), ("Local", internal_local)] {
            for (external, outside) in [("Cluster", external_cluster), ("Local", external_local)] {
                let found = plan(&settings, internal, external, Backends::HereAndThere);
                let context = format!("detector {detector}, all {all}, ITP {internal}, ETP {external}");
                assert_eq!(found, (inside.to_owned(), outside.to_owned()), "{context}");
            }
        }
    }
}

#[test]
fn f1_without_endpoints_all_flows_are_rejected() {
    for detector in [true, false] {
        for policy in ["Cluster", "Local"] {
            let reject = "Reject | Reject | Reject".to_owned();
            let found = plan(&with(detector, true), policy, policy, Backends::Nowhere);
            assert_eq!(found, (reject.clone(), reject), "{policy}");
        }
    }
}

#[test]
fn f2_f3_without_a_local_endpoint_flows_with_local_policy_are_dropped() {
    let (inside, outside) = plan(&with(true, false), "Local", "Local", Backends::There);
    assert_eq!(inside, "Drop | Drop | Drop");
    assert_eq!(outside, "Cluster K | Cluster M | Drop");
    let (inside, outside) = plan(&with(false, true), "Local", "Local", Backends::There);
    assert_eq!(inside, "Drop | Drop | Drop");
    assert_eq!(outside, "Drop | Cluster M | Drop");
    let (inside, outside) = plan(&with(true, false), "Cluster", "Cluster", Backends::There);
    assert_eq!(inside, "Cluster K | Cluster M | Cluster M");
    assert_eq!(outside, "Cluster M | Cluster M | Cluster M");
}
