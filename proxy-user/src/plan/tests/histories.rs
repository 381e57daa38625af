//! What must hold for any history of changes: told step by step, a data plane ends up as if it had been told at once,
//! also if it keeps failing.

use std::collections::BTreeMap;

use proptest::prelude::*;
use serde_json::json;

use crate::{
    dataplane::{Dataplane, Error, Faulty, Memory, State},
    model::{
        DetectLocal, Model, NodePortSetting, Settings,
        fixture::{full_service, full_slice, named, node, settings},
    },
    plan::{Delta, Planner, PortId},
    source::{Change, Kind},
};

/// One thing that happens. Names, addresses and ports come from few, so that they meet.
#[derive(Clone, Debug)]
enum Step {
    Service { name: u8, created: u8, shape: u16 },
    NoService(u8),
    Slice { name: u8, service: u8, v6: bool, endpoints: Vec<u16> },
    NoSlice(u8),
    Node(u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..4_u8, 0..3_u8, any::<u16>())
            .prop_map(|(name, created, shape)| Step::Service { name, created, shape }),
        2 => (0..4_u8).prop_map(Step::NoService),
        6 => (0..5_u8, 0..4_u8, any::<bool>(), proptest::collection::vec(any::<u16>(), 0..5))
            .prop_map(|(name, service, v6, endpoints)| Step::Slice { name, service, v6, endpoints }),
        2 => (0..5_u8).prop_map(Step::NoSlice),
        1 => (0..4_u8).prop_map(Step::Node),
    ]
}

/// Steps, each with whether the data plane is told right after it.
fn history() -> impl Strategy<Value = Vec<(Step, bool)>> {
    proptest::collection::vec((step(), any::<bool>()), 1..40)
}

fn bit(shape: u16, number: u8) -> bool {
    shape >> number & 1 == 1
}

fn service(name: u8, created: u8, shape: u16) -> Change {
    let policy = |number| if bit(shape, number) { "Local" } else { "Cluster" };
    let mut ports =
        vec![json!({ "name": "", "port": 80, "protocol": "TCP", "nodePort": 30080 + u16::from(name % 2) })];
    if bit(shape, 0) {
        ports.push(json!({ "name": "dns", "port": 53 + (shape >> 12 & 1), "protocol": "UDP" }));
    }
    let dual = bit(shape, 3);
    let (v4, v6) = (format!("10.0.0.{}", shape >> 8 & 3), format!("fd00::{name}"));
    full_service(json!({
        "metadata": { "namespace": "ns", "name": format!("s{name}"),
                      "creationTimestamp": format!("2026-01-01T00:00:0{created}Z") },
        "spec": {
            "type": if bit(shape, 11) { "ExternalName" } else { "LoadBalancer" },
            "clusterIP": v4, "clusterIPs": if dual { vec![v4.clone(), v6] } else { vec![v4.clone()] },
            "ipFamilies": if dual { vec!["IPv4", "IPv6"] } else { vec!["IPv4"] },
            "externalIPs": if bit(shape, 4) { vec!["192.0.2.1", "2001:db8::1"] } else { vec![] },
            "loadBalancerSourceRanges": if bit(shape, 5) { vec!["203.0.113.0/24"] } else { vec![] },
            "internalTrafficPolicy": policy(1), "externalTrafficPolicy": policy(2),
            "sessionAffinity": if bit(shape, 6) { "ClientIP" } else { "None" },
            "ports": ports,
        },
        "status": { "loadBalancer": { "ingress": if bit(shape, 7) { json!([{ "ip": "198.51.100.1" }]) } else { json!([]) } } },
    }))
}

fn slice(name: u8, service: u8, v6: bool, endpoints: &[u16]) -> Change {
    let address = |shape: u16| {
        if v6 { format!("fd00:10::{}", shape % 8 + 1) } else { format!("10.244.0.{}", shape % 8) }
    };
    let endpoint = |shape: &u16| {
        let hints = if bit(*shape, 7) {
            json!({ "forZones": [{ "name": format!("z{}", shape >> 8 & 1) }] })
        } else {
            json!({})
        };
        json!({
            "addresses": [address(*shape)],
            "nodeName": if bit(*shape, 3) { "node-a" } else { "node-b" },
            "conditions": { "ready": !bit(*shape, 4), "serving": !bit(*shape, 5), "terminating": bit(*shape, 6) },
            "hints": hints,
        })
    };
    full_slice(json!({
        "metadata": { "namespace": "ns", "name": format!("e{name}"),
                      "labels": { "kubernetes.io/service-name": format!("s{service}") } },
        "addressType": if v6 { "IPv6" } else { "IPv4" },
        "ports": [{ "name": "", "port": 8080 }, { "name": "dns", "port": 1053, "protocol": "UDP" }],
        "endpoints": endpoints.iter().map(endpoint).collect::<Vec<_>>(),
    }))
}

impl Step {
    /// The object the step is about, and the change it is.
    fn change(&self) -> (String, Change) {
        match self {
            Self::Service { name, created, shape } => (format!("s{name}"), service(*name, *created, *shape)),
            Self::NoService(name) => {
                (format!("s{name}"), Change::Delete(Kind::Service, named(&format!("s{name}"))))
            }
            Self::Slice { name, service, v6, endpoints } => {
                (format!("e{name}"), slice(*name, *service, *v6, endpoints))
            }
            Self::NoSlice(name) => {
                (format!("e{name}"), Change::Delete(Kind::EndpointSlice, named(&format!("e{name}"))))
            }
            Self::Node(shape) => {
                let labels =
                    if shape & 1 == 1 { json!({ "topology.kubernetes.io/zone": "z1" }) } else { json!({}) };
                let cidrs = if shape & 2 == 2 { vec!["10.244.0.0/24"] } else { vec![] };
                let value = json!({ "metadata": { "name": "node-a", "labels": labels }, "spec": { "podCIDRs": cidrs },
                    "status": { "addresses": [{ "type": "InternalIP", "address": format!("203.0.113.{shape}") }] } });
                ("node".to_owned(), node(value))
            }
        }
    }
}

fn node_settings() -> Settings {
    Settings {
        detect_local: DetectLocal::NodeCidr,
        node_port_addresses: NodePortSetting::Primary,
        ..settings()
    }
}

/// Plans what is dirty.
fn replan(model: &mut Model, planner: &mut Planner) {
    for name in model.take_dirty() {
        planner.update(&name, model.plan(&name));
    }
    planner.update_node(model.node_plan());
}

/// What a data plane holds that is told everything at once about the objects that are left.
fn rebuilt(history: &[(Step, bool)]) -> Memory {
    let mut left = BTreeMap::new();
    for (step, _) in history {
        let (key, change) = step.change();
        left.insert(key, change);
    }
    let mut model = Model::new(node_settings());
    left.into_values().rev().for_each(|change| model.apply(change));
    let mut planner = Planner::default();
    replan(&mut model, &mut planner);
    let mut memory = Memory::default();
    memory.apply(&planner.complete()).unwrap();
    memory
}

fn settled(memory: &mut Memory) -> (State, Option<crate::plan::NodePlan>, Vec<crate::plan::PortPlan>) {
    let ports = memory.ports().map(|port| {
        let mut port = crate::plan::PortPlan::clone(port);
        port.cluster.sort_unstable();
        port.local.sort_unstable();
        port
    });
    let ports = ports.collect();
    (memory.dump().unwrap(), memory.node().cloned(), ports)
}

/// Applies a delta; says whether the next one has to be complete.
fn attempt(planner: &mut Planner, dataplane: &mut Faulty<Memory>, delta: &Delta) -> Attempt {
    let repairable = match dataplane.apply(delta) {
        Ok(()) => return Attempt::Done,
        Err(Error::Ports(failed)) => {
            let ids: Vec<PortId> = failed.into_iter().map(|(id, _)| id).collect();
            planner.failed(delta, &ids)
        }
        Err(_) => false,
    };
    if repairable {
        return Attempt::Again;
    }
    dataplane.reread().unwrap();
    Attempt::FromScratch
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Attempt {
    Done,
    Again,
    FromScratch,
}

fn next(planner: &mut Planner, last: Attempt) -> Delta {
    if last == Attempt::FromScratch { planner.complete() } else { planner.take_delta() }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn step_by_step_equals_all_at_once(history in history()) {
        let mut model = Model::new(node_settings());
        let (mut planner, mut memory) = (Planner::default(), Memory::default());
        for (step, tell) in &history {
            model.apply(step.change().1);
            replan(&mut model, &mut planner);
            if *tell {
                // Memory refuses a delta that starts from anything else than what it holds.
                memory.apply(&planner.take_delta()).unwrap();
                memory.dump().unwrap();
            }
        }
        memory.apply(&planner.take_delta()).unwrap();
        prop_assert_eq!(settled(&mut memory), settled(&mut rebuilt(&history)));
        prop_assert!(planner.take_delta().is_empty());
    }

    #[test]
    fn a_complete_delta_makes_anything_right(before in history(), after in history()) {
        let mut memory = rebuilt(&before);
        let mut model = Model::new(node_settings());
        after.iter().for_each(|(step, _)| model.apply(step.change().1));
        let mut planner = Planner::default();
        replan(&mut model, &mut planner);
        memory.apply(&planner.complete()).unwrap();
        prop_assert_eq!(settled(&mut memory), settled(&mut rebuilt(&after)));
    }

    #[test]
    fn a_data_plane_that_keeps_failing_gets_there(history in history(), seed: u64) {
        let mut model = Model::new(node_settings());
        let mut planner = Planner::default();
        let mut faulty = Faulty::new(Memory::default(), seed, 10, 10);
        let mut last = Attempt::Done;
        for (step, tell) in &history {
            model.apply(step.change().1);
            replan(&mut model, &mut planner);
            if *tell {
                let delta = next(&mut planner, last);
                last = attempt(&mut planner, &mut faulty, &delta);
            }
        }
        for attempts in 0.. {
            prop_assert!(attempts < 500, "it never got there");
            let delta = next(&mut planner, last);
            last = attempt(&mut planner, &mut faulty, &delta);
            if last == Attempt::Done {
                break;
            }
        }
        prop_assert_eq!(settled(faulty.inner()), settled(&mut rebuilt(&history)));
    }
}
