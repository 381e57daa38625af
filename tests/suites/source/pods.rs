//! Pods and namespaces, a stream of their own.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use k8s_openapi::api::{
    core::v1::{Container, Namespace, Pod},
    node::v1::RuntimeClass,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::{
    Api,
    api::{DeleteParams, Patch, PatchParams},
};
use serde_json::{Value, json};
use tokio::{sync::mpsc::Receiver, task::JoinHandle, time::timeout};
use weir::{
    model::{Change, Kind, PodChange, PodObject},
    source::{
        SourceStatus,
        kube::{Connection, Credentials, KubeSource, watch, watch_pods},
    },
};
use weir_tests::apiserver::ApiServer;

use super::PATIENCE;
use crate::api_objects::{ApiObjects, NAMESPACE, create};

/// There is no controller that makes service accounts.
const NO_ACCOUNTS: &str = "--disable-admission-plugins=ServiceAccount";

async fn connection(server: &ApiServer, user: &str) -> Connection {
    let settings = KubeSource {
        credentials: Credentials::Kubeconfig(server.kubeconfig(user).unwrap()),
        servers: Vec::new(),
        node: "n1".to_owned(),
        versions: None,
    };
    Connection::open(settings).await.unwrap()
}

/// The stream, with what is of interest here.
struct Source {
    changes: Receiver<PodChange>,
    status: Arc<SourceStatus>,
    task: JoinHandle<()>,
}

impl Source {
    fn start(connection: Connection) -> Self {
        let status = Arc::new(SourceStatus::default());
        let (sender, changes) = tokio::sync::mpsc::channel(16);
        let task = tokio::spawn(watch_pods(connection, sender, Arc::clone(&status)));
        Self { changes, status, task }
    }

    /// The next change to a pod or to our namespace, or without an object, as a word; with what the object chooses.
    async fn next(&mut self) -> String {
        loop {
            let change = timeout(PATIENCE, self.changes.recv()).await;
            let change = change.unwrap_or_else(|_| {
                panic!("no change in time; {:#?}", self.status.of(Kind::Pod).report(Kind::Pod))
            });
            let word = word(&change.expect("the source goes on"));
            if !word.contains("Namespace ") || word.contains(NAMESPACE) {
                return word;
            }
        }
    }

    async fn initial(&mut self) -> BTreeSet<String> {
        let mut seen = BTreeSet::new();
        while seen.iter().filter(|word: &&String| word.starts_with("synced")).count() < Kind::PODS.len() {
            assert!(seen.insert(self.next().await), "something came twice: {seen:?}");
        }
        seen
    }

    async fn end(self) {
        drop(self.changes);
        timeout(PATIENCE, self.task).await.expect("the source ends in time").unwrap();
    }
}

fn word(change: &PodChange) -> String {
    match change {
        Change::Apply(object) => {
            let labels = match object {
                PodObject::Pod(object) => &object.metadata.labels,
                PodObject::Namespace(object) => &object.metadata.labels,
            };
            let choice = labels.as_ref().and_then(|labels| labels.get("weir.dev/socket-lb"));
            let choice = choice.map(|choice| format!(" {choice}")).unwrap_or_default();
            format!("+{} {}{choice}", object.kind(), object.name().name())
        }
        Change::Delete(kind, name) => format!("-{kind} {}", name.name()),
        Change::Synced(kind) => format!("synced {kind}s"),
    }
}

impl ApiObjects {
    fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.0.clone(), NAMESPACE)
    }

    async fn pod(&self, name: &str, node: &str, host_network: bool) {
        let pod = json!({
            "metadata": {"name": name},
            "spec": {
                "nodeName": node, "hostNetwork": host_network,
                "containers": [{"name": "main", "image": "none"}],
            },
        });
        create(&self.pods(), pod).await;
    }

    /// A pod with all that decides about its sockets, and the class that it is of.
    async fn rich_pod(&self, name: &str) {
        let class = json!({"metadata": {"name": "kata"}, "handler": "kata"});
        create::<RuntimeClass>(&Api::all(self.0.clone()), class).await;
        let container = |name: &str| json!({"name": name, "image": "none"});
        let pod = json!({
            "metadata": {"name": name, "labels": {"app": "rich"}, "annotations": {"sidecar.istio.io/status": "{}"}},
            "spec": {
                "nodeName": "n1", "runtimeClassName": "kata", "hostNetwork": true,
                "initContainers": [container("first"), container("linkerd-proxy")],
                "containers": [container("main"), container("istio-proxy")],
            },
        });
        create(&self.pods(), pod).await;
    }

    async fn delete_pod(&self, name: &str) {
        self.pods().delete(name, &DeleteParams::default().grace_period(0)).await.unwrap();
    }
}

fn label(value: &Value) -> Patch<Value> {
    Patch::Merge(json!({"metadata": {"labels": {"weir.dev/socket-lb": value}}}))
}

#[tokio::test]
async fn this_node_s_pods_come_with_their_changes_and_go_when_deleted_or_finished() {
    let server = ApiServer::start(&["--authorization-mode=AlwaysAllow", NO_ACCOUNTS]).await.unwrap();
    let objects = ApiObjects::open(&server).await;
    for (name, node, host_network) in [("a", "n1", false), ("host", "n1", true), ("elsewhere", "n2", false)] {
        objects.pod(name, node, host_network).await;
    }
    let mut source = Source::start(connection(&server, "admin").await);
    let first = ["+Namespace shop", "+Pod a", "+Pod host", "synced Namespaces", "synced Pods"];
    assert_eq!(source.initial().await, first.map(str::to_owned).into());

    let patch = PatchParams::default();
    objects.pods().patch("a", &patch, &label(&json!("off"))).await.unwrap();
    assert_eq!(source.next().await, "+Pod a off");
    let namespaces: Api<Namespace> = Api::all(objects.0.clone());
    namespaces.patch(NAMESPACE, &patch, &label(&json!("off"))).await.unwrap();
    assert_eq!(source.next().await, "+Namespace shop off");
    namespaces.patch(NAMESPACE, &patch, &label(&Value::Null)).await.unwrap();
    assert_eq!(source.next().await, "+Namespace shop");
    objects.pod("late", "n1", false).await;
    assert_eq!(source.next().await, "+Pod late");
    objects.delete_pod("late").await;
    // The source may report that it is being deleted before it reports that it is gone.
    while source.next().await != "-Pod late" {}
    for (name, phase) in [("a", "Succeeded"), ("host", "Failed")] {
        let status = Patch::Merge(json!({"status": {"phase": phase}}));
        objects.pods().patch_status(name, &patch, &status).await.unwrap();
        assert_eq!(source.next().await, format!("-Pod {name}"));
    }
    source.end().await;
}

#[tokio::test]
async fn all_that_decides_about_a_pod_s_sockets_comes_and_of_a_namespace_its_metadata() {
    let server = ApiServer::start(&["--authorization-mode=AlwaysAllow", NO_ACCOUNTS]).await.unwrap();
    let objects = ApiObjects::open(&server).await;
    objects.rich_pod("rich").await;
    let namespaces: Api<Namespace> = Api::all(objects.0.clone());
    namespaces.patch(NAMESPACE, &PatchParams::default(), &label(&json!("off"))).await.unwrap();
    let mut source = Source::start(connection(&server, "admin").await);
    let (mut pod, mut namespace) = (None, None);
    while pod.is_none() || namespace.is_none() {
        match timeout(PATIENCE, source.changes.recv()).await.unwrap().unwrap() {
            Change::Apply(PodObject::Pod(object)) => pod = Some(object),
            Change::Apply(PodObject::Namespace(object))
                if object.metadata.name.as_deref() == Some(NAMESPACE) =>
            {
                namespace = Some(object);
            }
            _ => {}
        }
    }
    let (pod, told) = (pod.unwrap(), objects.pods().get("rich").await.unwrap());
    assert_eq!(pod.metadata, ObjectMeta { managed_fields: None, generation: None, ..told.metadata });
    let (spec, told) = (pod.spec.unwrap(), told.spec.unwrap());
    assert_eq!((spec.host_network, spec.runtime_class_name), (Some(true), Some("kata".to_owned())));
    let names = |containers: &[Container]| containers.iter().map(|one| one.name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&spec.containers), names(&told.containers));
    assert_eq!(names(&spec.init_containers.unwrap()), names(&told.init_containers.unwrap()));
    let (namespace, told) = (namespace.unwrap(), namespaces.get(NAMESPACE).await.unwrap());
    assert_eq!(namespace.metadata, ObjectMeta { managed_fields: None, ..told.metadata });
    assert_eq!((namespace.spec, namespace.status), (None, None));
    source.end().await;
}

#[tokio::test]
async fn an_outage_removes_no_pod_and_deletions_follow() {
    let mut server = ApiServer::start(&["--authorization-mode=AlwaysAllow", NO_ACCOUNTS]).await.unwrap();
    let sibling = server.sibling().await.unwrap();
    let objects = ApiObjects::open(&sibling).await;
    for name in ["stays", "goes"] {
        objects.pod(name, "n1", false).await;
    }
    let mut source = Source::start(connection(&server, "admin").await);
    assert_eq!(source.initial().await.len(), 5);
    server.stop();
    objects.delete_pod("goes").await;
    server.restart().await.unwrap();
    loop {
        match source.next().await.as_str() {
            "-Pod goes" => break,
            word => assert!(word.starts_with('+'), "{word}"),
        }
    }
    source.end().await;
}

#[tokio::test]
async fn without_the_right_to_see_pods_services_go_on_and_the_server_is_left_alone() {
    let server = ApiServer::start(&["--authorization-mode=RBAC", NO_ACCOUNTS]).await.unwrap();
    let objects = ApiObjects::open(&server).await;
    objects.pod("a", "n1", false).await;
    let resources = ["services", "namespaces"];
    objects.allow(json!([{"apiGroups": [""], "resources": resources, "verbs": ["list", "watch"]}])).await;
    let connection = connection(&server, "weir").await;
    let mut source = Source::start(connection.clone());
    let mut seen = BTreeSet::new();
    while seen.len() < 2 {
        seen.insert(source.next().await);
    }
    // The source does not report pods as complete: what was in force before stays.
    assert_eq!(seen, ["+Namespace shop", "synced Namespaces"].map(str::to_owned).into());

    let (sender, mut changes) = tokio::sync::mpsc::channel(16);
    let services = tokio::spawn(watch(connection, sender, Arc::default()));
    objects.service("web").await;
    let web = async {
        while !matches!(changes.recv().await, Some(Change::Apply(object)) if object.name().name() == "web") {}
    };
    timeout(PATIENCE, web).await.expect("Services are told of");
    let refused = async {
        while source.status.of(Kind::Pod).report(Kind::Pod).errors == 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, refused).await.expect("the refusal is noticed");
    let report = source.status.of(Kind::Pod).report(Kind::Pod);
    assert!(!report.synced && report.objects == 0, "{report:?}");
    // It may be starting, so it is asked again soon, and then less and less.
    assert!(report.errors <= 9, "{report:?}");
    assert!(source.changes.is_empty());
    source.end().await;
    drop(changes);
    timeout(PATIENCE, services).await.expect("the source ends in time").unwrap();
}
