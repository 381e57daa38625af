//! Query by query: weir on node 1 and a real CoreDNS, both reading one kube-apiserver, asked the same.

use anyhow::Result;
use hickory_proto::op::ResponseCode;
use serde_json::{Value, json};
use weir::model::Object;
use weir_tests::{
    control_plane::ControlPlane,
    names::{ask, ask_by_tcp, libc_resolves},
    netns::Namespace,
    objects::NAMESPACE,
};

use super::*;

fn service(name: &str, spec: Value) -> Object {
    let value = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": name, "namespace": NAMESPACE }, "spec": spec,
    });
    Object::Service(serde_json::from_value(value).unwrap())
}

fn slice(
    name: &str,
    service: &str,
    headless: bool,
    family: Family,
    ports: Value,
    endpoints: Value,
) -> Object {
    let mut labels = json!({ "kubernetes.io/service-name": service });
    if headless {
        labels["service.kubernetes.io/headless"] = json!("");
    }
    let value = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": { "name": name, "namespace": NAMESPACE, "labels": labels },
        "addressType": family.to_string(), "ports": ports, "endpoints": endpoints,
    });
    Object::EndpointSlice(serde_json::from_value(value).unwrap())
}

fn dual(ips: [&str; 2], ports: Value) -> Value {
    json!({
        "clusterIP": ips[0], "clusterIPs": ips, "ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "RequireDualStack",
        "ports": ports,
    })
}

fn ready(address: &str) -> Value {
    json!({ "addresses": [address], "conditions": { "ready": true } })
}

fn named(address: &str, name: &str) -> Value {
    json!({ "addresses": [address], "hostname": name })
}

fn http() -> Value {
    json!([{ "name": "http", "port": 8080, "protocol": "TCP" }])
}

/// Services with ClusterIPs, and names for others.
fn with_addresses() -> Vec<Object> {
    let dns = json!([{ "name": "dns", "port": 53, "protocol": "UDP" }, { "name": "dns-tcp", "port": 53, "protocol": "TCP" }]);
    let coredns = |family| {
        let address = pod_address(family, 2, 1).to_string();
        let name = format!("kube-dns-{}", family.to_string().to_lowercase());
        slice(&name, "kube-dns", false, family, dns.clone(), json!([ready(&address)]))
    };
    let web = json!([
        { "name": "http", "port": 80 }, { "name": "metrics", "port": 9090 }, { "name": "dns", "port": 53, "protocol": "UDP" },
    ]);
    let alias =
        |name: &str, target: &str| service(name, json!({ "type": "ExternalName", "externalName": target }));
    vec![
        service("kube-dns", dual(["10.96.0.10", "fd00:10:96::a"], dns.clone())),
        coredns(Family::V4),
        coredns(Family::V6),
        service("web", dual(["10.96.1.1", "fd00:10:96::101"], web)),
        slice(
            "web-a",
            "web",
            false,
            Family::V4,
            http(),
            json!([ready("10.244.1.50"), named("10.244.1.51", "w")]),
        ),
        service("plain", json!({ "clusterIP": "10.96.1.2", "ports": [{ "port": 80 }] })),
        service("other", json!({ "clusterIP": "10.96.1.9", "ports": [{ "port": 80 }] })),
        alias("alias", "web.default.svc.cluster.local"),
        alias("lost", "no.default.svc.cluster.local"),
    ]
}

/// Headless Services.
fn headless() -> Vec<Object> {
    let with = |more: Value| {
        let mut spec = json!({ "clusterIP": "None", "ports": [{ "name": "http", "port": 8080 }] });
        spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        spec
    };
    let db = json!([
        named("10.244.1.60", "db-0"), named("10.244.2.61", "db-1"), ready("10.244.2.62"),
        { "addresses": ["10.244.2.63"], "hostname": "db-3", "conditions": { "ready": false } },
    ]);
    let db_v6 = json!([named("fd00:10:244:1::60", "db-0"), ready("fd00:10:244:1::")]);
    vec![
        service("db", with(json!({ "ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "RequireDualStack" }))),
        slice("db-a", "db", true, Family::V4, http(), db),
        slice("db-b", "db", true, Family::V6, http(), db_v6),
        service("all", with(json!({ "publishNotReadyAddresses": true }))),
        // The controller that makes slices marks endpoints of such a Service as ready.
        slice("all-a", "all", true, Family::V4, http(), json!([ready("10.244.1.70")])),
        service("unserved", with(json!({}))),
    ]
}

const TYPES: [RecordType; 7] = [
    RecordType::A,
    RecordType::AAAA,
    RecordType::SRV,
    RecordType::PTR,
    RecordType::CNAME,
    RecordType::MX,
    RecordType::TXT,
];

/// Names of every kind, present and absent.
const NAMES: [&str; 38] = [
    "cluster.local.",
    "svc.cluster.local.",
    "pod.cluster.local.",
    "default.svc.cluster.local.",
    "nowhere.svc.cluster.local.",
    "web.default.svc.cluster.local.",
    "WeB.Default.Svc.Cluster.Local.",
    "kube-dns.default.svc.cluster.local.",
    "plain.default.svc.cluster.local.",
    "other.default.svc.cluster.local.",
    "no.default.svc.cluster.local.",
    "web.nowhere.svc.cluster.local.",
    "_http._tcp.web.default.svc.cluster.local.",
    "_dns._udp.web.default.svc.cluster.local.",
    "_http._udp.web.default.svc.cluster.local.",
    "_no._tcp.web.default.svc.cluster.local.",
    "w.web.default.svc.cluster.local.",
    "10-244-1-50.web.default.svc.cluster.local.",
    "10-244-1-51.web.default.svc.cluster.local.",
    "db.default.svc.cluster.local.",
    "db-0.db.default.svc.cluster.local.",
    "db-1.db.default.svc.cluster.local.",
    "db-3.db.default.svc.cluster.local.",
    "10-244-2-62.db.default.svc.cluster.local.",
    "10-244-1-60.db.default.svc.cluster.local.",
    "fd00-10-244-1--0.db.default.svc.cluster.local.",
    "_http._tcp.db.default.svc.cluster.local.",
    "_sql._tcp.db.default.svc.cluster.local.",
    "all.default.svc.cluster.local.",
    "unserved.default.svc.cluster.local.",
    "alias.default.svc.cluster.local.",
    "a.b.c.web.default.svc.cluster.local.",
    "10-244-1-60.default.pod.cluster.local.",
    "fd00-10-244-1--60.default.pod.cluster.local.",
    "nonsense.default.pod.cluster.local.",
    "1.1.96.10.in-addr.arpa.",
    "60.1.244.10.in-addr.arpa.",
    "a.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.6.9.0.0.0.1.0.0.0.0.d.f.ip6.arpa.",
];

/// Where weir answers otherwise, and why.
fn differs(name: &str, kind: RecordType) -> Option<&'static str> {
    match (name, kind) {
        // CoreDNS looks on: names of addresses fall through to the upstream unless they are asked for as such.
        (name, kind) if name.ends_with(".arpa.") && kind != RecordType::PTR => {
            Some("a name of ours that has no such record")
        }
        ("WeB.Default.Svc.Cluster.Local.", RecordType::SRV) => {
            Some("targets are in the case they were asked in")
        }
        (name, RecordType::SRV) if name.contains(".pod.") => Some("CoreDNS gives pods a port 0"),
        ("alias.default.svc.cluster.local.", RecordType::SRV | RecordType::PTR | RecordType::MX) => {
            Some("an alias is one for every type; CoreDNS says so for addresses only")
        }
        (name, RecordType::TXT) if name.ends_with("cluster.local.") => {
            Some("CoreDNS answers TXT of every name without looking whether it is there")
        }
        _ => None,
    }
}

/// CoreDNS as kubeadm configures it.
fn kubeadm(kubeconfig: &std::path::Path) -> String {
    format!(
        "
    ready
    errors
    kubernetes cluster.local in-addr.arpa ip6.arpa {{
        kubeconfig {}
        pods insecure
        fallthrough in-addr.arpa ip6.arpa
        ttl 5
    }}",
        kubeconfig.display()
    )
}

/// Asks both everything.
fn compare(client: &Namespace, ours: IpAddr, theirs: IpAddr) -> Result<()> {
    let mut compared = 0;
    let mut wrong = Vec::new();
    for (name, kind) in NAMES.into_iter().flat_map(|name| TYPES.map(|kind| (name, kind))) {
        if differs(name, kind).is_some() {
            continue;
        }
        let (one, other) = (ask(client, ours, name, kind)?, ask(client, theirs, name, kind)?);
        compared += 1;
        if one != other {
            wrong.push(format!("{name} {kind}\n  weir:    {one:?}\n  CoreDNS: {other:?}"));
        }
    }
    assert!(wrong.is_empty(), "{} of {compared} differ:\n{}", wrong.len(), wrong.join("\n"));
    let version = ask(client, theirs, "dns-version.cluster.local.", RecordType::TXT)?;
    assert_eq!(ask(client, ours, "dns-version.cluster.local.", RecordType::TXT)?, version);
    Ok(())
}

#[test]
fn weir_answers_as_coredns_does_and_goes_on_without_an_api_server() -> Result<()> {
    let topology = Topology::new()?;
    let mut cluster = ControlPlane::start(&topology.router, Location::Router.client_address(Family::V4))?;
    let objects = [with_addresses(), headless()].concat();
    cluster.apply(&objects.iter().collect::<Vec<_>>())?;
    let kubeconfig = cluster.kubeconfig()?;
    let fixture = Fixture::new(&topology, Plane::Nftables)?;
    let coredns = fixture.coredns(&kubeadm(&kubeconfig))?;
    let arguments = [fixture.arguments()?, vec![format!("--kubeconfig={}", kubeconfig.display())]].concat();
    let start = || names::start_weir(topology.at(Location::Host(1)), fixture.directory.path(), &arguments);
    let weir = start()?;
    let client = topology.at(CLIENT);
    let theirs = pod_address(Family::V4, 2, 1);
    let ours: IpAddr = "169.254.20.53".parse()?;
    let reads = |server| {
        ask(client, server, "db.default.svc.cluster.local.", RecordType::A)
            .is_ok_and(|said| said.answers.len() == 3)
    };
    await_that(&format!("CoreDNS has read everything\n{}", coredns.log()), || reads(theirs));
    await_that(&format!("weir has read everything\n{}", fixture.say_log()), || reads(ours));
    await_that("weir answers at the Service", || {
        fixture.logged("this node answers DNS queries to this address")
    });

    compare(client, ours, theirs)?;
    // weir answers with a change without another request to the API server.
    let more = slice(
        "db-c",
        "db",
        true,
        Family::V4,
        json!([{ "name": "http", "port": 8080, "protocol": "TCP" }]),
        json!([
            { "addresses": ["10.244.1.99"], "hostname": "db-9" },
        ]),
    );
    cluster.apply(&[&more])?;
    await_that("the new endpoint is there", || {
        fixture.ask("db-9.db.default.svc.cluster.local.", RecordType::A).addresses().len() == 1
    });

    cluster.stop();
    let service = dns_ip(Family::V4);
    assert_eq!(
        libc_resolves(client, service, "db-9.db")?,
        ["10.244.1.99".parse::<IpAddr>()?],
        "the API server is away"
    );
    let by_tcp = ask_by_tcp(client, service, "_http._tcp.db.default.svc.cluster.local.", RecordType::SRV)?;
    assert_eq!((by_tcp.code, by_tcp.answers.len()), (ResponseCode::NoError, 5));
    // One that starts now has no names, answers nothing, and takes nothing away from CoreDNS.
    drop(weir);
    let _weir = start()?;
    await_that("it answers at its own address", || {
        ask(client, ours, "dns-version.cluster.local.", RecordType::TXT).is_ok()
    });
    assert_eq!(libc_resolves(client, service, "db-9.db")?, ["10.244.1.99".parse::<IpAddr>()?]);
    Ok(())
}
