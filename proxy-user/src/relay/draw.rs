//! Which backend a new client of one NodePort gets.
//!
//! In: where the NodePort leads. Out: a backend by chance, or with session affinity the one before: all clients have one
//! address, so there is one backend for all of them (A1, A3).

use std::{
    net::SocketAddr,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use super::leads::Lead;

/// The draw of one NodePort.
#[derive(Debug)]
pub struct Draw(Mutex<State>);

#[derive(Debug)]
struct State {
    lead: Lead,
    /// What the last client got, and when.
    last: Option<(SocketAddr, Instant)>,
}

impl Draw {
    /// Draws from these.
    #[must_use]
    pub const fn new(lead: Lead) -> Self {
        Self(Mutex::new(State { lead, last: None }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Draws from these from now on.
    pub fn set(&self, lead: &Lead) {
        let mut state = self.state();
        if state.lead == *lead {
            return;
        }
        state.lead = lead.clone();
        // A backend that left and comes again has forgotten its clients (A5).
        state.last = state.last.filter(|(backend, _)| lead.backends.contains(backend));
    }

    /// The backend of a client that comes now; none where there is none.
    pub fn pick(&self, now: Instant) -> Option<SocketAddr> {
        let mut state = self.state();
        let State { lead, last } = &mut *state;
        let remembered = lead.affinity.and_then(|rest| {
            last.filter(|(_, at)| now.saturating_duration_since(*at) <= rest).map(|(backend, _)| backend)
        });
        let drawn = || lead.backends.get(fastrand::usize(..lead.backends.len().max(1))).copied();
        let picked = remembered.or_else(drawn)?;
        *last = Some((picked, now));
        Some(picked)
    }

    /// Whether a backend is one of them still.
    pub fn holds(&self, backend: SocketAddr) -> bool {
        self.state().lead.backends.contains(&backend)
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, time::Duration};

    use super::*;

    fn lead(backends: &[&str], affinity: Option<u64>) -> Lead {
        let backends = backends.iter().map(|backend| backend.parse().unwrap()).collect();
        Lead { backends, affinity: affinity.map(Duration::from_secs) }
    }

    #[test]
    fn every_backend_is_drawn_and_none_that_left() {
        let draw = Draw::new(lead(&["10.0.0.1:1", "10.0.0.2:2"], None));
        let all = |draw: &Draw| (0..64).filter_map(|_| draw.pick(Instant::now())).collect::<BTreeSet<_>>();
        assert_eq!(all(&draw).len(), 2);
        draw.set(&lead(&["10.0.0.2:2"], None));
        assert_eq!(all(&draw), BTreeSet::from(["10.0.0.2:2".parse().unwrap()]));
        assert!(!draw.holds("10.0.0.1:1".parse().unwrap()));
    }

    #[test]
    fn a1_a3_a5_sticky_clients_have_one_backend_until_it_leaves_or_they_rest() {
        let both = ["10.0.0.1:1", "10.0.0.2:2"];
        let draw = Draw::new(lead(&both, Some(10)));
        let start = Instant::now();
        let first = draw.pick(start).unwrap();
        // Each use winds the clock again.
        let later = (1..64).map(|beat| start + Duration::from_secs(9 * beat));
        assert!(later.clone().all(|now| draw.pick(now) == Some(first)));
        let rested = (1..64).map(|beat| start + Duration::from_secs(1000 + 11 * beat));
        assert!(rested.clone().any(|now| draw.pick(now) != Some(first)), "it may get the other one then");

        let now = start + Duration::from_secs(5000);
        let kept = draw.pick(now).unwrap();
        let other: Vec<&str> = both.into_iter().filter(|it| *it != kept.to_string()).collect();
        draw.set(&lead(&other, Some(10)));
        assert_ne!(draw.pick(now), Some(kept));
        draw.set(&lead(&both, Some(10)));
        assert_ne!(draw.pick(now), Some(kept), "one that comes again has forgotten its clients");
    }
}
