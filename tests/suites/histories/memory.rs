//! The invariants of plans: with a delta for each step a data plane ends up as with one delta for all, also
//! if it keeps failing.

use proptest::prelude::*;
use weir::{
    dataplane::{Dataplane as _, Error, Faulty, Memory, State},
    plan::{NodePlan, PortPlan},
};
use weir_tests::agent::Agent;

use super::{
    cluster::{Step, history, settings, summary},
    settle,
};

/// The state of a data plane that gets all remaining objects in one delta.
fn rebuilt(history: &[(Step, bool)]) -> Result<Held, Error> {
    let mut agent = Agent::new(settings(), Memory::default());
    summary(history).into_iter().for_each(|step| step.happen(&mut agent));
    agent.bring_up_to_date()?;
    held(agent.plane())
}

type Held = (State, Option<NodePlan>, Vec<PortPlan>);

fn held(memory: &mut Memory) -> Result<Held, Error> {
    let ports = memory.ports().map(|port| {
        let mut port = PortPlan::clone(port);
        port.cluster.sort_unstable();
        port.local.sort_unstable();
        port
    });
    let ports = ports.collect();
    Ok((memory.dump()?, memory.node().cloned(), ports))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn step_by_step_equals_all_at_once(history in history()) {
        let mut agent = Agent::new(settings(), Memory::default());
        for (step, tell) in &history {
            step.happen(&mut agent);
            if *tell {
                // Memory refuses a delta that starts from anything else than what it holds.
                agent.bring_up_to_date().unwrap();
                agent.dump().unwrap();
            }
        }
        agent.bring_up_to_date().unwrap();
        prop_assert_eq!(held(agent.plane())?, rebuilt(&history)?);
        prop_assert!(agent.is_up_to_date());
    }

    #[test]
    fn a_complete_delta_makes_anything_right(before in history(), after in history()) {
        let mut old = Agent::new(settings(), Memory::default());
        before.iter().for_each(|(step, _)| step.happen(&mut old));
        old.bring_up_to_date().unwrap();
        let mut agent = Agent::new(settings(), std::mem::take(old.plane()));
        after.iter().for_each(|(step, _)| step.happen(&mut agent));
        agent.bring_up_to_date().unwrap();
        prop_assert_eq!(held(agent.plane())?, rebuilt(&after)?);
    }

    #[test]
    fn a_data_plane_that_keeps_failing_gets_there(history in history(), seed: u64) {
        let mut agent = Agent::new(settings(), Faulty::new(Memory::default(), seed, 10, 10));
        for (step, tell) in &history {
            step.happen(&mut agent);
            if *tell {
                // A try that fails leaves the rest to the next one.
                let _ = agent.bring_up_to_date();
            }
        }
        settle(&mut agent)?;
        prop_assert_eq!(held(agent.plane().inner())?, rebuilt(&history)?);
    }
}
