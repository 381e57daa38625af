//! Sources of Kubernetes objects: a cluster's API server, or a directory of manifests.
//!
//! In: lists and watches, or files. Out: [`Change`](crate::model::Change)s on a channel, in their order. A
//! source never reports an object as deleted because the API server or the directory cannot be read.

pub mod host;
pub mod kube;
pub mod manifests;
mod status;
pub use status::{KindReport, KindStatus, SourceStatus};
