//! Which frontends weir answers DNS on, in place of the cluster's DNS Service.

use serde_json::json;

use crate::{
    model::{Change, Kind},
    model::{
        DetectLocal, DnsService, Family, Model, ObjectName, Settings,
        fixture::{full_service, model, settings},
    },
};

fn dns(namespace: &str, name: &str, ip: &str) -> Change {
    full_service(json!({
        "metadata": { "namespace": namespace, "name": name, "labels": { "k8s-app": "kube-dns" } },
        "spec": { "clusterIP": ip, "ports": [
            { "name": "dns", "port": 53, "protocol": "UDP" }, { "name": "metrics", "port": 9153 },
        ] },
    }))
}

/// The ports of a Service on which weir answers DNS.
fn answered(model: &Model, name: &ObjectName) -> Vec<u16> {
    let plan = model.plan(name);
    let frontends = plan.ports.iter().flat_map(|port| &port.frontends);
    frontends.filter(|planned| planned.answered_here).map(|planned| planned.frontend.port).collect()
}

#[test]
fn weir_answers_for_the_dns_service_that_it_finds() {
    let settings = Settings { dns_service: Some(DnsService::Detected), ..settings() };
    let (usual, rke2) = (
        ObjectName::new("kube-system", "kube-dns"),
        ObjectName::new("kube-system", "rke2-coredns-rke2-coredns"),
    );
    let mut model = model(
        settings,
        [dns("tenant", "kube-dns", "10.0.0.9"), dns(rke2.namespace(), rke2.name(), "10.0.0.10")],
    );
    assert_eq!(answered(&model, &rke2), [53]);
    assert_eq!(answered(&model, &ObjectName::new("tenant", "kube-dns")), [0_u16; 0]);
    model.take_dirty();

    model.apply(dns(usual.namespace(), usual.name(), "10.0.0.11"));
    assert_eq!(model.take_dirty(), [usual.clone(), rke2.clone()], "both plans are computed again");
    assert_eq!((answered(&model, &usual), answered(&model, &rke2)), (vec![53], vec![]));

    model.apply(Change::Delete(Kind::Service, usual.clone()));
    assert_eq!(model.take_dirty(), [usual, rke2.clone()]);
    assert_eq!(answered(&model, &rke2), [53]);
}

#[test]
fn the_plan_and_the_dns_server_have_the_same_clients() {
    let of = |settings: Settings| model(settings, []).node_plan();
    let with = |detect_local| Settings {
        dns_service: Some(DnsService::Detected),
        dns_clients: vec!["192.0.2.0/24".parse().unwrap()],
        detect_local,
        ..settings()
    };
    let pods = DetectLocal::ClusterCidr(vec!["10.244.0.0/16".parse().unwrap()]);
    let clients = of(with(pods.clone())).name_clients.unwrap();
    assert_eq!(clients.of(Family::V4).len(), 2);
    assert!(clients.of(Family::V6).is_empty(), "pods are not recognized in this family");
    assert_eq!(of(with(DetectLocal::Bridge("cni0".to_owned()))).name_clients, None);
    assert_eq!(of(Settings { dns_service: None, ..with(pods) }).name_clients, None);
}
