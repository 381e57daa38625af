//! Kubernetes objects for tests, written as the JSON of an API server.

use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::model::{Change, DetectLocal, Model, NodePortSetting, Object, ObjectName, Settings};

/// Reads `value` as an API object.
pub(crate) fn object<T: DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).expect("the JSON of a test is an API object")
}

/// The Service `ns/name` with this spec.
pub(crate) fn service(name: &str, spec: Value) -> Change {
    full_service(json!({ "metadata": { "namespace": "ns", "name": name }, "spec": spec }))
}

/// A Service with this JSON.
pub(crate) fn full_service(value: Value) -> Change {
    Change::Apply(Object::Service(Box::new(object(value))))
}

/// The IPv4 slice `ns/name` of `ns/service` with these ports and endpoints.
pub(crate) fn slice(name: &str, service: &str, ports: Value, endpoints: Value) -> Change {
    full_slice(json!({
        "metadata": { "namespace": "ns", "name": name, "labels": { "kubernetes.io/service-name": service } },
        "addressType": "IPv4",
        "ports": ports,
        "endpoints": endpoints,
    }))
}

/// An EndpointSlice with this JSON.
pub(crate) fn full_slice(value: Value) -> Change {
    Change::Apply(Object::EndpointSlice(Box::new(object(value))))
}

/// A Node with this JSON.
pub(crate) fn node(value: Value) -> Change {
    Change::Apply(Object::Node(Box::new(object(value))))
}

/// A ServiceCIDR with these networks.
pub(crate) fn service_cidr(name: &str, cidrs: Value) -> Change {
    let value = json!({ "metadata": { "name": name }, "spec": { "cidrs": cidrs } });
    Change::Apply(Object::ServiceCidr(Box::new(object(value))))
}

/// The name `ns/name`.
pub(crate) fn named(name: &str) -> ObjectName {
    ObjectName::new("ns", name)
}

/// Settings of the node `node-a`. NodePorts answer on all addresses, and pods are in `10.244.0.0/16` and
/// `fd00:10::/32`.
pub(crate) fn settings() -> Settings {
    Settings {
        node_name: "node-a".to_owned(),
        detect_local: DetectLocal::ClusterCidr(vec![
            "10.244.0.0/16".parse().unwrap(),
            "fd00:10::/32".parse().unwrap(),
        ]),
        node_port_addresses: NodePortSetting::ALL,
        ..Settings::default()
    }
}

/// A model that has taken in these changes.
pub(crate) fn model(settings: Settings, changes: impl IntoIterator<Item = Change>) -> Model {
    let mut model = Model::new(settings);
    changes.into_iter().for_each(|change| model.apply(change));
    model
}
