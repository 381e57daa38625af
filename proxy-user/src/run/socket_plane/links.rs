//! Programs that another program detached, and maps that lost their pins.
//!
//! In: the links and pins of the socket plane. Out: the same links and pins again, a log line, and a metric.

use std::{path::PathBuf, time::Duration};

use crate::{
    dataplane::ebpf::{Links, Place, Problem, repin},
    observe::Metrics,
};

/// The pause between two checks of the links.
const LOOK_AT_LINKS: Duration = Duration::from_secs(2);

/// Attaches programs again that another program detached, and pins maps again, on a thread of its own.
pub(in crate::run) fn keep_attached(links: Links, place: Place, metrics: &Metrics) -> anyhow::Result<()> {
    let metrics = metrics.clone();
    std::thread::Builder::new().name("links".to_owned()).spawn(move || {
        let (mut last_failure, mut last_name) = (None, None);
        loop {
            std::thread::sleep(LOOK_AT_LINKS);
            let repaired = links.repair(|| place.is_in_use());
            let repaired = new_failure(repaired, &mut last_failure, |error| {
                tracing::error!(error, "kernel programs are detached; nftables serves meanwhile");
            });
            if !repaired.is_empty() {
                tracing::warn!(
                    links = file_names(&repaired),
                    "another program detached weir's kernel programs or removed their links; weir attached them again"
                );
                metrics.count_attached_anew(repaired.len() as u64);
            }
            let named = new_failure(repin(&place), &mut last_name, |error| {
                tracing::warn!(error, "weir's maps are not pinned; the next agent will start with empty maps");
            });
            if !named.is_empty() {
                let maps = file_names(&named);
                tracing::warn!(maps, "another program removed pins of weir's maps; weir pinned them again");
            }
        }
    })?;
    Ok(())
}

/// The repaired paths. Calls `say` with a failure that differs from the last one.
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
