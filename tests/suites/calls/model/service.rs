//! The state of a Service.
//!
//! In: how it changes. Out: what new flows get, what existing flows keep, and the clients that it remembers.

use crate::suites::calls::{
    sequence::{Change, Shape},
    servers::Server,
};

/// The result of a new flow to an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Door {
    Of(Vec<Server>),
    /// A refusal.
    Closed,
}

pub(super) struct Service {
    pub(super) present: bool,
    sticky: bool,
    ready: Vec<u8>,
    /// Endpoints that terminate and serve.
    drain: Vec<u8>,
    /// The backend that the client has over TCP and over UDP.
    remembered: [Option<u8>; 2],
    /// Whether the last change took a backend from flows that have it.
    has_lost: bool,
}

impl Service {
    pub(super) fn new(shape: &Shape) -> Self {
        let Shape { present, endpoints, sticky } = shape.clone();
        Self { present, sticky, ready: endpoints, drain: Vec::new(), remembered: [None; 2], has_lost: false }
    }

    /// Its endpoints, and those that drain, whether or not it is there.
    pub(super) fn endpoints(&self) -> (&[u8], &[u8]) {
        (&self.ready, &self.drain)
    }

    /// Whether it is there, and sticky.
    pub(super) const fn standing(&self) -> (bool, bool) {
        (self.present, self.sticky)
    }

    pub(super) fn change(&mut self, change: Change) {
        let served: Vec<u8> =
            self.ready.iter().chain(&self.drain).copied().filter(|one| self.serves(*one)).collect();
        match change {
            Change::Goes => self.present = false,
            Change::Comes => self.present = true,
            Change::Joins(one) | Change::Drains(one) | Change::Leaves(one) => {
                self.ready.retain(|known| *known != one);
                self.drain.retain(|known| *known != one);
            }
        }
        match change {
            Change::Joins(one) => self.ready.push(one),
            Change::Drains(one) => self.drain.push(one),
            _ => {}
        }
        self.has_lost = served.into_iter().any(|one| !self.serves(one));
        let drawn = self.drawn().to_vec();
        // An endpoint that comes back has forgotten its clients.
        self.remembered = self.remembered.map(|known| known.filter(|one| drawn.contains(one)));
    }

    /// Whether the last change took a backend from flows that have it.
    pub(super) const fn has_lost(&self) -> bool {
        self.has_lost
    }

    /// Whether flows stay with a backend.
    pub(super) fn serves(&self, backend: u8) -> bool {
        self.present && (self.ready.contains(&backend) || self.drain.contains(&backend))
    }

    /// All backends that flows stay with.
    pub(super) fn serving(&self) -> Vec<Server> {
        self.ready.iter().chain(&self.drain).copied().map(Server::Backend).collect()
    }

    /// The backends for new flows: endpoints that terminate only where there are no others.
    pub(super) fn drawn(&self) -> &[u8] {
        match (self.present, self.ready.is_empty()) {
            (false, _) => &[],
            (true, true) => &self.drain,
            (true, false) => &self.ready,
        }
    }

    /// The result of a new flow to an address of it; `otherwise` serves there while the Service is absent.
    pub(super) fn door(&self, otherwise: Option<Server>) -> Door {
        match self.drawn() {
            [] if self.present => Door::Closed,
            [] => otherwise.map_or(Door::Closed, |server| Door::Of(vec![server])),
            backends => Door::Of(backends.iter().copied().map(Server::Backend).collect()),
        }
    }

    /// The backend that the client has of a sticky Service, by one of the transports.
    pub(super) fn remembers(&self, transport: usize) -> Option<u8> {
        self.remembered[transport].filter(|_| self.sticky)
    }

    pub(super) fn remember(&mut self, transport: usize, backend: u8) {
        if self.drawn().contains(&backend) {
            self.remembered[transport].get_or_insert(backend);
        }
    }
}
