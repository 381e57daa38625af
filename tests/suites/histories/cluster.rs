//! Random changes of a cluster.
//!
//! In: chance. Out: steps, each of which is a change of one object or of the host's addresses. Names, addresses and ports
//! come from few, so that they meet.

use std::net::IpAddr;

use proptest::prelude::*;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use weir::{
    dataplane::Dataplane,
    model::{Change, DetectLocal, Kind, NodePortSetting, Object, ObjectName, Settings},
};
use weir_tests::agent::Agent;

/// One thing that happens.
#[derive(Clone, Debug)]
pub(super) enum Step {
    Service { name: u8, created: u8, shape: u16 },
    NoService(u8),
    Slice { name: u8, service: u8, v6: bool, endpoints: Vec<u16> },
    NoSlice(u8),
    Node(u8),
    Host(u8),
}

const SERVICES: u8 = 4;
const SLICES: u8 = 6;

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..SERVICES, 0..3_u8, any::<u16>())
            .prop_map(|(name, created, shape)| Step::Service { name, created, shape }),
        1 => (0..SERVICES).prop_map(Step::NoService),
        8 => (0..SLICES, 0..SERVICES, any::<bool>(), proptest::collection::vec(any::<u16>(), 0..6))
            .prop_map(|(name, service, v6, endpoints)| Step::Slice { name, service, v6, endpoints }),
        1 => (0..SLICES).prop_map(Step::NoSlice),
        1 => (0..8_u8).prop_map(Step::Node),
        1 => (0..8_u8).prop_map(Step::Host),
    ]
}

/// Steps, each with whether the data planes get a delta right after it.
pub(super) fn history() -> impl Strategy<Value = Vec<(Step, bool)>> {
    proptest::collection::vec((step(), any::<bool>()), 1..40)
}

/// Pods are recognised by the Node's own networks, so that there is a way to recognise them in some states and none in others.
pub(super) fn settings() -> Settings {
    Settings {
        node_name: "node-a".to_owned(),
        detect_local: DetectLocal::NodeCidr,
        node_port_addresses: NodePortSetting::PRIMARY,
        ..Settings::default()
    }
}

/// The steps that still count at the end of a history, in another order.
pub(super) fn summary(history: &[(Step, bool)]) -> Vec<&Step> {
    let mut left: Vec<&Step> = Vec::new();
    for (step, _) in history.iter().rev() {
        if !left.iter().any(|later| later.about() == step.about()) {
            left.push(step);
        }
    }
    left
}

/// Takes every Service and every slice away.
pub(super) fn delete_everything<D: Dataplane>(agent: &mut Agent<D>) {
    (0..SERVICES).for_each(|name| Step::NoService(name).happen(agent));
    (0..SLICES).for_each(|name| Step::NoSlice(name).happen(agent));
}

impl Step {
    /// Hands it to an agent.
    pub(super) fn happen<D: Dataplane>(&self, agent: &mut Agent<D>) {
        agent.take_in(match self {
            Self::Service { name, created, shape } => service(*name, *created, *shape),
            Self::NoService(name) => delete(Kind::Service, &format!("s{name}")),
            Self::Slice { name, service, v6, endpoints } => slice(*name, *service, *v6, endpoints),
            Self::NoSlice(name) => delete(Kind::EndpointSlice, &format!("e{name}")),
            Self::Node(shape) => node((*shape).into()),
            Self::Host(shape) => return agent.model().set_host_addresses(host((*shape).into())),
        });
    }

    /// The object.
    fn about(&self) -> (u8, u8) {
        match self {
            Self::Service { name, .. } | Self::NoService(name) => (0, *name),
            Self::Slice { name, .. } | Self::NoSlice(name) => (1, *name),
            Self::Node(_) => (2, 0),
            Self::Host(_) => (3, 0),
        }
    }
}

fn bit(shape: u16, number: u8) -> bool {
    shape >> number & 1 == 1
}

fn when<T>(condition: bool, values: &[T]) -> &[T] {
    if condition { values } else { &[] }
}

fn object<T: DeserializeOwned>(value: Value) -> Box<T> {
    Box::new(serde_json::from_value(value).expect("a history wrote an object that is none"))
}

fn service(name: u8, created: u8, shape: u16) -> Change {
    let policy = |number| if bit(shape, number) { "Local" } else { "Cluster" };
    let mut ports = vec![json!({ "name": "", "port": 80, "nodePort": 30080 + u16::from(name % 2) })];
    if bit(shape, 0) {
        ports.push(json!({ "name": "dns", "port": 53 + (shape >> 12 & 1), "protocol": "UDP" }));
    }
    let (v4, v6) = (format!("10.96.0.{}", shape >> 8 & 3), format!("fd00:10:96::{name}"));
    let families: &[&str] = if bit(shape, 3) { &["IPv4", "IPv6"] } else { &["IPv4"] };
    let balancers = [json!({ "ip": "198.51.100.1" }), json!({ "ip": "2001:db8:2::1" })];
    let service = json!({
        "metadata": { "namespace": "ns", "name": format!("s{name}"),
                      "creationTimestamp": format!("2026-01-01T00:00:0{created}Z") },
        "spec": {
            "type": if shape >> 13 == 0 { "ExternalName" } else { "LoadBalancer" },
            "clusterIP": v4, "clusterIPs": [v4, v6], "ipFamilies": families,
            "externalIPs": when(bit(shape, 4), &["192.0.2.1", "2001:db8::1"]),
            "loadBalancerSourceRanges": when(bit(shape, 5), &["203.0.113.0/24", "2001:db8:9::/48"]),
            "internalTrafficPolicy": policy(1), "externalTrafficPolicy": policy(2),
            "sessionAffinity": if bit(shape, 6) { "ClientIP" } else { "None" },
            "sessionAffinityConfig": { "clientIP": { "timeoutSeconds": if bit(shape, 10) { 60 } else { 10800 } } },
            "ports": ports,
        },
        "status": { "loadBalancer": { "ingress": when(bit(shape, 7), &balancers) } },
    });
    Change::Apply(Object::Service(object(service)))
}

fn endpoint(shape: u16, v6: bool) -> Value {
    // Where an endpoint is follows from its address, as in a cluster: there is one table of local ones.
    let number = shape % 12 + 1;
    let address = if v6 { format!("fd00:10:244::{number}") } else { format!("10.244.0.{number}") };
    let hints = when(bit(shape, 7), &["z0", "z1"][usize::from(shape >> 8 & 1)..]);
    json!({
        "addresses": [address],
        "nodeName": if number.is_multiple_of(2) { "node-a" } else { "node-b" },
        "conditions": { "ready": !bit(shape, 4), "serving": !bit(shape, 5), "terminating": bit(shape, 6) },
        "hints": { "forZones": hints.iter().map(|zone| json!({ "name": zone })).collect::<Vec<_>>() },
    })
}

fn slice(name: u8, service: u8, v6: bool, endpoints: &[u16]) -> Change {
    let slice = json!({
        "metadata": { "namespace": "ns", "name": format!("e{name}"),
                      "labels": { "kubernetes.io/service-name": format!("s{service}") } },
        "addressType": if v6 { "IPv6" } else { "IPv4" },
        "ports": [{ "name": "", "port": 8080 }, { "name": "dns", "port": 1053, "protocol": "UDP" }],
        "endpoints": endpoints.iter().map(|shape| endpoint(*shape, v6)).collect::<Vec<_>>(),
    });
    Change::Apply(Object::EndpointSlice(object(slice)))
}

fn node(shape: u16) -> Change {
    let zone = if bit(shape, 0) { "z1" } else { "z0" };
    let node = json!({
        "metadata": { "name": "node-a", "labels": { "topology.kubernetes.io/zone": zone } },
        "spec": { "podCIDRs": when(bit(shape, 1), &["10.244.0.0/24", "fd00:10:244::/64"]) },
        "status": { "addresses": [
            { "type": "InternalIP", "address": format!("203.0.113.{}", shape >> 2) },
            { "type": "InternalIP", "address": "2001:db8::a" },
        ] },
    });
    Change::Apply(Object::Node(object(node)))
}

/// A ClusterIP among the host's own addresses belongs to a process that answers there, as a DNS cache does.
pub(super) fn host(shape: u16) -> Vec<IpAddr> {
    let addresses = [(0, "203.0.113.7"), (1, "10.96.0.1"), (2, "fd00:10:96::1")];
    let addresses = addresses.into_iter().filter(|(number, _)| bit(shape, *number));
    addresses.map(|(_, address)| address.parse().expect("not an address")).collect()
}

fn delete(kind: Kind, name: &str) -> Change {
    Change::Delete(kind, ObjectName::new("ns", name))
}
