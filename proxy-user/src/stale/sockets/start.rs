//! The thread that closes and moves sockets.
//!
//! In: the pinned maps of the socket plane. Out: a sender for [`Suspects`], and metrics of what was closed and moved.

use std::{path::Path, sync::mpsc};

use super::{Sockets, Suspects};
use crate::{dataplane::ebpf::Place, observe::Metrics};

/// The directories in which container runtimes name the network namespaces of pods: CNI's runtimes, and Docker.
const NAMESPACES: [&str; 2] = ["/run/netns", "/run/docker/netns"];

/// Starts the thread. If weir cannot close sockets here, it logs one warning and starts no thread.
pub(crate) fn start(place: &Place, metrics: &Metrics) -> anyhow::Result<Option<mpsc::Sender<Suspects>>> {
    let sockets = match Sockets::open(&place.sockets(), &place.services(), &NAMESPACES.map(Path::new)) {
        Ok(sockets) => sockets,
        Err(error) => {
            tracing::warn!(%error, "weir does not close sockets of removed backends");
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
