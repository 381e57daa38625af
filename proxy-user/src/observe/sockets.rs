//! Metrics of the socket plane.
//!
//! In: the fill of its maps, errors in its programs, counts of pods and sockets. Out: `weir_*` metrics that stay empty
//! without a socket plane.

use prometheus_client::{
    metrics::{counter::Counter, family::Family as Labelled, gauge::Gauge},
    registry::Registry,
};

use super::registration::{Label, put};

#[derive(Debug)]
pub(super) struct SocketMetrics {
    elements: Labelled<Label, Gauge>,
    room: Labelled<Label, Gauge>,
    bytes: Labelled<Label, Gauge>,
    refused: Labelled<Label, Counter>,
    troubles: Labelled<Label, Counter>,
    closed: Labelled<Label, Counter>,
    moved: Counter,
    attached_anew: Counter,
    bypassed: Labelled<Label, Gauge>,
    waiting: Gauge,
}

impl SocketMetrics {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let r = registry.sub_registry_with_prefix("weir");
        Self {
            elements: put(r, "map_elements", "Entries in an eBPF map", Labelled::default()),
            room: put(
                r,
                "map_max_elements",
                "Entries that an eBPF map holds before weir enlarges it",
                Labelled::default(),
            ),
            bytes: put(r, "map_bytes", "Kernel memory that an eBPF map takes, in bytes", Labelled::default()),
            refused: put(
                r,
                "sockets_refused",
                "Sockets and clients for which an eBPF map had no room, by reason",
                Labelled::default(),
            ),
            troubles: put(r, "program_troubles", "Errors in eBPF programs, by kind", Labelled::default()),
            closed: put(
                r,
                "sockets_closed",
                "Sockets closed because their backend no longer serves, by protocol",
                Labelled::default(),
            ),
            moved: put(
                r,
                "sockets_moved",
                "Connected UDP sockets whose datagrams go through their Service again because their backend no longer serves",
                Counter::default(),
            ),
            attached_anew: put(
                r,
                "programs_attached_anew",
                "eBPF programs attached again after another program detached them",
                Counter::default(),
            ),
            bypassed: put(
                r,
                "bypassed_pods",
                "Pods whose sockets weir leaves alone, by reason",
                Labelled::default(),
            ),
            waiting: put(
                r,
                "bypassed_pods_waiting",
                "Pods whose sockets weir should leave alone but still translates",
                Gauge::default(),
            ),
        }
    }

    pub(super) fn set_fill(&self, map: &'static str, elements: u32, room: u32) {
        self.elements.get_or_create(&[("map", map)]).set(elements.into());
        self.room.get_or_create(&[("map", map)]).set(room.into());
    }

    pub(super) fn set_bytes(&self, map: &'static str, bytes: u64) {
        self.bytes.get_or_create(&[("map", map)]).set(i64::try_from(bytes).unwrap_or(i64::MAX));
    }

    pub(super) fn count_refused(&self, reason: &'static str, more: u64) {
        self.refused.get_or_create(&[("reason", reason)]).inc_by(more);
    }

    pub(super) fn count_trouble(&self, trouble: &'static str, more: u64) {
        self.troubles.get_or_create(&[("trouble", trouble)]).inc_by(more);
    }

    pub(super) fn count_closed(&self, protocol: &'static str, more: u64) {
        self.closed.get_or_create(&[("protocol", protocol)]).inc_by(more);
    }

    pub(super) fn count_moved(&self, more: u64) {
        self.moved.inc_by(more);
    }

    pub(super) fn count_attached_anew(&self, more: u64) {
        self.attached_anew.inc_by(more);
    }

    /// Replaces all reasons, so a reason without pods has no series.
    pub(super) fn set_bypassed(&self, pods: impl Iterator<Item = (&'static str, i64)>, waiting: i64) {
        self.bypassed.clear();
        for (reason, count) in pods {
            self.bypassed.get_or_create(&[("reason", reason)]).set(count);
        }
        self.waiting.set(waiting);
    }
}
