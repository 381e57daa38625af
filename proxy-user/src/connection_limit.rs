//! Limits how many connections a server keeps open, in all and for each client.
//!
//! In: the client's address of each connection, or another key to count it by. Out: a [`Permit`] for it,
//! which reports when the connection must close to make room for a new one. A new connection always gets a
//! permit, because a client with many connections must not lock out other clients. The client with the most
//! connections loses the one that was idle for longest.

use std::{
    collections::{BTreeMap, HashMap},
    hash::Hash,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use prometheus_client::metrics::counter::Counter;
use tokio::sync::oneshot;

/// The limit of one server, or of several servers that share it. `K` is the key that connections are counted
/// by.
#[derive(Debug)]
pub struct ConnectionLimit<K = IpAddr>(Arc<Shared<K>>);

impl<K> Clone for ConnectionLimit<K> {
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
    state: Mutex<State<K>>,
}

#[derive(Debug)]
struct State<K> {
    /// The number of the last use. A connection is stored under the number of its last use, so the first one
    /// was idle for longest.
    uses: u64,
    taken: BTreeMap<u64, Open<K>>,
    by_client: HashMap<K, usize>,
}

#[derive(Debug)]
struct Open<K> {
    client: K,
    /// Dropped to make the connection close.
    _stay: oneshot::Sender<()>,
}

impl ConnectionLimit {
    /// Gives a new connection of `client` a permit.
    #[must_use]
    pub fn admit(&self, client: IpAddr) -> Permit {
        self.admit_for(client.to_canonical())
    }
}

impl<K: Copy + Eq + Hash> ConnectionLimit<K> {
    /// A limit of `most` connections, at most `each` of them from one client. `refused` counts connections
    /// that were closed to make room.
    #[must_use]
    pub fn new(most: usize, each: usize, refused: Counter) -> Self {
        let state = State { uses: 0, taken: BTreeMap::new(), by_client: HashMap::new() };
        Self(Arc::new(Shared { most: most.max(1), each: each.max(1), refused, state: Mutex::new(state) }))
    }

    /// Gives a new connection a permit that counts to the share of `client`.
    #[must_use]
    pub fn admit_for(&self, client: K) -> Permit<K> {
        let mut state = self.0.state();
        let loser = if state.held_by(client) >= self.0.each {
            Some(client)
        } else if state.taken.len() >= self.0.most {
            state.by_client.iter().max_by_key(|(_, open)| **open).map(|(client, _)| *client)
        } else {
            None
        };
        if let Some(oldest) = loser.and_then(|loser| state.longest_idle(loser)) {
            state.free(oldest);
            self.0.refused.inc();
        }
        let (stay, leave) = oneshot::channel();
        let number = state.hold(Open { client, _stay: stay });
        *state.by_client.entry(client).or_default() += 1;
        drop(state);
        Permit { shared: Arc::clone(&self.0), number, leave }
    }
}

impl<K> Shared<K> {
    fn state(&self) -> MutexGuard<'_, State<K>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Copy + Eq + Hash> State<K> {
    fn held_by(&self, client: K) -> usize {
        self.by_client.get(&client).copied().unwrap_or_default()
    }

    fn longest_idle(&self, client: K) -> Option<u64> {
        self.taken.iter().find(|(_, open)| open.client == client).map(|(number, _)| *number)
    }

    fn hold(&mut self, open: Open<K>) -> u64 {
        self.uses += 1;
        self.taken.insert(self.uses, open);
        self.uses
    }

    fn free(&mut self, number: u64) {
        let Some(Open { client, .. }) = self.taken.remove(&number) else { return };
        let Some(open) = self.by_client.get_mut(&client) else { return };
        *open -= 1;
        if *open == 0 {
            self.by_client.remove(&client);
        }
    }
}

/// The permit of one connection. Dropping it ends the connection's share of the limit.
#[derive(Debug)]
pub struct Permit<K: Copy + Eq + Hash = IpAddr> {
    shared: Arc<Shared<K>>,
    number: u64,
    leave: oneshot::Receiver<()>,
}

impl<K: Copy + Eq + Hash> Permit<K> {
    /// Records that the client sent something, so that this connection is the last of its client to be
    /// closed.
    pub fn touch(&mut self) {
        let mut state = self.shared.state();
        if let Some(open) = state.taken.remove(&self.number) {
            self.number = state.hold(open);
        }
    }

    /// Waits until the connection must close to make room. May be called again after the returned future was
    /// dropped.
    pub async fn revoked(&mut self) {
        // Nothing is ever sent: `free` drops the sender, which ends this wait.
        let _ = (&mut self.leave).await;
    }
}

impl<K: Copy + Eq + Hash> Drop for Permit<K> {
    fn drop(&mut self) {
        self.shared.state().free(self.number);
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    fn client(last: u8) -> IpAddr {
        [10, 244, 0, last].into()
    }

    fn has_to_go(permit: &mut Permit) -> bool {
        permit.revoked().now_or_never().is_some()
    }

    fn limit(most: usize, each: usize) -> (ConnectionLimit, Counter) {
        let refused = Counter::default();
        (ConnectionLimit::new(most, each, refused.clone()), refused)
    }

    #[test]
    fn a_client_over_its_share_loses_its_own_longest_idle_connection() {
        let (limit, refused) = limit(100, 2);
        let mut other = limit.admit(client(2));
        let (mut first, mut second) = (limit.admit(client(1)), limit.admit(client(1)));
        first.touch();
        let mut third = limit.admit("::ffff:10.244.0.1".parse().unwrap());
        assert!(has_to_go(&mut second), "the second connection was idle for longest");
        assert!(!has_to_go(&mut first) && !has_to_go(&mut third) && !has_to_go(&mut other));
        assert_eq!(refused.get(), 1);
    }

    #[test]
    fn a_new_client_gets_the_share_of_the_client_that_holds_most() {
        let (limit, refused) = limit(4, 3);
        let mut modest = limit.admit(client(2));
        let mut greedy: Vec<Permit> = (0..3).map(|_| limit.admit(client(1))).collect();
        let mut new = limit.admit(client(3));
        let gone: Vec<bool> = greedy.iter_mut().map(has_to_go).collect();
        assert_eq!(gone, [true, false, false]);
        assert!(!has_to_go(&mut modest) && !has_to_go(&mut new));
        assert_eq!(refused.get(), 1);
    }

    #[test]
    fn a_closed_connection_frees_its_share() {
        let (limit, refused) = limit(2, 2);
        for _ in 0..10 {
            let (first, second) = (limit.admit(client(1)), limit.admit(client(1)));
            drop((first, second));
        }
        assert_eq!(refused.get(), 0);
        let state = limit.0.state();
        assert!(state.taken.is_empty() && state.by_client.is_empty());
    }
}
