//! Consequences of an applied delta, for each family and each service port by itself.
//!
//! In: a delta and its shortfall. Out: reports, health checks, suspects and NodePorts for the relay of everything in force; and the
//! retry of the rest.

use std::{collections::BTreeSet, time::Instant};

use super::{Engine, FIRST_RETRY};
use crate::{
    dataplane::{Error, Shortfall},
    model::{Family, PerFamily},
    plan::{Delta, PortDelta, PortId},
    relay::NodePortChanges,
};

pub(super) struct Applied {
    /// The families that take part in it.
    pub(super) families: Vec<Family>,
    /// Why each was compared, if it was.
    pub(super) reasons: PerFamily<Option<&'static str>>,
    /// When it began.
    pub(super) started: Instant,
}

impl Engine {
    pub(super) fn after_apply(&mut self, delta: &Delta, short: Shortfall, applied: Applied) {
        let Applied { mut families, reasons, started } = applied;
        for (family, error) in &short.failed {
            self.failed(*family, error);
        }
        families.retain(|family| short.failed.iter().all(|(failed, _)| failed != family));
        for family in self.families.iter().copied().filter(|family| !families.contains(family)) {
            // A frontend that was never in force has translated no flow.
            if self.report.has_served(family) {
                self.suspected.give_up(delta, family);
            }
        }
        self.keep_left(&short.left);
        if families.is_empty() {
            return;
        }
        let refused = self.keep_refused(&short.refused);
        let is_in_force = |port: &&PortDelta| {
            port.id().is_some_and(|id| families.contains(&id.family) && !refused.contains(id))
        };
        let in_force: Vec<&PortDelta> = delta.ports.iter().filter(is_in_force).collect();
        self.report.count(delta, &families, &in_force, self.planner.services().len());
        self.suspected.send_flows(&in_force, &families, &self.planner);
        self.send_to_relay(&in_force, if delta.complete { &families } else { &[] });
        self.try_again(delta, &refused);
        for family in &families {
            self.in_force(*family, delta, *reasons.get(*family), started);
        }
        self.report.nothing_pending();
        self.update_health_checks();
        tracing::debug!(ports = in_force.len(), refused = refused.len(), took = ?started.elapsed(), "in force");
    }

    /// Schedules the retry of refused ports.
    fn try_again(&mut self, delta: &Delta, refused: &BTreeSet<&PortId>) {
        let refused: Vec<PortId> = refused.iter().copied().cloned().collect();
        let entangled = self.planner.record_applied(delta, &refused);
        let now = Instant::now();
        for family in self.families.iter().filter(|family| *entangled.get(**family)) {
            self.recoveries.get_mut(*family).by("refusal", now + FIRST_RETRY);
        }
        self.refused.retain(|id, _| self.planner.waits(id));
        if !self.planner.has_waiting() {
            self.retries.settled();
        }
    }

    /// Keeps and logs each port that could not be programmed. Answers with the ports.
    fn keep_refused<'a>(&mut self, ports: &'a [(PortId, String)]) -> BTreeSet<&'a PortId> {
        let mut fresh = false;
        for (port, problem) in ports {
            if self.refused.insert(port.clone(), problem.clone()).as_ref() != Some(problem) {
                tracing::error!(%port, problem, "cannot program this service port; it is tried again");
                fresh = true;
            }
        }
        self.report.refused(ports, &self.model);
        if !ports.is_empty() {
            self.retries.refused(fresh, Instant::now(), self.longest_retry);
        }
        ports.iter().map(|(port, _)| port).collect()
    }

    /// Keeps and logs each port that the socket plane left to the nftables plane.
    fn keep_left(&mut self, ports: &[(PortId, String)]) {
        let mut fresh = false;
        for (port, problem) in ports {
            if self.left.insert(port.clone(), problem.clone()).as_ref() != Some(problem) {
                tracing::warn!(%port, problem, "nftables serves this service port, because the socket plane cannot; it is tried again");
                fresh = true;
            }
        }
        if !ports.is_empty() {
            self.planner.record_left(ports.iter().map(|(port, _)| port.clone()));
            self.retries.refused(fresh, Instant::now(), self.longest_retry);
        }
        self.left.retain(|id, _| self.planner.is_left(id));
    }

    fn send_to_relay(&mut self, in_force: &[&PortDelta], everything_of: &[Family]) {
        let Some((relay, of)) = &self.relay else { return };
        let news = NodePortChanges::of(in_force.iter().copied(), everything_of, *of);
        if !news.is_empty() && relay.send(news).is_err() {
            tracing::error!("the relay has ended, NodePorts are not served on loopback addresses");
            self.relay = None;
        }
    }

    pub(super) fn update_health_checks(&mut self) {
        let refused = self.refused.keys().map(|port| port.service.clone()).collect();
        self.checks.tell(&self.model, &self.planner, &self.families, &refused);
    }

    fn in_force(&mut self, family: Family, delta: &Delta, reason: Option<&'static str>, started: Instant) {
        self.report.in_force(family, delta.complete, started);
        if let Some(reason) = reason {
            self.recoveries.get_mut(family).done(Instant::now());
            let services = self.planner.services().len();
            tracing::info!(%family, reason, services, ports = delta.ports.len(), took = ?started.elapsed(), "in force");
        }
    }

    /// Schedules a comparison of a family's table with the kernel.
    pub(super) fn failed(&mut self, family: Family, error: &Error) {
        self.recoveries.get_mut(family).failed(Instant::now(), self.longest_retry);
        self.report.failed(family, error);
    }
}
