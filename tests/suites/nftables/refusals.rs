//! Changes that the kernel refuses, and objects that another program removes: other service ports are not
//! affected.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use weir::{
    dataplane::{Dataplane as _, Error, nftables::Nftables},
    model::Family,
    plan::{Delta, PortId, PortPlan},
};

use super::{assert_installed, both, change, in_namespace, nft, port, start, step};

/// The same service port with source ranges that overlap, which plans never have, and which the kernel does not take.
fn refused(plan: &Arc<PortPlan>) -> Arc<PortPlan> {
    let mut plan = PortPlan::clone(plan);
    let ranges = match plan.id.family {
        Family::V4 => ["198.51.100.0/24", "198.51.100.0/25"],
        Family::V6 => ["2001:db8:1::/48", "2001:db8:1::/49"],
    };
    let sources = ranges.map(|range| range.parse().unwrap());
    plan.frontends.last_mut().unwrap().allowed_sources = Some(sources.into());
    Arc::new(plan)
}

/// The names of what could not be programmed.
fn failed(result: Result<(), Error>) -> Vec<PortId> {
    match result {
        Err(Error::Partly(short)) => short.refused.into_iter().map(|(id, _)| id).collect(),
        other => panic!("{other:?}"),
    }
}

fn plan(family: Family, number: u8, affinity: Option<u32>) -> Arc<PortPlan> {
    Arc::new(port(family, number, &[1, 2, 3], affinity))
}

#[test]
fn of_many_service_ports_in_one_transaction_only_those_that_the_kernel_refuses_are_left_out() {
    in_namespace(|| {
        let good = |family| (1..=90).map(move |number| plan(family, number, None));
        let mut plans: Vec<_> = Family::ALL.into_iter().flat_map(good).collect();
        let bad = [3, 4, 41, 89, 90, 130, 179];
        bad.iter().for_each(|&index| plans[index] = refused(&plans[index]));
        let all: Vec<_> = plans.iter().collect();
        let mut plane = Nftables::open(both()).unwrap();
        let mut named = failed(plane.apply(&start(&all)));
        let mut expected: Vec<_> = bad.iter().map(|&index| plans[index].id.clone()).collect();
        named.sort_unstable();
        expected.sort_unstable();
        assert_eq!(named, expected);
        let state = plane.dump().unwrap();
        for (index, plan) in plans.iter().enumerate().filter(|(index, _)| !bad.contains(index)) {
            assert!(state.frontends.contains_key(&plan.frontends[0].frontend), "{index}");
        }
        assert_installed(&mut plane, &plans[0]);
        assert_installed(&mut plane, &plans[178]);
    });
}

#[test]
fn a_service_port_outlives_a_restart_with_a_change_that_the_kernel_refuses() {
    in_namespace(|| {
        let both_families = |number, affinity| Family::ALL.map(|family| plan(family, number, affinity));
        let works = both_families(1, Some(60));
        let [other, gone, later] = [2, 3, 4].map(|number| both_families(number, Some(60)));
        let refused = works.each_ref().map(refused);
        let mut plane = Nftables::open(both()).unwrap();
        plane.apply(&start(&works.iter().chain(&other).chain(&gone).collect::<Vec<_>>())).unwrap();
        for (works, refused) in works.iter().zip(&refused) {
            assert_eq!(
                failed(plane.apply(&step(Some(works), Some(refused)))),
                std::slice::from_ref(&refused.id)
            );
        }
        works.iter().for_each(|plan| assert_installed(&mut plane, plan));

        drop(plane);
        let mut plane = Nftables::open(both()).unwrap();
        let ids = refused.each_ref().map(|plan| plan.id.clone());
        assert_eq!(failed(plane.apply(&start(&refused.iter().chain(&other).collect::<Vec<_>>()))), ids);
        works.iter().chain(&other).for_each(|plan| assert_installed(&mut plane, plan));
        let chains = nft(&["list", "chains"]);
        assert!(chains.contains("guard-prerouting"), "{chains}");
        let state = plane.dump().unwrap();
        assert!(gone.iter().all(|plan| !state.frontends.contains_key(&plan.frontends[0].frontend)));

        // Neither a change of another port nor the correction of this one stumbles over what was kept.
        for plan in &later {
            plane.apply(&step(None, Some(plan))).unwrap();
        }
        works.iter().for_each(|plan| assert_installed(&mut plane, plan));
        let corrected = Family::ALL.map(|family| Arc::new(port(family, 1, &[2, 5], Some(60))));
        for plan in &corrected {
            plane.apply(&step(None, Some(plan))).unwrap();
        }
        corrected.iter().chain(&other).chain(&later).for_each(|plan| assert_installed(&mut plane, plan));
    });
}

/// Many service ports; their addresses and ports follow from their numbers.
fn many(family: Family, count: u16) -> Vec<Arc<PortPlan>> {
    let plans = (0..count).map(|number| {
        let mut plan = port(family, 1, &[1, 3, 5], None);
        plan.id.port = format!("port-{number}").into();
        plan.frontends.truncate(1);
        plan.frontends[0].frontend.port = 1000 + number;
        Arc::new(plan)
    });
    plans.collect()
}

/// Whether the error blames another program and no service port.
fn took_away(error: &Error) -> bool {
    let Error::Partly(short) = error else { return false };
    let blames = |error: &Error| matches!(error, Error::Kernel(text) if text.contains("another program"));
    short.refused.is_empty() && short.failed.iter().all(|(_, error)| blames(error))
}

/// The error reports at once that something is missing, and blames no service port.
#[test]
fn a_removal_by_another_program_is_no_fault_of_service_ports() {
    in_namespace(|| {
        for (family, table) in [(Family::V4, "ip"), (Family::V6, "ip6")] {
            let plans = many(family, 200);
            let mut plane = Nftables::open(both()).unwrap();
            plane.apply(&start(&[])).unwrap();
            nft(&["delete", "table", table, "weir"]);
            let ports: Vec<_> = plans.iter().map(|plan| change(None, Some(plan))).collect();
            let error = plane.apply(&Delta { ports, ..Delta::default() }).unwrap_err();
            assert!(took_away(&error), "{error:?}");
            plane.reread().unwrap();
            plane.apply(&start(&plans.iter().collect::<Vec<_>>())).unwrap();
            plans.iter().step_by(50).for_each(|plan| assert_installed(&mut plane, plan));
            plane.remove().unwrap();
        }
    });
}

/// Whenever it happens, writing ends there, and no service port is named for it.
#[test]
fn a_table_that_is_taken_away_in_the_middle_of_a_start_ends_it_and_the_next_start_makes_it_whole() {
    in_namespace(|| {
        let plans: Vec<_> = Family::ALL.into_iter().flat_map(|family| many(family, 3000)).collect();
        let delta = start(&plans.iter().collect::<Vec<_>>());
        let mut plane = Nftables::open(both()).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let flushing = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                nft(&["flush", "ruleset"]);
            }
        });
        for _ in 0..10 {
            let result = plane.apply(&delta);
            assert!(result.as_ref().err().is_none_or(took_away), "{result:?}");
            plane.reread().unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        flushing.join().unwrap();
        plane.reread().unwrap();
        plane.apply(&delta).unwrap();
        plans.iter().step_by(1000).for_each(|plan| assert_installed(&mut plane, plan));
    });
}
