//! Metrics of DNS answers.
//!
//! In: counts of queries by outcome, and the number of answered addresses. Out: `weir_dns_*` metrics that stay empty
//! without `--dns`.

use prometheus_client::{
    metrics::{counter::Counter, family::Family as Labelled, gauge::Gauge},
    registry::Registry,
};

use super::registration::{Label, put};

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

    pub(super) fn count_queries(&self, outcome: &'static str, more: u64) {
        self.queries.get_or_create(&[("outcome", outcome)]).inc_by(more);
    }

    pub(super) fn set_addresses(&self, addresses: i64) {
        self.addresses.set(addresses);
    }
}
