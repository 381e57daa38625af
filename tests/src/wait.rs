//! Waiting for what has to come to pass, and no longer.

use std::{
    thread,
    time::{Duration, Instant},
};

/// How long anything may take on a busy machine.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// Waits until `holds`.
///
/// # Panics
///
/// When it does not within [`DEADLINE`].
pub fn await_that(what: &str, holds: impl FnMut() -> bool) {
    await_within(DEADLINE, what, holds);
}

/// Waits until `holds`, but no longer than `limit`.
///
/// # Panics
///
/// When it does not within `limit`.
pub fn await_within(limit: Duration, what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + limit;
    while !holds() {
        assert!(Instant::now() < deadline, "not within {limit:?}: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}
