//! What runs beside a sockets' plane, each for itself: Services wait for none of it.
//!
//! ```text
//! engine ──Suspects──▶ closing (own thread) ──▶ sockets of backends that serve no longer
//! programs ──troubles (map)──▶ watching (task) ──▶ log, metrics
//! maps ──what they hold and cost──▶ watching (task) ──▶ metrics
//! affinities (map) ──▶ forgetting (own thread)
//! links, names of maps ──▶ attaching and naming anew (own thread) ──▶ log, metrics
//! pods ──▶ bypass (see `pods`) ──▶ metrics
//! ```

use std::{
    path::{Path, PathBuf},
    sync::mpsc,
    time::Duration,
};

use anyhow::Context as _;
use aya::maps::{Map, MapData, PerCpuArray};
use tokio::sync::watch;

use crate::{
    dataplane::{
        ebpf::{
            BypassCensus, Counted, Links, Place, Problem, Usage, forget_clients as forget, name_again, usage,
        },
        sockets::{Sockets, Suspects},
    },
    observe::{Metrics, PortCount},
    plan::PortId,
};

/// Where network namespaces of pods have names, if their runtime gives them some: CNI's runtimes, and Docker.
const NAMESPACES: [&str; 2] = ["/run/netns", "/run/docker/netns"];

/// What `/proxyMode` says while the sockets' plane serves.
pub(super) const MODE: &str = "ebpf";

/// How often the programs' counters are looked at.
const LOOK: Duration = Duration::from_secs(5);

/// How often the links of the programs are looked at.
const LOOK_AT_LINKS: Duration = Duration::from_secs(2);

/// How often sticky clients are looked at for those to forget.
const FORGET: Duration = Duration::from_secs(10);

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

/// Closes sockets whose backend serves no longer, behind the engine's back. Where that is not possible, one warning says
/// so and nothing is closed.
pub(super) fn close(place: &Place, metrics: &Metrics) -> anyhow::Result<Option<mpsc::Sender<Suspects>>> {
    let sockets = match Sockets::open(&place.sockets(), &place.services(), &NAMESPACES.map(Path::new)) {
        Ok(sockets) => sockets,
        Err(error) => {
            tracing::warn!(%error, "sockets whose backend is gone are not closed");
            return Ok(None);
        }
    };
    let (sender, suspects) = mpsc::channel();
    let metrics = metrics.clone();
    std::thread::Builder::new().name("sockets".to_owned()).spawn(move || {
        sockets.run(&suspects, |taken| {
            metrics.count_closed("TCP", taken.tcp);
            metrics.count_closed("UDP", taken.udp);
            metrics.count_moved(taken.moved);
        });
    })?;
    Ok(Some(sender))
}

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

/// Says what goes wrong inside the programs.
pub(super) fn watch_troubles(maps: &Path, metrics: &Metrics) -> anyhow::Result<()> {
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

/// Attaches programs anew that others have detached, and gives maps their names again, behind the engine's back.
pub(super) fn keep_attached(links: Links, place: Place, metrics: &Metrics) -> anyhow::Result<()> {
    let metrics = metrics.clone();
    std::thread::Builder::new().name("links".to_owned()).spawn(move || {
        let (mut last_failure, mut last_name) = (None, None);
        loop {
            std::thread::sleep(LOOK_AT_LINKS);
            let repaired = links.repair(|| place.is_in_use());
            let repaired = new_failure(repaired, &mut last_failure, |error| {
                tracing::error!(error, "kernel programs are detached; packets are served meanwhile");
            });
            if !repaired.is_empty() {
                tracing::warn!(
                    links = file_names(&repaired),
                    "another program detached our kernel programs or removed their links; they are attached anew"
                );
                metrics.count_attached_anew(repaired.len() as u64);
            }
            let named = new_failure(name_again(&place), &mut last_name, |error| {
                tracing::warn!(error, "our maps have no names; the next agent will begin with empty ones");
            });
            if !named.is_empty() {
                let maps = file_names(&named);
                tracing::warn!(maps, "another program removed the names of our maps; they have them again");
            }
        }
    })?;
    Ok(())
}

/// What was found; of a failure that is not the last one once more, `say` is told.
fn new_failure(
    found: Result<Vec<PathBuf>, Problem>,
    last: &mut Option<String>,
    say: impl FnOnce(&str),
) -> Vec<PathBuf> {
    let failure = found.as_ref().err().map(ToString::to_string);
    if let Some(error) = failure.as_deref().filter(|_| failure != *last) {
        say(error);
    }
    *last = failure;
    found.unwrap_or_default()
}

fn file_names(paths: &[PathBuf]) -> String {
    let names = paths.iter().filter_map(|path| path.file_name());
    names.map(|name| name.to_string_lossy()).collect::<Vec<_>>().join(", ")
}

/// Keeps the metrics at what the maps hold and cost.
pub(super) fn watch_usage(place: Place, metrics: &Metrics) {
    let metrics = metrics.clone();
    tokio::spawn(async move {
        let mut interval = tokio::time::interval(LOOK);
        loop {
            interval.tick().await;
            let usage = usage(&place).unwrap_or_else(|error| {
                tracing::debug!(%error, "cannot read what the maps hold");
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

/// Removes sticky clients whose time is over, and those of groups that have too many, so that they do not fill the map.
pub(super) fn forget_clients(place: Place) -> anyhow::Result<()> {
    std::thread::Builder::new().name("affinity".to_owned()).spawn(move || {
        loop {
            std::thread::sleep(FORGET);
            match forget(&place) {
                Ok(clients) => tracing::debug!(clients, "forgot sticky clients"),
                Err(error) => tracing::warn!(%error, "sticky clients are not forgotten"),
            }
        }
    })?;
    Ok(())
}

/// Keeps the metrics at how many pods are left alone.
pub(super) fn watch_bypassed(mut census: watch::Receiver<BypassCensus>, metrics: &Metrics) {
    let metrics = metrics.clone();
    tokio::spawn(async move {
        while census.changed().await.is_ok() {
            let BypassCensus { pods, waiting } = census.borrow_and_update().clone();
            metrics.set_bypassed(pods, waiting);
        }
    });
}
