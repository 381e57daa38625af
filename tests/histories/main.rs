//! Random histories of a cluster, played to nftables and to memory: what the kernel holds is what was said, step by
//! step, after a restart, after failures, and when everything is gone.

use proptest::prelude::*;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use weir::{
    dataplane::{Dataplane, Faulty, Memory, State, nftables::Nftables},
    model::{DetectLocal, NodePortSetting, ObjectName, PerFamily, Settings},
    source::{Change, Kind, Object},
};
use weir_tests::{agent::Agent, netns::Namespace};

/// One thing that happens. Names, addresses and ports come from few, so that they meet.
#[derive(Clone, Debug)]
enum Step {
    Service { name: u8, created: u8, shape: u16 },
    NoService(u8),
    Slice { name: u8, service: u8, v6: bool, endpoints: Vec<u16> },
    NoSlice(u8),
    Node(u8),
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
    ]
}

/// Steps, each with whether the data planes are told right after it.
fn history() -> impl Strategy<Value = Vec<(Step, bool)>> {
    proptest::collection::vec((step(), any::<bool>()), 1..40)
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

fn delete(kind: Kind, name: &str) -> Change {
    Change::Delete(kind, ObjectName::new("ns", name))
}

impl Step {
    fn change(&self) -> Change {
        match self {
            Self::Service { name, created, shape } => service(*name, *created, *shape),
            Self::NoService(name) => delete(Kind::Service, &format!("s{name}")),
            Self::Slice { name, service, v6, endpoints } => slice(*name, *service, *v6, endpoints),
            Self::NoSlice(name) => delete(Kind::EndpointSlice, &format!("e{name}")),
            Self::Node(shape) => node((*shape).into()),
        }
    }
}

/// Pods are told by the Node's own networks, so that there is a way to tell them in some states and none in others.
fn settings() -> Settings {
    Settings {
        node_name: "node-a".to_owned(),
        detect_local: DetectLocal::NodeCidr,
        node_port_addresses: NodePortSetting::Primary,
        ..Settings::default()
    }
}

fn open() -> Nftables {
    Nftables::open(PerFamily { v4: true, v6: true }).expect("these tests need root")
}

fn delete_everything<D: Dataplane>(agent: &mut Agent<D>) {
    (0..SERVICES).for_each(|name| agent.take_in(Step::NoService(name).change()));
    (0..SLICES).for_each(|name| agent.take_in(Step::NoSlice(name).change()));
}

/// Tries until the data plane holds what is known.
fn settle<D: Dataplane>(agent: &mut Agent<D>) -> Result<(), TestCaseError> {
    for _ in 0..500 {
        if agent.bring_up_to_date().is_ok() {
            return Ok(());
        }
    }
    Err(TestCaseError::fail("it never got there"))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_kernel_holds_what_memory_holds(history in history()) {
        Namespace::new("histories").unwrap().run(|| {
            let (mut kernel, mut memory) =
                (Agent::new(settings(), open()), Agent::new(settings(), Memory::default()));
            for (step, tell) in &history {
                kernel.take_in(step.change());
                memory.take_in(step.change());
                if *tell {
                    kernel.bring_up_to_date().map_err(|error| TestCaseError::fail(error.to_string()))?;
                    memory.bring_up_to_date().unwrap();
                    prop_assert_eq!(kernel.dump().unwrap(), memory.dump().unwrap(), "after {:?}", step);
                }
            }
            memory.bring_up_to_date().unwrap();
            kernel.restart(open());
            kernel.bring_up_to_date().map_err(|error| TestCaseError::fail(error.to_string()))?;
            prop_assert_eq!(kernel.dump().unwrap(), memory.dump().unwrap(), "after a restart");
            delete_everything(&mut kernel);
            kernel.bring_up_to_date().map_err(|error| TestCaseError::fail(error.to_string()))?;
            prop_assert_eq!(kernel.dump().unwrap(), State::default());
            Ok(())
        })?;
    }

    #[test]
    fn a_kernel_that_keeps_failing_gets_there(history in history(), seed: u64) {
        Namespace::new("faults").unwrap().run(|| {
            let mut kernel = Agent::new(settings(), Faulty::new(open(), seed, 10, 5));
            let mut memory = Agent::new(settings(), Memory::default());
            for (step, tell) in &history {
                kernel.take_in(step.change());
                memory.take_in(step.change());
                if *tell {
                    // A try that fails leaves the rest to the next one.
                    let _ = kernel.bring_up_to_date();
                }
            }
            settle(&mut kernel)?;
            memory.bring_up_to_date().unwrap();
            prop_assert_eq!(kernel.dump().unwrap(), memory.dump().unwrap());
            delete_everything(&mut kernel);
            settle(&mut kernel)?;
            prop_assert_eq!(kernel.dump().unwrap(), State::default());
            Ok(())
        })?;
    }
}
