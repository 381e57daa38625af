//! The metrics: kube-proxy's under their own names (P7), weir's as `weir_*`, and those of the process.
//!
//! In: calls of the engine and of the servers. Out: Prometheus' text format, for `/metrics`.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use jiff::Timestamp;
use prometheus_client::{encoding::text::encode_registry, metrics::counter::Counter, registry::Registry};

use self::{kube_proxy::KubeProxy, weir::Weir};
use super::{
    drops::{DropCount, Drops},
    names::NameMetrics,
    planes::PlaneMetrics,
    process::Process,
    registration::{Label, family_label, family_name},
    requests::RequestMetrics,
    services::{PortCount, Services},
    sockets::SocketMetrics,
    text_format,
    watches::Watches,
};
use crate::model::Family;

mod kube_proxy;
mod weir;

/// Which traffic policy keeps traffic on this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrafficPolicy {
    /// internalTrafficPolicy.
    Internal,
    /// externalTrafficPolicy.
    External,
}

/// All metrics of the agent. Clones share them.
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

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// New metrics. Every series whose labels are known in advance starts at zero.
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

    /// Counts a changed Service. kube-proxy counts it once for each family.
    pub fn service_changed(&self) {
        self.0.kube_proxy.service_changes.inc();
    }

    /// Counts a changed EndpointSlice.
    pub fn endpoints_changed(&self) {
        self.0.kube_proxy.endpoint_changes.inc();
    }

    /// Sets how many Service and EndpointSlice changes the kernel does not have yet.
    pub fn set_pending(&self, services: usize, endpoints: usize) {
        self.0.kube_proxy.service_changes_pending.set(whole(services));
        self.0.kube_proxy.endpoint_changes_pending.set(whole(endpoints));
    }

    /// Notes that a change for a family arrived now.
    pub fn queued(&self, family: Family) {
        self.0.kube_proxy.last_queued.get_or_create(&family_label(family)).set(seconds_now());
    }

    /// Counts a successful update of a family: a comparison of all rules (`full`), or changes only.
    pub fn synced(&self, family: Family, full: bool, took: Duration) {
        let (of, label) = (&self.0.kube_proxy, family_label(family));
        of.sync.get_or_create(&label).observe(took.as_secs_f64());
        // kube-proxy shows both kinds from the first update on.
        for (kind, happened) in [(&of.full_sync, full), (&of.partial_sync, !full)] {
            let timings = kind.get_or_create(&label);
            if happened {
                timings.observe(took.as_secs_f64());
            }
        }
        of.last_sync.get_or_create(&label).set(seconds_now());
    }

    /// Counts a failed update of a family.
    pub fn sync_failed(&self, family: Family) {
        self.0.kube_proxy.sync_failures.get_or_create(&family_label(family)).inc();
    }

    /// Sets how often weir failed to remove rules and maps of a family that it no longer needs. Planes that remove
    /// nothing pass 0.
    pub fn removals_failed(&self, family: Family, times: u64) {
        let counted = self.0.kube_proxy.cleanup_failures.get_or_create(&family_label(family));
        counted.inc_by(times.saturating_sub(counted.get()));
    }

    /// Observes the time from an object's change until the kernel has it. Call it only for changes that happened
    /// after the agent started.
    pub fn network_programmed(&self, family: Family, since_change: Duration) {
        let of = &self.0.kube_proxy.network_programming;
        of.get_or_create(&family_label(family)).observe(since_change.as_secs_f64());
    }

    /// Sets how many service ports with policy Local have endpoints, but none on this node (F2, F3).
    pub fn no_local_endpoints(&self, family: Family, policy: TrafficPolicy, ports: usize) {
        let policy = match policy {
            TrafficPolicy::Internal => "internal",
            TrafficPolicy::External => "external",
        };
        let labels = [("ip_family", family_name(family)), ("traffic_policy", policy)];
        self.0.kube_proxy.no_local_endpoints.get_or_create(&labels).set(whole(ports));
    }

    /// Counts a sweep for stale UDP flows (K1), and the flows that it deleted.
    pub fn conntrack_cleaned(&self, family: Family, took: Duration, deleted: usize) {
        let (of, label) = (&self.0.kube_proxy, family_label(family));
        of.conntrack.get_or_create(&label).observe(took.as_secs_f64());
        of.conntrack_deleted.get_or_create(&label).inc_by(deleted as u64);
    }

    /// Sets for how many NodePorts weir listens on a loopback address. TCP and UDP count separately.
    pub fn set_localhost_listeners(&self, family: Family, listeners: usize) {
        let of = &self.0.kube_proxy.localhost_listeners;
        of.get_or_create(&family_label(family)).set(whole(listeners));
    }

    /// Counts a NodePort for which weir could not listen on a loopback address.
    pub fn localhost_listener_failed(&self, family: Family) {
        self.0.kube_proxy.localhost_failures.get_or_create(&family_label(family)).inc();
    }

    /// Counts a response of `/healthz` (P1).
    pub fn healthz_answered(&self, ok: bool) {
        self.0.kube_proxy.healthz.get_or_create(&code_label(ok)).inc();
    }

    /// Counts a response of `/livez` (P4).
    pub fn livez_answered(&self, ok: bool) {
        self.0.kube_proxy.livez.get_or_create(&code_label(ok)).inc();
    }

    /// Sets how much the kernel has now.
    pub fn set_size(&self, services: usize, frontends: usize, backends: usize) {
        let of = &self.0.weir;
        of.services.set(whole(services));
        of.frontends.set(whole(frontends));
        of.backends.set(whole(backends));
    }

    /// Counts DNS queries with one outcome.
    pub fn count_queries(&self, outcome: &'static str, more: u64) {
        self.0.names.count_queries(outcome, more);
    }

    /// Sets at how many ClusterIPs this node answers DNS queries now.
    pub fn set_answered_addresses(&self, addresses: usize) {
        self.0.names.set_addresses(whole(addresses));
    }

    /// Counts a request to the API server; `code` is `None` if no response came.
    pub fn count_request(&self, method: &str, host: &str, code: Option<u16>, took: Duration) {
        self.0.requests.count(method, host, code, took);
    }

    /// Shows the counters of each service port, which each scrape reads with `read`.
    pub fn count_services(&self, read: impl Fn() -> Vec<PortCount> + Send + Sync + 'static) {
        self.0.services.read_with(Box::new(read));
    }

    /// Shows the counters of dropped and rejected packets, which each scrape reads with `read`.
    pub fn count_drops(&self, read: impl Fn() -> Vec<DropCount> + Send + Sync + 'static) {
        self.0.drops.read_with(Box::new(read));
    }

    /// Shows for how long the API server has sent nothing for each kind, which each scrape reads with `read`.
    pub fn show_silences(&self, read: impl Fn() -> Vec<(&'static str, Duration)> + Send + Sync + 'static) {
        self.0.watches.read_with(Box::new(read));
    }

    /// Sets how full a map of the socket plane is.
    pub fn set_fill(&self, map: &'static str, elements: u32, room: u32) {
        self.0.sockets.set_fill(map, elements, room);
    }

    /// Sets how much kernel memory a map of the socket plane takes.
    pub fn set_map_bytes(&self, map: &'static str, bytes: u64) {
        self.0.sockets.set_bytes(map, bytes);
    }

    /// Counts sockets or clients for which a map had no room.
    pub fn count_refused_socket(&self, reason: &'static str, more: u64) {
        self.0.sockets.count_refused(reason, more);
    }

    /// Counts errors in the kernel programs.
    pub fn count_trouble(&self, trouble: &'static str, more: u64) {
        self.0.sockets.count_trouble(trouble, more);
    }

    /// Sets whether a data plane serves, and how often the whole plane has failed.
    pub fn set_plane(&self, plane: &'static str, active: bool, failures: u64) {
        self.0.planes.set(plane, active, failures);
    }

    /// Sets how many service ports only nftables serves, because the socket plane could not take them.
    pub fn set_left_to_packets(&self, ports: usize) {
        self.0.planes.set_left(whole(ports));
    }

    /// Counts sockets that weir closed because their backend no longer serves.
    pub fn count_closed(&self, protocol: &'static str, more: u64) {
        self.0.sockets.count_closed(protocol, more);
    }

    /// Counts connected UDP sockets whose datagrams go through their Service again, because their backend no longer
    /// serves.
    pub fn count_moved(&self, more: u64) {
        self.0.sockets.count_moved(more);
    }

    /// Counts kernel programs that weir attached again after another program detached them.
    pub fn count_attached_anew(&self, more: u64) {
        self.0.sockets.count_attached_anew(more);
    }

    /// Sets how many pods' sockets weir leaves alone, by reason, and of how many it should but does not yet.
    pub fn set_bypassed(&self, pods: BTreeMap<&'static str, usize>, waiting: usize) {
        let pods = pods.into_iter().map(|(reason, count)| (reason, whole(count)));
        self.0.sockets.set_bypassed(pods, whole(waiting));
    }

    /// Sets how many service ports the kernel does not have as planned.
    pub fn set_unprogrammed(&self, ports: usize) {
        self.0.weir.unprogrammed.set(whole(ports));
    }

    /// Counts service ports that weir changed in the kernel.
    pub fn changes_applied(&self, ports: usize) {
        self.0.weir.changes_applied.inc_by(ports as u64);
    }

    /// Counts an event that weir does not write, because there are too many.
    pub fn event_dropped(&self) {
        self.0.weir.events_dropped.inc();
    }

    /// Counts a comparison of all rules with the kernel, for a reason such as `start`, `failure` or `flushed`.
    pub fn reconciled(&self, reason: &'static str) {
        self.0.weir.reconciles.get_or_create(&[("reason", reason)]).inc();
    }

    /// The counter of connections and queries that one of weir's servers refuses.
    #[must_use]
    pub fn refused(&self, reason: &'static str) -> Counter {
        self.0.weir.refused.get_or_create(&[("reason", reason)]).clone()
    }

    /// All metrics in Prometheus' text format, version 0.0.4.
    #[must_use]
    pub fn render(&self) -> String {
        let mut text = String::new();
        match encode_registry(&mut text, &self.0.registry) {
            Ok(()) => text_format::plain(&text),
            // Writing to a string cannot fail.
            Err(std::fmt::Error) => String::new(),
        }
    }
}

fn code_label(ok: bool) -> Label {
    [("code", if ok { "200" } else { "503" })]
}

fn whole(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn seconds_now() -> f64 {
    Timestamp::now().as_duration().as_secs_f64()
}

#[cfg(test)]
mod tests;
