//! The cluster's API server as a source.
//!
//! In: watches of Services, EndpointSlices, this Node and ServiceCIDRs (W1, W2, W3). Out: their [`Change`]s,
//! without metadata that weir does not use. Objects of a list are passed on as they arrive, so this room
//! stores only the names of existing objects.
//!
//! ```text
//! connection ──▶ responses ──▶ watch ──Event──▶ ledger ──Change──▶ channel
//! (servers,      (end in      (retries)        (reported names)
//!  credentials)   order)                       versions: on disk, for the next agent
//! ```
//!
//! While the API server cannot be reached, no change is reported. Objects that were deleted meanwhile are
//! reported by the next full list, once that is complete.

use std::{path::PathBuf, sync::Arc};

use tokio::sync::mpsc::Sender;

use super::SourceStatus;
use crate::model::{Change, PodChange};

mod connection;
mod credentials;
mod json;
mod ledger;
mod objects;
mod pods;
mod protobuf;
mod responses;
mod retry;
mod stream_item;
mod token;
mod versions;
mod watch;

pub use connection::{Connection, ConnectionOptions, RequestObserver, RequestReport};
pub use credentials::{ConnectError, Credentials};

/// An API server to watch, the credentials for it, and this node.
#[derive(Clone, Debug)]
pub struct KubeSource {
    /// The source of credentials and address.
    pub credentials: Credentials,
    /// API servers to use instead of the credentials' own. weir goes to the next one after repeated failures.
    pub servers: Vec<http::Uri>,
    /// The name of this node's Node.
    pub node: String,
    /// The directory in which resource versions are stored for the next start of the agent.
    pub versions: Option<PathBuf>,
}

/// Watches until the receiver of `changes` is dropped. Every failure is retried without end.
pub async fn watch(connection: Connection, changes: Sender<Change>, status: Arc<SourceStatus>) {
    watch::every_kind(connection, changes, status, false).await;
}

/// Watches as [`watch()`], with headless Services and their endpoints, which DNS answers need.
pub async fn watch_with_names(connection: Connection, changes: Sender<Change>, status: Arc<SourceStatus>) {
    watch::every_kind(connection, changes, status, true).await;
}

/// Watches this node's pods and all namespaces, independent of [`watch()`], until the receiver of `changes`
/// is dropped. Every failure is retried without end. If the role forbids one of the two kinds, that is logged
/// once, and [`Change::Synced`] of that kind is not sent until it is allowed.
pub async fn watch_pods(connection: Connection, changes: Sender<PodChange>, status: Arc<SourceStatus>) {
    pods::both_kinds(connection, changes, status).await;
}
