//! weir's metrics of what it programs: sizes, changes, failures.
//!
//! In: a registry. Out: the handles that [`Metrics`](super::Metrics) counts with.

use prometheus_client::{
    metrics::{counter::Counter, family::Family as Labelled, gauge::Gauge, info::Info},
    registry::Registry,
};

use crate::observe::registration::{Label, put};

#[derive(Debug)]
pub(super) struct Weir {
    pub(super) services: Gauge,
    pub(super) frontends: Gauge,
    pub(super) backends: Gauge,
    pub(super) unprogrammed: Gauge,
    pub(super) changes_applied: Counter,
    pub(super) events_dropped: Counter,
    pub(super) reconciles: Labelled<Label, Counter>,
    pub(super) refused: Labelled<Label, Counter>,
}

impl Weir {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let r = registry.sub_registry_with_prefix("weir");
        let build = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
        r.register("build", "The version of weir", build);
        Self {
            services: put(r, "services", "Services in the kernel", Gauge::default()),
            frontends: put(
                r,
                "frontends",
                "Frontends (address, protocol and port) in the kernel",
                Gauge::default(),
            ),
            backends: put(
                r,
                "backends",
                "Backends in the kernel, counted once per service port",
                Gauge::default(),
            ),
            unprogrammed: put(
                r,
                "unprogrammed_ports",
                "Service ports that the kernel does not have as planned",
                Gauge::default(),
            ),
            changes_applied: put(
                r,
                "changes_applied",
                "Service port changes written to the kernel",
                Counter::default(),
            ),
            events_dropped: put(
                r,
                "events_dropped",
                "Kubernetes events not written because of a rate limit or a full queue",
                Counter::default(),
            ),
            reconciles: put(
                r,
                "reconciles",
                "Comparisons of all rules with the kernel, by reason",
                Labelled::default(),
            ),
            refused: put(
                r,
                "clients_refused",
                "Connections and DNS queries that weir refused or closed because a limit was reached, by server",
                Labelled::default(),
            ),
        }
    }
}
