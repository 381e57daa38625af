use std::{fs, net::IpAddr, time::Duration};

use k8s_openapi::api::core::v1::ServiceSpec;
use tokio::time::timeout;

use super::*;
use crate::model::Object;

/// A directory with a source on it.
struct Fixture {
    directory: tempfile::TempDir,
    state: State,
}

impl Fixture {
    fn new(files: &[(&str, &str)]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let state = State::new(ManifestSource::new(directory.path(), "n1"));
        let fixture = Self { directory, state };
        for (name, text) in files {
            fixture.write(name, text);
        }
        fixture
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.directory.path().join(name), text).unwrap();
    }

    /// Waits until files are so old that they are not read again for their age.
    fn await_old_files(&self) {
        use std::{os::unix::fs::MetadataExt, time::SystemTime};
        let changed = |entry: fs::DirEntry| entry.metadata().unwrap().ctime() as u64;
        let last = fs::read_dir(self.directory.path()).unwrap().map(|entry| changed(entry.unwrap())).max();
        let now = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        while last.is_some_and(|last| now() <= last + 3) {
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
    }

    fn remove(&self, name: &str) {
        fs::remove_file(self.directory.path().join(name)).unwrap();
    }

    /// Looks, and writes each change as a word.
    fn look(&mut self) -> Vec<String> {
        self.state.look(&HashSet::new()).iter().map(word).collect()
    }

    /// What is wrong, by file.
    fn errors(&self) -> Vec<String> {
        let files = &self.state.status.files;
        files
            .iter()
            .flat_map(|file| file.errors.iter().map(|error| format!("{}: {error}", file.name)))
            .collect()
    }

    /// The spec of a Service as it would be told anew.
    fn spec(&self, name: &str) -> ServiceSpec {
        spec(&load_once(&self.state.settings).unwrap(), name)
    }
}

fn word(change: &Change) -> String {
    match change {
        Change::Apply(object) => format!("+{} {}", object.kind(), object.name()),
        Change::Delete(kind, name) => format!("-{kind} {name}"),
        Change::Synced(kind) => format!("{kind} synced"),
    }
}

fn spec(changes: &[Change], name: &str) -> ServiceSpec {
    let found = changes.iter().find_map(|change| match change {
        Change::Apply(Object::Service(service)) if service.metadata.name.as_deref() == Some(name) => {
            service.spec.clone()
        }
        _ => None,
    });
    found.unwrap_or_else(|| panic!("no Service {name}"))
}

/// A Service with more lines for its spec.
fn service(name: &str, more: &str) -> String {
    format!(
        "{{apiVersion: v1, kind: Service, metadata: {{name: {name}}}, spec: {{ports: [{{port: 80}}], {more}}}}}\n---\n"
    )
}

const SLICE: &str = "
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{port: 8080}]
endpoints: [{addresses: [10.1.0.5]}]
";

#[test]
fn every_kind_and_every_kind_of_list_is_read() {
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
    let told = fixture.look();
    assert_eq!(
        told,
        [
            "+Service default/web",
            "+Service x/b",
            "+EndpointSlice default/web-1",
            "+Node n1",
            "+ServiceCIDR all"
        ]
    );
    assert_eq!(fixture.errors(), Vec::<String>::new());
    assert_eq!(fixture.look(), Vec::<String>::new(), "nothing is told twice");
}

#[test]
fn w8_ports_of_slices_get_the_defaults_of_the_api_server() {
    let mut fixture = Fixture::new(&[("a.yaml", SLICE)]);
    let changes = fixture.state.look(&HashSet::new());
    let [Change::Apply(Object::EndpointSlice(slice))] = &changes[..] else { panic!("{changes:?}") };
    let port = &slice.ports.as_ref().unwrap()[0];
    assert_eq!(
        (port.name.as_deref(), port.protocol.as_deref(), port.port),
        (Some(""), Some("TCP"), Some(8080))
    );
}

#[test]
fn w1_w2_what_is_not_ours_is_left_out() {
    let labelled = service("other", "")
        .replace("{name: other}", "{name: other, labels: {service.kubernetes.io/service-proxy-name: ''}}");
    let headless =
        SLICE.replace("service-name: web", "service-name: web, service.kubernetes.io/headless: ''");
    let mut fixture = Fixture::new(&[
        ("a.yaml", &(labelled + &service("none", "clusterIP: None") + &service("web", ""))),
        ("b.yaml", &headless),
    ]);
    assert_eq!(fixture.look(), ["+Service default/web"]);
    fixture.write("b.yaml", SLICE);
    assert_eq!(fixture.look(), ["+EndpointSlice default/web-1"]);
    fixture.write("b.yaml", &headless);
    assert_eq!(fixture.look(), ["-EndpointSlice default/web-1"]);
}

#[test]
fn a_broken_file_keeps_its_last_good_state_and_others_go_on() {
    let mut fixture = Fixture::new(&[("a.yaml", &service("a", "")), ("b.yaml", &service("b", ""))]);
    fixture.look();
    fixture.write("a.yaml", &(service("a2", "") + "kind: Service\nmetadata: [oops"));
    fixture.write("b.yaml", &service("b2", ""));
    assert_eq!(fixture.look(), ["-Service default/b", "+Service default/b2"]);
    assert_eq!(fixture.errors().len(), 1);
    assert_eq!(fixture.state.status.files[0].objects, 1);
    fixture.write("a.yaml", &service("a2", ""));
    assert_eq!(fixture.look(), ["-Service default/a", "+Service default/a2"]);
    assert_eq!(fixture.errors(), Vec::<String>::new());
    fixture.remove("a.yaml");
    assert_eq!(fixture.look(), ["-Service default/a2"]);
}

#[test]
fn what_a_file_said_before_it_broke_stays_in_force_over_a_restart() {
    let kept = tempfile::tempdir().unwrap();
    let mut fixture = Fixture::new(&[("a.yaml", &service("a", "")), ("b.yaml", &service("b", ""))]);
    fixture.state.settings.last_good = Some(kept.path().join("kept"));
    let restart = |fixture: &mut Fixture| fixture.state = State::new(fixture.state.settings.clone());
    restart(&mut fixture);
    fixture.look();
    let broken = "kind: Service\nmetadata: [oops";
    for text in [broken.as_bytes(), b"a: \xff"] {
        fs::write(fixture.directory.path().join("a.yaml"), text).unwrap();
        fixture.write("b.yaml", &service("b2", ""));
        restart(&mut fixture);
        assert_eq!(fixture.look(), ["+Service default/a", "+Service default/b2"]);
        assert_eq!(fixture.errors().len(), 1);
        assert_eq!(fixture.state.status.files[0].objects, 1);
        assert_eq!(fixture.look(), Vec::<String>::new());
    }
    fixture.write("a.yaml", &service("a2", ""));
    assert_eq!(fixture.look(), ["-Service default/a", "+Service default/a2"]);

    // A file that was taken away meanwhile says nothing any more, also when a broken one of its name comes later.
    fixture.remove("a.yaml");
    restart(&mut fixture);
    assert_eq!(fixture.look(), ["+Service default/b2"]);
    fixture.write("a.yaml", broken);
    restart(&mut fixture);
    assert_eq!(fixture.look(), ["+Service default/b2"]);
}

#[test]
fn a_file_that_is_too_large_or_too_deep_costs_the_others_nothing() {
    let mut fixture = Fixture::new(&[("a.yaml", &service("a", "")), ("b.yaml", &service("b", ""))]);
    fixture.look();
    let large = fs::File::create(fixture.directory.path().join("a.yaml")).unwrap();
    large.set_len(1 << 40).unwrap();
    // It takes the parser hours to find that out by itself.
    fixture.write("c.yaml", &"{a: ".repeat(1_000_000));
    fixture.write("b.yaml", &service("b2", ""));
    assert_eq!(fixture.look(), ["-Service default/b", "+Service default/b2"]);
    assert_eq!(
        fixture.errors(),
        [
            "a.yaml: has more than the 67108864 bytes that are read; divide it into several files",
            "c.yaml: more than 1000 brackets are open at line 1",
        ]
    );
    // Brackets of many documents do not add up.
    fixture.write("c.yaml", &"---\n# [[[\n".repeat(1000));
    fixture.write("a.yaml", &service("a", ""));
    assert_eq!(fixture.look(), Vec::<String>::new());
    assert_eq!(fixture.errors(), Vec::<String>::new());
}

#[test]
fn what_files_said_is_kept_when_there_is_room_again() {
    let disk = tempfile::tempdir().unwrap();
    let full = disk.path().join("full");
    fs::write(&full, "").unwrap();
    let mut fixture = Fixture::new(&[("a.yaml", &service("a", "")), ("b.yaml", &service("b", ""))]);
    fixture.state.settings.last_good = Some(full.join("kept"));
    fixture.state = State::new(fixture.state.settings.clone());
    fixture.await_old_files();
    assert_eq!(fixture.look(), ["+Service default/a", "+Service default/b"]);
    fs::remove_file(&full).unwrap();
    assert_eq!(fixture.look(), Vec::<String>::new());
    for name in ["a.yaml", "b.yaml"] {
        fixture.write(name, "kind: Service");
    }
    fixture.state = State::new(fixture.state.settings.clone());
    assert_eq!(fixture.look(), ["+Service default/a", "+Service default/b"]);
}

#[test]
fn what_files_said_is_kept_beside_the_status_file() {
    let kept = tempfile::tempdir().unwrap();
    let mut fixture = Fixture::new(&[("a.yaml", &service("a", ""))]);
    fixture.state.settings.status_file = Some(kept.path().join("status.json"));
    fixture.state = State::new(fixture.state.settings.clone());
    fixture.look();
    fixture.write("a.yaml", "kind: Service");
    fixture.state = State::new(fixture.state.settings.clone());
    assert_eq!(fixture.look(), ["+Service default/a"]);
}

#[test]
fn where_nothing_can_be_kept_manifests_are_followed_all_the_same() {
    let mut fixture = Fixture::new(&[("a.yaml", &service("a", "")), ("b.yaml", "kind: Service")]);
    fixture.state.settings.last_good = Some("/proc/weir".into());
    fixture.state = State::new(fixture.state.settings.clone());
    assert_eq!(fixture.look(), ["+Service default/a"]);
    fixture.write("b.yaml", &service("b", ""));
    assert_eq!(fixture.look(), ["+Service default/b"]);
}

/// As `kubectl apply` refuses it, whose `--validate` is strict.
#[test]
fn a_field_that_no_such_object_has_is_an_error_and_everything_else_is_served() {
    let mut fixture = Fixture::new(&[("a.yaml", &service("a", "")), ("b.yaml", &service("b", ""))]);
    assert_eq!(fixture.look(), ["+Service default/a", "+Service default/b"]);
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
    assert_eq!(fixture.look(), ["-Service default/b", "+Service default/b2"]);
    insta::assert_snapshot!(fixture.errors().join("\n"), @r"
    a.yaml: document 2 (Service default/a): `spec.prots` is no field of this kind
    c.yaml: document 1: `itmes` is no field of this kind
    c.yaml: document 1 (Service default/c): `items[0].metadata.lables` is no field of this kind
    c.yaml: document 1 (Service default/c): `items[0].spec.ports[0].prot` is no field of this kind
    d.json: document 1 (Node n1): `spec.podCidr` is no field of this kind
    e.yaml: document 1 (EndpointSlice default/web-1): `endpoints[0].conditions.redy` is no field of this kind
    e.yaml: document 1 (EndpointSlice default/web-1): `endpoints[0].nodename` is no field of this kind
    ");
    fixture.write("a.yaml", &service("a2", ""));
    assert_eq!(fixture.look(), ["-Service default/a", "+Service default/a2"]);
}

#[test]
fn what_kubectl_prints_of_an_object_is_a_manifest() {
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
    assert_eq!(fixture.look(), ["+Service default/web"]);
    assert_eq!(fixture.errors(), Vec::<String>::new());
}

/// What an agent took that knew other fields is programmed, and goes on while the file is complained of.
#[test]
fn what_was_kept_with_a_field_that_is_not_known_stays_in_force() {
    let kept = tempfile::tempdir().unwrap();
    let text = service("a", "fieldOfAnotherVersion: 1");
    let mut fixture = Fixture::new(&[("a.yaml", &text)]);
    fs::write(kept.path().join("a.yaml"), &text).unwrap();
    fixture.state.settings.last_good = Some(kept.path().to_owned());
    fixture.state = State::new(fixture.state.settings.clone());
    assert_eq!(fixture.look(), ["+Service default/a"]);
    let error =
        "a.yaml: document 1 (Service default/a): `spec.fieldOfAnotherVersion` is no field of this kind";
    assert_eq!(fixture.errors(), [error]);
}

#[test]
fn a_byte_order_mark_is_no_part_of_a_manifest() {
    let json = r#"{"kind": "Node", "apiVersion": "v1", "metadata": {"name": "n1"}}"#;
    let mut fixture = Fixture::new(&[("a.yaml", &format!("\u{feff}{}", service("a", "")))]);
    fixture.write("b.json", &format!("\u{feff}{json}"));
    assert_eq!(fixture.look(), ["+Service default/a", "+Node n1"]);
    assert_eq!(fixture.errors(), Vec::<String>::new());
}

#[test]
fn a_file_that_loses_all_its_objects_is_warned_of() {
    let mut fixture = Fixture::new(&[("a.yaml", &(service("a", "") + &service("a2", "")))]);
    fixture.look();
    fixture.write("a.yaml", "# nothing yet\n");
    assert_eq!(fixture.look(), ["-Service default/a", "-Service default/a2"]);
    let warning = "a.yaml: has no object any more; the 2 that it had are removed";
    assert_eq!(fixture.state.status.warnings, [warning]);
    fixture.write("a.yaml", &service("a", ""));
    assert_eq!(fixture.look(), ["+Service default/a"]);
    assert_eq!(fixture.state.status.warnings, Vec::<String>::new());
}

#[test]
fn what_cannot_be_read_is_an_error_and_not_gone() {
    let mut fixture = Fixture::new(&[("a.yaml", &service("a", ""))]);
    fixture.look();
    let path = fixture.directory.path().join("a.yaml");
    fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("nowhere", &path).unwrap();
    assert_eq!(fixture.look(), Vec::<String>::new());
    assert_eq!(fixture.errors(), ["a.yaml: cannot be read: No such file or directory (os error 2)"]);
    fs::remove_file(&path).unwrap();
    fs::write(&path, b"a: \xff").unwrap();
    assert_eq!(fixture.look(), Vec::<String>::new());
    assert_eq!(fixture.errors(), ["a.yaml: is not UTF-8 text at byte 3"]);
}

#[test]
fn a_directory_that_vanishes_takes_nothing_with_it() {
    let mut fixture = Fixture::new(&[("a.yaml", &service("a", "")), ("b.yaml", &service("b", ""))]);
    fixture.look();
    let path = fixture.directory.path().to_owned();
    fs::remove_dir_all(&path).unwrap();
    assert_eq!(fixture.look(), Vec::<String>::new());
    assert!(fixture.state.status.error.as_ref().unwrap().contains("No such file or directory"));
    fs::create_dir(&path).unwrap();
    fixture.write("b.yaml", &service("b", ""));
    assert_eq!(fixture.look(), ["-Service default/a"]);
    assert_eq!(fixture.state.status.error, None);
}

#[test]
fn an_object_may_move_from_file_to_file_and_the_first_file_counts() {
    let mut fixture = Fixture::new(&[("a.yaml", &service("web", "sessionAffinity: None"))]);
    fixture.look();
    fixture.write("b.yaml", &service("web", "sessionAffinity: ClientIP"));
    assert_eq!(fixture.look(), Vec::<String>::new());
    assert_eq!(
        fixture.state.status.warnings,
        ["Service default/web is in a.yaml (document 1) and in b.yaml (document 1); the first one counts"]
    );
    fixture.remove("a.yaml");
    assert_eq!(fixture.look(), ["+Service default/web"], "no delete in between");
    assert_eq!(fixture.state.status.warnings, Vec::<String>::new());
}

#[test]
fn kinds_that_are_not_used_are_named_and_ignored() {
    let mut fixture = Fixture::new(&[("a.yaml", &(service("a", "") + "{apiVersion: v1, kind: Pod}"))]);
    assert_eq!(fixture.look(), ["+Service default/a"]);
    assert_eq!(fixture.state.status.warnings, ["a.yaml: document 2: kind `Pod` is not used here; ignored"]);
}

#[test]
fn errors_name_file_document_object_and_field() {
    let bad = |document: &str| {
        let mut fixture = Fixture::new(&[("web.yaml", &format!("{}{document}", service("good", "")))]);
        assert_eq!(fixture.look(), Vec::<String>::new(), "{document}");
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
fn all_that_is_wrong_is_reported_at_once_when_loading() {
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

#[test]
fn a_loaded_directory_ends_with_every_kind_synced() {
    let fixture = Fixture::new(&[("a.yaml", &service("a", ""))]);
    let words: Vec<_> = load_once(&fixture.state.settings).unwrap().iter().map(word).collect();
    let synced = ["Service synced", "EndpointSlice synced", "Node synced", "ServiceCIDR synced"];
    assert_eq!(words, [&["+Service default/a"][..], &synced].concat());
}

fn ips(spec: &ServiceSpec) -> Vec<IpAddr> {
    assert_eq!(spec.cluster_ip.as_ref(), spec.cluster_ips.as_ref().and_then(|ips| ips.first()));
    spec.cluster_ips.iter().flatten().map(|ip| ip.parse().unwrap()).collect()
}

#[test]
fn cluster_ips_follow_families_and_policy() {
    let text = service("plain", "")
        + &service("six", "ipFamilies: [IPv6]")
        + &service("dual", "ipFamilyPolicy: PreferDualStack")
        + &service("dual6", "ipFamilyPolicy: RequireDualStack, ipFamilies: [IPv6]")
        + &service("half", "ipFamilyPolicy: RequireDualStack, clusterIP: 10.96.0.7")
        + &service("fixed", "clusterIP: 192.0.2.1");
    let mut fixture = Fixture::new(&[("a.yaml", &text)]);
    let families = |name: &str| {
        let spec = fixture.spec(name);
        let ips = ips(&spec);
        let ranges = &fixture.state.settings.service_ranges;
        let inside = ips.iter().filter(|ip| ranges.iter().any(|range| range.contains(*ip))).count();
        (spec.ip_families.unwrap().join(" "), ips.len(), inside)
    };
    assert_eq!(families("plain"), ("IPv4".to_owned(), 1, 1));
    assert_eq!(families("six"), ("IPv6".to_owned(), 1, 1));
    assert_eq!(families("dual"), ("IPv4 IPv6".to_owned(), 2, 2));
    assert_eq!(families("dual6"), ("IPv6 IPv4".to_owned(), 2, 2));
    assert_eq!(families("half"), ("IPv4 IPv6".to_owned(), 2, 2));
    assert_eq!(families("fixed"), ("IPv4".to_owned(), 1, 0));
    assert_eq!(ips(&fixture.spec("half"))[0].to_string(), "10.96.0.7");
    fixture.state.settings.service_ranges.pop();
    let error = load_once(&fixture.state.settings).unwrap_err().to_string();
    assert_eq!(
        error,
        "a.yaml: document 2 (Service default/six): `spec.clusterIP` asks for IPv6, but no IPv6 range is configured\n\
         a.yaml: document 4 (Service default/dual6): `spec.clusterIP` asks for IPv6, but no IPv6 range is configured\n\
         a.yaml: document 5 (Service default/half): `spec.ipFamilyPolicy` asks for IPv6, but no IPv6 range is configured"
    );
}

#[test]
fn node_ports_and_the_health_check_port_are_given() {
    let local = "type: LoadBalancer, externalTrafficPolicy: Local";
    let text = service("np", "type: NodePort").replace(
        "{port: 80}",
        "{port: 80, name: a}, {port: 80, name: b, protocol: UDP}, {port: 81, name: c, nodePort: 80}",
    ) + &service("lb", local)
        + &service("bare", "type: LoadBalancer, allocateLoadBalancerNodePorts: false");
    let fixture = Fixture::new(&[("a.yaml", &text)]);
    let ports = |name: &str| -> Vec<_> {
        fixture.spec(name).ports.unwrap().into_iter().map(|port| port.node_port).collect()
    };
    let np = ports("np");
    assert_eq!(np[0], np[1], "one number for both protocols of a port");
    assert!((30086..=32767).contains(&np[0].unwrap()), "{np:?}");
    assert_eq!(np[2], Some(80));
    let health = fixture.spec("lb").health_check_node_port.unwrap();
    assert!((30086..=32767).contains(&health) && ports("lb")[0] != Some(health));
    assert_eq!((ports("bare"), fixture.spec("bare").health_check_node_port), (vec![None], None));
}

#[test]
fn allocations_are_the_same_after_a_restart_and_yield_to_explicit_ones() {
    let text: String = (0..40).map(|index| service(&format!("s{index}"), "type: NodePort")).collect();
    let mut fixture = Fixture::new(&[("a.yaml", &text)]);
    fixture.look();
    let before = fixture.state.status.allocations.clone();
    let mut again = State::new(fixture.state.settings.clone());
    again.look(&HashSet::new());
    assert_eq!(again.status.allocations, before);

    let wanted = &before[3];
    let (ip, port) = (wanted.cluster_ips[0], wanted.node_ports[0].node_port);
    let name = wanted.service.strip_prefix("default/").unwrap();
    let explicit = format!("type: NodePort, clusterIP: {ip}");
    let explicit = service("zz", &explicit).replace("{port: 80}", &format!("{{port: 80, nodePort: {port}}}"));
    fixture.write("b.yaml", &explicit);
    assert_eq!(fixture.look(), [format!("+Service default/{name}"), "+Service default/zz".to_owned()]);
    let after = &fixture.state.status.allocations;
    assert_ne!(after[3].cluster_ips, before[3].cluster_ips);
    assert_ne!(after[3].node_ports, before[3].node_ports);
    assert_eq!((&after[..3], &after[4..]), (&before[..3], &before[4..]), "nobody else moves");
    let moved = format!("Service default/{name} moves from {ip} to {}", after[3].cluster_ips[0]);
    assert_eq!(fixture.state.status.warnings, [moved]);
}

#[test]
fn addresses_that_two_services_name_go_to_the_first_file() {
    let fixed = "type: NodePort, clusterIP: 10.96.0.9";
    let mut fixture = Fixture::new(&[("a.yaml", &service("z", fixed)), ("b.yaml", &service("a", fixed))]);
    assert_eq!(fixture.look(), ["+Service default/z"]);
    assert_eq!(
        fixture.errors(),
        ["b.yaml: document 1 (Service default/a): `spec.clusterIP` is taken by Service default/z"]
    );
    fixture.remove("a.yaml");
    assert_eq!(fixture.look(), ["-Service default/z", "+Service default/a"]);
}

#[test]
fn an_exhausted_range_is_said_and_the_rest_goes_on() {
    let text: String = (0..8).map(|index| service(&format!("s{index}"), "")).collect();
    let mut fixture = Fixture::new(&[]);
    fixture.state.settings.service_ranges = vec!["192.0.2.0/29".parse().unwrap()];
    fixture.state = State::new(fixture.state.settings.clone());
    fixture.write("a.yaml", &text);
    assert_eq!(fixture.look().len(), 8);
    assert_eq!(fixture.state.status.allocations.len(), 6);
    let shortages = [
        "Service default/s6: no IPv4 ClusterIP is left to give",
        "Service default/s7: no IPv4 ClusterIP is left to give",
    ];
    assert_eq!(fixture.state.status.warnings, shortages);
}

#[test]
fn the_status_file_follows_and_is_no_manifest() {
    let mut fixture = Fixture::new(&[("a.yaml", &service("a", ""))]);
    let path = fixture.directory.path().join("status.json");
    fixture.state.settings.status_file = Some(path.clone());
    fixture.state = State::new(fixture.state.settings.clone());
    let read = || serde_json::from_slice::<ManifestStatus>(&fs::read(&path).unwrap()).unwrap();
    fixture.look();
    assert_eq!(read(), fixture.state.status);
    assert_eq!(read().allocations[0].service, "default/a");
    fixture.write("a.yaml", "kind: Service");
    fixture.look();
    assert_eq!(read().files.len(), 1);
    assert_eq!(read().files[0].errors[0], "document 1 (Service): `metadata.name` is missing");
}

/// A source at work on a directory.
struct Running {
    directory: tempfile::TempDir,
    changes: mpsc::Receiver<Change>,
    view: watch::Receiver<Arc<ManifestStatus>>,
    task: tokio::task::JoinHandle<()>,
}

impl Running {
    fn start(name: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (sender, changes) = mpsc::channel(64);
        let (viewer, view) = watch::channel(Arc::default());
        let settings = ManifestSource::new(directory.path().join(name), "n1");
        let task = tokio::spawn(watch(settings, sender, Arc::default(), viewer));
        Self { directory, changes, view, task }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    async fn next(&mut self) -> String {
        let change = timeout(Duration::from_secs(10), self.changes.recv()).await.expect("a change in time");
        word(&change.expect("the source goes on"))
    }

    async fn synced(&mut self) {
        for kind in Kind::ALL {
            assert_eq!(self.next().await, format!("{kind} synced"));
        }
    }
}

#[tokio::test]
async fn changes_are_noticed_however_they_are_made() {
    let mut source = Running::start(".");
    source.synced().await;
    fs::write(source.path("a.yaml"), service("a", "")).unwrap();
    assert_eq!(source.next().await, "+Service default/a");
    // As editors do it.
    fs::write(source.path(".a.yaml.swp"), service("b", "")).unwrap();
    fs::rename(source.path(".a.yaml.swp"), source.path("a.yaml")).unwrap();
    assert_eq!(source.next().await, "-Service default/a");
    assert_eq!(source.next().await, "+Service default/b");
    fs::remove_file(source.path("a.yaml")).unwrap();
    assert_eq!(source.next().await, "-Service default/b");
}

#[tokio::test]
async fn a_file_is_not_read_while_it_is_being_written() {
    use std::io::Write;
    let mut source = Running::start(".");
    source.synced().await;
    fs::write(source.path("a.yaml"), service("a", "")).unwrap();
    assert_eq!(source.next().await, "+Service default/a");
    let mut file = fs::File::create(source.path("a.yaml")).unwrap();
    for other in ["b", "c"] {
        // A slow writer holds up no other file.
        fs::write(source.path(&format!("{other}.yaml")), service(other, "")).unwrap();
        assert_eq!(source.next().await, format!("+Service default/{other}"), "the first file is cut short");
        file.write_all(b"# a long preface\n").unwrap();
    }
    file.write_all(service("a", "sessionAffinity: ClientIP").as_bytes()).unwrap();
    drop(file);
    assert_eq!(source.next().await, "+Service default/a");
}

#[tokio::test]
async fn a_mounted_config_map_is_followed_through_its_symlinks() {
    let mut source = Running::start("mount");
    let publish = |source: &Running, version: &str, text: &str| {
        let mount = source.path("mount");
        fs::create_dir_all(mount.join(version)).unwrap();
        fs::write(mount.join(version).join("a.yaml"), text).unwrap();
        std::os::unix::fs::symlink(version, mount.join("..data_tmp")).unwrap();
        fs::rename(mount.join("..data_tmp"), mount.join("..data")).unwrap();
    };
    publish(&source, "..1", &service("a", ""));
    std::os::unix::fs::symlink("..data/a.yaml", source.path("mount/a.yaml")).unwrap();
    let mut first: Vec<String> = Vec::new();
    for _ in 0..5 {
        first.push(source.next().await);
    }
    assert!(first.contains(&"+Service default/a".to_owned()), "{first:?}");
    publish(&source, "..2", &service("b", ""));
    assert_eq!(source.next().await, "-Service default/a");
    assert_eq!(source.next().await, "+Service default/b");
}

#[tokio::test]
async fn a_directory_may_come_late_go_and_come_back() {
    let mut source = Running::start("later");
    source.view.wait_for(|status| status.error.is_some()).await.unwrap();
    assert!(source.changes.is_empty(), "nothing is synced before the directory was read");
    for round in ["a", "b", "c"] {
        let staged = source.path("staged");
        fs::create_dir(&staged).unwrap();
        fs::write(staged.join("x.yaml"), service(round, "")).unwrap();
        fs::rename(&staged, source.path("later")).unwrap();
        let mut told = source.next().await;
        if told.starts_with('-') {
            told = source.next().await;
        }
        assert_eq!(told, format!("+Service default/{round}"));
        if round == "a" {
            source.synced().await;
        }
        // The new directory is watched like the first one.
        fs::write(source.path("later/y.yaml"), service("y", "")).unwrap();
        assert_eq!(source.next().await, "+Service default/y");
        fs::remove_file(source.path("later/y.yaml")).unwrap();
        assert_eq!(source.next().await, "-Service default/y");
        fs::remove_dir_all(source.path("later")).unwrap();
        source.view.wait_for(|status| status.error.is_some()).await.unwrap();
    }
}

#[tokio::test]
async fn the_source_ends_when_nobody_receives() {
    let mut source = Running::start(".");
    source.synced().await;
    source.changes.close();
    timeout(Duration::from_secs(10), source.task).await.expect("it ends in time").unwrap();
}
