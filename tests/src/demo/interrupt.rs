//! Signals that end the demo as an error does, so that everything it made is removed.
//!
//! In: SIGINT and SIGTERM. Out: an error at the next `check`. A second signal ends the process at once.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Result, ensure};
use tokio::signal::unix::{SignalKind, signal};

/// The exit code of a process that SIGINT ended, as shells count it.
pub const EXIT_CODE: u8 = 130;

static CAME: AtomicBool = AtomicBool::new(false);

/// Starts the thread that waits for signals.
///
/// # Errors
///
/// When signals cannot be waited for.
pub fn watch() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut interrupt, mut terminate) = {
        let _inside = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    thread::Builder::new().name("signals".to_owned()).spawn(move || {
        runtime.block_on(async {
            loop {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
                if CAME.swap(true, Ordering::Relaxed) {
                    std::process::exit(EXIT_CODE.into());
                }
            }
        });
    })?;
    Ok(())
}

/// Whether a signal came.
#[must_use]
pub fn came() -> bool {
    CAME.load(Ordering::Relaxed)
}

/// Fails once a signal came.
///
/// # Errors
///
/// Then.
pub(super) fn check() -> Result<()> {
    ensure!(!came(), "a signal came");
    Ok(())
}

/// Waits for a signal.
pub(super) fn wait() {
    while !came() {
        thread::sleep(Duration::from_millis(50));
    }
}
