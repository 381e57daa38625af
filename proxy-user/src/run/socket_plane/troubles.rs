//! Problems inside the programs, counted in the map `troubles`.
//!
//! In: the pinned map. Out: one log line and the metrics for each kind whose count grew.

use std::path::Path;

use anyhow::Context as _;
use aya::maps::{Map, MapData, PerCpuArray};

use super::LOOK;
use crate::observe::Metrics;

/// The metric label and the log text of each [`proxy_ebpf::trouble`].
const TROUBLES: [(&str, &str); proxy_ebpf::trouble::COUNT as usize] = [
    (
        "affinity-full",
        "the map of sticky clients is full, so some clients get another backend at each connection",
    ),
    ("socket-storage", "no room for some unconnected sockets; nftables translates their packets instead"),
    ("flows-full", "some unconnected sockets sent to more Services at a time than weir keeps"),
    ("slots", "the map of backends was inconsistent; did another program change weir's maps?"),
    (
        "homes-full",
        "no room for some pods that listen on a Service's address; their connections go to the Service",
    ),
    ("origins-full", "no room for some connected sockets; nftables translates their packets instead"),
];

/// The [`TROUBLES`] that a bound causes, and the metric label of what was refused.
const REFUSED: [(&str, &str); 4] = [
    ("affinity-full", "clients"),
    ("socket-storage", "flows"),
    ("flows-full", "crowds"),
    ("origins-full", "origins"),
];

/// Logs and counts problems inside the programs.
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
                // The agent before this one has reported earlier counts.
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
