//! Deltas for the data plane: changes as they come, and complete ones when a comparison is due.
//!
//! In: the planner's state, and the families that are due. Out: applied deltas, and their shortfall for [`after_apply`](Engine::after_apply).

use std::time::Instant;

use super::{Engine, applied::Applied};
use crate::{
    causes::causes,
    dataplane::{Dataplane, Error, Shortfall},
    model::{Family, PerFamily},
    plan::{ClusterIpDelta, Delta, PortDelta},
    sys::bpf,
};

impl Engine {
    /// Brings the data plane up to date. Changes go first to every family that can be written, so that they do not wait for a
    /// comparison of the other family.
    pub(super) fn program(&mut self, plane: &mut dyn Dataplane, started: Instant) {
        if self.retries.take_due(started) {
            self.planner.retry();
        }
        let due = self.reread_due(plane, started);
        if self.began {
            self.give_changes(plane, due, started);
        }
        let now = Instant::now();
        let front = plane.wants_everything().is_some_and(|at| at <= now);
        if front || self.families.iter().any(|family| due.get(*family).is_some()) {
            self.give_everything(plane, due, front, started);
        }
        self.report.plane(plane, self.refused.len(), self.left.len());
        let recoveries = self.families.iter().filter_map(|family| self.recoveries.get(*family).next());
        self.wake = recoveries.chain(self.retries.next()).chain(plane.wants_everything()).min();
    }

    /// Reads back the families that are due. At the start, opening the data plane has done that.
    fn reread_due(&mut self, plane: &mut dyn Dataplane, now: Instant) -> PerFamily<Option<&'static str>> {
        let mut due = PerFamily::default();
        for family in self.families.clone() {
            let Some(reason) = self.recoveries.get(family).due(now) else { continue };
            if self.began
                && let Err(error) = plane.reread_family(family)
            {
                self.failed(family, &error);
                continue;
            }
            *due.get_mut(family) = Some(reason);
        }
        due
    }

    fn give_changes(
        &mut self,
        plane: &mut dyn Dataplane,
        due: PerFamily<Option<&'static str>>,
        started: Instant,
    ) {
        let delta = self.planner.take_delta();
        let orphaned = self.planner.take_orphaned();
        for family in self.families.iter().filter(|family| *orphaned.get(**family)) {
            // Leftovers from before the start harm nothing, and a comparison is expensive, so they wait.
            self.recoveries.get_mut(*family).by("leftovers", started + self.longest_retry);
        }
        let takes_part =
            |family: &Family| !self.recoveries.get(*family).is_lost() && due.get(*family).is_none();
        let families: Vec<Family> = self.families.iter().copied().filter(takes_part).collect();
        if delta.is_empty() {
            if families.len() == self.families.len() {
                self.report.nothing_pending();
            }
            return self.update_health_checks();
        }
        for family in self.families.clone() {
            if families.contains(&family) || concerns(&delta, family) {
                self.report.queued(family);
            }
        }
        let short = self.apply(plane, &delta);
        self.suspected.send_sockets(&delta);
        self.after_apply(&delta, short, Applied { families, reasons: PerFamily::default(), started });
    }

    fn give_everything(
        &mut self,
        plane: &mut dyn Dataplane,
        due: PerFamily<Option<&'static str>>,
        front: bool,
        started: Instant,
    ) {
        let is_due = |family: Family| due.get(family).is_some();
        let delta = self.planner.complete_for(PerFamily { v4: is_due(Family::V4), v6: is_due(Family::V6) });
        let families: Vec<Family> = self.families.iter().copied().filter(|family| is_due(*family)).collect();
        for family in &families {
            self.report.queued(*family);
            due.get(*family).iter().for_each(|reason| self.report.metrics.reconciled(reason));
        }
        let short = self.apply(plane, &delta);
        // Later comparisons change nothing for sockets, unless the socket plane itself was incomplete.
        if front || !self.began {
            self.suspected.send_sockets(&delta);
        }
        self.began = true;
        for frontend in plane.take_left_over() {
            self.suspected.left_over(frontend);
        }
        self.after_apply(&delta, short, Applied { families, reasons: due, started });
        drop(delta);
        bpf::trim_heap();
    }

    /// Applies a delta. If the whole data plane fails, each family fails.
    fn apply(&self, plane: &mut dyn Dataplane, delta: &Delta) -> Shortfall {
        self.suspected.announce(delta);
        match plane.apply(delta) {
            Ok(()) => Shortfall::default(),
            Err(Error::Partly(short)) => short,
            Err(error) => {
                let text = causes(&error);
                let failed = self.families.iter().map(|family| (*family, Error::Kernel(text.clone())));
                Shortfall { failed: failed.collect(), ..Shortfall::default() }
            }
        }
    }
}

fn concerns(delta: &Delta, family: Family) -> bool {
    let of_family = |port: &PortDelta| port.id().is_some_and(|id| id.family == family);
    let address = |change: &ClusterIpDelta| {
        let (ClusterIpDelta::Add(ip) | ClusterIpDelta::Remove(ip)) = change;
        Family::of(*ip) == family
    };
    delta.node.is_some() || delta.ports.iter().any(of_family) || delta.cluster_ips.iter().any(address)
}
