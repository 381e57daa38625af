//! Tables that have the right names and another shape: of another version, or of another program.

use std::sync::Arc;

use weir::{
    dataplane::{Dataplane as _, Error, nftables::Nftables},
    model::Family,
    plan::PortPlan,
};

use super::{assert_installed, both, in_namespace, nft, port, start};

fn plans() -> Vec<Arc<PortPlan>> {
    Family::ALL.into_iter().map(|family| Arc::new(port(family, 1, &[1, 2, 3], Some(60)))).collect()
}

/// Runs these commands of `nft` on both tables, where `TABLE` stands for the table and `ADDRESS` for the type of its
/// addresses.
fn change(script: &str) {
    for (table, address) in [("ip weir", "ipv4_addr"), ("ip6 weir", "ipv6_addr")] {
        let script = script.replace("TABLE", table).replace("ADDRESS", address);
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), script).unwrap();
        nft(&["-f", file.path().to_str().unwrap()]);
    }
}

fn assert_all(plane: &mut Nftables) {
    plans().iter().for_each(|plan| assert_installed(plane, plan));
}

const SHAPES: [&str; 7] = [
    // Another kind of value, another kind of key, and room for few.
    "add table TABLE; add map TABLE affinity { type ADDRESS . inet_proto . inet_service : mark; }",
    "add table TABLE; add set TABLE cluster-ips { type ADDRESS . inet_service; }",
    "add table TABLE; add set TABLE node-ips { type ADDRESS; size 1; }",
    "add table TABLE; add set TABLE hairpin { type ADDRESS . ADDRESS . inet_proto . inet_service; flags timeout; }",
    // Another hook, another priority, another type, none at all.
    "add table TABLE; add chain TABLE nat-output { type filter hook input priority 7; policy drop; }",
    "add table TABLE; add chain TABLE filter-input; add chain TABLE remember { type filter hook input priority 1; }",
    "add table TABLE { flags dormant; }",
];

#[test]
fn a_table_of_any_other_shape_is_made_right_at_a_start() {
    in_namespace(|| {
        let plans = plans();
        let delta = start(&plans.iter().collect::<Vec<_>>());
        Nftables::open(both()).unwrap().apply(&delta).unwrap();
        let right = nft(&["list", "chains"]);
        nft(&["flush", "ruleset"]);
        for shape in SHAPES {
            change(shape);
            let mut plane = Nftables::open(both()).unwrap();
            plane.apply(&delta).unwrap_or_else(|error| panic!("{shape}: {error:?}"));
            assert_all(&mut plane);
            let mut chains: Vec<_> = nft(&["list", "chains"]).lines().map(str::to_owned).collect();
            let mut expected: Vec<_> = right.lines().map(str::to_owned).collect();
            chains.sort();
            expected.sort();
            assert_eq!(chains, expected, "{shape}");
            assert!(!nft(&["list", "ruleset"]).contains("dormant"), "{shape}");
            plane.remove().unwrap();
        }
    });
}

#[test]
fn a_base_chain_that_was_moved_while_the_agent_runs_is_moved_back() {
    in_namespace(|| {
        let plans = plans();
        let delta = start(&plans.iter().collect::<Vec<_>>());
        let mut plane = Nftables::open(both()).unwrap();
        plane.apply(&delta).unwrap();
        let right = nft(&["list", "chains"]);
        change(
            "flush chain TABLE nat-output; delete chain TABLE nat-output
             add chain TABLE nat-output { type nat hook output priority 50; }",
        );
        plane.reread().unwrap();
        plane.apply(&delta).unwrap();
        assert_all(&mut plane);
        assert_eq!(nft(&["list", "chains"]).matches("priority 50").count(), 0, "{right}");
    });
}

/// A chain of ours is no base chain, and a foreign rule that leads to it keeps it from being replaced.
#[test]
fn a_table_that_cannot_be_changed_into_the_right_one_is_built_anew() {
    in_namespace(|| {
        let plans = plans();
        let delta = start(&plans.iter().collect::<Vec<_>>());
        change(
            "add table TABLE; add chain TABLE nat-output; add chain TABLE a; add rule TABLE a jump nat-output",
        );
        let mut plane = Nftables::open(both()).unwrap();
        // Each family is given up after two attempts.
        let right = (0..6).any(|_| match plane.apply(&delta) {
            Ok(()) => true,
            Err(Error::Partly(short)) if !short.refused.is_empty() => panic!("{short:?}"),
            Err(_) => {
                plane.reread().unwrap();
                false
            }
        });
        assert!(right, "it was never built anew");
        assert_all(&mut plane);
        assert!(!nft(&["list", "ruleset"]).contains("chain a {"));
    });
}
