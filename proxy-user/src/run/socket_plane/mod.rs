//! What runs beside a socket plane. No Service waits for it.
//!
//! ```text
//! troubles (map) ──▶ `troubles` (task) ──▶ log, metrics
//! all maps ────────▶ `usage` (task) ──▶ metrics
//! affinities (map) ▶ `clients` (thread): removes expired sticky clients
//! links, map names ▶ `links` (thread): attaches programs and pins maps again ──▶ log, metrics
//! ```

use std::time::Duration;

use crate::{
    dataplane::ebpf::{Counted, Place},
    observe::PortCount,
    plan::PortId,
};

mod clients;
mod links;
mod troubles;
mod usage;

pub(super) use clients::forget_clients;
pub(super) use links::keep_attached;
pub(super) use troubles::watch_troubles;
pub(super) use usage::watch_usage;

/// How often weir reads the programs' counters and looks for its pins.
const LOOK: Duration = Duration::from_secs(5);

/// What was counted for each service port; nothing where that cannot be read.
pub(super) fn counts(counted: &Counted) -> Vec<PortCount> {
    let tallies = counted.read().unwrap_or_else(|error| {
        tracing::debug!(%error, "cannot read what the programs counted");
        Default::default()
    });
    let count = |(id, tally): (PortId, proxy_ebpf::Tally)| PortCount {
        namespace: id.service.namespace().to_owned(),
        service: id.service.name().to_owned(),
        port: id.port.to_string(),
        protocol: id.protocol.to_string(),
        served: tally.served,
        refused: tally.refused,
    };
    tallies.into_iter().map(count).collect()
}

/// Ends when all pins that were there are gone, as after `weir cleanup`. The kernel has detached the programs then, and
/// everything beside the plane holds maps that no program reads; packets serve meanwhile, and the next start of the agent
/// makes new ones.
pub(super) async fn removed(place: Option<Place>) {
    let Some(place) = place else { return std::future::pending().await };
    let mut interval = tokio::time::interval(LOOK);
    let mut was_there = false;
    loop {
        interval.tick().await;
        let gone = place.is_gone();
        if was_there && gone {
            return;
        }
        was_there = !gone;
    }
}
