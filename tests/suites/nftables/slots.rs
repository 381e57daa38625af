//! Slots: what others, or an agent that ended, left in them.

use std::{net::Ipv4Addr, sync::Arc};

use weir::{
    dataplane::{Dataplane as _, nftables::Nftables},
    model::Family,
    plan::{Backend, PortPlan},
};

use super::{assert_installed, both, cluster_ip_route, in_namespace, nft, port, start, step};

fn plan(backends: &[u8]) -> Arc<PortPlan> {
    Arc::new(port(Family::V4, 1, backends, None))
}

/// How many slots of the ClusterIP there are.
fn slots() -> usize {
    let listed = nft(&["list", "map", "ip", "weir", "backends"]);
    listed.lines().filter(|line| line.contains("10.96.0.1 . tcp . 80 . ")).count()
}

/// Slots are not read at start. Wrong contents are put right all the same.
#[test]
fn slots_that_were_changed_behind_our_back_are_put_right() {
    in_namespace(|| {
        let slot = |number: u8| format!("10.96.0.1 . tcp . 80 . {number}");
        let add = |number, backend| {
            let element = format!("{{ {} : 10.244.0.{backend} . 8080 }}", slot(number));
            nft(&["add", "element", "ip", "weir", "backends", &element]);
        };
        let delete = |number| {
            nft(&["delete", "element", "ip", "weir", "backends", &format!("{{ {} }}", slot(number))]);
        };
        let mut plane = Nftables::open(both()).unwrap();
        let (three, four, five, six) =
            (plan(&[1, 3, 5]), plan(&[1, 3, 5, 7]), plan(&[1, 3, 5, 7, 9]), plan(&[1, 3, 5, 7, 9, 11]));
        plane.apply(&start(&[&five])).unwrap();

        // Another endpoint in one slot, none in another, and one where no frontend reaches.
        delete(0);
        add(0, 99);
        delete(1);
        add(5, 99);
        drop(plane);
        let mut plane = Nftables::open(both()).unwrap();
        plane.apply(&start(&[&five])).unwrap();
        assert_installed(&mut plane, &five);
        plane.apply(&step(Some(&five), Some(&six))).unwrap();
        assert_installed(&mut plane, &six);
        assert_eq!(slots(), 6);

        // Endpoints went while no agent ran, and with them, by another hand, one of their slots.
        delete(4);
        drop(plane);
        let mut plane = Nftables::open(both()).unwrap();
        plane.apply(&start(&[&three])).unwrap();
        assert_installed(&mut plane, &three);
        assert_eq!(slots(), 3);

        // The agent was killed before it deleted the slots it had vacated.
        plane.apply(&step(Some(&three), Some(&four))).unwrap();
        plane.apply(&step(Some(&four), Some(&three))).unwrap();
        assert_eq!(slots(), 4);
        drop(plane);
        let mut plane = Nftables::open(both()).unwrap();
        let other = plan(&[1, 3, 5, 11]);
        plane.apply(&start(&[&other])).unwrap();
        assert_installed(&mut plane, &other);
        assert_eq!(slots(), 4);
    });
}

/// The kernel reports every message of a batch in which a slot holds something else, and here those are many.
#[test]
fn a_service_of_very_many_endpoints_all_of_which_changed_is_adopted() {
    in_namespace(|| {
        let plan = |last: u32| {
            let mut plan = port(Family::V4, 1, &[], None);
            let first = u32::from(Ipv4Addr::new(10, 128, 0, 0));
            let addresses = (first + last - 45_000..first + last).map(Ipv4Addr::from);
            plan.cluster =
                addresses.map(|at| Backend { address: at.into(), port: 8080, local: false }).collect();
            plan.frontends.truncate(1);
            plan.frontends[0].route = cluster_ip_route();
            Arc::new(plan)
        };
        for plan in [plan(45_000), plan(60_000)] {
            let mut plane = Nftables::open(both()).unwrap();
            plane.apply(&start(&[&plan])).unwrap();
            assert_installed(&mut plane, &plan);
        }
    });
}

/// A packet that looked its frontend up before a change must still find the slot that the old count allows.
#[test]
fn a_slot_outlives_the_count_that_reached_it_by_one_change() {
    in_namespace(|| {
        let mut plane = Nftables::open(both()).unwrap();
        let (three, one, two) = (plan(&[1, 2, 3]), plan(&[1]), plan(&[1, 4]));
        plane.apply(&start(&[&three])).unwrap();
        plane.apply(&step(Some(&three), Some(&one))).unwrap();
        assert_installed(&mut plane, &one);
        assert_eq!(slots(), 3, "the two slots that are not reached any more are still there");
        plane.apply(&step(Some(&one), Some(&two))).unwrap();
        assert_installed(&mut plane, &two);
        assert_eq!(slots(), 2, "and go with the next change");
        plane.apply(&step(Some(&two), Some(&one))).unwrap();
        plane.apply(&step(Some(&one), None)).unwrap();
        assert_eq!(slots(), 0);
    });
}
