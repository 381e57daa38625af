//! The Kubernetes source against real API servers that go and come back, change what they and their clients are known by, and
//! fall silent: what is written reaches the source, and no list is asked for that is not needed.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says so by panicking")]

mod agent;
mod audit;
mod authority;
mod restarts;
mod rotation;
mod silence;
