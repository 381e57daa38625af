//! The progress of programming, for operators and load balancers.
//!
//! In: changes that the engine takes in, and what of each delta is in force, refused or failed. Out: health, metrics, events and
//! log lines, and the first time that everything of a family is in force.

use std::{collections::BTreeMap, time::Instant};

use k8s_openapi::jiff::Timestamp;
use tokio::sync::{mpsc, watch};

use super::MOST_CHANGES;
use crate::{
    causes::causes,
    dataplane::{Dataplane, Error, Fill, Standing},
    model::{Change, Family, Model, Object, ObjectName, PerFamily},
    observe::{Events, Health, Metrics, Trouble},
    plan::{Delta, PortDelta, PortId},
    run::{census::Census, left_out},
};

pub(super) struct Report {
    pub(super) metrics: Metrics,
    pub(super) events: Events,
    health: Health,
    census: Census,
    /// Receives the name of the plane that serves.
    pub(super) mode: Option<watch::Sender<&'static str>>,
    /// Receives each family once everything of it is in force.
    pub(super) first: Option<mpsc::UnboundedSender<Family>>,
    /// The families of which everything has been in force since the start, but for refused ports.
    served: PerFamily<bool>,
    /// How many changes of Services and of slices are taken in and not yet in force.
    pending: (usize, usize),
    /// Slices taken in and not yet in force: their family, and when the endpoints changed.
    triggers: Vec<(Family, Timestamp)>,
    started: Timestamp,
}

impl Report {
    pub(super) fn new(metrics: Metrics, health: Health) -> Self {
        Self {
            metrics,
            events: Events::logged(),
            health,
            census: Census::default(),
            mode: None,
            first: None,
            served: PerFamily::default(),
            pending: (0, 0),
            triggers: Vec::new(),
            started: Timestamp::now(),
        }
    }

    pub(super) fn started(&self, families: &[Family]) {
        families.iter().for_each(|family| self.health.started(*family));
    }

    /// Counts a change that the engine takes in.
    pub(super) fn taken_in(&mut self, change: &Change) {
        match change {
            Change::Apply(Object::Service(_)) => {
                self.metrics.service_changed();
                self.pending.0 += 1;
            }
            Change::Apply(Object::EndpointSlice(slice)) => {
                self.metrics.endpoints_changed();
                self.pending.1 += 1;
                // The bound keeps a family that cannot be written from piling them up.
                let room = MOST_CHANGES.saturating_sub(self.triggers.len());
                self.triggers.extend(trigger(slice).filter(|(_, at)| *at > self.started).take(room));
            }
            Change::Apply(_) | Change::Delete(..) | Change::Synced(_) => {}
        }
    }

    /// Every change that was taken in is in force or failed.
    pub(super) fn nothing_pending(&mut self) {
        self.pending = (0, 0);
    }

    /// Publishes what is pending, and whether load balancers may send traffic here. They must not while the
    /// node's Services are not programmed (P3), even if its Node permits it.
    pub(super) fn publish(&self, families: &[Family], node_is_eligible: bool) {
        self.metrics.set_pending(self.pending.0, self.pending.1);
        let serves = families.iter().any(|family| self.has_served(*family));
        self.health.set_eligible(serves && node_is_eligible);
    }

    /// Whether everything of a family has been in force since the start.
    pub(super) fn has_served(&self, family: Family) -> bool {
        *self.served.get(family)
    }

    pub(super) fn queued(&self, family: Family) {
        self.health.queued(family);
        self.metrics.queued(family);
    }

    pub(super) fn failed(&self, family: Family, error: &Error) {
        self.metrics.sync_failed(family);
        let error = causes(error);
        tracing::error!(%family, error, "cannot program the kernel; what is programmed stays");
    }

    /// Makes one event for each Service with refused ports.
    pub(super) fn refused(&self, ports: &[(PortId, String)], model: &Model) {
        let mut notes: BTreeMap<&ObjectName, Vec<String>> = BTreeMap::new();
        for (port, problem) in ports {
            notes.entry(&port.service).or_default().push(format!("{port}: {problem}"));
        }
        for (service, notes) in notes {
            let note = left_out::some_of(&notes);
            let trouble = Trouble::of_service(service.clone(), "FailedToProgram", "Program", note);
            self.events.report(trouble.with_uid(model.uid(service)));
        }
    }

    /// Counts the ports of a delta that are in force.
    pub(super) fn count(
        &mut self,
        delta: &Delta,
        families: &[Family],
        in_force: &[&PortDelta],
        services: usize,
    ) {
        if delta.complete {
            families.iter().for_each(|family| self.census.forget(*family));
        }
        in_force.iter().for_each(|port| self.census.count(port));
        self.census.publish(&self.metrics, services);
        self.metrics.changes_applied(in_force.len());
    }

    /// Everything of a family that was taken in so far is in force, but for refused ports.
    pub(super) fn in_force(&mut self, family: Family, complete: bool, started: Instant) {
        self.health.updated(family);
        self.metrics.synced(family, complete, started.elapsed());
        if !std::mem::replace(self.served.get_mut(family), true)
            && let Some(first) = &self.first
        {
            // The receiver may have given up.
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
    }

    /// Publishes the state of the data plane.
    pub(super) fn plane(&self, plane: &dyn Dataplane, refused: usize, left: usize) {
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
        self.metrics.set_unprogrammed(refused);
        self.metrics.set_left_to_packets(left);
    }
}

/// The family of a slice, and when its endpoints last changed, if it has that annotation (W10).
fn trigger(
    slice: &k8s_openapi::api::discovery::v1::EndpointSlice,
) -> impl Iterator<Item = (Family, Timestamp)> {
    let annotation = slice.metadata.annotations.as_ref().and_then(|annotations| {
        annotations.get("endpoints.kubernetes.io/last-change-trigger-time")?.parse().ok()
    });
    let family = match slice.address_type.as_str() {
        "IPv4" => Some(Family::V4),
        "IPv6" => Some(Family::V6),
        _ => None,
    };
    family.zip(annotation).into_iter()
}
