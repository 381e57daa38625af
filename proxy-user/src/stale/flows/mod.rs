//! Takes away UDP flows that lead where no Service leads them any more (K1 to K7), through ctnetlink.
//!
//! In: the [`Suspects`] of a delta that is in the kernel. Out: their stale flows are gone, all others untouched.
//!
//! For a few frontends the kernel is asked for exactly their flows. For many it is asked for the UDP flows once, each
//! looked up in a hash table. Either way flows are judged as they arrive and never collected.

use std::{io, net::SocketAddr};

use self::ctnetlink::{Entry, Requests, Scope, Walked};
use crate::dataplane::Error;
use crate::model::Family;

mod coming;
mod ctnetlink;
mod start;
mod suspect;
#[cfg(test)]
mod tests;

pub use coming::Coming;
pub(crate) use start::start;
pub use suspect::{Flow, Suspects};

/// Up to so many frontends are asked for one by one. Each costs the kernel a walk over its table, a walk for all UDP
/// flows costs copying them.
const ONE_BY_ONE: usize = 8;

/// So many flows are deleted with one system call.
const BATCH: usize = 64;

/// So often a walk is repeated that the kernel says was disturbed (K5).
const REPEATS: usize = 4;

/// The connection to connection tracking of the network namespace it was opened in. Calls block.
pub struct Conntrack {
    walks: Requests,
    deletions: Requests,
    kernel_filters: bool,
}

impl Conntrack {
    /// Opens it.
    ///
    /// # Errors
    ///
    /// When netlink sockets cannot be had.
    pub fn open() -> Result<Self, Error> {
        let open = || Requests::open().map_err(failed("opening connection tracking"));
        Ok(Self { walks: open()?, deletions: open()?, kernel_filters: true })
    }

    /// Opens it to read whole tables and pick from them itself, as it has to on kernels before 5.8.
    ///
    /// # Errors
    ///
    /// As [`Conntrack::open`].
    pub fn open_unfiltered() -> Result<Self, Error> {
        Ok(Self { kernel_filters: false, ..Self::open()? })
    }

    /// Whether the kernel picks the flows, as far as is known: it shows when it is first asked to.
    #[must_use]
    pub fn kernel_filters(&self) -> bool {
        self.kernel_filters
    }

    /// Has the kernel load connection tracking where it is a module that nothing has needed yet.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn load(&mut self) -> Result<(), Error> {
        let walked = self.walks.walk(Scope::Udp(Family::V4), |_| Ok(()));
        walked.map(drop).map_err(failed("loading connection tracking"))
    }

    /// Deletes the stale flows of `suspects` and says how many there were. Call it when the delta they come from is in
    /// the kernel, or flows come back as they were.
    ///
    /// # Errors
    ///
    /// When the flows cannot be read or deleted; some may be gone by then. Calling again is safe.
    pub fn clean(&mut self, suspects: &Suspects) -> Result<u64, Error> {
        suspects.begin();
        let cleaned = self.sweep_all(suspects);
        if cleaned.is_err() {
            // Answers to what failed may still be on their way.
            *self = Self { kernel_filters: self.kernel_filters, ..Self::open()? };
        }
        cleaned
    }

    /// Deletes the UDP flow from `client` to `destination` unless its answers come from where `is_right` says. A client that goes on
    /// begins a new one.
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
            // Answers to what failed may still be on their way.
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

/// The cheapest walks that see every flow of `suspects`.
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
