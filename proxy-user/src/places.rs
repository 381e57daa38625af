//! How many connections a server keeps open, and for which clients.
//!
//! In: the client's address of each connection, or what else its share is counted by. Out: a [`Place`] for it, which says when the connection has to make room
//! for another one. A new connection always gets a place, because a client that holds many must not lock out the others:
//! the client that holds most gives up the one that was idle for longest.

use std::{
    collections::{BTreeMap, HashMap},
    hash::Hash,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use prometheus_client::metrics::counter::Counter;
use tokio::sync::oneshot;

/// The places of one server, or of several that share them. `K` is what a share belongs to.
#[derive(Debug)]
pub struct Places<K = IpAddr>(Arc<Shared<K>>);

impl<K> Clone for Places<K> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

#[derive(Debug)]
struct Shared<K> {
    most: usize,
    each: usize,
    /// Counts connections that had to make room.
    refused: Counter,
    room: Mutex<Room<K>>,
}

#[derive(Debug)]
struct Room<K> {
    /// Rises with every use of a place, so that the places stand in the order in which they were used last.
    uses: u64,
    taken: BTreeMap<u64, Held<K>>,
    of_each: HashMap<K, usize>,
}

#[derive(Debug)]
struct Held<K> {
    client: K,
    /// Dropping it tells the connection to go.
    _stay: oneshot::Sender<()>,
}

impl Places {
    /// A place for a new connection of `client`.
    #[must_use]
    pub fn take(&self, client: IpAddr) -> Place {
        self.take_for(client.to_canonical())
    }
}

impl<K: Copy + Eq + Hash> Places<K> {
    /// Room for `most` connections, of which one client holds `each` at most. `refused` counts connections that had to
    /// make room for others.
    #[must_use]
    pub fn new(most: usize, each: usize, refused: Counter) -> Self {
        let room = Room { uses: 0, taken: BTreeMap::new(), of_each: HashMap::new() };
        Self(Arc::new(Shared { most: most.max(1), each: each.max(1), refused, room: Mutex::new(room) }))
    }

    /// A place for a new connection that counts to the share of `client`.
    #[must_use]
    pub fn take_for(&self, client: K) -> Place<K> {
        let mut room = self.0.room();
        let loser = if room.held_by(client) >= self.0.each {
            Some(client)
        } else if room.taken.len() >= self.0.most {
            room.of_each.iter().max_by_key(|(_, held)| **held).map(|(client, _)| *client)
        } else {
            None
        };
        if let Some(oldest) = loser.and_then(|loser| room.longest_idle(loser)) {
            room.free(oldest);
            self.0.refused.inc();
        }
        let (stay, leave) = oneshot::channel();
        let number = room.hold(Held { client, _stay: stay });
        *room.of_each.entry(client).or_default() += 1;
        drop(room);
        Place { shared: Arc::clone(&self.0), number, leave }
    }
}

impl<K> Shared<K> {
    fn room(&self) -> MutexGuard<'_, Room<K>> {
        self.room.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Copy + Eq + Hash> Room<K> {
    fn held_by(&self, client: K) -> usize {
        self.of_each.get(&client).copied().unwrap_or_default()
    }

    fn longest_idle(&self, client: K) -> Option<u64> {
        self.taken.iter().find(|(_, held)| held.client == client).map(|(number, _)| *number)
    }

    fn hold(&mut self, held: Held<K>) -> u64 {
        self.uses += 1;
        self.taken.insert(self.uses, held);
        self.uses
    }

    fn free(&mut self, number: u64) {
        let Some(Held { client, .. }) = self.taken.remove(&number) else { return };
        let Some(held) = self.of_each.get_mut(&client) else { return };
        *held -= 1;
        if *held == 0 {
            self.of_each.remove(&client);
        }
    }
}

/// One connection's place, free again when this is dropped.
#[derive(Debug)]
pub struct Place<K: Copy + Eq + Hash = IpAddr> {
    shared: Arc<Shared<K>>,
    number: u64,
    leave: oneshot::Receiver<()>,
}

impl<K: Copy + Eq + Hash> Place<K> {
    /// The client said something: of this client's connections this one is now the last to make room.
    pub fn used(&mut self) {
        let mut room = self.shared.room();
        if let Some(held) = room.taken.remove(&self.number) {
            self.number = room.hold(held);
        }
    }

    /// Waits until the connection has to make room for another one. Call it again after a wait that was given up.
    pub async fn lost(&mut self) {
        // The sender sends nothing: it is dropped when the place is taken away.
        let _ = (&mut self.leave).await;
    }
}

impl<K: Copy + Eq + Hash> Drop for Place<K> {
    fn drop(&mut self) {
        self.shared.room().free(self.number);
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    fn client(last: u8) -> IpAddr {
        [10, 244, 0, last].into()
    }

    fn has_to_go(place: &mut Place) -> bool {
        place.lost().now_or_never().is_some()
    }

    fn places(most: usize, each: usize) -> (Places, Counter) {
        let refused = Counter::default();
        (Places::new(most, each, refused.clone()), refused)
    }

    #[test]
    fn a_client_beyond_its_share_loses_its_own_longest_idle_connection() {
        let (places, refused) = places(100, 2);
        let mut other = places.take(client(2));
        let (mut first, mut second) = (places.take(client(1)), places.take(client(1)));
        first.used();
        let mut third = places.take("::ffff:10.244.0.1".parse().unwrap());
        assert!(has_to_go(&mut second), "it was idle for longest");
        assert!(!has_to_go(&mut first) && !has_to_go(&mut third) && !has_to_go(&mut other));
        assert_eq!(refused.get(), 1);
    }

    #[test]
    fn a_new_client_gets_a_place_from_the_client_that_holds_most() {
        let (places, refused) = places(4, 3);
        let mut modest = places.take(client(2));
        let mut greedy: Vec<Place> = (0..3).map(|_| places.take(client(1))).collect();
        let mut new = places.take(client(3));
        let gone: Vec<bool> = greedy.iter_mut().map(has_to_go).collect();
        assert_eq!(gone, [true, false, false]);
        assert!(!has_to_go(&mut modest) && !has_to_go(&mut new));
        assert_eq!(refused.get(), 1);
    }

    #[test]
    fn a_connection_that_ends_gives_its_place_back() {
        let (places, refused) = places(2, 2);
        for _ in 0..10 {
            let (first, second) = (places.take(client(1)), places.take(client(1)));
            drop((first, second));
        }
        assert_eq!(refused.get(), 0);
        let room = places.0.room();
        assert!(room.taken.is_empty() && room.of_each.is_empty());
    }
}
