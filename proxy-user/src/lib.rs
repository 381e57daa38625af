//! weir: a Kubernetes service proxy, one agent on each node.
//!
//! Data flows one way:
//!
//! ```text
//! source ──Change──▶ model ──dirty services──▶ plan ──Delta──▶ dataplane ──▶ kernel
//! ```
//!
//! `source` reads Kubernetes objects. `model` is the last room that uses their types. `plan` computes the
//! frontends and backends of one Service on this node, and `dataplane` writes them to the kernel. `run` is
//! the only wiring. `relay` carries connections in the agent where no plane can translate them. `observe`
//! stands beside the flow; only `run` and the callers of the data planes import it.

#![deny(unsafe_code)]

mod causes;
pub mod cli;
pub mod config;
pub mod connection_limit;
pub mod dataplane;
pub mod dns;
pub mod machine;
pub mod observe;
pub mod optout;
mod relay;
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
