//! Whether the agent applies changes in time (P1 to P4), for `/healthz` and `/livez`.
//!
//! In: when changes were queued and applied, per family, and whether load balancers may use the node. Out: a status
//! code and a JSON body. [`ProxyHealth`] reads no clock; [`Health`] is the shared handle that reads it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use axum::{
    Router,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::any,
};
use jiff::Timestamp;
use serde::Serialize;
use tokio::sync::watch;

use super::Metrics;
use crate::model::Family;

/// A point in time, on the monotonic clock and on the wall clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// The monotonic clock, for durations.
    pub steady: Instant,
    /// The wall clock, for the JSON body.
    pub wall: Timestamp,
}

impl Moment {
    /// Reads both clocks.
    #[must_use]
    pub fn now() -> Self {
        Self { steady: Instant::now(), wall: Timestamp::now() }
    }
}

/// The response of a health endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Code 200 if true, else 503.
    pub ok: bool,
    /// JSON text.
    pub body: String,
}

/// The health of both families: a family is late when a change has waited for longer than the timeout (P2).
#[derive(Clone, Debug)]
pub struct ProxyHealth {
    timeout: Duration,
    eligible: bool,
    updated: BTreeMap<Family, Timestamp>,
    waiting_since: BTreeMap<Family, Instant>,
    /// Families of which the kernel has had all Services since the start.
    served: BTreeSet<Family>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Body {
    #[serde(serialize_with = "as_text")]
    last_updated: Timestamp,
    #[serde(serialize_with = "as_text")]
    current_time: Timestamp,
    #[serde(skip_serializing_if = "Option::is_none")]
    node_eligible: Option<bool>,
    healthy: bool,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    status: BTreeMap<Family, FamilyStatus>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct FamilyStatus {
    #[serde(serialize_with = "as_text")]
    last_updated: Timestamp,
    healthy: bool,
}

fn as_text<S: serde::Serializer>(time: &Timestamp, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(time)
}

/// The start of year 1, which kube-proxy shows for "never".
const NEVER: i64 = -62_135_596_800;

impl ProxyHealth {
    /// Healthy, because no change waits, and not eligible, because the Node is unknown. A change that waits for twice
    /// the configured `sync_period` is late (P2).
    #[must_use]
    pub fn new(sync_period: Duration) -> Self {
        Self {
            timeout: sync_period.saturating_mul(2),
            eligible: false,
            updated: BTreeMap::new(),
            waiting_since: BTreeMap::new(),
            served: BTreeSet::new(),
        }
    }

    /// A change for `family` arrived. The oldest change that waits counts.
    pub fn queued(&mut self, family: Family, now: Moment) {
        self.waiting_since.entry(family).or_insert(now.steady);
    }

    /// The engine begins to serve `family`, so the family counts from now on (P2).
    pub fn started(&mut self, family: Family, now: Moment) {
        self.updated.insert(family, now.wall);
    }

    /// The kernel has all changes that arrived for `family`.
    pub fn updated(&mut self, family: Family, now: Moment) {
        self.waiting_since.remove(&family);
        self.updated.insert(family, now.wall);
        self.served.insert(family);
    }

    /// Whether load balancers may send traffic to this node (P3).
    pub fn set_eligible(&mut self, eligible: bool) {
        self.eligible = eligible;
    }

    /// Whether no family is late (P2). A family that this node could not serve since the start does not count while the
    /// other family serves (R17), because a restart would change nothing. The JSON body shows it as late.
    #[must_use]
    pub fn healthy(&self, now: Moment) -> bool {
        let counts = |family: &&Family| self.served.is_empty() || self.served.contains(*family);
        self.updated.keys().filter(counts).all(|family| self.in_time(*family, now))
    }

    /// The response of `/healthz` (P1).
    #[must_use]
    pub fn healthz(&self, now: Moment) -> Answer {
        self.answer(now, Some(self.eligible))
    }

    /// The response of `/livez` (P4).
    #[must_use]
    pub fn livez(&self, now: Moment) -> Answer {
        self.answer(now, None)
    }

    fn in_time(&self, family: Family, now: Moment) -> bool {
        let since = self.waiting_since.get(&family);
        since.is_none_or(|since| now.steady.saturating_duration_since(*since) < self.timeout)
    }

    fn answer(&self, now: Moment, node_eligible: Option<bool>) -> Answer {
        let healthy = self.healthy(now);
        let ok = healthy && node_eligible.unwrap_or(true);
        let latest = self.updated.values().max().copied().or_else(|| Timestamp::from_second(NEVER).ok());
        let status = |(family, at): (&Family, &Timestamp)| {
            (*family, FamilyStatus { last_updated: *at, healthy: self.in_time(*family, now) })
        };
        let body = Body {
            // Like kube-proxy, a healthy answer says that the last update was now.
            last_updated: latest.filter(|_| !ok).unwrap_or(now.wall),
            current_time: now.wall,
            node_eligible,
            healthy,
            status: self.updated.iter().map(status).collect(),
        };
        Answer { ok, body: serde_json::to_string(&body).unwrap_or_default() }
    }
}

/// A [`ProxyHealth`] that the engine and the HTTP server share.
#[derive(Clone, Debug)]
pub struct Health {
    state: Arc<Mutex<ProxyHealth>>,
    /// Whether the kernel has had all Services of a family.
    serves: watch::Sender<bool>,
}

impl Health {
    /// See [`ProxyHealth::new`].
    #[must_use]
    pub fn new(sync_period: Duration) -> Self {
        let state = Arc::new(Mutex::new(ProxyHealth::new(sync_period)));
        Self { state, serves: watch::channel(false).0 }
    }

    /// See [`ProxyHealth::queued`].
    pub fn queued(&self, family: Family) {
        self.state().queued(family, Moment::now());
    }

    /// See [`ProxyHealth::started`].
    pub fn started(&self, family: Family) {
        self.state().started(family, Moment::now());
    }

    /// See [`ProxyHealth::updated`].
    pub fn updated(&self, family: Family) {
        self.state().updated(family, Moment::now());
        self.serves.send_if_modified(|serves| !std::mem::replace(serves, true));
    }

    /// Waits until the kernel has all changes that arrived for one family.
    pub async fn serves(&self) {
        // An error would mean that all senders are dropped, and `self` holds one.
        let _ = self.serves.subscribe().wait_for(|serves| *serves).await;
    }

    /// See [`ProxyHealth::set_eligible`].
    pub fn set_eligible(&self, eligible: bool) {
        self.state().set_eligible(eligible);
    }

    /// See [`ProxyHealth::healthy`].
    #[must_use]
    pub fn healthy(&self) -> bool {
        self.state().healthy(Moment::now())
    }

    fn state(&self) -> MutexGuard<'_, ProxyHealth> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Serves `/healthz` and `/livez` for any method, and counts each response.
pub fn health_router(health: &Health, metrics: &Metrics) -> Router {
    let (ready, ready_metrics) = (health.clone(), metrics.clone());
    let (alive, alive_metrics) = (health.clone(), metrics.clone());
    let healthz = move || {
        let answer = ready.state().healthz(Moment::now());
        ready_metrics.healthz_answered(answer.ok);
        std::future::ready(respond(answer))
    };
    let livez = move || {
        let answer = alive.state().livez(Moment::now());
        alive_metrics.livez_answered(answer.ok);
        std::future::ready(respond(answer))
    };
    Router::new().route("/healthz", any(healthz)).route("/livez", any(livez))
}

fn respond(answer: Answer) -> Response {
    let code = if answer.ok { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let headers = [(header::CONTENT_TYPE, "application/json"), (header::X_CONTENT_TYPE_OPTIONS, "nosniff")];
    (code, headers, answer.body).into_response()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const PERIOD: Duration = Duration::from_secs(30);

    struct Clock {
        start: Instant,
    }

    impl Clock {
        fn at(&self, seconds: u64) -> Moment {
            Moment {
                steady: self.start + Duration::from_secs(seconds),
                wall: Timestamp::from_second(1_000_000_000 + i64::try_from(seconds).unwrap()).unwrap(),
            }
        }
    }

    fn new() -> (ProxyHealth, Clock) {
        let mut health = ProxyHealth::new(PERIOD);
        health.set_eligible(true);
        (health, Clock { start: Instant::now() })
    }

    fn json(answer: &Answer) -> Value {
        serde_json::from_str(&answer.body).unwrap()
    }

    /// P2, as a table: name, steps with their times, time of the check, expected health.
    #[test]
    fn p2_a_change_that_waits_for_two_sync_periods_is_unhealthy() {
        use Family::{V4, V6};
        enum Step {
            Queued(Family, u64),
            Updated(Family, u64),
        }
        use Step::{Queued, Updated};
        let table: &[(&str, &[Step], u64, bool)] = &[
            ("no change ever arrived", &[], 1000, true),
            ("a family that never started does not count", &[Queued(V4, 0)], 1000, true),
            ("no change waits", &[Updated(V4, 0)], 1000, true),
            ("a change waits and is not yet late", &[Updated(V4, 0), Queued(V4, 1)], 60, true),
            ("late at exactly the timeout", &[Updated(V4, 0), Queued(V4, 1)], 61, false),
            ("the oldest change counts", &[Updated(V4, 0), Queued(V4, 1), Queued(V4, 50)], 61, false),
            ("applied again", &[Updated(V4, 0), Queued(V4, 1), Updated(V4, 90)], 95, true),
            (
                "a later change waits again",
                &[Updated(V4, 0), Queued(V4, 1), Updated(V4, 9), Queued(V4, 10)],
                69,
                true,
            ),
            ("one late family is enough", &[Updated(V4, 0), Updated(V6, 0), Queued(V6, 1)], 61, false),
            (
                "the other family's update does not help",
                &[Updated(V4, 0), Updated(V6, 0), Queued(V6, 1), Updated(V4, 60)],
                61,
                false,
            ),
        ];
        for (name, steps, asked, healthy) in table {
            let (mut health, clock) = new();
            for step in *steps {
                match step {
                    Queued(family, at) => health.queued(*family, clock.at(*at)),
                    Updated(family, at) => health.updated(*family, clock.at(*at)),
                }
            }
            assert_eq!(health.healthy(clock.at(*asked)), *healthy, "{name}");
            assert_eq!(health.healthz(clock.at(*asked)).ok, *healthy, "{name}");
            assert_eq!(health.livez(clock.at(*asked)).ok, *healthy, "{name}");
        }
    }

    #[test]
    fn p1_healthz_needs_an_eligible_node_and_p4_livez_does_not() {
        let clock = Clock { start: Instant::now() };
        let mut health = ProxyHealth::new(PERIOD);
        health.updated(Family::V4, clock.at(0));
        assert!(!health.healthz(clock.at(5)).ok, "P3: an unknown node is not eligible");
        assert!(health.livez(clock.at(5)).ok);
        health.set_eligible(true);
        assert!(health.healthz(clock.at(5)).ok);
    }

    #[test]
    fn p1_p4_bodies_when_healthy() {
        let (mut health, clock) = new();
        health.updated(Family::V4, clock.at(0));
        health.updated(Family::V6, clock.at(2));
        let status = json!({
            "IPv4": {"lastUpdated": "2001-09-09T01:46:40Z", "healthy": true},
            "IPv6": {"lastUpdated": "2001-09-09T01:46:42Z", "healthy": true},
        });
        let (now, later) = (clock.at(10), "2001-09-09T01:46:50Z");
        assert_eq!(
            json(&health.healthz(now)),
            json!({"lastUpdated": later, "currentTime": later, "nodeEligible": true, "healthy": true, "status": status})
        );
        assert_eq!(
            json(&health.livez(now)),
            json!({"lastUpdated": later, "currentTime": later, "healthy": true, "status": status})
        );
    }

    #[test]
    fn p1_body_keeps_the_last_update_when_unhealthy() {
        let (mut health, clock) = new();
        health.updated(Family::V4, clock.at(0));
        health.updated(Family::V6, clock.at(0));
        health.queued(Family::V6, clock.at(0));
        assert_eq!(
            json(&health.healthz(clock.at(60))),
            json!({
                "lastUpdated": "2001-09-09T01:46:40Z", "currentTime": "2001-09-09T01:47:40Z",
                "nodeEligible": true, "healthy": false,
                "status": {
                    "IPv4": {"lastUpdated": "2001-09-09T01:46:40Z", "healthy": true},
                    "IPv6": {"lastUpdated": "2001-09-09T01:46:40Z", "healthy": false},
                }
            })
        );
    }

    #[test]
    fn p2_status_is_left_out_before_the_first_update() {
        let clock = Clock { start: Instant::now() };
        let health = ProxyHealth::new(PERIOD);
        assert_eq!(
            json(&health.healthz(clock.at(0))),
            json!({
                "lastUpdated": "0001-01-01T00:00:00Z", "currentTime": "2001-09-09T01:46:40Z",
                "nodeEligible": false, "healthy": true,
            })
        );
    }
}
