//! Which pods' sockets are left alone: a path of its own, so that Services wait for no pod and no cgroup.
//!
//! ```text
//! source (task) ──PodChange──▶ decide (task: model) ──Bypassed──▶ bypass (own thread) ──▶ kernel
//! ```

use std::{path::Path, sync::Arc};

use anyhow::Context as _;
use tokio::sync::{mpsc, watch};

use super::{Bypass, Bypassed, Census, Pods};
use crate::{
    model::PodChange,
    observe::Metrics,
    source::{
        SourceStatus,
        kube::{self, Connection},
    },
};

/// Changes that may wait between the source and the model.
const WAITING_CHANGES: usize = 256;

/// Starts to keep the map of bypassed cgroups, pinned in the directory `maps` beside `settings`, at what Pods and Namespaces say.
/// Answers how many pods that concerns. Needs a tokio runtime; goes on until that ends, and what the maps hold stays.
///
/// # Errors
///
/// When the maps cannot be opened, or the thread does not start.
pub fn start(
    connection: Connection,
    status: Arc<SourceStatus>,
    maps: &Path,
    cgroup_root: &Path,
) -> anyhow::Result<watch::Receiver<Census>> {
    let bypass = Bypass::open(maps, cgroup_root).context("opening what lets pods opt out")?;
    let census = bypass.census();
    let (changes_in, changes) = mpsc::channel(WAITING_CHANGES);
    let (decided, wanted) = watch::channel(Arc::default());
    tokio::spawn(kube::watch_pods(connection, changes_in, status));
    tokio::spawn(decide(changes, decided));
    std::thread::Builder::new().name("bypass".to_owned()).spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(bypass.run(wanted));
        anyhow::Ok(())
    })?;
    Ok(census)
}

/// Sends the pods to bypass to `decided` after each change, until the changes end or the receiver is gone.
pub async fn decide(mut changes: mpsc::Receiver<PodChange>, decided: watch::Sender<Arc<Bypassed>>) {
    let mut pods = Pods::default();
    loop {
        let change = tokio::select! {
            change = changes.recv() => change,
            () = decided.closed() => return,
        };
        let Some(change) = change else { return };
        pods.apply(change);
        while let Ok(change) = changes.try_recv() {
            pods.apply(change);
        }
        let bypassed = pods.bypassed();
        decided.send_if_modified(|known| {
            let changed = **known != bypassed;
            if changed {
                *known = Arc::new(bypassed);
            }
            changed
        });
    }
}

/// Keeps the metrics at how many pods are left alone.
pub(crate) fn show_census(mut census: watch::Receiver<Census>, metrics: &Metrics) {
    let metrics = metrics.clone();
    tokio::spawn(async move {
        while census.changed().await.is_ok() {
            let Census { pods, waiting } = census.borrow_and_update().clone();
            metrics.set_bypassed(pods, waiting);
        }
    });
}
