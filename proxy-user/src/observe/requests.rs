//! Metrics of requests to the API server, under the names that every Kubernetes component uses.
//!
//! In: a call for each request. Out: `rest_client_*`.

use std::time::Duration;

use prometheus_client::{
    metrics::{counter::Counter, family::Family as Labelled, histogram::Histogram},
    registry::Registry,
};

use super::registration::put;

type Labels<const N: usize> = [(&'static str, String); N];
type Timings = Labelled<Labels<2>, Histogram, fn() -> Histogram>;

#[derive(Debug)]
pub(super) struct RequestMetrics {
    requests: Labelled<Labels<3>, Counter>,
    durations: Timings,
}

fn timing() -> Histogram {
    Histogram::new([0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0])
}

impl RequestMetrics {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let timings = Timings::new_with_constructor(timing as fn() -> Histogram);
        Self {
            requests: put(
                registry,
                "rest_client_requests",
                "Requests to the API server, by HTTP status code",
                Labelled::default(),
            ),
            durations: put(
                registry,
                "rest_client_request_duration_seconds",
                "Time until the API server began its response, in seconds",
                timings,
            ),
        }
    }

    pub(super) fn count(&self, method: &str, host: &str, code: Option<u16>, took: Duration) {
        let code = code.map_or_else(|| "<error>".to_owned(), |code| code.to_string());
        let (method, host) = (method.to_owned(), host.to_owned());
        let labels = [("code", code), ("host", host.clone()), ("method", method.clone())];
        self.requests.get_or_create(&labels).inc();
        let labels = [("host", host), ("verb", method)];
        self.durations.get_or_create(&labels).observe(took.as_secs_f64());
    }
}
