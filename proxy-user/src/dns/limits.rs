//! Who is answered, and how often.
//!
//! In: the address of whoever asks. Out: whether to answer. One client cannot take more than its share, and what is
//! remembered of clients is bounded by forgetting those that have been quiet.

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

/// How many queries pass between two looks for clients that have been quiet.
const BETWEEN_LOOKS: u32 = 8192;
/// More clients than this a node does not have; all of them share one rate then.
const MOST_CLIENTS: usize = 16_384;

/// What is done about a query before it is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// It is answered.
    Answer,
    /// It is refused: it comes from elsewhere.
    Refuse,
    /// It is not answered: there are too many.
    Drop,
}

/// Which networks are answered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Clients {
    /// The host's own addresses, sorted.
    pub host: Vec<IpAddr>,
    /// The networks of pods, and those that were asked for. `None` where nothing tells pods from others: then all are
    /// answered.
    pub networks: Option<NameClients>,
}

impl Clients {
    /// Whether an address is a client's.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        address.is_loopback()
            || self.networks.as_ref().is_none_or(|networks| networks.contains(address))
            || self.host.binary_search(&address).is_ok()
    }
}

/// The limits in force.
#[derive(Debug)]
pub struct Limits {
    clients: RwLock<Clients>,
    each: DefaultKeyedRateLimiter<IpAddr>,
    strangers: DefaultDirectRateLimiter,
    queries: AtomicU32,
    /// Whence we ask ourselves.
    own: Option<IpAddr>,
    /// Whether there are more clients than can be told apart.
    crowded: AtomicBool,
    /// The first that was refused since that was asked.
    refused: Mutex<Option<IpAddr>>,
}

impl Limits {
    /// `rate` queries a second from each address, and as many at once.
    #[must_use]
    pub fn new(rate: NonZeroU32) -> Self {
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

    /// Always answers this address, from which only the host can ask.
    #[must_use]
    pub fn with_own(self, own: IpAddr) -> Self {
        Self { own: Some(own), ..self }
    }

    /// Says who is answered from now on.
    pub fn set_clients(&self, clients: Clients) {
        *self.clients.write().unwrap_or_else(PoisonError::into_inner) = clients;
    }

    /// What to do about a query from this address.
    pub fn admit(&self, from: IpAddr) -> Admission {
        if self.own == Some(from) {
            return Admission::Answer;
        }
        if self.queries.fetch_add(1, Ordering::Relaxed).is_multiple_of(BETWEEN_LOOKS) {
            self.each.retain_recent();
            self.crowded.store(self.each.len() > MOST_CLIENTS, Ordering::Relaxed);
        }
        let known = self.clients.read().unwrap_or_else(PoisonError::into_inner).contains(from);
        // Strangers, who may have any number of addresses, are counted together.
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

    /// An address that was refused since this was asked last.
    pub fn take_refused(&self) -> Option<IpAddr> {
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
    fn pods_and_the_host_are_answered_and_others_refused() {
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
    fn where_nothing_tells_pods_nobody_is_refused() {
        let limits = Limits::new(NonZeroU32::MIN);
        assert_eq!(limits.admit(ip("203.0.113.1")), Admission::Answer);
    }

    #[test]
    fn one_client_that_asks_too_often_takes_nothing_from_others() {
        let limits = limits(5);
        let of = |from: &str| (0..100).filter(|_| limits.admit(ip(from)) != Admission::Drop).count();
        assert!((5..20).contains(&of("10.244.0.1")));
        assert!((5..20).contains(&of("10.244.0.2")));
        let strangers =
            (0..100_u8).filter(|last| limits.admit(ip(&format!("198.51.100.{last}"))) != Admission::Drop);
        assert!((5..20).contains(&strangers.count()));
    }
}
