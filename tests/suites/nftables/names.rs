//! Names that users choose, as long as they can be.

use std::sync::Arc;

use weir::{
    dataplane::{Dataplane as _, nftables::Nftables},
    model::{Family, ObjectName},
    plan::{PortId, PortPlan},
};

use super::{assert_installed, both, in_namespace, nft, port, start, step};

/// A sticky service port with a fork for its NodePort: two chains and the service port in one name.
fn longest(family: Family, number: u8) -> Arc<PortPlan> {
    let plan = port(family, number, &[1, 2, 3], Some(60));
    let name = |letter: &str| letter.repeat(63);
    let service = ObjectName::new(&name("n"), &format!("s{number}{}", &name("s")[2..]));
    Arc::new(PortPlan { id: PortId { service, port: name("p").into(), ..plan.id }, ..plan })
}

#[test]
fn service_ports_with_the_longest_names_are_programmed_told_apart_listed_and_adopted() {
    in_namespace(|| {
        let plans: Vec<_> =
            Family::ALL.into_iter().flat_map(|family| [1, 2].map(|number| longest(family, number))).collect();
        let plans: Vec<_> = plans.iter().collect();
        let assert_all = |plane: &mut Nftables| {
            plans.iter().for_each(|plan| assert_installed(plane, plan));
            let listed = nft(&["list", "ruleset"]);
            for plan in &plans {
                let comment = format!("comment \"{}/{}\"", plan.id.service.name(), plan.id.port);
                assert!(listed.contains(&comment), "{comment} is not in {listed}");
            }
            assert_eq!(listed.matches("map clients-").count(), 8, "{listed}");
        };
        let mut plane = Nftables::open(both()).unwrap();
        plane.apply(&start(&plans)).unwrap();
        assert_all(&mut plane);
        drop(plane);
        let mut plane = Nftables::open(both()).unwrap();
        plane.apply(&start(&plans)).unwrap();
        assert_all(&mut plane);
        for plan in &plans {
            plane.apply(&step(Some(plan), None)).unwrap();
        }
        assert!(!nft(&["list", "ruleset"]).contains("sss"), "what was theirs is gone");
    });
}
