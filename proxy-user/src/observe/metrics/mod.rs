//! The metrics: kube-proxy's under their own names (section 4), ours as `weir_*`, the process's.
//!
//! In: calls of the loop that programs and of the servers. Out: Prometheus' text format, for `/metrics`.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use jiff::Timestamp;
use prometheus_client::{
    encoding::text::encode_registry,
    metrics::{
        counter::Counter,
        family::Family as Labelled,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
        info::Info,
    },
    registry::{Metric, Registry},
};
use std::sync::atomic::AtomicU64;

use super::{
    drops::{DropCount, Drops},
    names::NameMetrics,
    planes::PlaneMetrics,
    process::Process,
    requests::RequestMetrics,
    services::{PortCount, Services},
    sockets::SocketMetrics,
    text_format,
    watches::Watches,
};
use crate::model::Family;

pub(super) type Label = [(&'static str, &'static str); 1];
type Seconds = Gauge<f64, AtomicU64>;
type Timings = Labelled<Label, Histogram, fn() -> Histogram>;

/// Which traffic policy keeps traffic on this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrafficPolicy {
    /// internalTrafficPolicy.
    Internal,
    /// externalTrafficPolicy.
    External,
}

/// The handle through which everything is counted; clones count into the same place.
#[derive(Clone, Debug)]
pub struct Metrics(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    registry: Registry,
    kube_proxy: KubeProxy,
    weir: Weir,
    sockets: SocketMetrics,
    names: NameMetrics,
    planes: PlaneMetrics,
    requests: RequestMetrics,
    services: Services,
    drops: Drops,
    watches: Watches,
}

#[derive(Debug)]
struct KubeProxy {
    sync: Timings,
    full_sync: Timings,
    partial_sync: Timings,
    last_sync: Labelled<Label, Seconds>,
    last_queued: Labelled<Label, Seconds>,
    network_programming: Timings,
    endpoint_changes_pending: Gauge,
    endpoint_changes: Counter,
    service_changes_pending: Gauge,
    service_changes: Counter,
    no_local_endpoints: Labelled<[(&'static str, &'static str); 2], Gauge>,
    sync_failures: Labelled<Label, Counter>,
    cleanup_failures: Labelled<Label, Counter>,
    healthz: Labelled<Label, Counter>,
    livez: Labelled<Label, Counter>,
    localhost_listeners: Labelled<Label, Gauge>,
    localhost_failures: Labelled<Label, Counter>,
    conntrack: Timings,
    conntrack_deleted: Labelled<Label, Counter>,
}

#[derive(Debug)]
struct Weir {
    services: Gauge,
    frontends: Gauge,
    backends: Gauge,
    unprogrammed: Gauge,
    changes_applied: Counter,
    events_dropped: Counter,
    reconciles: Labelled<Label, Counter>,
    refused: Labelled<Label, Counter>,
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

fn family_label(family: Family) -> Label {
    [("ip_family", family_name(family))]
}

pub(super) const fn family_name(family: Family) -> &'static str {
    match family {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    }
}

fn code_label(ok: bool) -> Label {
    [("code", if ok { "200" } else { "503" })]
}

/// Registers under a name and gives back the handle. Counters go without the `_total` that is put behind their names.
pub(super) fn put<M: Metric + Clone>(registry: &mut Registry, name: &str, help: &str, metric: M) -> M {
    registry.register(name, help, metric.clone());
    metric
}

impl KubeProxy {
    fn register(registry: &mut Registry) -> Self {
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

impl Weir {
    fn register(registry: &mut Registry) -> Self {
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

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// A fresh set of metrics, with every series whose labels are known beforehand at zero.
    #[must_use]
    pub fn new() -> Self {
        let mut registry = Registry::default();
        let kube_proxy = KubeProxy::register(&mut registry);
        let weir = Weir::register(&mut registry);
        let sockets = SocketMetrics::register(&mut registry);
        let names = NameMetrics::register(&mut registry);
        let planes = PlaneMetrics::register(&mut registry);
        let requests = RequestMetrics::register(&mut registry);
        let services = Services::default();
        registry.register_collector(Box::new(services.clone()));
        let drops = Drops::default();
        registry.register_collector(Box::new(drops.clone()));
        let watches = Watches::default();
        registry.register_collector(Box::new(watches.clone()));
        registry.register_collector(Box::new(Process));
        let metrics = Self(Arc::new(Inner {
            registry,
            kube_proxy,
            weir,
            sockets,
            names,
            planes,
            requests,
            services,
            drops,
            watches,
        }));
        for family in Family::ALL {
            let of = &metrics.0.kube_proxy;
            drop(of.sync_failures.get_or_create(&family_label(family)));
            drop(of.cleanup_failures.get_or_create(&family_label(family)));
            drop(of.conntrack_deleted.get_or_create(&family_label(family)));
            drop(of.conntrack.get_or_create(&family_label(family)));
            drop(of.localhost_failures.get_or_create(&family_label(family)));
            metrics.set_localhost_listeners(family, 0);
            metrics.no_local_endpoints(family, TrafficPolicy::Internal, 0);
            metrics.no_local_endpoints(family, TrafficPolicy::External, 0);
        }
        metrics
    }

    /// A Service changed. kube-proxy counts it once for each family.
    pub fn service_changed(&self) {
        self.0.kube_proxy.service_changes.inc();
    }

    /// An EndpointSlice changed.
    pub fn endpoints_changed(&self) {
        self.0.kube_proxy.endpoint_changes.inc();
    }

    /// How many Service and EndpointSlice changes the kernel does not have yet.
    pub fn set_pending(&self, services: usize, endpoints: usize) {
        self.0.kube_proxy.service_changes_pending.set(whole(services));
        self.0.kube_proxy.endpoint_changes_pending.set(whole(endpoints));
    }

    /// Something is to be programmed for a family, as of now.
    pub fn queued(&self, family: Family) {
        self.0.kube_proxy.last_queued.get_or_create(&family_label(family)).set(seconds_now());
    }

    /// A family was programmed, with everything compared (`full`) or changes only, and it took so long.
    pub fn synced(&self, family: Family, full: bool, took: Duration) {
        let (of, label) = (&self.0.kube_proxy, family_label(family));
        of.sync.get_or_create(&label).observe(took.as_secs_f64());
        // Both kinds are there from the first on, also where nothing has changed yet.
        for (kind, happened) in [(&of.full_sync, full), (&of.partial_sync, !full)] {
            let timings = kind.get_or_create(&label);
            if happened {
                timings.observe(took.as_secs_f64());
            }
        }
        of.last_sync.get_or_create(&label).set(seconds_now());
    }

    /// A family could not be programmed.
    pub fn sync_failed(&self, family: Family) {
        self.0.kube_proxy.sync_failures.get_or_create(&family_label(family)).inc();
    }

    /// Something of a family that is not needed any more could not be removed, so many times until now. Planes that remove
    /// nothing say 0.
    pub fn removals_failed(&self, family: Family, times: u64) {
        let counted = self.0.kube_proxy.cleanup_failures.get_or_create(&family_label(family));
        counted.inc_by(times.saturating_sub(counted.get()));
    }

    /// How long ago the object changed of which the kernel now has the news. To be called only for changes that
    /// happened after the agent started.
    pub fn network_programmed(&self, family: Family, since_change: Duration) {
        let of = &self.0.kube_proxy.network_programming;
        of.get_or_create(&family_label(family)).observe(since_change.as_secs_f64());
    }

    /// How many service ports have endpoints, but none here while their policy wants local ones (F2, F3).
    pub fn no_local_endpoints(&self, family: Family, policy: TrafficPolicy, ports: usize) {
        let policy = match policy {
            TrafficPolicy::Internal => "internal",
            TrafficPolicy::External => "external",
        };
        let labels = [("ip_family", family_name(family)), ("traffic_policy", policy)];
        self.0.kube_proxy.no_local_endpoints.get_or_create(&labels).set(whole(ports));
    }

    /// Stale UDP flows were looked for (K1): it took so long, and so many were deleted.
    pub fn conntrack_cleaned(&self, family: Family, took: Duration, deleted: usize) {
        let (of, label) = (&self.0.kube_proxy, family_label(family));
        of.conntrack.get_or_create(&label).observe(took.as_secs_f64());
        of.conntrack_deleted.get_or_create(&label).inc_by(deleted as u64);
    }

    /// So many NodePorts are listened for on a loopback address, TCP and UDP counted apart.
    pub fn set_localhost_listeners(&self, family: Family, listeners: usize) {
        let of = &self.0.kube_proxy.localhost_listeners;
        of.get_or_create(&family_label(family)).set(whole(listeners));
    }

    /// A NodePort could not be listened for on a loopback address.
    pub fn localhost_listener_failed(&self, family: Family) {
        self.0.kube_proxy.localhost_failures.get_or_create(&family_label(family)).inc();
    }

    /// `/healthz` answered (P1).
    pub fn healthz_answered(&self, ok: bool) {
        self.0.kube_proxy.healthz.get_or_create(&code_label(ok)).inc();
    }

    /// `/livez` answered (P4).
    pub fn livez_answered(&self, ok: bool) {
        self.0.kube_proxy.livez.get_or_create(&code_label(ok)).inc();
    }

    /// What is programmed now.
    pub fn set_size(&self, services: usize, frontends: usize, backends: usize) {
        let of = &self.0.weir;
        of.services.set(whole(services));
        of.frontends.set(whole(frontends));
        of.backends.set(whole(backends));
    }

    pub(super) fn names(&self) -> &NameMetrics {
        &self.0.names
    }

    /// The API server was asked, by this HTTP method, and answered with this code or not at all.
    pub fn asked(&self, method: &str, host: &str, code: Option<u16>, took: Duration) {
        self.0.requests.asked(method, host, code, took);
    }

    /// Shows what `read` finds counted for each service port. It is called at each scrape.
    pub fn count_services(&self, read: impl Fn() -> Vec<PortCount> + Send + Sync + 'static) {
        self.0.services.read_with(Box::new(read));
    }

    /// Shows what `read` finds counted for each reason not to serve a packet. It is called at each scrape.
    pub fn count_drops(&self, read: impl Fn() -> Vec<DropCount> + Send + Sync + 'static) {
        self.0.drops.read_with(Box::new(read));
    }

    /// Shows for how long, as `read` finds, nothing has come of each kind. It is called at each scrape.
    pub fn show_silences(&self, read: impl Fn() -> Vec<(&'static str, Duration)> + Send + Sync + 'static) {
        self.0.watches.read_with(Box::new(read));
    }

    /// How full one of the sockets' plane's maps is.
    pub fn set_fill(&self, map: &'static str, elements: u32, room: u32) {
        self.0.sockets.set_fill(map, elements, room);
    }

    /// What one of the sockets' plane's maps takes of the kernel's memory.
    pub fn set_map_bytes(&self, map: &'static str, bytes: u64) {
        self.0.sockets.set_bytes(map, bytes);
    }

    /// A bound was met: this many more sockets or clients found no room.
    pub fn count_refused_socket(&self, reason: &'static str, more: u64) {
        self.0.sockets.count_refused(reason, more);
    }

    /// The kernel programs could not do something, this many times more.
    pub fn count_trouble(&self, trouble: &'static str, more: u64) {
        self.0.sockets.count_trouble(trouble, more);
    }

    /// Whether a data plane serves, and how often it has failed as a whole.
    pub fn set_plane(&self, plane: &'static str, active: bool, failures: u64) {
        self.0.planes.set(plane, active, failures);
    }

    /// So many service ports could not be taken by the sockets' plane, and are served by packets.
    pub fn set_left_to_packets(&self, ports: usize) {
        self.0.planes.set_left(whole(ports));
    }

    /// Sockets were closed because their backend serves no longer.
    pub fn count_closed(&self, protocol: &'static str, more: u64) {
        self.0.sockets.count_closed(protocol, more);
    }

    /// Datagrams of connected sockets go to their Service again because their backend serves no longer.
    pub fn count_moved(&self, more: u64) {
        self.0.sockets.count_moved(more);
    }

    /// Kernel programs that others detached were attached anew.
    pub fn count_attached_anew(&self, more: u64) {
        self.0.sockets.count_attached_anew(more);
    }

    /// How many pods' sockets are left alone, by reason, and how many should be and are not yet.
    pub fn set_bypassed(&self, pods: BTreeMap<&'static str, usize>, waiting: usize) {
        let pods = pods.into_iter().map(|(reason, count)| (reason, whole(count)));
        self.0.sockets.set_bypassed(pods, whole(waiting));
    }

    /// So many service ports could not be programmed and are not as they should be.
    pub fn set_unprogrammed(&self, ports: usize) {
        self.0.weir.unprogrammed.set(whole(ports));
    }

    /// So many service ports were changed in the kernel.
    pub fn changes_applied(&self, ports: usize) {
        self.0.weir.changes_applied.inc_by(ports as u64);
    }

    /// An event is not written, because there are too many.
    pub fn event_dropped(&self) {
        self.0.weir.events_dropped.inc();
    }

    /// Everything was compared with the kernel, for a reason such as `start`, `failure` or `flushed`.
    pub fn reconciled(&self, reason: &'static str) {
        self.0.weir.reconciles.get_or_create(&[("reason", reason)]).inc();
    }

    /// Counts what a bound of weir's own servers keeps out.
    #[must_use]
    pub fn refused(&self, reason: &'static str) -> Counter {
        self.0.weir.refused.get_or_create(&[("reason", reason)]).clone()
    }

    /// Everything in Prometheus' text format, version 0.0.4.
    #[must_use]
    pub fn render(&self) -> String {
        let mut text = String::new();
        match encode_registry(&mut text, &self.0.registry) {
            Ok(()) => text_format::plain(&text),
            // Writing into a string does not fail.
            Err(std::fmt::Error) => String::new(),
        }
    }
}

fn whole(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn seconds_now() -> f64 {
    Timestamp::now().as_duration().as_secs_f64()
}

#[cfg(test)]
mod tests;
