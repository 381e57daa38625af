//! Many service ports in one transaction: everything that the kernel reports of it is taken in.

use std::sync::Arc;

use weir::{
    dataplane::{Dataplane as _, nftables::Nftables},
    model::{Family, ObjectName},
    plan::PortPlan,
};

use super::{both, in_namespace, port, start};

/// One of many service ports at one address, each with clients of its own to remember.
fn sticky(number: u16) -> Arc<PortPlan> {
    let mut plan = port(Family::V4, 1, &[1, 2, 3], Some(60));
    plan.id.service = ObjectName::new("default", &format!("sticky-{number}"));
    plan.frontends.truncate(1);
    plan.frontends[0].frontend.port = 1000 + number;
    Arc::new(plan)
}

#[test]
fn many_sticky_service_ports_are_programmed_by_one_transaction() {
    in_namespace(|| {
        // Each of them has chains of its own, and the kernel acknowledges every chain.
        let plans: Vec<_> = (0..1_000).map(sticky).collect();
        let all: Vec<_> = plans.iter().collect();
        let mut plane = Nftables::open(both()).unwrap();
        plane.apply(&start(&all)).unwrap();
        let state = plane.dump().unwrap();
        let missing = plans.iter().filter(|plan| !state.frontends.contains_key(&plan.frontends[0].frontend));
        assert_eq!(missing.count(), 0);
    });
}
