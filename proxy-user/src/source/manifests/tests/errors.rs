//! Files and fields with errors: the messages, and what stays in force.

use super::*;

#[test]
fn a_file_that_is_too_large_or_too_deep_does_not_delay_others() {
    let mut fixture = Fixture::new(&[("a.yaml", &service("a", "")), ("b.yaml", &service("b", ""))]);
    fixture.reread();
    let large = fs::File::create(fixture.directory.path().join("a.yaml")).unwrap();
    large.set_len(1 << 40).unwrap();
    // The parser alone would need hours to find out.
    fixture.write("c.yaml", &"{a: ".repeat(1_000_000));
    fixture.write("b.yaml", &service("b2", ""));
    assert_eq!(fixture.reread(), ["-Service default/b", "+Service default/b2"]);
    assert_eq!(
        fixture.errors(),
        [
            "a.yaml: is larger than the limit of 67108864 bytes; divide it into several files",
            "c.yaml: more than 1000 brackets are open at line 1",
        ]
    );
    // Brackets are counted for each document.
    fixture.write("c.yaml", &"---\n# [[[\n".repeat(1000));
    fixture.write("a.yaml", &service("a", ""));
    assert_eq!(fixture.reread(), Vec::<String>::new());
    assert_eq!(fixture.errors(), Vec::<String>::new());
}

/// As in `kubectl apply`, which validates strictly.
#[test]
fn an_unknown_field_is_an_error_and_other_files_are_served() {
    let mut fixture = Fixture::new(&[("a.yaml", &service("a", "")), ("b.yaml", &service("b", ""))]);
    assert_eq!(fixture.reread(), ["+Service default/a", "+Service default/b"]);
    let typo = service("a", "").replace("ports:", "prots:");
    fixture.write("a.yaml", &(service("a0", "") + &typo));
    fixture.write("b.yaml", &service("b2", ""));
    let list = "{kind: ServiceList, itmes: [], items: [{metadata: {name: c, lables: {}}, spec: {ports: [{port: 1, prot: 2}]}}]}";
    fixture.write("c.yaml", list);
    fixture.write(
        "d.json",
        r#"{"kind": "Node", "apiVersion": "v1", "metadata": {"name": "n1"}, "spec": {"podCidr": "x"}}"#,
    );
    let slice = SLICE
        .replace("addresses: [10.1.0.5]", "addresses: [10.1.0.5], conditions: {redy: true}, nodename: null");
    fixture.write("e.yaml", &slice);
    assert_eq!(fixture.reread(), ["-Service default/b", "+Service default/b2"]);
    insta::assert_snapshot!(fixture.errors().join("\n"), @r"
    a.yaml: document 2 (Service default/a): `spec.prots` is not a field of this kind
    c.yaml: document 1: `itmes` is not a field of this kind
    c.yaml: document 1 (Service default/c): `items[0].metadata.lables` is not a field of this kind
    c.yaml: document 1 (Service default/c): `items[0].spec.ports[0].prot` is not a field of this kind
    d.json: document 1 (Node n1): `spec.podCidr` is not a field of this kind
    e.yaml: document 1 (EndpointSlice default/web-1): `endpoints[0].conditions.redy` is not a field of this kind
    e.yaml: document 1 (EndpointSlice default/web-1): `endpoints[0].nodename` is not a field of this kind
    ");
    fixture.write("a.yaml", &service("a2", ""));
    assert_eq!(fixture.reread(), ["-Service default/a", "+Service default/a2"]);
}

#[test]
fn a_file_that_loses_all_its_objects_causes_a_warning() {
    let mut fixture = Fixture::new(&[("a.yaml", &(service("a", "") + &service("a2", "")))]);
    fixture.reread();
    fixture.write("a.yaml", "# nothing yet\n");
    assert_eq!(fixture.reread(), ["-Service default/a", "-Service default/a2"]);
    let warning = "a.yaml: has no objects any more; its previous 2 are removed";
    assert_eq!(fixture.state.status.warnings, [warning]);
    fixture.write("a.yaml", &service("a", ""));
    assert_eq!(fixture.reread(), ["+Service default/a"]);
    assert_eq!(fixture.state.status.warnings, Vec::<String>::new());
}

#[test]
fn objects_of_an_unreadable_file_stay() {
    let mut fixture = Fixture::new(&[("a.yaml", &service("a", ""))]);
    fixture.reread();
    let path = fixture.directory.path().join("a.yaml");
    fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("nowhere", &path).unwrap();
    assert_eq!(fixture.reread(), Vec::<String>::new());
    assert_eq!(fixture.errors(), ["a.yaml: cannot be read: No such file or directory (os error 2)"]);
    fs::remove_file(&path).unwrap();
    fs::write(&path, b"a: \xff").unwrap();
    assert_eq!(fixture.reread(), Vec::<String>::new());
    assert_eq!(fixture.errors(), ["a.yaml: is not UTF-8 text at byte 3"]);
}

#[test]
fn objects_of_a_deleted_directory_stay() {
    let mut fixture = Fixture::new(&[("a.yaml", &service("a", "")), ("b.yaml", &service("b", ""))]);
    fixture.reread();
    let path = fixture.directory.path().to_owned();
    fs::remove_dir_all(&path).unwrap();
    assert_eq!(fixture.reread(), Vec::<String>::new());
    assert!(fixture.state.status.error.as_ref().unwrap().contains("No such file or directory"));
    fs::create_dir(&path).unwrap();
    fixture.write("b.yaml", &service("b", ""));
    assert_eq!(fixture.reread(), ["-Service default/a"]);
    assert_eq!(fixture.state.status.error, None);
}

#[test]
fn errors_name_file_document_object_and_field() {
    let bad = |document: &str| {
        let mut fixture = Fixture::new(&[("web.yaml", &format!("{}{document}", service("good", "")))]);
        assert_eq!(fixture.reread(), Vec::<String>::new(), "{document}");
        fixture.errors().join("\n")
    };
    let port = |port: &str| bad(&service("x", "").replace("{port: 80}", port));
    let with = |more: &str| bad(&service("x", more));
    let slice = |from: &str, to: &str| bad(&SLICE.replace(from, to));
    let cidr = "{apiVersion: networking.k8s.io/v1, kind: ServiceCIDR, metadata: {name: c}, spec: {cidrs: [10.0.0.0/40]}}";
    let list = "{kind: List, items: [{kind: Service, metadata: {name: Web}, spec: {ports: [{port: 80}]}}]}";
    let all = [
        bad("a: b: c"),
        bad("[1]"),
        bad("{kind: Service}"),
        bad("{metadata: {name: x}}"),
        bad("{apiVersion: v2, kind: Service, metadata: {name: x}, spec: {ports: [{port: 80}]}}"),
        bad(list),
        bad(cidr),
        port("{port: eighty}"),
        port("{port: 70000, protocol: ICMP, nodePort: 30000}"),
        port("{port: 80}, {port: 80, name: b}"),
        port(""),
        with("clusterIP: 10.96.0.256"),
        with("clusterIP: 10.96.0.5, clusterIPs: [10.96.0.6]"),
        with("clusterIPs: [10.96.0.5, 10.96.0.6]"),
        with("ipFamilies: [IPv4, IPv6], ipFamilyPolicy: SingleStack"),
        with("clusterIP: 10.96.0.5, ipFamilies: [IPv6]"),
        with("type: Balancer, sessionAffinity: Yes, externalTrafficPolicy: local"),
        with(
            "sessionAffinityConfig: {clientIP: {timeoutSeconds: 0}}, loadBalancerSourceRanges: [' 10.0.0.0/8 ', x]",
        ),
        slice("addressType: IPv4", ""),
        slice("10.1.0.5", "fd00::1"),
        slice("port: 8080", "port: 0"),
    ];
    insta::assert_snapshot!(all.join("\n"));
}

#[test]
fn loading_reports_all_errors_at_once() {
    let fixture =
        Fixture::new(&[("a.yaml", "kind: Service"), ("b.yaml", "kind: Node"), ("c.yaml", &service("c", ""))]);
    let error = load_once(&fixture.state.settings).unwrap_err().to_string();
    assert_eq!(
        error,
        "a.yaml: document 1 (Service): `metadata.name` is missing\n\
         a.yaml: document 1 (Service): `spec` is missing\n\
         b.yaml: document 1 (Node): `metadata.name` is missing"
    );
    let missing = ManifestSource::new("/nonexistent/manifests", "n1");
    let error = load_once(&missing).unwrap_err().to_string();
    assert_eq!(error, "cannot read the directory of manifests `/nonexistent/manifests`");
}
