//! The protobuf messages, with the fields that weir reads.
//!
//! Numbers and types are those of Kubernetes' `generated.proto` files (core/v1, discovery/v1, meta/v1,
//! runtime), where a number never changes its meaning. Fields with other numbers are skipped during decoding.
//!
//! Strings are bytes here, because an API server stores strings in protobuf that are not UTF-8, and such an
//! annotation must not make its object unreadable.

use prost::{Message, bytes::Bytes};

/// meta/v1 `WatchEvent`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct WatchEvent {
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) kind: Bytes,
    #[prost(message, optional, tag = "2")]
    pub(super) object: Option<Raw>,
}

/// runtime `RawExtension`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Raw {
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) raw: Bytes,
}

/// runtime `Unknown`: an object of the requested kind.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Unknown {
    #[prost(bytes = "bytes", tag = "2")]
    pub(super) raw: Bytes,
}

/// Any object, with only its name and version.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Identified {
    #[prost(message, required, tag = "1")]
    pub(super) metadata: Identity,
}

/// The part of meta/v1 `ObjectMeta` for that.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Identity {
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) name: Bytes,
    #[prost(bytes = "bytes", tag = "3")]
    pub(super) namespace: Bytes,
    #[prost(bytes = "bytes", tag = "6")]
    pub(super) resource_version: Bytes,
}

/// meta/v1 `ObjectMeta`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Metadata {
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) name: Bytes,
    #[prost(bytes = "bytes", tag = "3")]
    pub(super) namespace: Bytes,
    #[prost(bytes = "bytes", tag = "5")]
    pub(super) uid: Bytes,
    #[prost(bytes = "bytes", tag = "6")]
    pub(super) resource_version: Bytes,
    #[prost(message, optional, tag = "8")]
    pub(super) creation_timestamp: Option<Time>,
    #[prost(message, repeated, tag = "11")]
    pub(super) labels: Vec<Pair>,
    #[prost(message, repeated, tag = "12")]
    pub(super) annotations: Vec<Pair>,
}

/// An entry of a map. A later entry replaces an earlier one with the same key.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Pair {
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) key: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    pub(super) value: Bytes,
}

/// meta/v1 `Time`.
#[derive(Clone, Copy, PartialEq, Message)]
pub(super) struct Time {
    #[prost(int64, tag = "1")]
    pub(super) seconds: i64,
    #[prost(int32, tag = "2")]
    pub(super) nanos: i32,
}

/// meta/v1 `Status`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Status {
    #[prost(bytes = "bytes", tag = "3")]
    pub(super) message: Bytes,
    #[prost(bytes = "bytes", tag = "4")]
    pub(super) reason: Bytes,
    #[prost(int32, tag = "6")]
    pub(super) code: i32,
}

/// core/v1 `Service`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Service {
    #[prost(message, required, tag = "1")]
    pub(super) metadata: Metadata,
    #[prost(message, required, tag = "2")]
    pub(super) spec: ServiceSpec,
    #[prost(message, required, tag = "3")]
    pub(super) status: ServiceStatus,
}

/// core/v1 `ServiceSpec`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct ServiceSpec {
    #[prost(message, repeated, tag = "1")]
    pub(super) ports: Vec<ServicePort>,
    #[prost(bytes = "bytes", tag = "3")]
    pub(super) cluster_ip: Bytes,
    #[prost(bytes = "bytes", tag = "4")]
    pub(super) kind: Bytes,
    #[prost(bytes = "bytes", repeated, tag = "5")]
    pub(super) external_ips: Vec<Bytes>,
    #[prost(bytes = "bytes", tag = "7")]
    pub(super) session_affinity: Bytes,
    #[prost(bytes = "bytes", repeated, tag = "9")]
    pub(super) load_balancer_source_ranges: Vec<Bytes>,
    #[prost(bytes = "bytes", tag = "10")]
    pub(super) external_name: Bytes,
    #[prost(bytes = "bytes", tag = "11")]
    pub(super) external_traffic_policy: Bytes,
    #[prost(int32, tag = "12")]
    pub(super) health_check_node_port: i32,
    #[prost(bool, tag = "13")]
    pub(super) publish_not_ready_addresses: bool,
    #[prost(message, optional, tag = "14")]
    pub(super) session_affinity_config: Option<SessionAffinityConfig>,
    #[prost(bytes = "bytes", repeated, tag = "18")]
    pub(super) cluster_ips: Vec<Bytes>,
    #[prost(bytes = "bytes", repeated, tag = "19")]
    pub(super) ip_families: Vec<Bytes>,
    #[prost(bytes = "bytes", optional, tag = "22")]
    pub(super) internal_traffic_policy: Option<Bytes>,
    #[prost(bytes = "bytes", optional, tag = "23")]
    pub(super) traffic_distribution: Option<Bytes>,
}

/// core/v1 `ServicePort`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct ServicePort {
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) name: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    pub(super) protocol: Bytes,
    #[prost(int32, tag = "3")]
    pub(super) port: i32,
    #[prost(int32, tag = "5")]
    pub(super) node_port: i32,
}

/// core/v1 `SessionAffinityConfig`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct SessionAffinityConfig {
    #[prost(message, optional, tag = "1")]
    pub(super) client_ip: Option<ClientIpConfig>,
}

/// core/v1 `ClientIPConfig`.
#[derive(Clone, Copy, PartialEq, Message)]
pub(super) struct ClientIpConfig {
    #[prost(int32, optional, tag = "1")]
    pub(super) timeout_seconds: Option<i32>,
}

/// core/v1 `ServiceStatus`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct ServiceStatus {
    #[prost(message, required, tag = "1")]
    pub(super) load_balancer: LoadBalancerStatus,
}

/// core/v1 `LoadBalancerStatus`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct LoadBalancerStatus {
    #[prost(message, repeated, tag = "1")]
    pub(super) ingress: Vec<LoadBalancerIngress>,
}

/// core/v1 `LoadBalancerIngress`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct LoadBalancerIngress {
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) ip: Bytes,
    #[prost(bytes = "bytes", optional, tag = "3")]
    pub(super) ip_mode: Option<Bytes>,
}

/// discovery/v1 `EndpointSlice`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct EndpointSlice {
    #[prost(message, required, tag = "1")]
    pub(super) metadata: Metadata,
    #[prost(message, repeated, tag = "2")]
    pub(super) endpoints: Vec<Endpoint>,
    #[prost(message, repeated, tag = "3")]
    pub(super) ports: Vec<EndpointPort>,
    #[prost(bytes = "bytes", tag = "4")]
    pub(super) address_type: Bytes,
}

/// discovery/v1 `Endpoint`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Endpoint {
    #[prost(bytes = "bytes", repeated, tag = "1")]
    pub(super) addresses: Vec<Bytes>,
    #[prost(message, required, tag = "2")]
    pub(super) conditions: EndpointConditions,
    #[prost(bytes = "bytes", optional, tag = "3")]
    pub(super) hostname: Option<Bytes>,
    #[prost(bytes = "bytes", optional, tag = "6")]
    pub(super) node_name: Option<Bytes>,
    #[prost(bytes = "bytes", optional, tag = "7")]
    pub(super) zone: Option<Bytes>,
    #[prost(message, optional, tag = "8")]
    pub(super) hints: Option<EndpointHints>,
}

/// discovery/v1 `EndpointConditions`.
#[derive(Clone, Copy, PartialEq, Message)]
pub(super) struct EndpointConditions {
    #[prost(bool, optional, tag = "1")]
    pub(super) ready: Option<bool>,
    #[prost(bool, optional, tag = "2")]
    pub(super) serving: Option<bool>,
    #[prost(bool, optional, tag = "3")]
    pub(super) terminating: Option<bool>,
}

/// discovery/v1 `EndpointHints`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct EndpointHints {
    #[prost(message, repeated, tag = "1")]
    pub(super) for_zones: Vec<Hint>,
    #[prost(message, repeated, tag = "2")]
    pub(super) for_nodes: Vec<Hint>,
}

/// discovery/v1 `ForZone` and `ForNode`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Hint {
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) name: Bytes,
}

/// discovery/v1 `EndpointPort`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct EndpointPort {
    #[prost(bytes = "bytes", optional, tag = "1")]
    pub(super) name: Option<Bytes>,
    #[prost(bytes = "bytes", optional, tag = "2")]
    pub(super) protocol: Option<Bytes>,
    #[prost(int32, optional, tag = "3")]
    pub(super) port: Option<i32>,
}

/// core/v1 `Pod`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Pod {
    #[prost(message, required, tag = "1")]
    pub(super) metadata: Metadata,
    #[prost(message, required, tag = "2")]
    pub(super) spec: PodSpec,
}

/// core/v1 `PodSpec`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct PodSpec {
    #[prost(message, repeated, tag = "2")]
    pub(super) containers: Vec<Container>,
    #[prost(bool, tag = "11")]
    pub(super) host_network: bool,
    #[prost(message, repeated, tag = "20")]
    pub(super) init_containers: Vec<Container>,
    #[prost(bytes = "bytes", optional, tag = "29")]
    pub(super) runtime_class_name: Option<Bytes>,
}

/// core/v1 `Container`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Container {
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) name: Bytes,
}

/// meta/v1 `PartialObjectMetadata`: an object of which only the metadata was requested.
#[derive(Clone, PartialEq, Message)]
pub(super) struct PartialObjectMetadata {
    #[prost(message, required, tag = "1")]
    pub(super) metadata: Metadata,
}

/// meta/v1 `ListMeta`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct ListMetadata {
    #[prost(bytes = "bytes", tag = "2")]
    pub(super) resource_version: Bytes,
}
