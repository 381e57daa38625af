//! Connected UDP sockets whose backend is gone, and that live on: their datagrams go to their Service again.
//!
//! In: which sockets, and what their Services lead to. Out: tables in the kernel that lead the first datagram of each of their flows,
//! and connection tracking without flows of theirs that lead elsewhere.
//!
//! No process can connect the socket of another one, and to close it would end a client that only sends: it may never read the error, and
//! would not connect again. Packets could be led from the beginning, but then each datagram of each connected socket would be translated.

use rustc_hash::FxHashMap;

use super::super::{
    Error,
    conntrack::Conntrack,
    nftables::{Moved, MovedTables},
};
use crate::model::{Family, PerFamily};

/// Most sockets that are moved. The kernel has them all in one map for each family.
const MOST: usize = 65_536;

/// Most of them in one network namespace, so that one pod leaves room for others.
pub(super) const MOST_OF_ONE: usize = 4096;

/// Moved sockets, and how the kernel leads them.
pub(super) struct MovedSockets {
    tables: MovedTables,
    conntrack: Conntrack,
    /// By their cookies.
    known: FxHashMap<u64, Moved>,
    /// What the tables hold, where that is known.
    written: PerFamily<Option<Vec<Moved>>>,
    /// Whether the kernel refused to lead them. Then sockets are closed, until everything is told anew.
    refused: bool,
}

impl MovedSockets {
    /// For the network namespace of the caller, through which the datagrams of all others come.
    pub(super) fn open() -> Result<Self, Error> {
        let (tables, conntrack) = (MovedTables::open()?, Conntrack::open()?);
        let (known, written) = (FxHashMap::default(), PerFamily::default());
        Ok(Self { tables, conntrack, known, written, refused: false })
    }

    /// Everything was told anew, perhaps because another program removed tables.
    pub(super) fn begin_anew(&mut self) {
        (self.written, self.refused) = (PerFamily::default(), false);
    }

    pub(super) fn is_any(&self) -> bool {
        !self.known.is_empty()
    }

    /// Whether one more can be moved.
    pub(super) fn has_room(&self, more: usize) -> bool {
        !self.refused && self.known.len() + more < MOST
    }

    /// How the socket is led already.
    pub(super) fn of(&self, cookie: u64) -> Option<&Moved> {
        self.known.get(&cookie)
    }

    /// Has these sockets led, no others, and ends flows that do not lead where `leads` says.
    ///
    /// # Errors
    ///
    /// When the kernel refuses. Those that were not led before are not led.
    pub(super) fn lead(
        &mut self,
        sockets: FxHashMap<u64, Moved>,
        leads: impl Fn(&Moved, std::net::SocketAddr) -> bool,
    ) -> Result<(), Error> {
        for family in Family::ALL {
            let written = self.write(family, &sockets);
            if written.is_err() {
                (self.refused, self.known) = (true, FxHashMap::default());
                return written;
            }
        }
        self.known = sockets;
        self.known.values().try_for_each(|moved| {
            self.conntrack.end_wrong(moved.client, moved.backend, |answers| leads(moved, answers))
        })
    }

    fn write(&mut self, family: Family, sockets: &FxHashMap<u64, Moved>) -> Result<(), Error> {
        let of_family = sockets.values().filter(|moved| Family::of(moved.client.ip()) == family);
        let mut moved: Vec<Moved> = of_family.copied().collect();
        moved.sort_unstable_by_key(|moved| (moved.client, moved.backend));
        let written = self.written.get_mut(family);
        if written.as_ref() == Some(&moved) {
            return Ok(());
        }
        *written = None;
        match self.tables.write(family, &moved) {
            // There may be nothing of this family, and nothing is wanted.
            Err(error) if moved.is_empty() => {
                tracing::debug!(%error, %family, "cannot look for moved sockets")
            }
            result => result?,
        }
        *self.written.get_mut(family) = Some(moved);
        Ok(())
    }
}
