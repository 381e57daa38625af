//! Connected UDP sockets whose backend is gone: their datagrams go through their Service again.
//!
//! In: the sockets, and which backends their Services have. Out: nftables tables that translate the first datagram of
//! each flow, and no flows of these sockets to other backends in connection tracking.
//!
//! No process can connect another process's socket. Closing it would end a client that only sends, because such a
//! client may never read the error and would not connect again. Translating all connected UDP sockets from the start
//! would cost every datagram.

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

/// The most moved sockets. Each family has one nftables map for them.
const MOST: usize = 65_536;

/// The most moved sockets of one network namespace, so that one pod leaves room for others.
pub(super) const MOST_OF_ONE: usize = 4096;

/// The moved sockets, and the tables that translate their datagrams.
pub(super) struct MovedSockets {
    tables: MovedTables,
    conntrack: Conntrack,
    /// By cookie.
    known: FxHashMap<u64, Moved>,
    /// The families that may have a table.
    there: PerFamily<bool>,
    /// Whether the kernel refused a table. Sockets are then closed, until the next complete delta.
    refused: bool,
}

impl MovedSockets {
    /// In the caller's network namespace, which the datagrams of all other namespaces pass.
    pub(super) fn open() -> Result<Self, Error> {
        let (tables, conntrack) = (MovedTables::open()?, Conntrack::open()?);
        let there = PerFamily { v4: true, v6: true };
        Ok(Self { tables, conntrack, known: FxHashMap::default(), there, refused: false })
    }

    /// A complete delta came into force, perhaps because another program removed tables.
    pub(super) fn begin_anew(&mut self) {
        (self.there, self.refused) = (PerFamily { v4: true, v6: true }, false);
    }

    pub(super) fn is_any(&self) -> bool {
        !self.known.is_empty()
    }

    /// Whether there is room for another socket beside `more` new ones.
    pub(super) fn has_room(&self, more: usize) -> bool {
        !self.refused && self.known.len() + more < MOST
    }

    /// The socket, if it is moved.
    pub(super) fn of(&self, cookie: u64) -> Option<&Moved> {
        self.known.get(&cookie)
    }

    /// Writes tables for exactly these sockets, and deletes their flows, and those of earlier ones, to backends that
    /// `serves` rejects. Writes everything each time, because other programs may remove tables.
    ///
    /// # Errors
    ///
    /// When the kernel refuses. No socket is moved then.
    pub(super) fn translate(
        &mut self,
        sockets: FxHashMap<u64, Moved>,
        serves: impl Fn(&Moved, SocketAddr) -> bool,
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
        // Goes on after an error, so that all other flows end.
        let mut end_wrong = |moved: &Moved, is_right: &dyn Fn(SocketAddr) -> bool| {
            let result = self.conntrack.end_wrong(moved.client, moved.backend, is_right);
            if ended.is_ok() {
                ended = result;
            }
        };
        for (_, moved) in before.iter().filter(|(cookie, _)| !self.known.contains_key(*cookie)) {
            // Its backend serves again, or another socket has the address now.
            end_wrong(moved, &|answers| answers == moved.backend);
        }
        self.known.values().for_each(|moved| end_wrong(moved, &|answers| serves(moved, answers)));
        ended
    }

    fn write(&mut self, family: Family, sockets: &FxHashMap<u64, Moved>) -> Result<(), Error> {
        let of_family = sockets.values().filter(|moved| Family::of(moved.client.ip()) == family);
        let moved: Vec<Moved> = of_family.copied().collect();
        if moved.is_empty() && !*self.there.get(family) {
            return Ok(());
        }
        match self.tables.write(family, &moved) {
            // The kernel may not have this family, which does not matter without sockets.
            Err(error) if moved.is_empty() => {
                tracing::debug!(%error, %family, "cannot remove the table of moved sockets")
            }
            result => result?,
        }
        *self.there.get_mut(family) = !moved.is_empty();
        Ok(())
    }
}
