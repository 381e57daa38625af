//! Registers a metric and builds the label of a family, for all files of metrics.
//!
//! In: a registry, names and help texts. Out: handles that count.

use prometheus_client::registry::{Metric, Registry};

use crate::model::Family;

/// One label: its name and its value.
pub(super) type Label = [(&'static str, &'static str); 1];

pub(super) fn family_label(family: Family) -> Label {
    [("ip_family", family_name(family))]
}

pub(super) const fn family_name(family: Family) -> &'static str {
    match family {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    }
}

/// Registers a metric and returns its handle. A counter's name has no `_total`, because the registry adds it.
pub(super) fn put<M: Metric + Clone>(registry: &mut Registry, name: &str, help: &str, metric: M) -> M {
    registry.register(name, help, metric.clone());
    metric
}
