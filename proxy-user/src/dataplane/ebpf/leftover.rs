//! The socket plane that an earlier agent left, for an agent that runs without one.
//!
//! In: deltas. Out: no programs and maps of an earlier agent, once the nftables plane has a complete delta.
//! Without an agent that updates them, the programs would translate to backends that are gone.

use std::{fs, io};

use super::Place;
use crate::{
    dataplane::{Dataplane, Error, State},
    plan::Delta,
};

/// Removes the programs and maps of an earlier agent, once.
pub struct LeftoverPlane {
    place: Place,
    done: bool,
}

impl LeftoverPlane {
    /// `place` may have programs and maps, or nothing.
    #[must_use]
    pub fn new(place: Place) -> Self {
        Self { place, done: false }
    }

    /// Whether this process may not read the directory. An agent without root's rights may not where only
    /// root may read the kernel's bpffs. That is no reason not to serve.
    fn is_unreadable(&self) -> bool {
        fs::read_dir(&self.place.bpf_root).is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied)
    }
}

impl Dataplane for LeftoverPlane {
    fn apply(&mut self, delta: &Delta) -> Result<(), Error> {
        if delta.complete && !self.done {
            if !self.place.is_on_bpffs().unwrap_or(true) {
                tracing::debug!(directory = %self.place.bpf_root.display(), "not a BPF file system: no earlier agent's kernel programs to remove");
            } else if self.is_unreadable() {
                tracing::warn!(
                    directory = %self.place.bpf_root.display(),
                    "no permission to look for kernel programs of an earlier agent; if there are any, they translate to backends that are gone: run `weir cleanup` as root"
                );
            } else {
                self.remove()?;
            }
            self.done = true;
        }
        Ok(())
    }

    fn reread(&mut self) -> Result<(), Error> {
        Ok(())
    }

    fn dump(&mut self) -> Result<State, Error> {
        Ok(State::default())
    }

    fn remove(&mut self) -> Result<(), Error> {
        let context = || format!("removing kernel programs and maps from {}", self.place.bpf_root.display());
        self.place.clear().map_err(|source| Error::Io { context: context(), source })
    }
}
