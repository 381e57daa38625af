//! The invariants of nftables: the kernel holds what the objects mean, step by step, after a restart, after
//! failures, and when everything is gone.

use proptest::prelude::*;
use weir::{
    dataplane::{Faulty, Memory, State, nftables::Nftables},
    model::PerFamily,
};
use weir_tests::{agent::Agent, netns::Namespace};

use super::{
    cluster::{delete_everything, history, settings},
    settle,
};

fn open() -> Nftables {
    Nftables::open(PerFamily { v4: true, v6: true }).expect("these tests need root")
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_kernel_holds_what_memory_holds(history in history()) {
        Namespace::new("histories").unwrap().run(|| {
            let (mut kernel, mut memory) =
                (Agent::new(settings(), open()), Agent::new(settings(), Memory::default()));
            for (step, tell) in &history {
                step.happen(&mut kernel);
                step.happen(&mut memory);
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
                step.happen(&mut kernel);
                step.happen(&mut memory);
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
