//! kube-proxy's own metrics, under the same names and with the same buckets.
//!
//! In: a registry. Out: the handles that [`Metrics`](super::Metrics) counts with.

use std::sync::atomic::AtomicU64;

use prometheus_client::{
    metrics::{
        counter::Counter,
        family::Family as Labelled,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};

use crate::observe::registration::{Label, put};

type Seconds = Gauge<f64, AtomicU64>;
type Timings = Labelled<Label, Histogram, fn() -> Histogram>;

#[derive(Debug)]
pub(super) struct KubeProxy {
    pub(super) sync: Timings,
    pub(super) full_sync: Timings,
    pub(super) partial_sync: Timings,
    pub(super) last_sync: Labelled<Label, Seconds>,
    pub(super) last_queued: Labelled<Label, Seconds>,
    pub(super) network_programming: Timings,
    pub(super) endpoint_changes_pending: Gauge,
    pub(super) endpoint_changes: Counter,
    pub(super) service_changes_pending: Gauge,
    pub(super) service_changes: Counter,
    pub(super) no_local_endpoints: Labelled<[(&'static str, &'static str); 2], Gauge>,
    pub(super) sync_failures: Labelled<Label, Counter>,
    pub(super) cleanup_failures: Labelled<Label, Counter>,
    pub(super) healthz: Labelled<Label, Counter>,
    pub(super) livez: Labelled<Label, Counter>,
    pub(super) localhost_listeners: Labelled<Label, Gauge>,
    pub(super) localhost_failures: Labelled<Label, Counter>,
    pub(super) conntrack: Timings,
    pub(super) conntrack_deleted: Labelled<Label, Counter>,
}

impl KubeProxy {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let r = registry.sub_registry_with_prefix("kubeproxy");
        let rules = |rest: &str| format!("sync_proxy_rules_{rest}");
        let timed = "Duration of updates of the kernel, in seconds";
        Self {
            sync: put(r, &rules("duration_seconds"), timed, timings(sync_timing)),
            full_sync: put(
                r,
                "sync_full_proxy_rules_duration_seconds",
                "Duration of updates that compare all rules with the kernel, in seconds",
                timings(sync_timing),
            ),
            partial_sync: put(
                r,
                "sync_partial_proxy_rules_duration_seconds",
                "Duration of updates that write changes only, in seconds",
                timings(sync_timing),
            ),
            last_sync: put(
                r,
                &rules("last_timestamp_seconds"),
                "Time of the last successful update of the kernel, in seconds since 1970",
                Labelled::default(),
            ),
            last_queued: put(
                r,
                &rules("last_queued_timestamp_seconds"),
                "Time at which the last change arrived, in seconds since 1970",
                Labelled::default(),
            ),
            network_programming: put(
                r,
                "network_programming_duration_seconds",
                "Time from a change of a Service or its pods until the kernel has it, in seconds",
                timings(programming_timing),
            ),
            endpoint_changes_pending: put(
                r,
                &rules("endpoint_changes_pending"),
                "EndpointSlice changes that are not in the kernel yet",
                Gauge::default(),
            ),
            endpoint_changes: put(
                r,
                &rules("endpoint_changes"),
                "EndpointSlice changes received",
                Counter::default(),
            ),
            service_changes_pending: put(
                r,
                &rules("service_changes_pending"),
                "Service changes that are not in the kernel yet",
                Gauge::default(),
            ),
            service_changes: put(
                r,
                &rules("service_changes"),
                "Service changes received",
                Counter::default(),
            ),
            no_local_endpoints: put(
                r,
                &rules("no_local_endpoints_total"),
                "Service ports with traffic policy Local that have endpoints, but none on this node",
                Labelled::default(),
            ),
            sync_failures: put(
                r,
                &rules("nftables_sync_failures"),
                "Failed updates of the kernel",
                Labelled::default(),
            ),
            cleanup_failures: put(
                r,
                &rules("nftables_cleanup_failures"),
                "Failed removals of rules and maps that are no longer needed",
                Labelled::default(),
            ),
            healthz: put(
                r,
                "proxy_healthz",
                "Responses of /healthz, by HTTP status code",
                Labelled::default(),
            ),
            livez: put(r, "proxy_livez", "Responses of /livez, by HTTP status code", Labelled::default()),
            localhost_listeners: put(
                r,
                "nftables_localhost_nodeport_listeners",
                "NodePorts for which weir listens on a loopback address",
                Labelled::default(),
            ),
            localhost_failures: put(
                r,
                "nftables_localhost_nodeport_listener_creation_failures",
                "Failed attempts to listen for a NodePort on a loopback address",
                Labelled::default(),
            ),
            conntrack: put(
                r,
                "conntrack_reconciler_sync_duration_seconds",
                "Duration of sweeps for stale UDP flows, in seconds",
                timings(sync_timing),
            ),
            conntrack_deleted: put(
                r,
                "conntrack_reconciler_deleted_entries",
                "Stale UDP flows deleted from connection tracking",
                Labelled::default(),
            ),
        }
    }
}

fn sync_timing() -> Histogram {
    Histogram::new(exponential_buckets(0.001, 2.0, 15))
}

fn programming_timing() -> Histogram {
    let seconds = (1..60).chain((60..120).step_by(5)).chain((120..=300).step_by(30));
    Histogram::new([0.25, 0.5].into_iter().chain(seconds.map(f64::from)))
}

fn timings(make: fn() -> Histogram) -> Timings {
    Labelled::new_with_constructor(make)
}
