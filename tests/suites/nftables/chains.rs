//! Chains: when they are written, and how long they stay.

use std::{collections::BTreeMap, sync::Arc};

use weir::{
    dataplane::{Dataplane as _, nftables::Nftables},
    model::{Family, PerFamily},
    plan::{Delta, NodePlan, NodePortAddresses, PortPlan},
};

use super::{assert_installed, both, in_namespace, nft, node, port, start, step};

/// The rules of each chain, with the numbers that the kernel gave them: a rule that is written again gets another one.
fn rules() -> BTreeMap<String, String> {
    let listed = nft(&["-a", "list", "ruleset"]);
    let chains = listed.split("\tchain ").skip(1).filter_map(|chain| {
        let (name, rest) = chain.split_once(" { ")?;
        Some((name.to_owned(), rest.split("\n\t}").next()?.to_owned()))
    });
    chains.collect()
}

fn new_node(plan: NodePlan) -> Delta {
    Delta { node: Some(Arc::new(plan)), ..Delta::default() }
}

fn node_ips(family: &str) -> String {
    nft(&["list", "set", family, "weir", "node-ips"])
}

#[test]
fn an_address_that_comes_to_the_node_writes_no_chain() {
    in_namespace(|| {
        let addresses = |all: &[&str]| -> Vec<_> { all.iter().map(|ip| ip.parse().unwrap()).collect() };
        let serving = |v4: &[&str], v6: &[&str]| NodePlan {
            node_port_addresses: PerFamily {
                v4: NodePortAddresses::Only(addresses(v4)),
                v6: NodePortAddresses::Only(addresses(v6)),
            },
            host_addresses: addresses(&[v4, v6].concat()),
            ..node()
        };
        let plans = Family::ALL.map(|family| Arc::new(port(family, 1, &[1, 2, 3], Some(60))));
        let mut plane = Nftables::open(both()).unwrap();
        let before = Delta {
            node: Some(Arc::new(serving(&["192.0.2.1"], &["2001:db8::1"]))),
            ..start(&plans.each_ref())
        };
        plane.apply(&before).unwrap();
        let before = rules();
        plane.apply(&new_node(serving(&["192.0.2.1", "192.0.2.9"], &["2001:db8::9"]))).unwrap();
        assert_eq!(rules(), before);
        assert!(node_ips("ip").contains("192.0.2.1") && node_ips("ip").contains("192.0.2.9"));
        assert!(!node_ips("ip6").contains("2001:db8::1\n") && node_ips("ip6").contains("2001:db8::9"));
    });
}

#[test]
fn a_node_that_changes_writes_the_chains_that_say_something_else_and_no_other() {
    in_namespace(|| {
        let plan = Arc::new(port(Family::V4, 1, &[1, 2, 3], None));
        let mut plane = Nftables::open(both()).unwrap();
        plane.apply(&start(&[&plan])).unwrap();
        let before = rules();
        plane.apply(&new_node(NodePlan { masquerade_mark: 0x8000, ..node() })).unwrap();
        let after = rules();
        let written: Vec<_> = after.iter().filter(|(name, _)| before[*name] != after[*name]).collect();
        assert!(written.iter().any(|(name, _)| *name == "nat-postrouting"), "{written:?}");
        assert!(written.iter().any(|(name, _)| name.starts_with("service-cluster-3")), "{written:?}");
        assert!(written.iter().all(|(name, _)| !name.starts_with("filter-")), "{written:?}");
        assert!(!after.values().any(|rules| rules.contains("0x00004000")), "{after:?}");
        assert_installed(&mut plane, &plan);
    });
}

#[test]
fn chains_that_no_service_uses_any_more_go_but_for_those_used_last() {
    in_namespace(|| {
        let mut plane = Nftables::open(both()).unwrap();
        let scaled = |count: u8, local: u8| {
            let backends: Vec<u8> = (0..local).map(|n| 2 * n).chain((0..count).map(|n| 2 * n + 1)).collect();
            Arc::new(port(Family::V4, 1, &backends, None))
        };
        let mut before: Option<Arc<PortPlan>> = None;
        let mut scale = |plane: &mut Nftables, plan: Arc<PortPlan>| {
            let delta = match &before {
                None => start(&[&plan]),
                Some(before) => step(Some(before), Some(&plan)),
            };
            plane.apply(&delta).unwrap();
            assert_installed(plane, &plan);
            before = Some(plan);
        };
        for count in 1..40 {
            for local in 1..4 {
                scale(&mut plane, scaled(count, local));
            }
        }
        let chains = rules();
        assert!(chains.len() < 50, "{}: {:?}", chains.len(), chains.keys());

        // One that comes and goes again and again is there already.
        scale(&mut plane, scaled(38, 3));
        let before = rules();
        for _ in 0..3 {
            scale(&mut plane, scaled(39, 3));
            scale(&mut plane, scaled(38, 3));
        }
        assert_eq!(rules(), before);
    });
}

/// As another program's rule keeps a chain of ours from going.
#[test]
fn chains_that_the_kernel_would_not_remove_are_counted_and_go_later() {
    in_namespace(|| {
        for (family, table, other) in [(Family::V4, "ip", Family::V6), (Family::V6, "ip6", Family::V4)] {
            let mut plane = Nftables::open(both()).unwrap();
            let plan = Arc::new(port(family, 1, &[1, 2, 3], Some(60)));
            plane.apply(&start(&[&plan])).unwrap();
            let ours = || rules().into_keys().filter(|name| name.contains("svc-1")).collect::<Vec<_>>();
            let failed = |plane: &Nftables| plane.standing()[0].failed_removals;
            assert!(!ours().is_empty());
            assert_eq!(failed(&plane), PerFamily::default());

            nft(&["add", "chain", table, "weir", "held"]);
            for chain in ours() {
                nft(&["add", "rule", table, "weir", "held", "jump", &chain]);
            }
            plane.apply(&step(Some(&plan), None)).unwrap();
            let counted = failed(&plane);
            assert!(*counted.get(family) > 0 && *counted.get(other) == 0, "{counted:?}");
            assert!(!ours().is_empty());

            nft(&["flush", "chain", table, "weir", "held"]);
            nft(&["delete", "chain", table, "weir", "held"]);
            let next = Arc::new(port(family, 2, &[1], None));
            plane.apply(&step(None, Some(&next))).unwrap();
            assert_eq!((failed(&plane), ours()), (counted, vec![]));
            plane.remove().unwrap();
        }
    });
}
