//! The thread that deletes stale flows.
//!
//! In: [`Suspects`] of deltas that are in force. Out: a sweep over connection tracking for all that wait, and its
//! metrics.

use tokio::sync::mpsc;

use super::{Conntrack, Suspects};
use crate::observe::Metrics;

/// Starts the thread, because a walk over a large table must not delay the next change. Suspects that arrive during a
/// walk wait for the next one, together.
pub(crate) fn start(metrics: Metrics) -> anyhow::Result<mpsc::UnboundedSender<Suspects>> {
    let mut conntrack = Conntrack::open()?;
    let (sender, mut receiver) = mpsc::unbounded_channel::<Suspects>();
    std::thread::Builder::new().name("conntrack".to_owned()).spawn(move || {
        while let Some(mut suspects) = receiver.blocking_recv() {
            while let Ok(later) = receiver.try_recv() {
                suspects.extend(later);
            }
            let started = std::time::Instant::now();
            match conntrack.clean(&suspects) {
                Ok(deleted) => {
                    let deleted = usize::try_from(deleted).unwrap_or(usize::MAX);
                    // One walk covers all families; the metric counts it for the first family that has suspects.
                    if let Some(family) = suspects.families().into_iter().next() {
                        metrics.conntrack_cleaned(family, started.elapsed(), deleted);
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot delete stale UDP flows; some may still go to removed backends")
                }
            }
        }
    })?;
    Ok(sender)
}
