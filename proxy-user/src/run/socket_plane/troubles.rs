//! Problems inside the programs, counted in the map `troubles`.
//!
//! In: the pinned map. Out: one log line and the metrics for each kind whose count grew.

use std::path::Path;

use anyhow::Context as _;
use aya::maps::{Map, MapData, PerCpuArray};

use super::LOOK;
use crate::observe::Metrics;

/// What each of [`proxy_ebpf::trouble`] is called, and what it means.
const TROUBLES: [(&str, &str); proxy_ebpf::trouble::COUNT as usize] = [
    ("affinity-full", "clients of Services with session affinity could not be remembered"),
    (
        "socket-storage",
        "unconnected sockets could not be remembered; their packets are led to backends instead",
    ),
    ("flows-full", "sockets without a connection spoke to more Services at a time than are remembered"),
    ("slots", "the map of backends was not as it should be; were our maps changed by others?"),
    ("homes-full", "pods that listen on a Service's address themselves are led to the Service all the same"),
    ("origins-full", "connected sockets could not be remembered; their packets are led to backends instead"),
];

/// Those of [`TROUBLES`] that a bound is the reason of, and what was refused.
const REFUSED: [(&str, &str); 4] = [
    ("affinity-full", "clients"),
    ("socket-storage", "flows"),
    ("flows-full", "crowds"),
    ("origins-full", "origins"),
];

/// Says what goes wrong inside the programs.
pub(in crate::run) fn watch_troubles(maps: &Path, metrics: &Metrics) -> anyhow::Result<()> {
    let path = maps.join("troubles");
    let map = MapData::from_pin(&path).with_context(|| format!("opening {}", path.display()))?;
    let map = PerCpuArray::<_, u64>::try_from(Map::PerCpuArray(map))?;
    let metrics = metrics.clone();
    TROUBLES.iter().for_each(|(name, _)| metrics.count_trouble(name, 0));
    REFUSED.iter().for_each(|(_, reason)| metrics.count_refused_socket(reason, 0));
    tokio::spawn(async move {
        let mut known = [None; TROUBLES.len()];
        let mut interval = tokio::time::interval(LOOK);
        loop {
            interval.tick().await;
            for ((element, (name, meaning)), known) in (0..).zip(TROUBLES).zip(&mut known) {
                let Ok(counts) = map.get(&element, 0) else { continue };
                let count: u64 = counts.iter().sum();
                // What was counted before this agent started has been told by another.
                let more = count.saturating_sub(known.replace(count).unwrap_or(count));
                if more > 0 {
                    tracing::warn!(trouble = name, times = more, "{meaning}");
                    metrics.count_trouble(name, more);
                    let refused = REFUSED.iter().find(|(trouble, _)| *trouble == name);
                    if let Some((_, reason)) = refused {
                        metrics.count_refused_socket(reason, more);
                    }
                }
            }
        }
    });
    Ok(())
}
