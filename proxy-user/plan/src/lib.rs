//! The meaning of each Service on this node.
//!
//! In: Kubernetes objects. Out: frontends, backends and the difference to what was applied before. A crate of its own, so that the
//! compiler keeps it free of the kernel and of the API client, and its tests build in seconds.
//!
//! ```text
//! Change ──▶ model ──names of changed Services──▶ plan ──▶ Delta
//! ```

#![forbid(unsafe_code)]

pub mod model;
pub mod plan;
