//! Where Kubernetes objects come from: a cluster's API server or a directory of manifests.
//!
//! In: a watch. Out: [`Change`](crate::model::Change)s on a channel, in the order they happened. A source never says that an
//! object is gone merely because it cannot reach its origin.

pub mod host;
pub mod kube;
pub mod manifests;
mod status;
pub use status::{KindReport, KindStatus, SourceStatus};
