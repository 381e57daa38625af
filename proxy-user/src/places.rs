//! Limits how many connections a server keeps open, in all and for each client.
//!
//! In: the client's address of each connection, or another key to count it by. Out: a [`Place`] for it, which
//! reports when the connection must close to make room for a new one. A new connection always gets a place,
//! because a client with many connections must not lock out other clients. The client with the most
//! connections loses the one that was idle for longest.

use std::{
    collections::{BTreeMap, HashMap},
    hash::Hash,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use prometheus_client::metrics::counter::Counter;
use tokio::sync::oneshot;

/// The places of one server, or of several servers that share them. `K` is the key that connections are
/// counted by.
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
    /// Counts connections that were closed to make room.
    refused: Counter,
    room: Mutex<Room<K>>,
}

#[derive(Debug)]
struct Room<K> {
    /// The number of the last use. A place is stored under the number of its last use, so the first one was
    /// idle for longest.
    uses: u64,
    taken: BTreeMap<u64, Held<K>>,
    of_each: HashMap<K, usize>,
}

#[derive(Debug)]
struct Held<K> {
    client: K,
    /// Dropped to make the connection close.
    _stay: oneshot::Sender<()>,
}

impl Places {
    /// Gives a new connection of `client` a place.
    #[must_use]
    pub fn take(&self, client: IpAddr) -> Place {
        self.take_for(client.to_canonical())
    }
}

impl<K: Copy + Eq + Hash> Places<K> {
    /// A limit of `most` connections, at most `each` of them from one client. `refused` counts connections
    /// that were closed to make room.
    #[must_use]
    pub fn new(most: usize, each: usize, refused: Counter) -> Self {
        let room = Room { uses: 0, taken: BTreeMap::new(), of_each: HashMap::new() };
        Self(Arc::new(Shared { most: most.max(1), each: each.max(1), refused, room: Mutex::new(room) }))
    }

    /// Gives a new connection a place that counts to the share of `client`.
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

/// The place of one connection. Dropping it frees the place.
#[derive(Debug)]
pub struct Place<K: Copy + Eq + Hash = IpAddr> {
    shared: Arc<Shared<K>>,
    number: u64,
    leave: oneshot::Receiver<()>,
}

impl<K: Copy + Eq + Hash> Place<K> {
    /// Records that the client sent something, so that this connection is the last of its client to be
    /// closed.
    pub fn used(&mut self) {
        let mut room = self.shared.room();
        if let Some(held) = room.taken.remove(&self.number) {
            self.number = room.hold(held);
        }
    }

    /// Waits until the connection must close to make room. May be called again after the returned future was
    /// dropped.
    pub async fn lost(&mut self) {
        // Nothing is ever sent: `free` drops the sender, which ends this wait.
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
    fn a_client_over_its_share_loses_its_own_longest_idle_connection() {
        let (places, refused) = places(100, 2);
        let mut other = places.take(client(2));
        let (mut first, mut second) = (places.take(client(1)), places.take(client(1)));
        first.used();
        let mut third = places.take("::ffff:10.244.0.1".parse().unwrap());
        assert!(has_to_go(&mut second), "the second connection was idle for longest");
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
    fn a_closed_connection_frees_its_place() {
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
