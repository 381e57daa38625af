//! From plans to the data plane: changes as they come, everything where that is due.
//!
//! In: the planner's state, and what is due. Out: deltas to the data plane, and what became of them, for [`settle`](super::settle).

use std::time::Instant;

use proxy_ebpf::system;

use super::{Engine, settle::Told};
use crate::{
    dataplane::{Dataplane, Error, Fill, Shortfall, Standing, conntrack::Suspects},
    model::{Family, PerFamily},
    plan::{ClusterIpDelta, Delta, PortDelta},
};

impl Engine {
    /// Brings the data plane up to date: what changed goes to everything that can be written, and what is compared with
    /// everything that should be there waits for none of it.
    pub(super) fn program(&mut self, plane: &mut dyn Dataplane, started: Instant) {
        if self.retries.take_due(started) {
            self.planner.retry();
        }
        let due = self.reread_due(plane, started);
        if self.began {
            self.tell_changes(plane, due, started);
        }
        let now = Instant::now();
        let front = plane.wants_everything().is_some_and(|at| at <= now);
        if front || self.families.iter().any(|family| due.get(*family).is_some()) {
            self.tell_everything(plane, due, front, started);
        }
        self.show(plane);
        let recoveries = self.families.iter().filter_map(|family| self.recoveries.get(*family).next());
        self.wake = recoveries.chain(self.retries.next()).chain(plane.wants_everything()).min();
    }

    /// Reads back what is to be compared now. At the start that was done when the data plane was opened.
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

    fn tell_changes(
        &mut self,
        plane: &mut dyn Dataplane,
        due: PerFamily<Option<&'static str>>,
        started: Instant,
    ) {
        let delta = self.planner.take_delta();
        let stray = self.planner.take_stray();
        for family in self.families.iter().filter(|family| *stray.get(**family)) {
            // Only what was found before the start is left, and a comparison has its price.
            self.recoveries.get_mut(*family).by("leftovers", started + self.longest_retry);
        }
        let takes_part =
            |family: &Family| !self.recoveries.get(*family).is_lost() && due.get(*family).is_none();
        let families: Vec<Family> = self.families.iter().copied().filter(takes_part).collect();
        if delta.is_empty() {
            if families.len() == self.families.len() {
                self.pending = (0, 0);
            }
            return self.tell_health_checks();
        }
        for family in self.families.clone() {
            if families.contains(&family) || concerns(&delta, family) {
                self.queued(family);
            }
        }
        let short = self.apply(plane, &delta);
        self.suspect_sockets(&delta);
        self.settle(&delta, short, Told { families, reasons: PerFamily::default(), started });
    }

    fn tell_everything(
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
            self.queued(*family);
            due.get(*family).iter().for_each(|reason| self.metrics.reconciled(reason));
        }
        let short = self.apply(plane, &delta);
        // Later comparisons say nothing new about sockets, unless it was their plane that lacked something.
        if front || !self.began {
            self.suspect_sockets(&delta);
        }
        self.began = true;
        for frontend in plane.take_left_over() {
            self.given_up.get_mut(frontend.destination.family()).extend(Suspects::left_over([frontend]));
        }
        self.settle(&delta, short, Told { families, reasons: due, started });
        drop(delta);
        system::trim_heap();
    }

    /// Applies a delta. A data plane that fails whole fails for each family.
    fn apply(&self, plane: &mut dyn Dataplane, delta: &Delta) -> Shortfall {
        if self.conntrack.is_some() {
            self.coming.announce(&delta.ports);
        }
        match plane.apply(delta) {
            Ok(()) => Shortfall::default(),
            Err(Error::Partly(short)) => short,
            Err(error) => {
                let text = super::settle::with_cause(&error);
                let failed = self.families.iter().map(|family| (*family, Error::Kernel(text.clone())));
                Shortfall { failed: failed.collect(), ..Shortfall::default() }
            }
        }
    }

    fn queued(&self, family: Family) {
        self.health.queued(family);
        self.metrics.queued(family);
    }

    /// Shows how the data plane stands.
    fn show(&self, plane: &dyn Dataplane) {
        for Fill { map, elements, room } in plane.fill() {
            self.metrics.set_fill(map, elements, room);
        }
        let standing = plane.standing();
        for Standing { plane, active, failures, failed_removals } in &standing {
            self.metrics.set_plane(plane, *active, *failures);
            for family in Family::ALL {
                self.metrics.removals_failed(family, *failed_removals.get(family));
            }
        }
        if let (Some(mode), Some(serves)) = (&self.mode, standing.iter().find(|standing| standing.active)) {
            mode.send_if_modified(|mode| std::mem::replace(mode, serves.plane) != serves.plane);
        }
        self.metrics.set_unprogrammed(self.refused.len());
        self.metrics.set_left_to_packets(self.left.len());
    }
}

/// Whether a delta has anything for a family.
fn concerns(delta: &Delta, family: Family) -> bool {
    let of_family = |port: &PortDelta| port.id().is_some_and(|id| id.family == family);
    let address = |change: &ClusterIpDelta| {
        let (ClusterIpDelta::Add(ip) | ClusterIpDelta::Remove(ip)) = change;
        Family::of(*ip) == family
    };
    delta.node.is_some() || delta.ports.iter().any(of_family) || delta.cluster_ips.iter().any(address)
}
