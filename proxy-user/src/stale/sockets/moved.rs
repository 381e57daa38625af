//! Connected UDP sockets whose backend is gone, and that live on: their datagrams go to their Service again.
//!
//! In: which sockets, and what their Services lead to. Out: tables in the kernel that lead the first datagram of each of their flows,
//! and connection tracking without flows of theirs that lead elsewhere.
//!
//! No process can connect the socket of another one, and to close it would end a client that only sends: it may never read the error, and
//! would not connect again. Packets could be led from the beginning, but then each datagram of each connected socket would be translated.

use std::net::SocketAddr;

use rustc_hash::FxHashMap;

use crate::model::{Family, PerFamily};
use crate::{
    dataplane::{
        Error,
        nftables::{Moved, MovedTables},
    },
    stale::flows::Conntrack,
};

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
    /// In which families there may be tables.
    there: PerFamily<bool>,
    /// Whether the kernel refused to lead them. Then sockets are closed, until everything is told anew.
    refused: bool,
}

impl MovedSockets {
    /// For the network namespace of the caller, through which the datagrams of all others come.
    pub(super) fn open() -> Result<Self, Error> {
        let (tables, conntrack) = (MovedTables::open()?, Conntrack::open()?);
        let there = PerFamily { v4: true, v6: true };
        Ok(Self { tables, conntrack, known: FxHashMap::default(), there, refused: false })
    }

    /// Everything was told anew, perhaps because another program removed tables.
    pub(super) fn begin_anew(&mut self) {
        (self.there, self.refused) = (PerFamily { v4: true, v6: true }, false);
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

    /// Has these sockets led, no others, and ends flows of theirs, and of those that were led until now, that do not lead where
    /// `leads` says. Everything is written each time, because other programs remove tables.
    ///
    /// # Errors
    ///
    /// When the kernel refuses. Those that were not led before are not led.
    pub(super) fn lead(
        &mut self,
        sockets: FxHashMap<u64, Moved>,
        leads: impl Fn(&Moved, SocketAddr) -> bool,
    ) -> Result<(), Error> {
        for family in Family::ALL {
            let written = self.write(family, &sockets);
            if written.is_err() {
                (self.refused, self.known) = (true, FxHashMap::default());
                return written;
            }
        }
        let before = std::mem::replace(&mut self.known, sockets);
        let mut ended = Ok(());
        // One that cannot be ended keeps no other from it.
        let mut end_wrong = |moved: &Moved, is_right: &dyn Fn(SocketAddr) -> bool| {
            let result = self.conntrack.end_wrong(moved.client, moved.backend, is_right);
            if ended.is_ok() {
                ended = result;
            }
        };
        for (_, moved) in before.iter().filter(|(cookie, _)| !self.known.contains_key(*cookie)) {
            // Its backend serves again, or the socket is another's now.
            end_wrong(moved, &|answers| answers == moved.backend);
        }
        self.known.values().for_each(|moved| end_wrong(moved, &|answers| leads(moved, answers)));
        ended
    }

    fn write(&mut self, family: Family, sockets: &FxHashMap<u64, Moved>) -> Result<(), Error> {
        let of_family = sockets.values().filter(|moved| Family::of(moved.client.ip()) == family);
        let moved: Vec<Moved> = of_family.copied().collect();
        if moved.is_empty() && !*self.there.get(family) {
            return Ok(());
        }
        match self.tables.write(family, &moved) {
            // There may be nothing of this family, and nothing is wanted.
            Err(error) if moved.is_empty() => {
                tracing::debug!(%error, %family, "cannot remove the table of moved sockets")
            }
            result => result?,
        }
        *self.there.get_mut(family) = !moved.is_empty();
        Ok(())
    }
}
