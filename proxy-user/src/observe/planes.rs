//! Metrics of the data planes: which of them serve, and how often a whole plane failed.
//!
//! In: calls of the engine. Out: `weir_plane_*` metrics, and the number of service ports that only nftables serves.

use prometheus_client::{
    metrics::{counter::Counter, family::Family as Labelled, gauge::Gauge},
    registry::Registry,
};

use super::registration::{Label, put};

#[derive(Debug)]
pub(super) struct PlaneMetrics {
    active: Labelled<Label, Gauge>,
    failures: Labelled<Label, Counter>,
    left: Gauge,
}

impl PlaneMetrics {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let r = registry.sub_registry_with_prefix("weir");
        Self {
            active: put(r, "plane_active", "1 if the data plane serves, else 0", Labelled::default()),
            failures: put(r, "plane_failures", "Failures of a whole data plane", Labelled::default()),
            left: put(
                r,
                "ports_left_to_packets",
                "Service ports that only the nftables plane serves because the socket plane could not take them",
                Gauge::default(),
            ),
        }
    }

    pub(super) fn set(&self, plane: &'static str, active: bool, failures: u64) {
        self.active.get_or_create(&[("plane", plane)]).set(active.into());
        let counted = self.failures.get_or_create(&[("plane", plane)]);
        counted.inc_by(failures.saturating_sub(counted.get()));
    }

    pub(super) fn set_left(&self, ports: i64) {
        self.left.set(ports);
    }
}
