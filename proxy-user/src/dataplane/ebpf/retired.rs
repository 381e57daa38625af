//! The sockets' plane of an agent that runs without one.
//!
//! In: deltas. Out: nothing is left of a plane that was here before, from the moment when the packets' plane serves alone:
//! programs nobody keeps up would lead to backends that are gone.

use std::{fs, io};

use super::Place;
use crate::{
    dataplane::{Dataplane, Error, State},
    plan::Delta,
};

/// Takes away what another agent's sockets' plane left, once.
pub struct Retired {
    place: Place,
    done: bool,
}

impl Retired {
    /// Of a place where there may be something.
    #[must_use]
    pub fn new(place: Place) -> Self {
        Self { place, done: false }
    }

    /// Whether this process has no right to look at the place. An agent without the rights of root has none where the
    /// kernel's bpffs is root's alone, and that is no reason not to serve.
    fn is_out_of_sight(&self) -> bool {
        fs::read_dir(&self.place.bpf_root).is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied)
    }
}

impl Dataplane for Retired {
    fn apply(&mut self, delta: &Delta) -> Result<(), Error> {
        if delta.complete && !self.done {
            if !self.place.is_on_bpffs().unwrap_or(true) {
                tracing::debug!(directory = %self.place.bpf_root.display(), "no kernel programs can be there");
            } else if self.is_out_of_sight() {
                tracing::warn!(
                    directory = %self.place.bpf_root.display(),
                    "this agent may not look for kernel programs of an earlier agent; if there are any, they lead to backends that are gone, and `weir cleanup` as root removes them"
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
