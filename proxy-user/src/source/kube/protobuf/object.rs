//! Converts messages to objects of `k8s_openapi`.
//!
//! In: messages. Out: objects with the same meaning. Go writes an empty string, list or number where JSON has
//! no field, so an empty field counts as absent, except where absence means something else (W8). Bytes that
//! are not UTF-8 become replacement characters, as in Go's JSON.

use std::collections::BTreeMap;

use bytes::Bytes;
use jiff::Timestamp;
use k8s_openapi::{
    api::{core::v1 as core, discovery::v1 as discovery},
    apimachinery::pkg::apis::meta::v1 as meta,
};
use prost::{DecodeError, Message as _};

use super::message;

/// A kind that is decoded from protobuf.
pub(in super::super) trait FromProtobuf: Sized {
    /// Whether only the metadata is requested.
    const METADATA_ONLY: bool = false;

    /// Decodes the message of an object.
    fn read(raw: Bytes) -> Result<Self, DecodeError>;
}

impl FromProtobuf for core::Service {
    fn read(raw: Bytes) -> Result<Self, DecodeError> {
        let message::Service { metadata, spec, status } = message::Service::decode(raw)?;
        let ingress = status.load_balancer.ingress.into_iter().map(ingress).collect();
        let load_balancer = core::LoadBalancerStatus { ingress: filled(ingress) };
        let status = core::ServiceStatus { load_balancer: Some(load_balancer), ..Default::default() };
        Ok(Self { metadata: object_meta(metadata), spec: Some(service_spec(spec)), status: Some(status) })
    }
}

impl FromProtobuf for discovery::EndpointSlice {
    fn read(raw: Bytes) -> Result<Self, DecodeError> {
        let message::EndpointSlice { metadata, endpoints, ports, address_type } =
            message::EndpointSlice::decode(raw)?;
        Ok(Self {
            metadata: object_meta(metadata),
            address_type: text(&address_type),
            endpoints: Some(endpoints.into_iter().map(endpoint).collect()),
            ports: Some(ports.into_iter().map(endpoint_port).collect()),
        })
    }
}

impl FromProtobuf for core::Pod {
    fn read(raw: Bytes) -> Result<Self, DecodeError> {
        let message::Pod { metadata, spec } = message::Pod::decode(raw)?;
        let message::PodSpec { containers, host_network, init_containers, runtime_class_name } = spec;
        let spec = core::PodSpec {
            containers: containers.into_iter().map(container).collect(),
            host_network: host_network.then_some(true),
            init_containers: filled(init_containers.into_iter().map(container).collect()),
            runtime_class_name: optional(runtime_class_name),
            ..Default::default()
        };
        Ok(Self { metadata: object_meta(metadata), spec: Some(spec), status: None })
    }
}

impl FromProtobuf for core::Namespace {
    const METADATA_ONLY: bool = true;

    fn read(raw: Bytes) -> Result<Self, DecodeError> {
        let message::PartialObjectMetadata { metadata } = message::PartialObjectMetadata::decode(raw)?;
        Ok(Self { metadata: object_meta(metadata), ..Default::default() })
    }
}

/// The metadata of an object that cannot be decoded after its first fields, which hold the name.
pub(super) fn identity(raw: Bytes) -> meta::ObjectMeta {
    let mut message = message::Identified::default();
    // `merge` fills the message field by field, so the fields before the fault are there.
    let _ = message.merge(raw);
    let message::Identity { name, namespace, resource_version } = message.metadata;
    meta::ObjectMeta {
        name: some(&name),
        namespace: some(&namespace),
        resource_version: some(&resource_version),
        ..Default::default()
    }
}

/// The bytes as text.
pub(super) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The bytes as text, or `None` if there are none, because JSON omits an empty field.
fn some(bytes: &[u8]) -> Option<String> {
    (!bytes.is_empty()).then(|| text(bytes))
}

/// The bytes of an optional field as text.
fn optional(bytes: Option<Bytes>) -> Option<String> {
    bytes.map(|bytes| text(&bytes))
}

fn texts(list: &[Bytes]) -> Option<Vec<String>> {
    filled(list.iter().map(|bytes| text(bytes)).collect())
}

fn filled<T>(list: Vec<T>) -> Option<Vec<T>> {
    (!list.is_empty()).then_some(list)
}

fn named(pairs: &[message::Pair]) -> Option<BTreeMap<String, String>> {
    let map = || pairs.iter().map(|message::Pair { key, value }| (text(key), text(value))).collect();
    (!pairs.is_empty()).then(map)
}

fn number(number: i32) -> Option<i32> {
    (number != 0).then_some(number)
}

fn object_meta(message: message::Metadata) -> meta::ObjectMeta {
    let message::Metadata { name, namespace, uid, resource_version, creation_timestamp, labels, annotations } =
        message;
    // Go's zero time, which means no time, is before the range of a timestamp.
    let created = creation_timestamp.and_then(|time| Timestamp::new(time.seconds, time.nanos).ok());
    meta::ObjectMeta {
        name: some(&name),
        namespace: some(&namespace),
        uid: some(&uid),
        resource_version: some(&resource_version),
        creation_timestamp: created.map(meta::Time),
        labels: named(&labels),
        annotations: named(&annotations),
        ..Default::default()
    }
}

fn service_spec(message: message::ServiceSpec) -> core::ServiceSpec {
    let message::ServiceSpec {
        ports,
        cluster_ip,
        kind,
        external_ips,
        session_affinity,
        load_balancer_source_ranges,
        external_name,
        external_traffic_policy,
        health_check_node_port,
        publish_not_ready_addresses,
        session_affinity_config,
        cluster_ips,
        ip_families,
        internal_traffic_policy,
        traffic_distribution,
    } = message;
    let client_ip = session_affinity_config.and_then(|config| config.client_ip);
    let affinity = client_ip.map(|message::ClientIpConfig { timeout_seconds }| core::SessionAffinityConfig {
        client_ip: Some(core::ClientIPConfig { timeout_seconds }),
    });
    core::ServiceSpec {
        ports: filled(ports.into_iter().map(service_port).collect()),
        cluster_ip: some(&cluster_ip),
        type_: some(&kind),
        external_ips: texts(&external_ips),
        session_affinity: some(&session_affinity),
        load_balancer_source_ranges: texts(&load_balancer_source_ranges),
        external_name: some(&external_name),
        external_traffic_policy: some(&external_traffic_policy),
        health_check_node_port: number(health_check_node_port),
        publish_not_ready_addresses: publish_not_ready_addresses.then_some(true),
        session_affinity_config: affinity,
        cluster_ips: texts(&cluster_ips),
        ip_families: texts(&ip_families),
        internal_traffic_policy: optional(internal_traffic_policy),
        traffic_distribution: optional(traffic_distribution),
        ..Default::default()
    }
}

fn service_port(message: message::ServicePort) -> core::ServicePort {
    let message::ServicePort { name, protocol, port, node_port } = message;
    core::ServicePort {
        name: some(&name),
        protocol: some(&protocol),
        port,
        node_port: number(node_port),
        ..Default::default()
    }
}

fn ingress(message: message::LoadBalancerIngress) -> core::LoadBalancerIngress {
    let message::LoadBalancerIngress { ip, ip_mode } = message;
    core::LoadBalancerIngress { ip: some(&ip), ip_mode: optional(ip_mode), ..Default::default() }
}

fn endpoint(message: message::Endpoint) -> discovery::Endpoint {
    let message::Endpoint { addresses, conditions, hostname, node_name, zone, hints } = message;
    let message::EndpointConditions { ready, serving, terminating } = conditions;
    discovery::Endpoint {
        addresses: addresses.iter().map(|address| text(address)).collect(),
        conditions: Some(discovery::EndpointConditions { ready, serving, terminating }),
        hostname: optional(hostname),
        node_name: optional(node_name),
        zone: optional(zone),
        hints: hints.map(endpoint_hints),
        ..Default::default()
    }
}

fn container(message: message::Container) -> core::Container {
    core::Container { name: text(&message.name), ..Default::default() }
}

fn endpoint_hints(message: message::EndpointHints) -> discovery::EndpointHints {
    let message::EndpointHints { for_zones, for_nodes } = message;
    let zones = for_zones.into_iter().map(|message::Hint { name }| discovery::ForZone { name: text(&name) });
    let nodes = for_nodes.into_iter().map(|message::Hint { name }| discovery::ForNode { name: text(&name) });
    discovery::EndpointHints { for_zones: filled(zones.collect()), for_nodes: filled(nodes.collect()) }
}

fn endpoint_port(message: message::EndpointPort) -> discovery::EndpointPort {
    let message::EndpointPort { name, protocol, port } = message;
    discovery::EndpointPort { name: optional(name), protocol: optional(protocol), port, ..Default::default() }
}
