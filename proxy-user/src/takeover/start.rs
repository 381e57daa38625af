//! Takes over from kube-proxy: removes what it left in the kernel, once weir's rules are in force.
//!
//! In: a message for each family that is in force. Out: a kernel without kube-proxy's rules of that family, or a log
//! line that says why they are still there. The ipvs mode, which has no family, goes with the last family. weir does
//! this once per start, so that it does not fight a kube-proxy that still runs and restores its rules.

use ipnet::IpNet;
use tokio::sync::mpsc;

use super::{KeepReason, KeptChain, Removed, listed, remove_of};
use crate::model::{Family, PerFamily};

/// Starts a task that waits for families. Virtual servers of IPVS in the `excluded` networks stay. The rules of a
/// family that is not `served` go with the first family that is.
pub(crate) fn start(excluded: Vec<IpNet>, served: PerFamily<bool>) -> mpsc::UnboundedSender<Family> {
    let (sender, mut in_force) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        let mut waiting = served;
        let mut going = PerFamily { v4: !served.v4, v6: !served.v6 };
        while let Some(family) = in_force.recv().await {
            *going.get_mut(family) = true;
            *waiting.get_mut(family) = false;
            let last = (!waiting.v4 && !waiting.v6).then_some(&*excluded);
            let (removed, failed) = remove_of(std::mem::take(&mut going), last).await;
            log_removed(&removed);
            for error in failed {
                let cause = std::error::Error::source(&error).map(ToString::to_string);
                tracing::warn!(%error, cause, "kube-proxy's rules may still translate new connections; `weir cleanup --kube-proxy` tries again");
            }
            if last.is_some() {
                return;
            }
        }
    });
    sender
}

/// Logs what was removed, and what stays.
pub(crate) fn log_removed(removed: &Removed) {
    let Removed { tables, chains, servers, sets, devices, kept_chains, kept_sets } = removed;
    if !removed.is_empty() {
        tracing::info!(
            tables,
            chains,
            servers,
            sets,
            devices,
            "took over from kube-proxy and removed its rules"
        );
    }
    let is_refused = |kept: &&KeptChain| matches!(kept.because, KeepReason::Refused(_));
    let (refused, led_to): (Vec<_>, Vec<_>) = kept_chains.iter().partition(is_refused);
    if !refused.is_empty() {
        tracing::warn!(
            chains = listed(refused),
            "chains of kube-proxy stay, because packets to Services would be refused without them; weir does not update them, so accept these packets by rules of your own"
        );
    }
    if !led_to.is_empty() {
        tracing::warn!(
            chains = listed(led_to),
            "chains of kube-proxy stay, because other programs use them; weir has emptied those with Services"
        );
    }
    if !kept_sets.is_empty() {
        tracing::warn!(sets = kept_sets.join(", "), "sets of kube-proxy stay, because rules use them");
    }
}
