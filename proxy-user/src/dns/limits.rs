//! Which clients get answers, and how many per second.
//!
//! In: the address of a client. Out: whether to answer. Each client has a rate limit. The memory for clients is
//! limited, because weir drops clients that have been quiet.

use std::{
    net::IpAddr,
    num::NonZeroU32,
    sync::{
        Mutex, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
};

use governor::{DefaultDirectRateLimiter, DefaultKeyedRateLimiter, Quota};

use crate::model::NameClients;

/// weir drops quiet clients after this many queries.
const BETWEEN_LOOKS: u32 = 8192;
/// With more clients than a node can have, all share one rate.
const MOST_CLIENTS: usize = 16_384;

/// The decision on a query before it is parsed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Admission {
    /// Answer it.
    Answer,
    /// Refuse it, because the client is neither this node nor one of its pods.
    Refuse,
    /// Ignore it, because there are too many.
    Drop,
}

/// The clients that get answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Clients {
    /// The host's own addresses, sorted.
    pub(crate) host: Vec<IpAddr>,
    /// The networks of pods, and those of `--dns-clients`. `None` if nothing distinguishes pods from other clients; all
    /// clients then get answers.
    pub(crate) networks: Option<NameClients>,
}

impl Clients {
    /// Whether a client with this address gets answers.
    #[must_use]
    pub(crate) fn contains(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        address.is_loopback()
            || self.networks.as_ref().is_none_or(|networks| networks.contains(address))
            || self.host.binary_search(&address).is_ok()
    }
}

#[derive(Debug)]
pub(crate) struct Limits {
    clients: RwLock<Clients>,
    each: DefaultKeyedRateLimiter<IpAddr>,
    strangers: DefaultDirectRateLimiter,
    queries: AtomicU32,
    /// The source address of weir's own test queries.
    own: Option<IpAddr>,
    /// Whether there are more than [`MOST_CLIENTS`].
    crowded: AtomicBool,
    /// The first refused client since [`Limits::take_refused`].
    refused: Mutex<Option<IpAddr>>,
}

impl Limits {
    /// `rate` queries a second from each address, and as many at once.
    #[must_use]
    pub(crate) fn new(rate: NonZeroU32) -> Self {
        Self {
            clients: RwLock::default(),
            each: DefaultKeyedRateLimiter::keyed(Quota::per_second(rate)),
            strangers: DefaultDirectRateLimiter::direct(Quota::per_second(rate)),
            queries: AtomicU32::new(0),
            own: None,
            crowded: AtomicBool::new(false),
            refused: Mutex::default(),
        }
    }

    /// Exempts this address, from which only the host can send.
    #[must_use]
    pub(crate) fn with_own(self, own: IpAddr) -> Self {
        Self { own: Some(own), ..self }
    }

    /// Replaces the clients that get answers.
    pub(crate) fn set_clients(&self, clients: Clients) {
        *self.clients.write().unwrap_or_else(PoisonError::into_inner) = clients;
    }

    /// The decision on a query from this address.
    pub(crate) fn admit(&self, from: IpAddr) -> Admission {
        if self.own == Some(from) {
            return Admission::Answer;
        }
        if self.queries.fetch_add(1, Ordering::Relaxed).is_multiple_of(BETWEEN_LOOKS) {
            self.each.retain_recent();
            self.crowded.store(self.each.len() > MOST_CLIENTS, Ordering::Relaxed);
        }
        let known = self.clients.read().unwrap_or_else(PoisonError::into_inner).contains(from);
        // Refused clients share one rate, because they may have any number of addresses.
        let within = match known && !self.crowded.load(Ordering::Relaxed) {
            true => self.each.check_key(&from).is_ok(),
            false => self.strangers.check().is_ok(),
        };
        match (known, within) {
            (_, false) => Admission::Drop,
            (true, true) => Admission::Answer,
            (false, true) => {
                let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
                refused.get_or_insert(from.to_canonical());
                Admission::Refuse
            }
        }
    }

    /// Takes the first client that was refused since the last call.
    pub(crate) fn take_refused(&self) -> Option<IpAddr> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::DetectLocal;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn limits(rate: u32) -> Limits {
        let limits = Limits::new(NonZeroU32::new(rate).unwrap());
        let pods = DetectLocal::ClusterCidr(vec!["10.244.0.0/16".parse().unwrap()]);
        let networks = NameClients::new(&pods, &[], &[]);
        limits.set_clients(Clients { host: vec![ip("192.0.2.1")], networks });
        limits
    }

    #[test]
    fn pods_and_the_host_get_answers_and_other_clients_are_refused() {
        let limits = limits(1000);
        for known in ["10.244.3.4", "192.0.2.1", "127.0.0.1", "::1", "::ffff:10.244.0.1"] {
            assert_eq!(limits.admit(ip(known)), Admission::Answer, "{known}");
        }
        for stranger in ["192.0.2.2", "10.245.0.1", "2001:db8::1"] {
            assert_eq!(limits.admit(ip(stranger)), Admission::Refuse, "{stranger}");
        }
        assert_eq!((limits.take_refused(), limits.take_refused()), (Some(ip("192.0.2.2")), None));
    }

    #[test]
    fn without_networks_of_pods_every_client_gets_answers() {
        let limits = Limits::new(NonZeroU32::MIN);
        assert_eq!(limits.admit(ip("203.0.113.1")), Admission::Answer);
    }

    #[test]
    fn one_client_that_asks_too_often_does_not_slow_down_the_others() {
        let limits = limits(5);
        let of = |from: &str| (0..100).filter(|_| limits.admit(ip(from)) != Admission::Drop).count();
        assert!((5..20).contains(&of("10.244.0.1")));
        assert!((5..20).contains(&of("10.244.0.2")));
        let strangers =
            (0..100_u8).filter(|last| limits.admit(ip(&format!("198.51.100.{last}"))) != Admission::Drop);
        assert!((5..20).contains(&strangers.count()));
    }
}
