//! Events about Services at a real API server, written with the rights that the chart gives.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says so by panicking")]

use std::{
    net::{Ipv4Addr, TcpListener},
    time::Duration,
};

use k8s_openapi::api::{
    core::v1::{Event as CoreEvent, Service},
    events::v1::Event,
};
use kube::{Api, Client, ResourceExt as _, api::ListParams};
use serde_json::{Value, json};
use tokio::{sync::watch, time::timeout};
use weir::{
    connection_limit::ConnectionLimit,
    model::{ObjectName, Uid},
    observe::{Events, Health, HealthCheckState, HealthChecks, Metrics, Trouble},
    source::kube::{Connection, Credentials, KubeSource},
};
use weir_tests::apiserver::ApiServer;

use crate::api_objects::{ApiObjects, NAMESPACE};

const NODE: &str = "n1";
const PATIENCE: Duration = Duration::from_secs(30);
const ROLE: &str = include_str!("../../charts/weir/templates/rbac.yaml");

/// The rules of the chart's role, those that depend on values too.
fn rules() -> Value {
    let start = ROLE.find("rules:").unwrap();
    let end = start + ROLE[start..].find("---").unwrap();
    let rules = ROLE[start..end].lines().filter(|line| !line.trim_start().starts_with("{{"));
    let part: Value = serde_yaml_ng::from_str(&rules.collect::<Vec<_>>().join("\n")).unwrap();
    part["rules"].clone()
}

/// An API server with a namespace, where the user `weir` may do what the chart lets it do.
async fn start() -> (ApiServer, ApiObjects) {
    start_with(rules()).await
}

/// The same where it may do this.
async fn start_with(rules: Value) -> (ApiServer, ApiObjects) {
    let server = ApiServer::start(&["--authorization-mode=RBAC"]).await.unwrap();
    let objects = ApiObjects::open(&server).await;
    objects.allow(rules).await;
    (server, objects)
}

/// As the agent has it, once its rights are known.
async fn weir(server: &ApiServer) -> Client {
    let credentials = Credentials::Kubeconfig(server.kubeconfig("weir").unwrap());
    let settings = KubeSource { credentials, servers: Vec::new(), node: NODE.to_owned(), versions: None };
    let client = Connection::open(settings).await.unwrap().client();
    let services: Api<Service> = Api::namespaced(client.clone(), NAMESPACE);
    let allowed = async {
        while services.list_metadata(&ListParams::default()).await.is_err() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(PATIENCE, allowed).await.expect("the role is not in force");
    client
}

/// The first event about this Service for which `wanted` holds.
async fn event(objects: &ApiObjects, service: &str, wanted: impl Fn(&Event) -> bool) -> Event {
    let events: Api<Event> = Api::namespaced(objects.0.clone(), NAMESPACE);
    let about = ListParams::default().fields(&format!("regarding.name={service}"));
    let looking = async {
        loop {
            let found = events.list(&about).await.unwrap().items.into_iter().find(&wanted);
            match found {
                Some(event) => return event,
                None => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    };
    timeout(PATIENCE, looking).await.expect("no such event")
}

fn trouble(service: &Service, note: &str) -> Trouble {
    let name = ObjectName::new(NAMESPACE, &service.name_any());
    Trouble::of_service(name, "FailedToProgram", "Program", note.to_owned()).with_uid(uid(service))
}

/// Whether an event is one of [`trouble`]: the API server writes some about the same Services, when it looks at their addresses.
fn is_trouble(event: &Event) -> bool {
    event.reason.as_deref() == Some("FailedToProgram")
}

fn uid(service: &Service) -> Option<Uid> {
    Uid::read(&service.uid()?)
}

/// Writes events as the agent of a node, without waiting for other nodes.
async fn agent(server: &ApiServer, node: &str) -> Events {
    Events::start_within(weir(server).await, node, Metrics::new(), Duration::ZERO)
}

#[tokio::test]
async fn trouble_with_a_service_becomes_one_event_that_describe_finds() {
    let (server, objects) = start().await;
    let cart = objects.service("cart").await;
    let till = objects.service("till").await;
    let events = agent(&server, NODE).await;
    let ghost = ObjectName::new(NAMESPACE, "ghost");
    events.report(Trouble::of_service(
        ghost,
        "FailedToProgram",
        "Program",
        "there is no such Service".to_owned(),
    ));
    events.report(trouble(&cart, "the map is full"));
    events.report(trouble(&cart, "the map is full"));
    events.report(trouble(&till, &"é".repeat(1000)));

    let about_till = event(&objects, "till", is_trouble).await;
    assert_eq!(about_till.note, Some("é".repeat(512)), "no more than an API server takes");
    assert_eq!(about_till.regarding.unwrap().uid, till.uid());

    // Written before the one about `till`, so it is there as it will be.
    let found = event(&objects, "cart", is_trouble).await;
    let regarding = found.regarding.clone().unwrap();
    assert_eq!(
        (regarding.api_version, regarding.kind, regarding.namespace, regarding.name, regarding.uid),
        (
            Some("v1".to_owned()),
            Some("Service".to_owned()),
            Some(NAMESPACE.to_owned()),
            Some("cart".to_owned()),
            cart.uid()
        )
    );
    assert_eq!(found.type_.as_deref(), Some("Warning"));
    assert_eq!(found.reason.as_deref(), Some("FailedToProgram"));
    assert_eq!(found.action.as_deref(), Some("Program"));
    assert_eq!(found.note.as_deref(), Some("the map is full"));
    assert_eq!(found.reporting_controller.as_deref(), Some("weir"));
    assert_eq!(found.reporting_instance.as_deref(), Some(NODE));
    assert!(found.series.is_none(), "the same within a short time is no news");

    // The request of `kubectl describe`.
    let core: Api<CoreEvent> = Api::namespaced(objects.0.clone(), NAMESPACE);
    let uid = cart.uid().unwrap();
    let selector = format!(
        "involvedObject.kind=Service,involvedObject.name=cart,involvedObject.namespace={NAMESPACE},involvedObject.uid={uid}"
    );
    assert_eq!(core.list(&ListParams::default().fields(&selector)).await.unwrap().items.len(), 1);
    let ghosts = ListParams::default().fields("involvedObject.name=ghost");
    assert_eq!(core.list(&ghosts).await.unwrap().items.len(), 0);

    events.report(trouble(&cart, "the map is full again"));
    let counted = event(&objects, "cart", |event| event.series.is_some()).await;
    assert_eq!((counted.name_any(), counted.series.unwrap().count), (found.name_any(), 2));
}

/// As kube-proxy's, by kind, reason and action, where `kubectl describe node` finds it.
#[tokio::test]
async fn a_start_becomes_an_event_of_the_node() {
    let (server, objects) = start().await;
    let events = agent(&server, NODE).await;
    events.report(Trouble::starting());
    events.report(Trouble::of_node(
        "FailedToStartMetricServer",
        "StartKubeProxy",
        "the port is taken".to_owned(),
    ));
    let all: Api<CoreEvent> = Api::namespaced(objects.0.clone(), "default");
    let about = ListParams::default().fields(&format!("involvedObject.kind=Node,involvedObject.uid={NODE}"));
    let both = async {
        loop {
            let mut found = all.list(&about).await.unwrap().items;
            if found.len() == 2 {
                found.sort_unstable_by_key(|event| event.type_.clone());
                return found;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let found = timeout(PATIENCE, both).await.expect("no such events");
    let told =
        found.iter().map(|event| (event.type_.as_deref(), event.reason.as_deref(), event.action.as_deref()));
    let expected = [("Normal", "Starting"), ("Warning", "FailedToStartMetricServer")];
    let expected = expected.map(|(kind, reason)| (Some(kind), Some(reason), Some("StartKubeProxy")));
    assert_eq!(told.collect::<Vec<_>>(), expected);
}

/// Waits until the event about the agent on this node was written, and so all events before it.
async fn written(objects: &ApiObjects, node: &str) {
    let events: Api<CoreEvent> = Api::namespaced(objects.0.clone(), "default");
    let about = ListParams::default().fields(&format!("involvedObject.kind=Node,involvedObject.uid={node}"));
    let looking = async {
        while events.list(&about).await.unwrap().items.is_empty() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(PATIENCE, looking).await.expect("no event about the node");
}

/// Reports the same from many nodes. The events about the Service.
async fn reported_by_every_node(server: &ApiServer, objects: &ApiObjects) -> Vec<Event> {
    let cart = objects.service("cart").await;
    let nodes: Vec<String> = (1..=5).map(|number| format!("n{number}")).collect();
    let mut agents = Vec::new();
    for node in &nodes {
        let events = agent(server, node).await;
        events.report(trouble(&cart, "the kernel refuses it"));
        events.report(Trouble::starting());
        agents.push(events);
    }
    for node in &nodes {
        written(objects, node).await;
    }
    let events: Api<Event> = Api::namespaced(objects.0.clone(), NAMESPACE);
    events.list(&ListParams::default().fields("regarding.name=cart")).await.unwrap().items
}

#[tokio::test]
async fn trouble_of_every_node_becomes_one_event_with_the_rights_of_the_chart() {
    let (server, objects) = start().await;
    let told = reported_by_every_node(&server, &objects).await;
    assert_eq!(told.len(), 1, "{told:#?}");
    assert!(told[0].series.is_none(), "one node said it once: {told:#?}");
}

#[tokio::test]
async fn trouble_of_every_node_becomes_one_event_with_the_rights_of_kube_proxy() {
    let mut rules = rules();
    rules.as_array_mut().unwrap().retain(|rule| rule["verbs"] != json!(["get"]));
    let (server, objects) = start_with(rules).await;
    let told = reported_by_every_node(&server, &objects).await;
    assert_eq!(told.len(), 1, "{told:#?}");
    assert!(told[0].series.is_none(), "one node said it once: {told:#?}");
}

#[tokio::test]
async fn h6_a_health_check_port_that_is_taken_becomes_an_event() {
    let (server, objects) = start().await;
    let cart = objects.service("cart").await;
    let events = agent(&server, NODE).await;
    let (_stop, stopping) = watch::channel(false);
    let limit = ConnectionLimit::new(16, 16, Metrics::new().refused("health-connections"));
    let checks = HealthChecks::start(Health::new(PATIENCE), events, limit, stopping);
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = taken.local_addr().unwrap();
    let addresses = vec![address.ip()];
    let state = HealthCheckState { port: address.port(), local_endpoints: 1, addresses, uid: uid(&cart) };
    checks.set(ObjectName::new(NAMESPACE, "cart"), Some(state));
    let is_it = |event: &Event| event.reason.as_deref() == Some("FailedToStartServiceHealthcheck");
    let found = event(&objects, "cart", is_it).await;
    assert_eq!(found.type_.as_deref(), Some("Warning"));
    assert_eq!(found.action.as_deref(), Some("Listen"));
    let note = found.note.unwrap();
    assert!(note.contains(&address.to_string()), "{note}");
}
