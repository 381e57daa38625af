//! The changes that valid files cause.

use super::*;

#[test]
fn every_kind_and_every_form_of_list_is_read() {
    let node = "{apiVersion: v1, kind: Node, metadata: {name: n1}, spec: {podCIDR: 10.1.0.0/24}}";
    let other = node.replace("n1", "n2");
    let json = r#"{"kind": "List", "apiVersion": "v1", "items": [
        {"apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": {"name": "all"},
         "spec": {"cidrs": ["10.96.0.0/16"]}}]}"#;
    let typed = "kind: ServiceList\nitems: [{metadata: {name: b, namespace: x}, spec: {ports: [{port: 1}]}}]";
    let mut fixture = Fixture::new(&[
        ("a.yaml", &(service("web", "") + SLICE)),
        ("b.yml", &format!("{node}\n---\n{other}\n---\n# nothing\n")),
        ("c.json", json),
        ("d.yaml", typed),
        ("e.txt", "not: looked at"),
        (".f.yaml", "neither: is this"),
    ]);
    fs::create_dir(fixture.directory.path().join("g.yaml")).unwrap();
    let changes = fixture.reread();
    assert_eq!(
        changes,
        [
            "+Service default/web",
            "+Service x/b",
            "+EndpointSlice default/web-1",
            "+Node n1",
            "+ServiceCIDR all"
        ]
    );
    assert_eq!(fixture.errors(), Vec::<String>::new());
    assert_eq!(fixture.reread(), Vec::<String>::new(), "nothing is reported twice");
}

#[test]
fn w8_ports_of_slices_get_the_defaults_of_the_api_server() {
    let mut fixture = Fixture::new(&[("a.yaml", SLICE)]);
    let changes = fixture.state.reread(&HashSet::new());
    let [Change::Apply(Object::EndpointSlice(slice))] = &changes[..] else { panic!("{changes:?}") };
    let port = &slice.ports.as_ref().unwrap()[0];
    assert_eq!(
        (port.name.as_deref(), port.protocol.as_deref(), port.port),
        (Some(""), Some("TCP"), Some(8080))
    );
}

#[test]
fn w1_w2_objects_that_weir_does_not_use_are_left_out() {
    let labelled = service("other", "")
        .replace("{name: other}", "{name: other, labels: {service.kubernetes.io/service-proxy-name: ''}}");
    let headless =
        SLICE.replace("service-name: web", "service-name: web, service.kubernetes.io/headless: ''");
    let mut fixture = Fixture::new(&[
        ("a.yaml", &(labelled + &service("none", "clusterIP: None") + &service("web", ""))),
        ("b.yaml", &headless),
    ]);
    assert_eq!(fixture.reread(), ["+Service default/web"]);
    fixture.write("b.yaml", SLICE);
    assert_eq!(fixture.reread(), ["+EndpointSlice default/web-1"]);
    fixture.write("b.yaml", &headless);
    assert_eq!(fixture.reread(), ["-EndpointSlice default/web-1"]);
}

#[test]
fn kubectls_output_is_a_valid_manifest() {
    let text = "apiVersion: v1
items:
- apiVersion: v1
  kind: Service
  metadata:
    creationTimestamp: '2026-01-01T00:00:00Z'
    managedFields:
    - {apiVersion: v1, fieldsType: FieldsV1, fieldsV1: {'f:spec': {'f:ports': {'.': {}}}}, manager: kubectl, operation: Update}
    name: web
    namespace: default
    resourceVersion: '7'
    uid: 6d9a4c1e-0000-4000-8000-000000000000
  spec: {clusterIP: 10.96.0.1, clusterIPs: [10.96.0.1], ports: [{port: 80, targetPort: http}], selector: {app: web}}
  status: {loadBalancer: {}}
kind: List
metadata: {resourceVersion: ''}
";
    let mut fixture = Fixture::new(&[("a.yaml", text)]);
    assert_eq!(fixture.reread(), ["+Service default/web"]);
    assert_eq!(fixture.errors(), Vec::<String>::new());
}

#[test]
fn a_byte_order_mark_is_skipped() {
    let json = r#"{"kind": "Node", "apiVersion": "v1", "metadata": {"name": "n1"}}"#;
    let mut fixture = Fixture::new(&[("a.yaml", &format!("\u{feff}{}", service("a", "")))]);
    fixture.write("b.json", &format!("\u{feff}{json}"));
    assert_eq!(fixture.reread(), ["+Service default/a", "+Node n1"]);
    assert_eq!(fixture.errors(), Vec::<String>::new());
}

#[test]
fn an_object_may_move_between_files_and_the_first_file_counts() {
    let mut fixture = Fixture::new(&[("a.yaml", &service("web", "sessionAffinity: None"))]);
    fixture.reread();
    fixture.write("b.yaml", &service("web", "sessionAffinity: ClientIP"));
    assert_eq!(fixture.reread(), Vec::<String>::new());
    assert_eq!(
        fixture.state.status.warnings,
        ["Service default/web is in a.yaml (document 1) and in b.yaml (document 1); the first one is used"]
    );
    fixture.remove("a.yaml");
    assert_eq!(fixture.reread(), ["+Service default/web"], "it is not deleted in between");
    assert_eq!(fixture.state.status.warnings, Vec::<String>::new());
}

#[test]
fn unused_kinds_are_ignored_with_a_warning() {
    let mut fixture = Fixture::new(&[("a.yaml", &(service("a", "") + "{apiVersion: v1, kind: Pod}"))]);
    assert_eq!(fixture.reread(), ["+Service default/a"]);
    assert_eq!(
        fixture.state.status.warnings,
        ["a.yaml: document 2: kind `Pod` is ignored, because weir does not use it"]
    );
}

#[test]
fn loading_ends_with_every_kind_synced() {
    let fixture = Fixture::new(&[("a.yaml", &service("a", ""))]);
    let words: Vec<_> = load_once(&fixture.state.settings).unwrap().iter().map(word).collect();
    let synced = ["Service synced", "EndpointSlice synced", "Node synced", "ServiceCIDR synced"];
    assert_eq!(words, [&["+Service default/a"][..], &synced].concat());
}
