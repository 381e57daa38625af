//! Frontends and backends that serve no longer, for the threads that look for flows and sockets which still use them.
//!
//! In: each delta, before and after it is in force. Out: suspects for `stale::flows` and `stale::sockets`. A thread that ended costs
//! an error in the log, and Services nothing.

use tokio::sync::mpsc;

use super::MOST_CHANGES;
use crate::{
    model::{Family, PerFamily},
    plan::{Delta, Frontend, Planner, PortDelta},
    stale::{
        flows::{AnnouncedPorts, Suspects},
        sockets,
    },
};

#[derive(Default)]
pub(super) struct Suspected {
    pub(super) flows: Option<mpsc::UnboundedSender<Suspects>>,
    /// Deltas that the kernel gets next, for a sweep over flows that is under way.
    announced: AnnouncedPorts,
    /// Frontends with flows still to be looked at: given up while their family took no part, or by an earlier
    /// agent.
    given_up: PerFamily<Suspects>,
    pub(super) sockets: Option<std::sync::mpsc::Sender<sockets::Suspects>>,
}

impl Suspected {
    /// Announces a delta before the kernel has it: what it serves is not stale.
    pub(super) fn announce(&self, delta: &Delta) {
        if self.flows.is_some() {
            self.announced.announce(&delta.ports);
        }
    }

    /// Remembers the frontends of a family that an earlier agent left and nothing serves.
    pub(super) fn left_over(&mut self, frontend: Frontend) {
        self.given_up.get_mut(frontend.destination.family()).extend(Suspects::left_over([frontend]));
    }

    /// Remembers the frontends that a delta gives up in a family that takes no part in it: the delta that puts the family right
    /// names only what is there.
    pub(super) fn give_up(&mut self, delta: &Delta, family: Family) {
        let given_up = self.given_up.get_mut(family);
        if self.flows.is_some() && given_up.len() < MOST_CHANGES {
            let of_family = |port: &&PortDelta| port.id().is_some_and(|id| id.family == family);
            given_up.extend(Suspects::given_up(delta.ports.iter().filter(of_family)));
        }
    }

    /// Sends the suspects of everything in force to `stale::flows`.
    pub(super) fn send_flows(&mut self, in_force: &[&PortDelta], families: &[Family], planner: &Planner) {
        let Some(flows) = &self.flows else { return };
        let mut suspects = Suspects::default();
        for family in families {
            suspects.extend(std::mem::take(self.given_up.get_mut(*family)));
        }
        suspects.extend(Suspects::of(in_force.iter().copied()));
        let suspects = suspects.on(planner.node(), |frontend| planner.has_frontend(frontend));
        let suspects = suspects.with_announced(&self.announced);
        if !suspects.is_empty() && flows.send(suspects).is_err() {
            tracing::error!("the thread that deletes stale UDP flows has ended, stale flows stay");
            self.flows = None;
        }
    }

    /// Sends the suspects of a delta to `stale::sockets`.
    pub(super) fn send_sockets(&mut self, delta: &Delta) {
        let Some(sockets) = &self.sockets else { return };
        let suspects = sockets::Suspects::of(delta);
        if !suspects.is_empty() && sockets.send(suspects).is_err() {
            tracing::error!("the thread that closes sockets has ended, sockets stay with dead backends");
            self.sockets = None;
        }
    }
}
