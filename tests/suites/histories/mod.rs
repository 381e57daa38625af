//! Random histories of a cluster, played to every data plane: in the end it holds what the objects mean, whatever deltas it got in
//! between, and however often it failed.

use proptest::test_runner::TestCaseError;
use weir::dataplane::Dataplane;
use weir_tests::agent::Agent;

mod cluster;
mod ebpf;
mod memory;
mod nftables;

/// Tries until the data plane holds what is known.
fn settle<D: Dataplane>(agent: &mut Agent<D>) -> Result<(), TestCaseError> {
    for _ in 0..500 {
        if agent.bring_up_to_date().is_ok() && agent.is_up_to_date() {
            return Ok(());
        }
    }
    Err(TestCaseError::fail("it never got there"))
}
