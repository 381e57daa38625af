//! How full the maps are, and how much memory they take.
//!
//! In: the pinned maps. Out: metrics.

use super::LOOK;
use crate::{
    dataplane::ebpf::{Place, Usage, usage},
    observe::Metrics,
};

/// Keeps the metrics up to date.
pub(in crate::run) fn watch_usage(place: Place, metrics: &Metrics) {
    let metrics = metrics.clone();
    tokio::spawn(async move {
        let mut interval = tokio::time::interval(LOOK);
        loop {
            interval.tick().await;
            let usage = usage(&place).unwrap_or_else(|error| {
                tracing::debug!(%error, "cannot read the size of the maps");
                Vec::new()
            });
            for Usage { map, elements, bytes } in usage {
                if let Some((elements, room)) = elements {
                    metrics.set_fill(map, elements, room);
                }
                if let Some(bytes) = bytes {
                    metrics.set_map_bytes(map, bytes);
                }
            }
        }
    });
}
