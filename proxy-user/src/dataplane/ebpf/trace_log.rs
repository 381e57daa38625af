//! The programs' trace messages, in the agent's log at the level trace (`-v 5`).
//!
//! In: the ring buffer of loaded programs. Out: log lines. At any other level the agent loads the programs
//! without their messages, and starts no thread.

use std::{
    os::fd::AsFd as _,
    sync::{Arc, Weak},
};

use aya::Ebpf;
use aya_log::EbpfLogger;
use nix::poll::{PollFd, PollFlags, poll};
use tracing::{Level, dispatcher};

use super::problem::Problem;

/// The global variable of the programs that has their log level.
pub(super) const LEVEL: &str = "AYA_LOG_LEVEL";

/// The log target of the messages.
const TARGET: &str = "weir::programs";

/// The longest time, in milliseconds, until the thread notices that the programs were replaced.
const POLL_TIMEOUT: u16 = 1000;

/// Whether the agent's log level includes the messages.
pub(super) fn is_enabled() -> bool {
    tracing::enabled!(target: TARGET, Level::TRACE)
}

/// Copies messages to the log until it is dropped.
#[derive(Debug)]
pub(super) struct Listener {
    _alive: Arc<()>,
}

impl Listener {
    pub(super) fn to(ebpf: &mut Ebpf) -> Result<Self, Problem> {
        let failed = |error: &dyn std::fmt::Display| Problem::Map {
            name: "AYA_LOGS".to_owned(),
            text: format!("reading messages of the programs: {error}"),
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
        let mut ready = [PollFd::new(logger.as_fd(), PollFlags::POLLIN)];
        if let Err(error) = poll(&mut ready, POLL_TIMEOUT) {
            tracing::debug!(%error, "cannot wait for messages of the programs");
        }
        logger.flush();
    }
}

/// Passes records of the crate `log`, which `aya-log` uses, to `tracing`.
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
