//! Source ranges: frontends that let in the same share a set.

use std::sync::Arc;

use weir::{
    dataplane::{Dataplane as _, nftables::Nftables},
    model::Family,
    plan::PortPlan,
};

use super::{assert_installed, both, in_namespace, nft, port, start, step};

fn guarded(family: Family, number: u8, ranges: &[&str]) -> Arc<PortPlan> {
    let mut plan = port(family, number, &[1, 2, 3], None);
    plan.frontends[2].allowed_sources = Some(ranges.iter().map(|net| net.parse().unwrap()).collect());
    Arc::new(plan)
}

/// How many sets of ranges there are, and chains that ask them.
fn lists() -> [usize; 2] {
    let listed = nft(&["list", "ruleset"]);
    ["set sources-", "chain guard-"].map(|what| listed.matches(what).count())
}

#[test]
fn frontends_with_the_same_source_ranges_share_one_set_which_goes_with_the_last_of_them() {
    in_namespace(|| {
        const BASE_CHAINS: usize = 2;
        let (one, other) = (&["198.51.100.0/24", "203.0.113.7/32"][..], &["192.0.2.0/25"][..]);
        let first = guarded(Family::V4, 1, one);
        let second = guarded(Family::V4, 2, one);
        let third = guarded(Family::V4, 3, other);
        let mut plane = Nftables::open(both()).unwrap();
        plane.apply(&start(&[&first, &second])).unwrap();
        assert_eq!(lists(), [1, BASE_CHAINS + 1]);
        plane.apply(&step(None, Some(&third))).unwrap();
        assert_eq!(lists(), [2, BASE_CHAINS + 2]);
        let changed = guarded(Family::V4, 2, other);
        plane.apply(&step(Some(&second), Some(&changed))).unwrap();
        assert_eq!(lists(), [2, BASE_CHAINS + 2]);
        [&first, &changed, &third].into_iter().for_each(|plan| assert_installed(&mut plane, plan));
        plane.apply(&step(Some(&first), None)).unwrap();
        assert_eq!(lists(), [1, BASE_CHAINS + 1]);

        // Another hand lets in more; the next agent finds another list, and one that nothing asks any more.
        let listed = nft(&["list", "sets", "ip"]);
        let set = listed.split_whitespace().find(|word| word.starts_with("sources-")).unwrap();
        nft(&["add", "element", "ip", "weir", set, "{ 198.51.100.9 . 0-65535 }"]);
        drop(plane);
        let mut plane = Nftables::open(both()).unwrap();
        plane.apply(&start(&[&changed])).unwrap();
        assert_installed(&mut plane, &changed);
        assert_eq!(lists(), [1, BASE_CHAINS + 1]);
        drop(plane);
        let mut plane = Nftables::open(both()).unwrap();
        plane.apply(&start(&[&first])).unwrap();
        assert_installed(&mut plane, &first);
        assert_eq!(lists(), [1, BASE_CHAINS + 1]);
        plane.apply(&step(Some(&first), None)).unwrap();
        assert_eq!(lists(), [0, 0]);
    });
}

#[test]
fn source_ranges_of_any_number_and_family_are_read_back() {
    in_namespace(|| {
        let many: Vec<String> = (0..=255).map(|n| format!("10.{n}.0.0/17")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        let plans = [
            guarded(Family::V4, 1, &many),
            guarded(Family::V4, 2, &["0.0.0.0/1", "255.255.255.255/32"]),
            guarded(Family::V6, 3, &["::/1", "fd00::/9", "ffff::ffff/128"]),
            guarded(Family::V6, 4, &[]),
        ];
        let mut plane = Nftables::open(both()).unwrap();
        plane.apply(&start(&plans.each_ref())).unwrap();
        plans.iter().for_each(|plan| assert_installed(&mut plane, plan));
    });
}
