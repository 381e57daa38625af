//! The records of the Kubernetes DNS specification 1.1. The number in a test's name is the specification's section.

use serde_json::json;

use super::*;
use crate::fixture::{full_service, full_slice, service};

fn cluster() -> Names {
    names([
        full_service(json!({
            "metadata": { "namespace": "kube-system", "name": "kube-dns" },
            "spec": { "clusterIP": "10.0.0.10", "clusterIPs": ["10.0.0.10", "fd00::a"],
                      "ports": [{ "name": "dns", "port": 53, "protocol": "UDP" }] },
        })),
        service(
            "web",
            json!({
                "clusterIP": "10.0.0.1", "clusterIPs": ["10.0.0.1", "fd00::1"],
                "ports": [{ "name": "http", "port": 80 }, { "name": "dns", "port": 53, "protocol": "UDP" }],
            }),
        ),
        service("plain", json!({ "clusterIP": "10.0.0.2", "ports": [{ "port": 80 }] })),
        service(
            "db",
            json!({
                "clusterIP": "None", "ports": [{ "name": "sql", "port": 5432 }],
            }),
        ),
        full_slice(json!({
            "metadata": { "namespace": "ns", "name": "db-4", "labels": {
                "kubernetes.io/service-name": "db", "service.kubernetes.io/headless": "" } },
            "addressType": "IPv4",
            "ports": [{ "name": "sql", "port": 5433 }],
            "endpoints": [
                { "addresses": ["10.244.0.1"], "hostname": "db-0", "conditions": { "ready": true } },
                { "addresses": ["10.244.0.2"] },
                { "addresses": ["10.244.0.3"], "hostname": "db-2", "conditions": { "ready": false } },
            ],
        })),
        full_slice(json!({
            "metadata": { "namespace": "ns", "name": "db-6", "labels": {
                "kubernetes.io/service-name": "db", "service.kubernetes.io/headless": "" } },
            "addressType": "IPv6",
            "ports": [{ "name": "sql", "port": 5433 }],
            "endpoints": [{ "addresses": ["fd00:10::1"], "hostname": "db-0" }, { "addresses": ["fd00:10::"] }],
        })),
        service("out", json!({ "type": "ExternalName", "externalName": "www.example.com" })),
        service("in", json!({ "type": "ExternalName", "externalName": "web.ns.svc.cluster.local." })),
        service("self", json!({ "type": "ExternalName", "externalName": "self.ns.svc.cluster.local" })),
        service("number", json!({ "type": "ExternalName", "externalName": "192.0.2.1" })),
        service("lost", json!({ "type": "ExternalName", "externalName": "no.ns.svc.cluster.local" })),
        service("half", json!({ "type": "ExternalName", "externalName": "plain.ns.svc.cluster.local" })),
        service("empty", json!({ "clusterIP": "None", "ports": [{ "name": "sql", "port": 1 }] })),
    ])
}

/// Each line is a name, a type and the expected answers.
fn check(table: &[(&str, &str, &[&str])]) {
    let names = cluster();
    for (name, kind, wanted) in table {
        assert_eq!(lines(&names, name, kind), *wanted, "{name} {kind}");
    }
}

#[test]
fn s2_2_the_version_of_the_schema() {
    check(&[
        ("dns-version.cluster.local.", "TXT", &["dns-version.cluster.local. 28800 IN TXT 1.1.0"]),
        ("dns-version.cluster.local.", "A", &["NODATA"]),
    ]);
}

#[test]
fn s2_3_1_addresses_of_a_service_with_cluster_ips() {
    check(&[
        ("web.ns.svc.cluster.local.", "A", &["web.ns.svc.cluster.local. 5 IN A 10.0.0.1"]),
        ("web.ns.svc.cluster.local.", "AAAA", &["web.ns.svc.cluster.local. 5 IN AAAA fd00::1"]),
        ("plain.ns.svc.cluster.local.", "AAAA", &["NODATA"]),
        ("web.ns.svc.cluster.local.", "MX", &["NODATA"]),
        ("no.ns.svc.cluster.local.", "A", &["NXDOMAIN"]),
        ("web.other.svc.cluster.local.", "A", &["NXDOMAIN"]),
        ("x.web.ns.svc.cluster.local.", "A", &["NXDOMAIN"]),
    ]);
}

#[test]
fn s2_3_2_ports_of_a_service_with_cluster_ips() {
    check(&[
        (
            "_http._tcp.web.ns.svc.cluster.local.",
            "SRV",
            &["_http._tcp.web.ns.svc.cluster.local. 5 IN SRV 0 50 80 web.ns.svc.cluster.local."],
        ),
        (
            "_dns._udp.web.ns.svc.cluster.local.",
            "SRV",
            &["_dns._udp.web.ns.svc.cluster.local. 5 IN SRV 0 50 53 web.ns.svc.cluster.local."],
        ),
        ("_http._udp.web.ns.svc.cluster.local.", "SRV", &["NXDOMAIN"]),
        // After NXDOMAIN a resolver would assume that no name below exists either (RFC 8020).
        ("_tcp.web.ns.svc.cluster.local.", "A", &["NODATA"]),
        ("_udp.web.ns.svc.cluster.local.", "NS", &["NODATA"]),
        ("_sctp.web.ns.svc.cluster.local.", "A", &["NXDOMAIN"]),
        ("_no._tcp.web.ns.svc.cluster.local.", "SRV", &["NXDOMAIN"]),
        (
            "web.ns.svc.cluster.local.",
            "SRV",
            &[
                "web.ns.svc.cluster.local. 5 IN SRV 0 25 53 web.ns.svc.cluster.local.",
                "web.ns.svc.cluster.local. 5 IN SRV 0 25 80 web.ns.svc.cluster.local.",
            ],
        ),
    ]);
    let answer = answered(&cluster(), "_http._tcp.web.ns.svc.cluster.local.", "SRV");
    assert_eq!(
        sorted(&answer.additionals),
        ["web.ns.svc.cluster.local. 5 IN A 10.0.0.1", "web.ns.svc.cluster.local. 5 IN AAAA fd00::1",]
    );
}

#[test]
fn s2_3_3_and_s2_4_3_addresses_have_names() {
    check(&[
        ("1.0.0.10.in-addr.arpa.", "PTR", &["1.0.0.10.in-addr.arpa. 5 IN PTR web.ns.svc.cluster.local."]),
        ("1.0.0.10.in-addr.arpa.", "A", &["NODATA"]),
        (
            "1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.d.f.ip6.arpa.",
            "PTR",
            &["1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.d.f.ip6.arpa. 5 IN PTR \
               web.ns.svc.cluster.local."],
        ),
        (
            "1.0.244.10.in-addr.arpa.",
            "PTR",
            &["1.0.244.10.in-addr.arpa. 5 IN PTR db-0.db.ns.svc.cluster.local."],
        ),
        (
            "2.0.244.10.in-addr.arpa.",
            "PTR",
            &["2.0.244.10.in-addr.arpa. 5 IN PTR 10-244-0-2.db.ns.svc.cluster.local."],
        ),
        ("3.0.244.10.in-addr.arpa.", "PTR", &["elsewhere"]),
        ("9.9.9.9.in-addr.arpa.", "PTR", &["elsewhere"]),
    ]);
}

#[test]
fn s2_4_1_addresses_of_a_headless_service() {
    check(&[
        (
            "db.ns.svc.cluster.local.",
            "A",
            &["db.ns.svc.cluster.local. 5 IN A 10.244.0.1", "db.ns.svc.cluster.local. 5 IN A 10.244.0.2"],
        ),
        (
            "db.ns.svc.cluster.local.",
            "AAAA",
            &[
                "db.ns.svc.cluster.local. 5 IN AAAA fd00:10::",
                "db.ns.svc.cluster.local. 5 IN AAAA fd00:10::1",
            ],
        ),
        ("db-0.db.ns.svc.cluster.local.", "A", &["db-0.db.ns.svc.cluster.local. 5 IN A 10.244.0.1"]),
        ("db-0.db.ns.svc.cluster.local.", "AAAA", &["db-0.db.ns.svc.cluster.local. 5 IN AAAA fd00:10::1"]),
        (
            "10-244-0-2.db.ns.svc.cluster.local.",
            "A",
            &["10-244-0-2.db.ns.svc.cluster.local. 5 IN A 10.244.0.2"],
        ),
        ("10-244-0-2.db.ns.svc.cluster.local.", "AAAA", &["NODATA"]),
        (
            "fd00-10--0.db.ns.svc.cluster.local.",
            "AAAA",
            &["fd00-10--0.db.ns.svc.cluster.local. 5 IN AAAA fd00:10::"],
        ),
        // An endpoint with a host name has no name made of its address.
        ("10-244-0-1.db.ns.svc.cluster.local.", "A", &["NXDOMAIN"]),
        ("db-2.db.ns.svc.cluster.local.", "A", &["NXDOMAIN"]),
        // "When there are no ready endpoints … the answer should be NXDOMAIN."
        ("empty.ns.svc.cluster.local.", "A", &["NXDOMAIN"]),
    ]);
}

#[test]
fn s2_4_2_ports_of_a_headless_service() {
    let wanted: &[&str] = &[
        "_sql._tcp.db.ns.svc.cluster.local. 5 IN SRV 0 25 5433 10-244-0-2.db.ns.svc.cluster.local.",
        "_sql._tcp.db.ns.svc.cluster.local. 5 IN SRV 0 25 5433 db-0.db.ns.svc.cluster.local.",
        "_sql._tcp.db.ns.svc.cluster.local. 5 IN SRV 0 25 5433 fd00-10--0.db.ns.svc.cluster.local.",
    ];
    check(&[
        ("_sql._tcp.db.ns.svc.cluster.local.", "SRV", wanted),
        ("_sql._udp.db.ns.svc.cluster.local.", "SRV", &["NXDOMAIN"]),
        ("_tcp.db.ns.svc.cluster.local.", "SRV", &["NODATA"]),
        ("_udp.db.ns.svc.cluster.local.", "SRV", &["NXDOMAIN"]),
        ("_sql._tcp.empty.ns.svc.cluster.local.", "SRV", &["NXDOMAIN"]),
    ]);
    let answer = answered(&cluster(), "_sql._tcp.db.ns.svc.cluster.local.", "SRV");
    assert_eq!(
        sorted(&answer.additionals),
        [
            "10-244-0-2.db.ns.svc.cluster.local. 5 IN A 10.244.0.2",
            "db-0.db.ns.svc.cluster.local. 5 IN A 10.244.0.1",
            "db-0.db.ns.svc.cluster.local. 5 IN AAAA fd00:10::1",
            "fd00-10--0.db.ns.svc.cluster.local. 5 IN AAAA fd00:10::",
        ]
    );
}

#[test]
fn s2_5_external_names_are_aliases() {
    let alias = "out.ns.svc.cluster.local. 5 IN CNAME www.example.com.";
    check(&[
        ("out.ns.svc.cluster.local.", "A", &[alias, "then www.example.com."]),
        ("out.ns.svc.cluster.local.", "CNAME", &[alias]),
        (
            "in.ns.svc.cluster.local.",
            "A",
            &[
                "in.ns.svc.cluster.local. 5 IN CNAME web.ns.svc.cluster.local.",
                "web.ns.svc.cluster.local. 5 IN A 10.0.0.1",
            ],
        ),
        ("x.out.ns.svc.cluster.local.", "A", &["NXDOMAIN"]),
        ("number.ns.svc.cluster.local.", "A", &["NXDOMAIN"]),
    ]);
    let lost = answered(&cluster(), "lost.ns.svc.cluster.local.", "A");
    assert_eq!(
        (lost.code, lost.answers.len()),
        (ResponseCode::NXDomain, 1),
        "the alias exists, its target does not"
    );
    let half = answered(&cluster(), "half.ns.svc.cluster.local.", "AAAA");
    let types: Vec<RecordType> =
        [half.answers, half.authorities].concat().iter().map(Record::record_type).collect();
    assert_eq!(
        (half.code, types),
        (ResponseCode::NoError, vec![RecordType::CNAME, RecordType::SOA]),
        "the target has no record of the type"
    );
    let circle = answered(&cluster(), "self.ns.svc.cluster.local.", "A");
    assert_eq!((circle.code, circle.answers.len()), (ResponseCode::NoError, 8));
}

#[test]
fn names_that_only_have_names_below_them_exist_without_records() {
    for name in [
        "cluster.local.",
        "svc.cluster.local.",
        "pod.cluster.local.",
        "ns.svc.cluster.local.",
        "dns.cluster.local.",
    ] {
        check(&[(name, "A", &["NODATA"])]);
    }
    check(&[("other.svc.cluster.local.", "A", &["NXDOMAIN"]), ("web.cluster.local.", "A", &["NXDOMAIN"])]);
}

#[test]
fn the_domain_names_its_server() {
    check(&[
        ("cluster.local.", "NS", &["cluster.local. 5 IN NS ns.dns.cluster.local."]),
        ("ns.dns.cluster.local.", "A", &["ns.dns.cluster.local. 5 IN A 10.0.0.10"]),
        ("ns.dns.cluster.local.", "AAAA", &["ns.dns.cluster.local. 5 IN AAAA fd00::a"]),
    ]);
    let soa = answered(&cluster(), "cluster.local.", "SOA");
    let serial = cluster().changes();
    assert_eq!(
        sorted(&soa.answers),
        [format!(
            "cluster.local. 5 IN SOA ns.dns.cluster.local. hostmaster.cluster.local. {serial} 7200 1800 86400 5"
        )]
    );
    assert!(soa.authoritative);
}

#[test]
fn pods_have_names_if_the_zone_says_so() {
    check(&[
        ("10-244-0-9.ns.pod.cluster.local.", "A", &["10-244-0-9.ns.pod.cluster.local. 5 IN A 10.244.0.9"]),
        ("10-244-0-9.ns.pod.cluster.local.", "AAAA", &["NODATA"]),
        ("fd00--9.ns.pod.cluster.local.", "AAAA", &["fd00--9.ns.pod.cluster.local. 5 IN AAAA fd00::9"]),
        ("10-244-0.ns.pod.cluster.local.", "A", &["NXDOMAIN"]),
    ]);
    let without = Zone { pods: false, ..zone() };
    let resolution = resolve_in(&cluster(), &without, "10-244-0-9.ns.pod.cluster.local.", RecordType::A, 0);
    assert!(matches!(resolution, Resolution::Answer(answer) if answer.code == ResponseCode::NXDomain));
}

#[test]
fn any_queries_get_hinfo() {
    check(&[
        ("web.ns.svc.cluster.local.", "ANY", &["web.ns.svc.cluster.local. 3600 IN HINFO RFC8482 "]),
        ("no.ns.svc.cluster.local.", "ANY", &["NXDOMAIN"]),
    ]);
}

#[test]
fn names_outside_the_domain_are_elsewhere() {
    check(&[
        ("www.example.com.", "A", &["elsewhere"]),
        ("web.ns.svc.cluster.local.example.com.", "A", &["elsewhere"]),
        ("local.", "A", &["elsewhere"]),
    ]);
}

#[test]
fn an_answer_has_the_case_of_its_question() {
    check(&[("wEb.NS.svc.Cluster.LOCAL.", "A", &["wEb.NS.svc.Cluster.LOCAL. 5 IN A 10.0.0.1"])]);
}
