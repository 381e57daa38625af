//! What the programs say about each socket they lead or refuse, in the agent's log at the level trace (`-v 5`).
//!
//! In: the ring buffer of loaded programs. Out: log lines. At any other level the programs are loaded without their
//! messages, and nothing of this runs.

use std::{
    os::fd::AsFd as _,
    sync::{Arc, Weak},
};

use aya::Ebpf;
use aya_log::EbpfLogger;
use nix::poll::{PollFd, PollFlags, poll};
use tracing::{Level, dispatcher};

use super::problem::Problem;

/// The name of the programs' level, which the loader sets.
pub(super) const LEVEL: &str = "AYA_LOG_LEVEL";

/// The target of their messages.
const TARGET: &str = "weir::programs";

/// How long nobody notices that the programs were replaced, in milliseconds.
const PATIENCE: u16 = 1000;

/// Whether somebody wants to know.
pub(super) fn is_wanted() -> bool {
    tracing::enabled!(target: TARGET, Level::TRACE)
}

/// Forwards what programs say until it is dropped.
#[derive(Debug)]
pub(super) struct Listener {
    _alive: Arc<()>,
}

impl Listener {
    /// Listens to loaded programs.
    pub(super) fn to(ebpf: &mut Ebpf) -> Result<Self, Problem> {
        let failed = |error: &dyn std::fmt::Display| Problem::Map {
            name: "AYA_LOGS".to_owned(),
            text: format!("listening to the programs: {error}"),
        };
        let logger = EbpfLogger::init_with_logger(ebpf, Forward).map_err(|error| failed(&error))?;
        let alive = Arc::new(());
        let watched = Arc::downgrade(&alive);
        let dispatch = dispatcher::get_default(Clone::clone);
        std::thread::Builder::new()
            .name("programs".to_owned())
            .spawn(move || dispatcher::with_default(&dispatch, || listen(logger, &watched)))
            .map_err(|error| failed(&error))?;
        Ok(Self { _alive: alive })
    }
}

fn listen(mut logger: EbpfLogger<Forward>, alive: &Weak<()>) {
    while alive.strong_count() > 0 {
        let mut there = [PollFd::new(logger.as_fd(), PollFlags::POLLIN)];
        if let Err(error) = poll(&mut there, PATIENCE) {
            tracing::debug!(%error, "waiting for what programs say");
        }
        logger.flush();
    }
}

/// From the `log` of `aya-log` to `tracing`.
struct Forward;

impl log::Log for Forward {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        tracing::trace!(target: TARGET, "{}", record.args());
    }

    fn flush(&self) {}
}
