//! The cluster's API server as a source.
//!
//! In: watches of Services, EndpointSlices, this Node and ServiceCIDRs (W1, W2, W3). Out: their [`Change`]s, less the
//! metadata nobody reads. Lists are passed on as they stream in, so nothing here holds more than the names of what
//! exists.
//!
//! ```text
//! connection ──▶ answers ──▶ watch ──Event──▶ ledger ──Change──▶ channel
//! (servers,      (how they   (retries)        (what is known)
//!  credentials)   end)                        versions: as of when, for the next agent
//! ```
//!
//! An API server that cannot be reached yields nothing at all, however long that lasts. What vanished in the meantime
//! is told by the next full list, and only when that is complete.

use std::{path::PathBuf, sync::Arc};

use tokio::sync::mpsc::Sender;

use super::SourceStatus;
use crate::model::{Change, PodChange};

mod answers;
mod connection;
mod credentials;
mod json;
mod ledger;
mod news;
mod objects;
mod pods;
mod protobuf;
mod retry;
mod token;
mod versions;
mod watch;

pub use connection::{Asked, Connection, Manner, Tell};
pub use credentials::{ConnectError, Credentials};

/// Which API server to watch, as whom, for which node.
#[derive(Clone, Debug)]
pub struct KubeSource {
    /// How to find and convince the API server.
    pub credentials: Credentials,
    /// API servers to use instead of the one the credentials name. After repeated failure the next one is tried.
    pub servers: Vec<http::Uri>,
    /// The name of the Node this agent runs on.
    pub node: String,
    /// The directory in which to keep as of when the cluster is known, for the next agent.
    pub versions: Option<PathBuf>,
}

/// Watches until the receiver of `changes` is gone. Whatever the API server does or fails to do is retried for ever.
pub async fn watch(connection: Connection, changes: Sender<Change>, status: Arc<SourceStatus>) {
    watch::every_kind(connection, changes, status, false).await;
}

/// The same, with headless Services and their endpoints, whose names are answered.
pub async fn watch_with_names(connection: Connection, changes: Sender<Change>, status: Arc<SourceStatus>) {
    watch::every_kind(connection, changes, status, true).await;
}

/// Watches this node's pods and the namespaces, beside and independent of [`watch()`], until the receiver of `changes` is
/// gone. Whatever the API server does or fails to do is retried for ever; where it does not let us see one of the two,
/// that is said once, and [`Change::Synced`] of that kind waits until it does.
pub async fn watch_pods(connection: Connection, changes: Sender<PodChange>, status: Arc<SourceStatus>) {
    pods::both_kinds(connection, changes, status).await;
}
