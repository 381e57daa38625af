//! Services, endpoints, the Node and ServiceCIDRs.

use std::{
    collections::BTreeSet,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use k8s_openapi::api::{core::v1::Node, discovery::v1::EndpointSlice};
use kube::{
    Api,
    api::{Patch, PatchParams},
};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::{sync::mpsc::Receiver, task::JoinHandle, time::timeout};
use weir::{
    model::{Change, Kind, Object},
    source::{
        SourceStatus,
        kube::{Connection, Credentials, KubeSource, watch},
    },
};
use weir_tests::apiserver::ApiServer;

use super::PATIENCE;
use crate::api_objects::{ApiObjects, NAMESPACE, create};

struct Source {
    changes: Receiver<Change>,
    status: Arc<SourceStatus>,
    task: JoinHandle<()>,
}

impl Source {
    async fn start(server: &ApiServer, user: &str, servers: &[&ApiServer]) -> Self {
        Self::start_with(server, user, servers, None).await
    }

    /// The same, with a place to keep versions.
    async fn start_with(
        server: &ApiServer,
        user: &str,
        servers: &[&ApiServer],
        versions: Option<&Path>,
    ) -> Self {
        let settings = KubeSource {
            credentials: Credentials::Kubeconfig(server.kubeconfig(user).unwrap()),
            servers: servers.iter().map(|server| server.url().parse().unwrap()).collect(),
            node: "n1".to_owned(),
            versions: versions.map(Path::to_owned),
        };
        let connection = Connection::open(settings).await.unwrap();
        let status = Arc::new(SourceStatus::default());
        let (sender, changes) = tokio::sync::mpsc::channel(16);
        let task = tokio::spawn(watch(connection, sender, Arc::clone(&status)));
        Self { changes, status, task }
    }

    async fn change(&mut self) -> Change {
        let change = timeout(PATIENCE, self.changes.recv()).await;
        let change = change.unwrap_or_else(|_| panic!("no change in time; {:#?}", self.status.report()));
        change.expect("the source goes on")
    }

    /// The next change to something in our namespace, or without one, as a word.
    async fn next(&mut self) -> String {
        loop {
            let change = self.change().await;
            let namespace = match &change {
                Change::Apply(object) => object.name().namespace().to_owned(),
                Change::Delete(_, name) => name.namespace().to_owned(),
                Change::Synced(_) => String::new(),
            };
            if ["", NAMESPACE].contains(&namespace.as_str()) {
                return word(&change);
            }
        }
    }

    /// Everything up to the moment when every kind is complete.
    async fn initial(&mut self) -> BTreeSet<String> {
        let mut seen = BTreeSet::new();
        while seen.iter().filter(|word: &&String| word.ends_with(" synced")).count() < Kind::ALL.len() {
            assert!(seen.insert(self.next().await), "something came twice: {seen:?}");
        }
        seen
    }

    async fn end(self) {
        drop(self.changes);
        timeout(PATIENCE, self.task).await.expect("the source ends in time").unwrap();
    }
}

fn word(change: &Change) -> String {
    match change {
        Change::Apply(object) => format!("+{} {}", object.kind(), object.name().name()),
        Change::Delete(kind, name) => format!("-{kind} {}", name.name()),
        Change::Synced(kind) => format!("{kind} synced"),
    }
}

fn words(words: &[&str]) -> BTreeSet<String> {
    let synced = Kind::ALL.map(|kind| format!("{kind} synced"));
    words.iter().map(|word| (*word).to_owned()).chain(synced).collect()
}

impl ApiObjects {
    fn slices(&self) -> Api<EndpointSlice> {
        Api::namespaced(self.0.clone(), NAMESPACE)
    }

    async fn slice(&self, name: &str) {
        let slice = json!({
            "metadata": {"name": name, "labels": {"kubernetes.io/service-name": "web", "app": "web"},
                "annotations": {"note": "x"}},
            "addressType": "IPv4", "endpoints": [{"addresses": ["10.1.0.5"]}], "ports": [{"port": 8080}],
        });
        create(&self.slices(), slice).await;
    }

    async fn node(&self, name: &str) {
        create::<Node>(&Api::all(self.0.clone()), json!({"metadata": {"name": name}})).await;
    }

    async fn patch_service(&self, name: &str, patch: Value) {
        self.services().patch(name, &PatchParams::default(), &Patch::Merge(patch)).await.unwrap();
    }
}

#[tokio::test]
async fn w1_w2_w3_lists_stream_and_changes_follow() {
    let server = ApiServer::start(&["--authorization-mode=AlwaysAllow"]).await.unwrap();
    let objects = ApiObjects::open(&server).await;
    objects.service("web").await;
    objects.service_with("none", json!({"clusterIP": "None"})).await;
    objects.slice("web-1").await;
    objects.node("n1").await;
    objects.node("n2").await;

    let mut source = Source::start(&server, "admin", &[]).await;
    let first = words(&["+Service web", "+EndpointSlice web-1", "+Node n1", "+ServiceCIDR kubernetes"]);
    assert_eq!(source.initial().await, first);
    for report in source.status.report() {
        // An etcd that cannot report its progress is discovered only once the stream of a watch has begun; pages follow at
        // once. Kinds of which there are many are listed in protobuf.
        let many = matches!(report.kind, Kind::Service | Kind::EndpointSlice);
        let relists = if many || server.streams_lists().unwrap() { 1 } else { 2 };
        assert_eq!((report.relists, report.streamed, report.errors), (relists, 1, 0), "{report:?}");
        assert!(report.connected && report.synced, "{report:?}");
    }

    objects.service("late").await;
    assert_eq!(source.next().await, "+Service late");
    objects.patch_service("late", json!({"spec": {"sessionAffinity": "ClientIP"}})).await;
    let Change::Apply(Object::Service(late)) = source.change().await else { panic!("not a Service") };
    assert_eq!(late.spec.unwrap().session_affinity.as_deref(), Some("ClientIP"));
    assert_eq!(late.metadata.managed_fields, None);
    // W1: the label, even without a value, hands the Service to another proxy; taking it off brings it back.
    let label =
        |value: Value| json!({"metadata": {"labels": {"service.kubernetes.io/service-proxy-name": value}}});
    objects.patch_service("late", label(json!(""))).await;
    assert_eq!(source.next().await, "-Service late");
    objects.patch_service("late", label(Value::Null)).await;
    assert_eq!(source.next().await, "+Service late");
    objects.delete_service("late").await;
    assert_eq!(source.next().await, "-Service late");
    // W2.
    let headless = json!({"metadata": {"labels": {"service.kubernetes.io/headless": ""}}});
    objects.slices().patch("web-1", &PatchParams::default(), &Patch::Merge(headless)).await.unwrap();
    assert_eq!(source.next().await, "-EndpointSlice web-1");
    source.end().await;
}

/// Every value at the end of a path, as `path=value`.
fn leaves(value: &Value, path: &str, into: &mut BTreeSet<String>) {
    match value {
        Value::Object(map) => {
            map.iter().for_each(|(key, value)| leaves(value, &format!("{path}.{key}"), into));
        }
        Value::Array(list) => {
            list.iter().enumerate().for_each(|(at, value)| leaves(value, &format!("{path}[{at}]"), into));
        }
        leaf => {
            into.insert(format!("{path}={leaf}"));
        }
    }
}

fn leaves_of(object: &impl Serialize) -> BTreeSet<String> {
    let mut all = BTreeSet::new();
    leaves(&serde_json::to_value(object).unwrap(), "", &mut all);
    all
}

/// A Service and a slice with everything that is read, and more.
async fn create_rich(objects: &ApiObjects) {
    let service = json!({
        "metadata": {
            "name": "rich",
            "labels": {"service.kubernetes.io/x": "y", "app": "rich"},
            "annotations": {"weir.dev/on-backend-removal": "reset"},
        },
        "spec": {
            "type": "LoadBalancer", "externalTrafficPolicy": "Local", "internalTrafficPolicy": "Local",
            "externalIPs": ["198.51.100.7"], "loadBalancerSourceRanges": ["192.0.2.0/24"],
            "sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 77}},
            "publishNotReadyAddresses": true, "trafficDistribution": "PreferSameZone",
            "ports": [
                {"name": "a", "port": 80, "protocol": "TCP", "targetPort": "web"},
                {"name": "b", "port": 53, "protocol": "UDP", "targetPort": 5353},
            ],
        },
    });
    create(&objects.services(), service).await;
    let status = json!({"status": {"loadBalancer": {"ingress": [
        {"ip": "203.0.113.9", "ipMode": "Proxy"}, {"hostname": "example.org"},
    ]}}});
    objects.services().patch_status("rich", &PatchParams::default(), &Patch::Merge(status)).await.unwrap();
    let slice = json!({
        "metadata": {
            "name": "rich-1",
            "labels": {"kubernetes.io/service-name": "rich", "app": "rich"},
            "annotations": {"endpoints.kubernetes.io/last-change-trigger-time": "2026-01-01T00:00:00Z"},
        },
        "addressType": "IPv6",
        "endpoints": [
            {
                "addresses": ["fd00::5"], "hostname": "web-0", "nodeName": "n1", "zone": "z1",
                "conditions": {"ready": false, "serving": true, "terminating": true},
                "hints": {"forZones": [{"name": "z1"}, {"name": "z2"}], "forNodes": [{"name": "n1"}]},
                "targetRef": {"kind": "Pod", "name": "p"},
            },
            {"addresses": ["fd00::6"]},
        ],
        "ports": [
            {"name": "a", "port": 8080, "protocol": "SCTP", "appProtocol": "http"},
            {"name": "b", "port": 1},
        ],
    });
    create(&objects.slices(), slice).await;
    objects.service_with("outside", json!({"type": "ExternalName", "externalName": "example.org"})).await;
}

/// Fields that weir does not read.
const LEFT_OUT: [&str; 10] = [
    ".metadata.generation",
    ".metadata.managedFields",
    ".metadata.labels.app",
    ".spec.ports[0].targetPort",
    ".spec.ports[1].targetPort",
    ".spec.ipFamilyPolicy",
    ".spec.allocateLoadBalancerNodePorts",
    ".status.loadBalancer.ingress[1].hostname",
    ".endpoints[0].targetRef",
    ".ports[0].appProtocol",
];

/// The parts of an object that weir reads mean the same in protobuf as in JSON, and none of them is missing.
#[tokio::test]
async fn objects_mean_the_same_in_protobuf_and_in_json() {
    let server = ApiServer::start(&["--authorization-mode=AlwaysAllow"]).await.unwrap();
    let objects = ApiObjects::open(&server).await;
    create_rich(&objects).await;
    let (mut source, mut read) = (Source::start(&server, "admin", &[]).await, 0);
    while read < 3 {
        let Change::Apply(object) = source.change().await else { continue };
        let (seen, told) = match (&object, object.name().name()) {
            (Object::Service(seen), name @ ("rich" | "outside")) => {
                (leaves_of(seen), leaves_of(&objects.services().get(name).await.unwrap()))
            }
            (Object::EndpointSlice(seen), name @ "rich-1") => {
                (leaves_of(seen), leaves_of(&objects.slices().get(name).await.unwrap()))
            }
            _ => continue,
        };
        let is_read = |leaf: &String| !LEFT_OUT.iter().any(|out| leaf.starts_with(out));
        assert_eq!(seen, told.into_iter().filter(is_read).collect(), "{}", object.name());
        read += 1;
    }
    source.end().await;
}

/// A field of a protobuf message that has contents of its own.
fn field(number: u8, contents: &[u8]) -> Vec<u8> {
    let length = u8::try_from(contents.len()).unwrap();
    assert!(length < 128, "a longer one takes another length");
    [&[number << 3 | 2, length], contents].concat()
}

/// Creates a Service with an annotation that is no UTF-8, which an API server accepts in protobuf.
async fn create_strange(objects: &ApiObjects, name: &str) {
    let annotation = [field(1, b"note"), field(2, b"caf\xe9")].concat();
    let metadata = [field(1, name.as_bytes()), field(12, &annotation)].concat();
    let port = [field(2, b"TCP"), vec![3 << 3, 80]].concat();
    let service = [field(1, &metadata), field(2, &field(1, &port)), field(3, &field(1, b""))].concat();
    let types = [field(1, b"v1"), field(2, b"Service")].concat();
    let body = [b"k8s\0".to_vec(), field(1, &types), field(2, &service)].concat();
    let protobuf = "application/vnd.kubernetes.protobuf";
    let request = http::Request::post(format!("/api/v1/namespaces/{NAMESPACE}/services"))
        .header("content-type", protobuf)
        .body(body)
        .unwrap();
    let created: Value = objects.0.request(request).await.unwrap();
    assert_eq!(created["metadata"]["name"], name);
}

#[tokio::test]
async fn services_with_text_that_is_no_utf8_come_like_others_and_nothing_is_listed_again() {
    let server = ApiServer::start(&["--authorization-mode=AlwaysAllow"]).await.unwrap();
    let objects = ApiObjects::open(&server).await;
    let mut names = vec!["+ServiceCIDR kubernetes".to_owned()];
    for number in 0..12 {
        create_strange(&objects, &format!("strange-{number}")).await;
        objects.service(&format!("web-{number}")).await;
        names.extend([format!("+Service strange-{number}"), format!("+Service web-{number}")]);
    }
    let mut source = Source::start(&server, "admin", &[]).await;
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    assert_eq!(source.initial().await, words(&names));
    for number in 12..24 {
        create_strange(&objects, &format!("strange-{number}")).await;
        assert_eq!(source.next().await, format!("+Service strange-{number}"));
    }
    objects.delete_service("strange-12").await;
    assert_eq!(source.next().await, "-Service strange-12");
    let report = source.status.of(Kind::Service).report(Kind::Service);
    assert_eq!((report.relists, report.errors), (1, 0), "{report:?}");
    source.end().await;
}

#[tokio::test]
async fn without_watch_list_pages_do_and_forbidden_service_cidrs_count_as_complete() {
    let options = ["--authorization-mode=RBAC", "--feature-gates=WatchList=false"];
    let server = ApiServer::start(&options).await.unwrap();
    let objects = ApiObjects::open(&server).await;
    let rule = |group: &str, resources: &[&str]| json!({"apiGroups": [group], "resources": resources, "verbs": ["list", "watch"]});
    let rules = [rule("", &["services", "nodes"]), rule("discovery.k8s.io", &["endpointslices"])];
    objects.allow(json!(rules)).await;
    let names: Vec<_> = (0..3).map(|index| format!("web-{index}")).collect();
    for name in &names {
        objects.service(name).await;
    }

    let mut source = Source::start(&server, "weir", &[]).await;
    assert_eq!(source.initial().await, words(&["+Service web-0", "+Service web-1", "+Service web-2"]));
    let report = source.status.of(Kind::Node).report(Kind::Node);
    assert_eq!((report.streamed, report.errors), (0, 0), "{report:?}");
    let cidrs = source.status.of(Kind::ServiceCidr).report(Kind::ServiceCidr);
    assert!(!cidrs.connected && cidrs.errors > 0, "{cidrs:?}");
    objects.delete_service("web-1").await;
    assert_eq!(source.next().await, "-Service web-1");
    source.end().await;
}

#[tokio::test]
async fn an_outage_removes_nothing_and_changes_follow() {
    let mut server = ApiServer::start(&["--authorization-mode=AlwaysAllow"]).await.unwrap();
    let sibling = server.sibling().await.unwrap();
    let objects = ApiObjects::open(&sibling).await;
    for name in ["stays", "goes"] {
        objects.service(name).await;
    }
    let mut source = Source::start(&server, "admin", &[]).await;
    let first = words(&["+Service goes", "+Service stays", "+ServiceCIDR kubernetes"]);
    assert_eq!(source.initial().await, first);

    server.stop();
    objects.delete_service("goes").await;
    objects.service("comes").await;
    let disconnected = async {
        while source.status.report().iter().any(|report| report.connected) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, disconnected).await.expect("the outage is noticed");
    assert!(source.changes.is_empty(), "an outage says nothing");

    // The old token is worth nothing to the server that comes back.
    server.rotate_tokens().unwrap();
    server.restart().await.unwrap();
    let back = Instant::now();
    let (mut came, mut went) = (false, false);
    while !(came && went) {
        match source.next().await.as_str() {
            "+Service comes" => came = true,
            "-Service goes" => went = true,
            "+Service stays" | "+ServiceCIDR kubernetes" => {}
            other => panic!("{other}"),
        }
    }
    assert!(back.elapsed() < Duration::from_secs(10), "took {:?}", back.elapsed());
    // Nothing of what stays is taken away later either.
    ApiObjects(server.client().await.unwrap()).service("last").await;
    loop {
        match source.next().await.as_str() {
            "+Service last" => break,
            word => assert!(word.starts_with('+'), "{word}"),
        }
    }
    source.end().await;
}

/// TCP is kept up meanwhile: nothing that is sent fails, and no connection ends.
#[tokio::test]
async fn a_server_that_hangs_is_left_before_a_watch_is_given_up_for_its_silence() {
    /// A watch is given up after 150 s, and the server for that one is another half a minute later.
    const PINGS: Duration = Duration::from_secs(145);
    let server = ApiServer::start(&["--authorization-mode=AlwaysAllow"]).await.unwrap();
    let sibling = server.sibling().await.unwrap();
    let objects = ApiObjects::open(&sibling).await;
    let mut source = Source::start(&server, "admin", &[&server, &sibling]).await;
    assert_eq!(source.initial().await, words(&["+ServiceCIDR kubernetes"]));
    server.freeze(true).unwrap();
    objects.service("late").await;
    let change =
        timeout(PINGS, source.changes.recv()).await.expect("the server is asked whether it is there");
    assert_eq!(word(&change.unwrap()), "+Service late", "the other server tells");
    let report = source.status.of(Kind::Service).report(Kind::Service);
    assert_eq!(report.relists, 1, "the watch goes on where it was: {report:?}");
    server.freeze(false).unwrap();
    source.end().await;
}

#[tokio::test]
async fn an_agent_that_starts_anew_needs_one_list_of_each_kind_whatever_versions_were_kept() {
    let server = ApiServer::start(&["--authorization-mode=AlwaysAllow"]).await.unwrap();
    let objects = ApiObjects::open(&server).await;
    objects.service("web").await;
    let kept = tempfile::tempdir().unwrap();
    let all = words(&["+Service web", "+ServiceCIDR kubernetes"]);
    let mut source = Source::start_with(&server, "admin", &[], Some(kept.path())).await;
    assert_eq!(source.initial().await, all);
    source.end().await;
    let file = std::fs::read_dir(kept.path()).unwrap().next().unwrap().unwrap().path();
    let versions = std::fs::read_to_string(&file).unwrap();
    assert!(versions.lines().next().unwrap().parse::<u64>().unwrap() > 0, "{versions}");
    // The existing version is kept and used, and no server of this cluster has ever reached the other.
    for version in [None, Some("09000000000000000000")] {
        if let Some(version) = version {
            std::fs::write(&file, version.to_owned() + &versions[version.len()..]).unwrap();
        }
        let mut source = Source::start_with(&server, "admin", &[], Some(kept.path())).await;
        assert_eq!(source.initial().await, all);
        let report = source.status.of(Kind::Service).report(Kind::Service);
        assert_eq!((report.relists, report.errors), (1, 0), "{report:?}");
        source.end().await;
    }
}

#[tokio::test]
async fn when_one_server_fails_the_next_one_is_asked() {
    let mut server = ApiServer::start(&["--authorization-mode=AlwaysAllow"]).await.unwrap();
    let sibling = server.sibling().await.unwrap();
    let objects = ApiObjects::open(&sibling).await;
    objects.service("web").await;
    // Each server has a certificate of its own here; the kubeconfig trusts them all.
    let mut source = Source::start(&server, "admin", &[&server, &sibling]).await;
    assert_eq!(source.initial().await, words(&["+Service web", "+ServiceCIDR kubernetes"]));
    server.stop();
    objects.service("late").await;
    while source.next().await != "+Service late" {}
    source.end().await;
}
