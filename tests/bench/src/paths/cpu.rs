//! CPU time of traffic: of clients and servers, and of the kernel for them.
//!
//! In: nothing. Out: nanoseconds. Clients and servers are threads of this process. The kernel processes a
//! packet where it was sent, on the sender's account; where it is too much it goes on in a thread of the
//! kernel's own, of which there is one on each core.

use std::{fs, path::PathBuf, time::Duration};

use anyhow::Result;
use nix::time::{ClockId, clock_gettime};

pub(super) struct CpuClock {
    /// `schedstat` of the kernel's threads.
    kernel: Vec<PathBuf>,
}

impl CpuClock {
    /// Looks for the kernel's threads.
    pub(super) fn new() -> Result<Self> {
        let mut kernel = Vec::new();
        for entry in fs::read_dir("/proc")? {
            let path = entry?.path();
            if fs::read_to_string(path.join("comm")).is_ok_and(|name| name.starts_with("ksoftirqd/")) {
                kernel.push(path.join("schedstat"));
            }
        }
        Ok(Self { kernel })
    }

    /// CPU time so far.
    pub(super) fn now(&self) -> Result<Duration> {
        let own = Duration::from(clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID)?);
        let kernel = self
            .kernel
            .iter()
            .filter_map(|path| fs::read_to_string(path).ok()?.split_whitespace().next()?.parse::<u64>().ok());
        Ok(own + Duration::from_nanos(kernel.sum()))
    }
}
