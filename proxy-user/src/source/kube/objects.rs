//! The watched kinds: their selectors, and the parts of an object that are kept.
//!
//! In: objects as the API server sends them. Out: [`Object`]s without what neither the model nor metrics use.
//! Most of the metadata and of a Node's status is dropped.

use std::fmt::Debug;

use futures::stream::BoxStream;
use k8s_openapi::{
    api::{
        core::v1::{Node, NodeStatus, Service},
        discovery::v1::EndpointSlice,
        networking::v1::ServiceCIDR,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::{Client, Resource, runtime::watcher::Config};
use serde::de::DeserializeOwned;

use super::{json, ledger::Named, protobuf, stream_item::ItemResult, versions::Version};
use crate::model::{HEADLESS_LABEL, Kind, Object, ObjectName, PROXY_NAME_LABEL};

/// The only annotation without weir's prefix that is kept (W10).
const TRIGGER_TIME_ANNOTATION: &str = "endpoints.kubernetes.io/last-change-trigger-time";

/// The prefix of weir's own annotations.
const OWN_ANNOTATIONS: &str = "weir.dev/";

/// The reaction if the server lacks a kind or forbids it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Absent {
    /// weir cannot work without the kind, so it retries often.
    RetryOften,
    /// Only a feature is missing without the kind, so weir retries rarely.
    RetryRarely,
    /// As [`Absent::RetryRarely`], and the kind counts as complete without any object.
    Complete,
}

/// A kind that the source watches.
pub(super) trait Watched:
    Resource<DynamicType = ()> + Clone + Default + DeserializeOwned + Debug + Send + Sync + 'static
{
    /// The object type of the stream to which this kind belongs.
    type Object: Named + Send + 'static;

    /// The kind of the objects.
    const KIND: Kind;
    /// The reaction if the server lacks the kind.
    const ABSENT: Absent = Absent::RetryOften;

    /// The selectors of the watch.
    fn selector(node: &str) -> Config;

    /// The selectors if weir answers DNS. They include objects that have a name but are not routed.
    fn selector_for_names(node: &str) -> Config {
        Self::selector(node)
    }

    /// The object without the parts that weir does not use.
    fn trimmed(self) -> Self::Object;

    /// An endless stream of events. It stores the version of each in `known`.
    fn events(client: Client, config: Config, _known: Version) -> BoxStream<'static, ItemResult<Self>> {
        json::events(client, config)
    }
}

impl Named for Object {
    fn name(&self) -> ObjectName {
        self.name()
    }
}

impl Watched for Service {
    type Object = Object;

    const KIND: Kind = Kind::Service;

    /// W1: no Services of other proxies, and no headless ones.
    fn selector(_node: &str) -> Config {
        Config::default().labels(&format!("!{PROXY_NAME_LABEL}")).fields("spec.clusterIP!=None")
    }

    /// Headless Services and those of other proxies too; the model skips both.
    fn selector_for_names(_node: &str) -> Config {
        Config::default()
    }

    fn trimmed(mut self) -> Object {
        trim(&mut self.metadata);
        if let Some(annotations) = &mut self.metadata.annotations {
            annotations.retain(|key, _| key.starts_with(OWN_ANNOTATIONS));
        }
        if let Some(status) = &mut self.status {
            status.conditions = None;
        }
        Object::Service(Box::new(self))
    }

    fn events(client: Client, config: Config, known: Version) -> BoxStream<'static, ItemResult<Self>> {
        protobuf::events(client, config, known)
    }
}

impl Watched for EndpointSlice {
    type Object = Object;

    const KIND: Kind = Kind::EndpointSlice;

    /// W2: no slices of headless Services.
    fn selector(_node: &str) -> Config {
        Config::default().labels(&format!("!{HEADLESS_LABEL}"))
    }

    /// Slices of headless Services too.
    fn selector_for_names(_node: &str) -> Config {
        Config::default()
    }

    fn trimmed(mut self) -> Object {
        trim(&mut self.metadata);
        if let Some(annotations) = &mut self.metadata.annotations {
            annotations.retain(|key, _| key == TRIGGER_TIME_ANNOTATION);
        }
        Object::EndpointSlice(Box::new(self))
    }

    fn events(client: Client, config: Config, known: Version) -> BoxStream<'static, ItemResult<Self>> {
        protobuf::events(client, config, known)
    }
}

impl Watched for Node {
    type Object = Object;

    const KIND: Kind = Kind::Node;

    /// W3: only this node's Node.
    fn selector(node: &str) -> Config {
        Config::default().fields(&format!("metadata.name={node}"))
    }

    fn trimmed(mut self) -> Object {
        trim(&mut self.metadata);
        self.metadata.annotations = None;
        self.status =
            self.status.map(|status| NodeStatus { addresses: status.addresses, ..NodeStatus::default() });
        Object::Node(Box::new(self))
    }
}

impl Watched for ServiceCIDR {
    type Object = Object;

    const KIND: Kind = Kind::ServiceCidr;
    const ABSENT: Absent = Absent::Complete;

    /// W3: all ServiceCIDRs.
    fn selector(_node: &str) -> Config {
        Config::default()
    }

    fn trimmed(mut self) -> Object {
        trim(&mut self.metadata);
        self.metadata.annotations = None;
        Object::ServiceCidr(Box::new(self))
    }
}

fn trim(metadata: &mut ObjectMeta) {
    metadata.managed_fields = None;
    metadata.owner_references = None;
    metadata.generate_name = None;
    metadata.self_link = None;
    if let Some(labels) = &mut metadata.labels {
        labels.retain(|key, _| {
            key == "kubernetes.io/service-name"
                || key == "topology.kubernetes.io/zone"
                || key.starts_with("service.kubernetes.io/")
        });
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn metadata(object: &Object) -> serde_json::Value {
        serde_json::to_value(object.metadata()).unwrap()
    }

    #[test]
    fn w10_a_slice_keeps_the_service_label_and_the_trigger_time() {
        let slice: EndpointSlice = serde_json::from_value(json!({
            "metadata": {
                "name": "web-1", "namespace": "shop", "resourceVersion": "7", "generateName": "web-",
                "labels": {"kubernetes.io/service-name": "web", "app": "web"},
                "annotations": {TRIGGER_TIME_ANNOTATION: "2026-01-01T00:00:00Z", "note": "long"},
                "ownerReferences": [{"apiVersion": "v1", "kind": "Service", "name": "web", "uid": "1"}],
                "managedFields": [{"manager": "x"}],
            },
            "addressType": "IPv4", "endpoints": [],
        }))
        .unwrap();
        assert_eq!(
            metadata(&slice.trimmed()),
            json!({
                "name": "web-1", "namespace": "shop", "resourceVersion": "7",
                "labels": {"kubernetes.io/service-name": "web"},
                "annotations": {TRIGGER_TIME_ANNOTATION: "2026-01-01T00:00:00Z"},
            })
        );
    }

    #[test]
    fn w10_a_service_keeps_weirs_annotations() {
        let service: Service = serde_json::from_value(json!({
            "metadata": {"name": "web", "annotations": {"weir.dev/on-backend-removal": "reset", "note": "long"}},
        }))
        .unwrap();
        assert_eq!(
            metadata(&service.trimmed()),
            json!({"name": "web", "annotations": {"weir.dev/on-backend-removal": "reset"}})
        );
    }

    #[test]
    fn a_node_keeps_addresses_zone_and_pod_cidrs() {
        let node: Node = serde_json::from_value(json!({
            "metadata": {"name": "n1", "labels": {"topology.kubernetes.io/zone": "a", "os": "linux"}},
            "spec": {"podCIDRs": ["10.1.0.0/24"]},
            "status": {
                "addresses": [{"type": "InternalIP", "address": "192.0.2.1"}],
                "images": [{"names": ["x"], "sizeBytes": 5}],
                "capacity": {"cpu": "8"},
            },
        }))
        .unwrap();
        let Object::Node(node) = node.trimmed() else { panic!("not a Node") };
        let status = serde_json::to_value(node.status).unwrap();
        assert_eq!(status, json!({"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]}));
        assert_eq!(
            node.metadata.labels.unwrap().into_keys().collect::<Vec<_>>(),
            ["topology.kubernetes.io/zone"]
        );
        assert_eq!(node.spec.unwrap().pod_cidrs.unwrap(), ["10.1.0.0/24"]);
    }

    #[test]
    fn w1_w2_w3_selectors_filter_on_the_server() {
        let service = Service::selector("n1");
        assert_eq!(service.label_selector.as_deref(), Some("!service.kubernetes.io/service-proxy-name"));
        assert_eq!(service.field_selector.as_deref(), Some("spec.clusterIP!=None"));
        let slice = EndpointSlice::selector("n1");
        assert_eq!(slice.label_selector.as_deref(), Some("!service.kubernetes.io/headless"));
        assert_eq!(Node::selector("n1").field_selector.as_deref(), Some("metadata.name=n1"));
    }

    #[test]
    fn with_dns_the_selectors_include_every_object_with_a_name() {
        for selector in [Service::selector_for_names("n1"), EndpointSlice::selector_for_names("n1")] {
            assert_eq!((selector.label_selector, selector.field_selector), (None, None));
        }
        assert_eq!(Node::selector_for_names("n1").field_selector.as_deref(), Some("metadata.name=n1"));
    }
}
