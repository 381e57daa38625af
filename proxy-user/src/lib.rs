//! weir: a Kubernetes service proxy, one agent a node.
//!
//! Data flows one way:
//!
//! ```text
//! source ──Change──▶ model ──dirty services──▶ plan ──Delta──▶ dataplane ──▶ kernel
//! ```
//!
//! `source` yields Kubernetes objects, `model` is the last place that knows them, `plan` says in frontends and backends
//! what one Service means on this node, and `dataplane` makes it true in the kernel. `run` is the only wiring;
//! `relay` is what the agent itself carries
//! where no plane can. `observe` stands beside the flow and is imported by `run` and the data planes' callers only.

#![deny(unsafe_code)]

mod causes;
pub mod cli;
pub mod config;
pub mod dataplane;
pub mod dns;
pub mod machine;
pub mod observe;
pub mod optout;
pub mod places;
pub mod relay;
pub mod run;
pub mod source;
pub mod stale;
pub mod sys;
pub mod takeover;

pub use weir_plan::{model, plan};

#[cfg(test)]
#[expect(dead_code, reason = "the tests of weir-plan use the rest")]
#[path = "../plan/src/model/fixture.rs"]
mod fixture;
