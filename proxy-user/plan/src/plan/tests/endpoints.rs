//! Which endpoints are selected: readiness, termination, policies and hints (E4, E6 to E10).
//!
//! An endpoint is written `NAME FLAGS`: `l`ocal, `r`eady, `s`erving, `t`erminating; `n:X,Y` and `z:X,Y` are
//! its node and zone hints. This node is `node-a` in zone `a`.

use serde_json::{Value, json};

use crate::{
    model::fixture::{model, named, node, service, settings, slice},
    plan::{Backend, Target},
};

/// The type and policy of the Service under test.
#[derive(Clone, Copy, Debug)]
enum Kind {
    /// ClusterIP only, internal policy Cluster.
    Internal,
    /// ClusterIP only, internal policy Local.
    InternalLocal,
    /// NodePort, external policy Cluster.
    External,
    /// NodePort, external policy Local.
    ExternalLocal,
    /// NodePort, both policies Local.
    BothLocal,
}

fn endpoint(text: &str) -> Value {
    let mut words = text.split(' ');
    let address = format!("10.244.0.{}", words.next().unwrap());
    let flags = words.next().unwrap_or_default();
    let mut value = json!({
        "addresses": [address],
        "nodeName": if flags.contains('l') { "node-a" } else { "node-b" },
        "conditions": { "ready": flags.contains('r'), "serving": flags.contains('s'),
                        "terminating": flags.contains('t') },
        "hints": {},
    });
    for word in words {
        let (kind, names) = word.split_once(':').unwrap();
        let names: Vec<Value> = names.split(',').map(|name| json!({ "name": name })).collect();
        value["hints"][if kind == "n" { "forNodes" } else { "forZones" }] = json!(names);
    }
    value
}

fn names(backends: &[Backend]) -> String {
    let last = |backend: &Backend| backend.address.to_string().rsplit('.').next().unwrap().to_owned();
    backends.iter().map(last).collect::<Vec<_>>().join(" ")
}

/// The Cluster set, the Local set, and whether any endpoint is usable at all.
fn select(kind: Kind, zone: &str, endpoints: &[&str]) -> (String, String, bool) {
    let internal = if matches!(kind, Kind::InternalLocal | Kind::BothLocal) { "Local" } else { "Cluster" };
    let external = if matches!(kind, Kind::ExternalLocal | Kind::BothLocal) { "Local" } else { "Cluster" };
    let reachable = !matches!(kind, Kind::Internal | Kind::InternalLocal);
    let plan = model(settings(), [
        service("web", json!({
            "type": if reachable { "NodePort" } else { "ClusterIP" },
            "clusterIP": "10.0.0.1", "internalTrafficPolicy": internal, "externalTrafficPolicy": external,
            "ports": [{ "port": 80, "nodePort": if reachable { 30080 } else { 0 } }] })),
        slice("web-1", "web", json!([{ "name": "", "port": 80 }]),
            endpoints.iter().map(|text| endpoint(text)).collect()),
        node(json!({ "metadata": { "name": "node-a", "labels": { "topology.kubernetes.io/zone": zone } } })),
    ])
    .plan(&named("web"));
    let port = &plan.ports[0];
    let any = port.frontends.iter().any(|planned| planned.route.host.target != Target::Reject);
    (names(&port.cluster), names(&port.local), any)
}

#[test]
fn e6_to_e8_readiness_and_policies_decide_about_the_sets() {
    use Kind::{BothLocal, External, ExternalLocal, Internal, InternalLocal};
    let cases: &[(Kind, &[&str], &str, &str, bool)] = &[
        // E6: the Cluster set.
        (Internal, &["1 rs", "2 lrs"], "1 2", "", true),
        (Internal, &["1 rs", "2 s"], "1", "", true),
        (Internal, &[], "", "", false),
        (Internal, &["1", "2 s"], "", "", false),
        (Internal, &["1 st", "2 lst"], "1 2", "", true),
        (Internal, &["1 rs", "2 st"], "1", "", true),
        (Internal, &["1 t", "2 st"], "2", "", true),
        (Internal, &["1 t"], "", "", false),
        // E2: with publishNotReadyAddresses an endpoint may be ready and terminating.
        (Internal, &["1 rst", "2 st"], "1", "", true),
        (External, &["1 rs", "2 lrs"], "1 2", "", true),
        // E4, E7: the Local set, and the Cluster set only if a frontend needs it.
        (InternalLocal, &["1 rs", "2 lrs"], "", "2", true),
        (InternalLocal, &["1 rs"], "", "", true),
        (InternalLocal, &["1 st"], "", "", true),
        (InternalLocal, &["1", "2 l"], "", "", false),
        (InternalLocal, &["1 rs", "2 lst"], "", "2", true),
        (InternalLocal, &["2 lst", "3 lrs"], "", "3", true),
        (InternalLocal, &["2 lt", "3 ls"], "", "", false),
        (ExternalLocal, &["1 rs", "2 lrs"], "1 2", "2", true),
        (ExternalLocal, &["1 rs", "2 lst"], "1", "2", true),
        (ExternalLocal, &["1 rs", "2 l"], "1", "", true),
        (ExternalLocal, &["1 st", "2 lst"], "1 2", "2", true),
        (ExternalLocal, &["1 st"], "1", "", true),
        (ExternalLocal, &["1 t", "2 ls"], "", "", false),
        (BothLocal, &["1 rs", "2 lrs"], "1 2", "2", true),
        (BothLocal, &["1 rs"], "1", "", true),
        (BothLocal, &["1", "2 l"], "", "", false),
    ];
    for (kind, endpoints, cluster, local, any) in cases {
        let found = select(*kind, "a", endpoints);
        assert_eq!(found, ((*cluster).into(), (*local).into(), *any), "{kind:?} {endpoints:?}");
    }
}

#[test]
fn e9_e10_hints_narrow_the_cluster_set_if_all_ready_endpoints_have_them() {
    use Kind::{BothLocal, ExternalLocal, Internal};
    let cases: &[(Kind, &[&str], &str, &str)] = &[
        (Internal, &["1 rs z:a", "2 rs z:b"], "1", ""),
        (Internal, &["1 rs z:b", "2 rs z:c"], "1 2", ""),
        (Internal, &["1 rs z:a", "2 rs"], "1 2", ""),
        (Internal, &["1 rs z:a,b", "2 rs z:b"], "1", ""),
        (Internal, &["1 rs z:a", "2 rs z:a", "3 rs z:b"], "1 2", ""),
        // Hints of an endpoint that is not ready do not count, and it needs none.
        (Internal, &["1 rs z:a", "2 rs z:b", "3 s"], "1", ""),
        (Internal, &["1 rs z:b", "2 s z:a"], "1", ""),
        // E6: if no endpoint is ready, hints do not count.
        (Internal, &["1 st z:a", "2 st z:b"], "1 2", ""),
        (Internal, &["1 rs n:node-a", "2 rs n:node-b"], "1", ""),
        (Internal, &["1 rs n:node-b", "2 rs n:node-c"], "1 2", ""),
        (Internal, &["1 rs n:node-a", "2 rs"], "1 2", ""),
        // Node hints go first. Zone hints count if node hints do not apply.
        (Internal, &["1 rs n:node-a z:b", "2 rs n:node-b z:a"], "1", ""),
        (Internal, &["1 rs n:node-b z:a", "2 rs n:node-c z:b"], "1", ""),
        (Internal, &["1 rs n:node-a z:b", "2 rs z:a"], "2", ""),
        // E10: an endpoint with a hint need not be local. E7: the Local set ignores hints.
        (ExternalLocal, &["1 rs z:a", "2 lrs z:b"], "1", "2"),
        (BothLocal, &["1 rs n:node-a", "2 lrs n:node-b"], "1", "2"),
    ];
    for (kind, endpoints, cluster, local) in cases {
        let found = select(*kind, "a", endpoints);
        assert_eq!(found, ((*cluster).into(), (*local).into(), true), "{kind:?} {endpoints:?}");
    }
}

#[test]
fn e9_e11_zone_hints_are_compared_with_this_nodes_zone() {
    for (zone, cluster) in [("a", "1"), ("b", "2"), ("c", "1 2"), ("", "1 2")] {
        assert_eq!(select(Kind::Internal, zone, &["1 rs z:a", "2 rs z:b"]).0, cluster, "zone {zone:?}");
    }
}
