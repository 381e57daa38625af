//! Sticky clients whose time is over.
//!
//! In: the pinned map `affinities`. Out: the map without expired clients, and without the oldest of a group that has too many.

use std::time::Duration;

use crate::dataplane::ebpf::{self, Place};

/// How often sticky clients are looked at for those to forget.
const FORGET: Duration = Duration::from_secs(10);

/// Removes sticky clients whose time is over, and those of groups that have too many, so that they do not fill the map.
pub(in crate::run) fn forget_clients(place: Place) -> anyhow::Result<()> {
    std::thread::Builder::new().name("affinity".to_owned()).spawn(move || {
        loop {
            std::thread::sleep(FORGET);
            match ebpf::forget_clients(&place) {
                Ok(clients) => tracing::debug!(clients, "forgot sticky clients"),
                Err(error) => tracing::warn!(%error, "sticky clients are not forgotten"),
            }
        }
    })?;
    Ok(())
}
