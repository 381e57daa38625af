//! `/metrics/slis`, the indicators that every Kubernetes component has beside its metrics (P7): the number of health
//! checks, and the result of the last one.
//!
//! In: requests of `/healthz` on the metrics port, as in kube-proxy. Out: Prometheus' text format.

use std::sync::{Arc, atomic::AtomicU64};

use prometheus_client::{
    encoding::text::encode_registry,
    metrics::{counter::Counter, family::Family as Labelled, gauge::Gauge},
    registry::Registry,
};

use super::{process, registration::put, text_format};

type Check = [(&'static str, &'static str); 2];
type Result = [(&'static str, &'static str); 3];

/// Kubernetes' name for a check that only shows that the process answers.
const PING: (&str, &str) = ("name", "ping");
const HEALTHZ: (&str, &str) = ("type", "healthz");

/// The two counters. Clones share them.
#[derive(Clone, Debug)]
pub(super) struct Indicators {
    registry: Arc<Registry>,
    last: Labelled<Check, Gauge>,
    all: Labelled<Result, Counter>,
}

impl Indicators {
    pub(super) fn new() -> Self {
        let mut registry = Registry::default();
        let start = "Start time of the process since the Unix epoch in seconds";
        let start: Gauge<f64, AtomicU64> =
            put(&mut registry, "process_start_time_seconds", start, Gauge::default());
        start.set(process::start_seconds().unwrap_or_default());
        let r = registry.sub_registry_with_prefix("kubernetes");
        let last =
            put(r, "healthcheck", "Result of the last health check, 1 for success", Labelled::default());
        let all = put(r, "healthchecks", "Health checks, by result", Labelled::default());
        Self { registry: Arc::new(registry), last, all }
    }

    /// Counts a request of `/healthz` as a success, because the process answered it.
    pub(super) fn pinged(&self) {
        self.last.get_or_create(&[PING, HEALTHZ]).set(1);
        self.all.get_or_create(&[PING, ("status", "success"), HEALTHZ]).inc();
    }

    /// Removes all series, as a `DELETE` asks.
    pub(super) fn reset(&self) {
        self.last.clear();
        self.all.clear();
    }

    /// The page in Prometheus' text format.
    pub(super) fn render(&self) -> String {
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = encode_registry(&mut text, &self.registry);
        text_format::plain(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p7_health_checks_are_counted_under_kubernetes_names() {
        let indicators = Indicators::new();
        indicators.pinged();
        indicators.clone().pinged();
        let text = indicators.render();
        assert!(text.contains("\nkubernetes_healthcheck{name=\"ping\",type=\"healthz\"} 1\n"), "{text}");
        let counted = "kubernetes_healthchecks_total{name=\"ping\",status=\"success\",type=\"healthz\"} 2\n";
        assert!(text.contains(counted), "{text}");
        indicators.reset();
        assert!(!indicators.render().contains("ping"));
    }
}
