//! Sticky clients whose time is over.
//!
//! In: the pinned map `affinities`. Out: the map without expired clients, and without the oldest of a group that has too many.

use std::time::Duration;

use crate::dataplane::ebpf::{self, Place};

/// The pause between two sweeps over sticky clients.
const FORGET: Duration = Duration::from_secs(10);

/// Removes expired sticky clients, and the oldest of groups that have too many, so that the map does not fill.
pub(in crate::run) fn forget_clients(place: Place) -> anyhow::Result<()> {
    std::thread::Builder::new().name("affinity".to_owned()).spawn(move || {
        loop {
            std::thread::sleep(FORGET);
            match ebpf::forget_clients(&place) {
                Ok(clients) => tracing::debug!(clients, "removed sticky clients"),
                Err(error) => tracing::warn!(%error, "cannot remove expired sticky clients"),
            }
        }
    })?;
    Ok(())
}
