//! What follows from a delta that was applied: for each family and each service port by itself.
//!
//! In: a delta, and what of it could not be done. Out: health, health checks, metrics, events, and suspects for
//! conntrack and sockets, of all that is in force; and when the rest is tried again.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};

use k8s_openapi::jiff::Timestamp;

use super::{Engine, FIRST_RETRY, MOST_CHANGES};
use crate::{
    dataplane::{Error, Shortfall, conntrack::Suspects, sockets},
    model::{Family, ObjectName, PerFamily},
    observe::Trouble,
    plan::{Delta, PortDelta, PortId},
    relay::News,
    run::left_out,
};

/// A delta that the data plane was told.
pub(super) struct Told {
    /// The families that take part in it.
    pub(super) families: Vec<Family>,
    /// Why each was compared, if it was.
    pub(super) reasons: PerFamily<Option<&'static str>>,
    /// When it began.
    pub(super) started: Instant,
}

impl Engine {
    /// Draws the consequences of what became of a delta.
    pub(super) fn settle(&mut self, delta: &Delta, short: Shortfall, told: Told) {
        let Told { mut families, reasons, started } = told;
        for (family, error) in &short.failed {
            self.failed(*family, error);
        }
        families.retain(|family| short.failed.iter().all(|(failed, _)| failed != family));
        self.remember_given_up(delta, &families);
        self.tell_of_left(&short.left);
        if families.is_empty() {
            return;
        }
        let refused = self.tell_of_refused(&short.refused);
        let in_force = |port: &&PortDelta| {
            port.id().is_some_and(|id| families.contains(&id.family) && !refused.contains(id))
        };
        let in_force: Vec<&PortDelta> = delta.ports.iter().filter(in_force).collect();
        if delta.complete {
            families.iter().for_each(|family| self.census.forget(*family));
        }
        in_force.iter().for_each(|port| self.census.count(port));
        self.census.publish(&self.metrics, self.planner.services().len());
        self.metrics.changes_applied(in_force.len());
        self.suspect_flows(&in_force, &families);
        self.tell_relay(&in_force, if delta.complete { &families } else { &[] });
        self.try_again(delta, &refused);
        for family in &families {
            self.in_force(*family, delta, *reasons.get(*family), started);
        }
        self.pending = (0, 0);
        self.tell_health_checks();
        tracing::debug!(ports = in_force.len(), refused = refused.len(), took = ?started.elapsed(), "in force");
    }

    /// Has refused ports tried again by themselves.
    fn try_again(&mut self, delta: &Delta, refused: &BTreeSet<&PortId>) {
        let refused: Vec<PortId> = refused.iter().copied().cloned().collect();
        let entangled = self.planner.settled(delta, &refused);
        let now = Instant::now();
        for family in self.families.iter().filter(|family| *entangled.get(**family)) {
            self.recoveries.get_mut(*family).by("refusal", now + FIRST_RETRY);
        }
        self.refused.retain(|id, _| self.planner.waits(id));
        if !self.planner.has_waiting() {
            self.retries.settled();
        }
    }

    /// Logs each port that could not be programmed, and makes one event for each Service. Answers with the ports.
    fn tell_of_refused<'a>(&mut self, ports: &'a [(PortId, String)]) -> BTreeSet<&'a PortId> {
        let mut notes: BTreeMap<&ObjectName, Vec<String>> = BTreeMap::new();
        let mut fresh = false;
        for (port, problem) in ports {
            if self.refused.insert(port.clone(), problem.clone()).as_ref() != Some(problem) {
                tracing::error!(%port, problem, "cannot program this service port; it is tried again");
                fresh = true;
            }
            notes.entry(&port.service).or_default().push(format!("{port}: {problem}"));
        }
        for (service, notes) in notes {
            let note = left_out::some_of(&notes);
            let trouble = Trouble::of_service(service.clone(), "FailedToProgram", "Program", note);
            self.events.tell(trouble.with_uid(self.model.uid(service)));
        }
        if !ports.is_empty() {
            self.retries.refused(fresh, Instant::now(), self.longest_retry);
        }
        ports.iter().map(|(port, _)| port).collect()
    }

    /// Logs each port that the sockets' plane left to the packets.
    fn tell_of_left(&mut self, ports: &[(PortId, String)]) {
        let mut fresh = false;
        for (port, problem) in ports {
            if self.left.insert(port.clone(), problem.clone()).as_ref() != Some(problem) {
                tracing::warn!(%port, problem, "packets serve this service port, because the sockets' plane cannot; it is tried again");
                fresh = true;
            }
        }
        if !ports.is_empty() {
            self.planner.left(ports.iter().map(|(port, _)| port.clone()));
            self.retries.refused(fresh, Instant::now(), self.longest_retry);
        }
        self.left.retain(|id, _| self.planner.is_left(id));
    }

    /// Tells what listens on loopback addresses of what is in force.
    fn tell_relay(&mut self, in_force: &[&PortDelta], everything_of: &[Family]) {
        let Some((relay, of)) = &self.relay else { return };
        let news = News::of(in_force.iter().copied(), everything_of, *of);
        if !news.is_empty() && relay.send(news).is_err() {
            tracing::error!("the relay is gone, NodePorts are not served on loopback addresses");
            self.relay = None;
        }
    }

    /// Tells the health check servers of what is in force.
    pub(super) fn tell_health_checks(&mut self) {
        let refused = self.refused.keys().map(|port| port.service.clone()).collect();
        self.checks.tell(&self.model, &self.planner, &self.families, &refused);
    }

    /// Says that everything of a family taken in so far is in force, but for ports that were refused.
    fn in_force(&mut self, family: Family, delta: &Delta, reason: Option<&'static str>, started: Instant) {
        self.health.updated(family);
        self.metrics.synced(family, delta.complete, started.elapsed());
        if !std::mem::replace(self.served.get_mut(family), true)
            && let Some(first) = &self.first
        {
            // What waited may have given up.
            let _ = first.send(family);
        }
        let now = Timestamp::now();
        let metrics = &self.metrics;
        self.triggers.retain(|(of, at)| {
            if *of == family {
                metrics.network_programmed(family, now.duration_since(*at).unsigned_abs());
            }
            *of != family
        });
        if let Some(reason) = reason {
            self.recoveries.get_mut(family).done(Instant::now());
            let services = self.planner.services().len();
            tracing::info!(%family, reason, services, ports = delta.ports.len(), took = ?started.elapsed(), "in force");
        }
    }

    /// Has a family's table read back and compared.
    pub(super) fn failed(&mut self, family: Family, error: &Error) {
        self.metrics.sync_failed(family);
        let recovery = self.recoveries.get_mut(family);
        recovery.failed(Instant::now(), self.longest_retry);
        let error = with_cause(error);
        tracing::error!(%family, error, "cannot program the kernel; what is programmed stays");
    }

    /// Remembers which frontends were given up in the families that take no part: what puts such a family right names only
    /// what is there. One that was never in force has led no flow.
    fn remember_given_up(&mut self, delta: &Delta, taking_part: &[Family]) {
        for family in self.families.iter().copied().filter(|family| !taking_part.contains(family)) {
            let given_up = self.given_up.get_mut(family);
            if self.conntrack.is_some() && *self.served.get(family) && given_up.len() < MOST_CHANGES {
                let of_family = |port: &&PortDelta| port.id().is_some_and(|id| id.family == family);
                given_up.extend(Suspects::given_up(delta.ports.iter().filter(of_family)));
            }
        }
    }

    fn suspect_flows(&mut self, in_force: &[&PortDelta], families: &[Family]) {
        let Some(conntrack) = &self.conntrack else { return };
        let mut suspects = Suspects::default();
        for family in families {
            suspects.extend(std::mem::take(self.given_up.get_mut(*family)));
        }
        suspects.extend(Suspects::of(in_force.iter().copied()));
        let suspects = suspects.on(self.planner.node(), |frontend| self.planner.has_frontend(frontend));
        let suspects = suspects.in_view_of(&self.coming);
        if !suspects.is_empty() && conntrack.send(suspects).is_err() {
            tracing::error!("the conntrack thread is gone, stale UDP flows stay");
            self.conntrack = None;
        }
    }

    pub(super) fn suspect_sockets(&mut self, delta: &Delta) {
        let Some(sockets) = &self.sockets else { return };
        let suspects = sockets::Suspects::of(delta);
        if !suspects.is_empty() && sockets.send(suspects).is_err() {
            tracing::error!("the thread that closes sockets is gone, sockets stay with dead backends");
            self.sockets = None;
        }
    }
}

/// An error with its cause.
pub(super) fn with_cause(error: &Error) -> String {
    match std::error::Error::source(error) {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}
