//! Taking over from kube-proxy: what it left in the kernel goes once everything of ours is in force.
//!
//! In: the news that it is. Out: a kernel without kube-proxy's rules, or a line that says why they are still there. It
//! is done once for each start, so that a kube-proxy that still runs and puts its rules back is not fought.

use ipnet::IpNet;
use tokio::sync::oneshot;

use crate::dataplane::kube_proxy::{self, Removed};

/// Waits for the news in a task. Virtual servers of IPVS in the `excluded` networks stay.
pub(super) fn start(excluded: Vec<IpNet>) -> oneshot::Sender<()> {
    let (sender, in_force) = oneshot::channel();
    tokio::spawn(async move {
        if in_force.await.is_err() {
            return;
        }
        match kube_proxy::remove(&excluded).await {
            Ok(removed) => tell(removed),
            Err(error) => {
                let cause = std::error::Error::source(&error).map(ToString::to_string);
                tracing::warn!(%error, cause, "kube-proxy's rules may still lead new connections; `weir cleanup --kube-proxy` tries again");
            }
        }
    });
    sender
}

/// Says what was removed.
pub(super) fn tell(removed: Removed) {
    let Removed { tables, chains, servers, sets, devices } = removed;
    if !removed.is_empty() {
        tracing::info!(
            tables,
            chains,
            servers,
            sets,
            devices,
            "took over from kube-proxy and removed what it had left"
        );
    }
}
