//! Which backend a new client of one NodePort gets.
//!
//! In: the NodePort's backends. Out: a random backend, or with session affinity the last one. All clients have the same
//! loopback address, so with affinity all of them have the same backend (A1, A3).

use std::{
    net::SocketAddr,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use super::node_ports::Backends;

/// Picks backends for one NodePort.
#[derive(Debug)]
pub(crate) struct Picker(Mutex<State>);

#[derive(Debug)]
struct State {
    backends: Backends,
    /// The backend of the last client, and when it was picked.
    last: Option<(SocketAddr, Instant)>,
}

impl Picker {
    #[must_use]
    pub(crate) const fn new(backends: Backends) -> Self {
        Self(Mutex::new(State { backends, last: None }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set(&self, backends: &Backends) {
        let mut state = self.state();
        if state.backends == *backends {
            return;
        }
        state.backends = backends.clone();
        // A backend that leaves and comes back has lost its sticky clients (A5).
        state.last = state.last.filter(|(backend, _)| backends.addresses.contains(backend));
    }

    /// The backend for a client that connects now; `None` if there is no backend.
    pub(crate) fn pick(&self, now: Instant) -> Option<SocketAddr> {
        let mut state = self.state();
        let State { backends: Backends { addresses, affinity }, last } = &mut *state;
        let sticky = affinity.and_then(|timeout| {
            last.filter(|(_, at)| now.saturating_duration_since(*at) <= timeout).map(|(backend, _)| backend)
        });
        let random = || addresses.get(fastrand::usize(..addresses.len().max(1))).copied();
        let picked = sticky.or_else(random)?;
        *last = Some((picked, now));
        Some(picked)
    }

    /// Whether the backend still serves.
    pub(crate) fn includes(&self, backend: SocketAddr) -> bool {
        self.state().backends.addresses.contains(&backend)
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, time::Duration};

    use super::*;

    fn backends(addresses: &[&str], affinity: Option<u64>) -> Backends {
        let addresses = addresses.iter().map(|address| address.parse().unwrap()).collect();
        Backends { addresses, affinity: affinity.map(Duration::from_secs) }
    }

    #[test]
    fn every_backend_is_picked_and_none_that_left() {
        let picker = Picker::new(backends(&["10.0.0.1:1", "10.0.0.2:2"], None));
        let all =
            |picker: &Picker| (0..64).filter_map(|_| picker.pick(Instant::now())).collect::<BTreeSet<_>>();
        assert_eq!(all(&picker).len(), 2);
        picker.set(&backends(&["10.0.0.2:2"], None));
        assert_eq!(all(&picker), BTreeSet::from(["10.0.0.2:2".parse().unwrap()]));
        assert!(!picker.includes("10.0.0.1:1".parse().unwrap()));
    }

    #[test]
    fn a1_a3_a5_sticky_clients_have_one_backend_until_it_leaves_or_they_are_idle() {
        let both = ["10.0.0.1:1", "10.0.0.2:2"];
        let picker = Picker::new(backends(&both, Some(10)));
        let start = Instant::now();
        let first = picker.pick(start).unwrap();
        // Each new client starts the timeout again.
        let later = (1..64).map(|beat| start + Duration::from_secs(9 * beat));
        assert!(later.clone().all(|now| picker.pick(now) == Some(first)));
        let rested = (1..64).map(|beat| start + Duration::from_secs(1000 + 11 * beat));
        assert!(
            rested.clone().any(|now| picker.pick(now) != Some(first)),
            "after the timeout another backend may be picked"
        );

        let now = start + Duration::from_secs(5000);
        let kept = picker.pick(now).unwrap();
        let other: Vec<&str> = both.into_iter().filter(|it| *it != kept.to_string()).collect();
        picker.set(&backends(&other, Some(10)));
        assert_ne!(picker.pick(now), Some(kept));
        picker.set(&backends(&both, Some(10)));
        assert_ne!(picker.pick(now), Some(kept), "a backend that comes back has lost its clients");
    }
}
