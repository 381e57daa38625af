//! Deletes stale UDP flows from connection tracking (K1 to K7), through ctnetlink.
//!
//! In: the [`Suspects`] of a delta that is in the kernel. Out: their stale flows are deleted, and no others.
//!
//! For a few frontends weir asks the kernel for exactly their flows. For many it reads all UDP flows once and looks
//! each up in a hash table. In both cases it checks flows as they arrive and never collects them.

use std::{io, net::SocketAddr};

use self::ctnetlink::{Entry, Requests, Scope, Walked};
use crate::dataplane::Error;
use crate::model::Family;

mod announced;
mod ctnetlink;
mod start;
mod suspect;
#[cfg(test)]
mod tests;

pub use announced::AnnouncedPorts;
pub(crate) use start::start;
pub use suspect::{Flow, Suspects};

/// Up to this many frontends, weir asks for the flows of each. Each request costs the kernel a walk over its table; a
/// request for all UDP flows costs the copy of all of them.
const ONE_BY_ONE: usize = 8;

/// Flows that are deleted with one system call.
const BATCH: usize = 64;

/// Repetitions of a walk that the kernel reports as interrupted (K5).
const REPEATS: usize = 4;

/// Connection tracking of the network namespace in which it was opened. Calls block.
pub struct Conntrack {
    walks: Requests,
    deletions: Requests,
    kernel_filters: bool,
}

impl Conntrack {
    /// Opens two netlink sockets.
    ///
    /// # Errors
    ///
    /// When the kernel gives no netlink socket.
    pub fn open() -> Result<Self, Error> {
        let open = || Requests::open().map_err(failed("opening connection tracking"));
        Ok(Self { walks: open()?, deletions: open()?, kernel_filters: true })
    }

    /// Opens it without the kernel's filters, which kernels before 5.8 do not have.
    ///
    /// # Errors
    ///
    /// As [`Conntrack::open`].
    pub fn open_unfiltered() -> Result<Self, Error> {
        Ok(Self { kernel_filters: false, ..Self::open()? })
    }

    /// Whether the kernel filters flows. True until the first request shows otherwise.
    #[must_use]
    pub fn kernel_filters(&self) -> bool {
        self.kernel_filters
    }

    /// Makes the kernel load connection tracking if it is a module.
    ///
    /// # Errors
    ///
    /// When the kernel has no connection tracking.
    pub fn load(&mut self) -> Result<(), Error> {
        let walked = self.walks.walk(Scope::Udp(Family::V4), |_| Ok(()));
        walked.map(drop).map_err(failed("loading connection tracking"))
    }

    /// Deletes the stale flows of `suspects` and returns their number. Call it when their delta is in the kernel,
    /// because the kernel would otherwise create the same flows again.
    ///
    /// # Errors
    ///
    /// When the flows cannot be read or deleted. Some may be deleted by then, and calling again is safe.
    pub fn clean(&mut self, suspects: &Suspects) -> Result<u64, Error> {
        suspects.begin();
        let cleaned = self.sweep_all(suspects);
        if cleaned.is_err() {
            // A new socket, because responses to the failed request may still arrive on the old one.
            *self = Self { kernel_filters: self.kernel_filters, ..Self::open()? };
        }
        cleaned
    }

    /// Deletes the UDP flow from `client` to `destination`, unless `is_right` accepts the source of its answers. The
    /// next datagram of the client starts a new flow.
    ///
    /// # Errors
    ///
    /// When the flow cannot be read or deleted.
    pub fn end_wrong(
        &mut self,
        client: SocketAddr,
        destination: SocketAddr,
        is_right: impl FnOnce(SocketAddr) -> bool,
    ) -> Result<(), Error> {
        let found = self.walks.find(client, destination);
        let ended = found.and_then(|found| match found {
            Some(entry) if !is_right(entry.flow.answers) => self.deletions.delete(&mut vec![entry]).map(drop),
            _ => Ok(()),
        });
        if ended.is_err() {
            // A new socket, because responses to the failed request may still arrive on the old one.
            *self = Self { kernel_filters: self.kernel_filters, ..Self::open()? };
        }
        ended.map_err(failed("ending a UDP flow in connection tracking"))
    }

    fn sweep_all(&mut self, suspects: &Suspects) -> Result<u64, Error> {
        let mut deleted = 0;
        if self.kernel_filters {
            for scope in scopes(suspects) {
                let (walked, count) = self.sweep(scope, suspects)?;
                deleted += count;
                if walked == Walked::Unfiltered {
                    tracing::debug!(
                        "this kernel cannot filter connection tracking; weir reads all flows instead"
                    );
                    self.kernel_filters = false;
                    break;
                }
            }
        }
        if !self.kernel_filters {
            for family in suspects.families() {
                deleted += self.sweep(Scope::Everything(family), suspects)?.1;
            }
        }
        Ok(deleted)
    }

    fn sweep(&mut self, scope: Scope, suspects: &Suspects) -> Result<(Walked, u64), Error> {
        let mut total = 0;
        let mut left = REPEATS;
        loop {
            let (walked, deleted) = self
                .pass(scope, suspects)
                .map_err(failed("clearing stale UDP flows from connection tracking"))?;
            total += deleted;
            left -= 1;
            if walked != Walked::Interrupted || left == 0 {
                return Ok((walked, total));
            }
        }
    }

    fn pass(&mut self, scope: Scope, suspects: &Suspects) -> io::Result<(Walked, u64)> {
        let mut stale: Vec<Entry> = Vec::with_capacity(BATCH);
        let mut deleted = 0;
        let Self { walks, deletions, .. } = self;
        let walked = walks.walk(scope, |entry| {
            if suspects.is_stale(entry.flow) {
                stale.push(entry);
            }
            if stale.len() == BATCH {
                deleted += deletions.delete(&mut stale)?;
            }
            Ok(())
        })?;
        Ok((walked, deleted + deletions.delete(&mut stale)?))
    }
}

/// The cheapest scopes that contain every flow of `suspects`.
fn scopes(suspects: &Suspects) -> Vec<Scope> {
    if suspects.len() <= ONE_BY_ONE {
        suspects.frontends().copied().map(Scope::Frontend).collect()
    } else {
        suspects.families().into_iter().map(Scope::Udp).collect()
    }
}

fn failed(doing: &str) -> impl Fn(io::Error) -> Error {
    move |source| Error::Io { context: doing.to_owned(), source }
}
