//! Metrics of answering names.
//!
//! In: what became of queries, and at how many addresses they are answered. Out: `weir_dns_*` metrics that stay empty
//! where no names are answered.

use prometheus_client::{
    metrics::{counter::Counter, family::Family as Labelled, gauge::Gauge},
    registry::Registry,
};

use super::{
    Metrics,
    metrics::{Label, put},
};

/// The handles.
#[derive(Debug)]
pub(super) struct NameMetrics {
    queries: Labelled<Label, Counter>,
    addresses: Gauge,
}

impl NameMetrics {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let r = registry.sub_registry_with_prefix("weir_dns");
        Self {
            queries: put(r, "queries", "DNS queries, by outcome", Labelled::default()),
            addresses: put(
                r,
                "answered_addresses",
                "ClusterIPs of the DNS Service at which this node answers DNS queries",
                Gauge::default(),
            ),
        }
    }
}

impl Metrics {
    /// Counts queries of one outcome.
    pub fn names_asked(&self, outcome: &'static str, more: u64) {
        self.names().queries.get_or_create(&[("outcome", outcome)]).inc_by(more);
    }

    /// At how many ClusterIPs names are answered here now.
    pub fn set_answered_addresses(&self, addresses: usize) {
        self.names().addresses.set(i64::try_from(addresses).unwrap_or(i64::MAX));
    }
}
