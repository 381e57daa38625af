//! Tasks and threads beside the socket plane. No Service waits for them.
//!
//! ```text
//! troubles (map) ──▶ `troubles` (task) ──▶ log, metrics
//! all maps ────────▶ `usage` (task) ──▶ metrics
//! affinities (map) ▶ `clients` (thread): removes expired sticky clients
//! links, map names ▶ `links` (thread): attaches programs and pins maps again ──▶ log, metrics
//! ```

use std::time::Duration;

use crate::{
    dataplane::ebpf::{Counters, Place},
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

/// The period of reading the programs' counters and checking weir's pins.
const LOOK: Duration = Duration::from_secs(5);

/// Connections of each service port; empty if the counters cannot be read.
pub(super) fn counts(counted: &Counters) -> Vec<PortCount> {
    let tallies = counted.read().unwrap_or_else(|error| {
        tracing::debug!(%error, "cannot read the counters of the programs");
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

/// Returns when all pins are gone, as after `weir cleanup`. The kernel has then detached the programs, and this process holds maps
/// that no program reads. nftables serves until the next start, which makes new maps.
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
