//! The thread that deletes stale flows.
//!
//! In: [`Suspects`] of deltas that are in force. Out: a sweep over connection tracking for all that wait, and its metrics.

use tokio::sync::mpsc;

use super::{Conntrack, Suspects};
use crate::observe::Metrics;

/// Clears stale flows behind the engine's back: a walk over a large table must not hold up the next change. What comes
/// while a walk is under way is one walk later.
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
                    // The walk is one for all families; it is booked on the first that had a part in it.
                    if let Some(family) = suspects.families().into_iter().next() {
                        metrics.conntrack_cleaned(family, started.elapsed(), deleted);
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "stale UDP flows may still lead to backends that are gone")
                }
            }
        }
    })?;
    Ok(sender)
}
