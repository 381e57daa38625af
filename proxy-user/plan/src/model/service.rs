//! The parts of a Service that this node needs.
//!
//! In: the API's Service. Out: a small, canonical [`Service`], so that two objects with the same meaning
//! compare equal, and a [`Problem`] for each value that weir cannot use.

use std::{net::IpAddr, sync::Arc, time::Duration};

use ipnet::IpNet;
use jiff::SignedDuration;
use k8s_openapi::api::core::v1 as api;
use rustc_hash::FxHashSet;
use serde::Serialize;

use super::{
    Family, ObjectName, PerFamily, Problem, Protocol, Settings, Uid, parse_address, parse_network, unusable,
};

/// A Service with this label, whatever its value, belongs to another proxy (W1).
pub const PROXY_NAME_LABEL: &str = "service.kubernetes.io/service-proxy-name";

/// The annotation that decides about TCP connections to a backend that stopped serving.
const ON_BACKEND_REMOVAL: &str = "weir.dev/on-backend-removal";

/// The default timeout of session affinity in seconds (A1).
const DEFAULT_AFFINITY: u32 = 10_800;

/// A Service that weir serves on this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Namespace and name.
    pub name: ObjectName,
    /// The uid, which differs from that of a deleted Service of the same name. `None` without an API server.
    pub uid: Option<Uid>,
    /// When it was created, in seconds since 1970; `i64::MAX` if unknown. Decides conflicts (R12).
    pub created: i64,
    /// The ClusterIP of each family. In a family without one the Service is not served (W5).
    pub cluster_ips: PerFamily<Option<IpAddr>>,
    /// `spec.externalIPs`, sorted (R10).
    pub external_ips: Box<[IpAddr]>,
    /// The load balancer's addresses that this node serves, sorted (R11).
    pub load_balancer_ips: Box<[IpAddr]>,
    /// `spec.loadBalancerSourceRanges`, sorted (F7).
    pub source_ranges: Box<[IpNet]>,
    /// The ports, in the Service's own order.
    pub ports: Box<[ServicePort]>,
    /// Whether internalTrafficPolicy is Local (E5).
    pub internal_local: bool,
    /// Whether externalTrafficPolicy is Local and applies to the type (E5).
    pub external_local: bool,
    /// The timeout of session affinity in seconds (A1).
    pub affinity: Option<u32>,
    /// The healthCheckNodePort, if it applies (H1).
    pub health_check_port: Option<u16>,
    /// The fate of clients' TCP connections when their backend stops serving.
    pub on_removal: Removal,
}

/// The fate of sockets after their backend stopped serving.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub enum Removal {
    /// weir keeps them; the client notices by itself.
    #[default]
    Keep,
    /// weir closes them, unless the backend serves again by then.
    Reset {
        /// The time from the moment the backend stopped serving.
        after: Duration,
    },
}

/// A port of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// The name, empty if it has none.
    pub name: Arc<str>,
    /// The transport protocol.
    pub protocol: Protocol,
    /// The port on ClusterIPs, external IPs and load balancer addresses.
    pub port: u16,
    /// The NodePort, 0 without one.
    pub node_port: u16,
}

impl Service {
    /// Reads a Service. `None` if weir does not serve it: another proxy does (W1), it is headless or an
    /// ExternalName (W4), or it has no ClusterIP of a served family (W5). Values that weir cannot use are
    /// left out and added to `problems` (W9).
    #[must_use]
    pub fn read(service: &api::Service, settings: &Settings, problems: &mut Vec<Problem>) -> Option<Self> {
        if service.metadata.labels.as_ref().is_some_and(|labels| labels.contains_key(PROXY_NAME_LABEL)) {
            return None;
        }
        let spec = service.spec.as_ref()?;
        let kind = spec.type_.as_deref().unwrap_or("ClusterIP");
        if kind == "ExternalName" || matches!(spec.cluster_ip.as_deref(), None | Some("" | "None")) {
            return None;
        }
        let mut cluster_ips = read_cluster_ips(spec, problems);
        for family in Family::ALL {
            if !settings.families.get(family) {
                *cluster_ips.get_mut(family) = None;
            }
        }
        if cluster_ips == PerFamily::default() {
            return None;
        }
        let has_external_ips = spec.external_ips.as_ref().is_some_and(|ips| !ips.is_empty());
        let external_local = spec.external_traffic_policy.as_deref() == Some("Local")
            && (matches!(kind, "LoadBalancer" | "NodePort") || (kind == "ClusterIP" && has_external_ips));
        let health_check = kind == "LoadBalancer" && external_local;
        Some(Self {
            name: ObjectName::of(&service.metadata),
            uid: service.metadata.uid.as_deref().and_then(Uid::read),
            created: service.metadata.creation_timestamp.as_ref().map_or(i64::MAX, |time| time.0.as_second()),
            cluster_ips,
            external_ips: read_external_ips(spec, settings, problems),
            load_balancer_ips: read_load_balancer_ips(service, problems),
            source_ranges: read_source_ranges(spec, problems),
            ports: read_ports(spec, problems),
            internal_local: spec.internal_traffic_policy.as_deref() == Some("Local"),
            external_local,
            affinity: read_affinity(spec),
            health_check_port: health_check.then(|| port_number(spec.health_check_node_port)).flatten(),
            on_removal: read_removal(service, problems),
        })
    }

    /// The families in which it is served.
    pub fn families(&self) -> impl Iterator<Item = Family> + '_ {
        Family::ALL.into_iter().filter(|family| self.cluster_ips.get(*family).is_some())
    }
}

/// Reads the ClusterIP of each family (W5).
fn read_cluster_ips(spec: &api::ServiceSpec, problems: &mut Vec<Problem>) -> PerFamily<Option<IpAddr>> {
    let mut found = PerFamily::default();
    let mut take = |field: String, text: &str, wanted: Option<Family>| match read_address(text) {
        Err(reason) => problems.push(Problem::new(field, text, reason)),
        Ok(ip) if wanted.is_some_and(|family| family != Family::of(ip)) => {
            problems.push(Problem::new(field, text, "not of the family that spec.ipFamilies gives it"));
        }
        Ok(ip) => *found.get_mut(Family::of(ip)) = Some(ip),
    };
    let families = spec.ip_families.as_deref().unwrap_or_default();
    if families.is_empty() {
        take("spec.clusterIP".to_owned(), spec.cluster_ip.as_deref().unwrap_or_default(), None);
    }
    let ips = spec.cluster_ips.as_deref().unwrap_or_default();
    for (index, (family, ip)) in families.iter().zip(ips).enumerate() {
        let family = Family::ALL.into_iter().find(|known| known.to_string() == *family);
        if let Some(family) = family {
            take(format!("spec.clusterIPs[{index}]"), ip, Some(family));
        }
    }
    found
}

/// Parses an address that a Service can have, or returns why it cannot.
fn read_address(text: &str) -> Result<IpAddr, &'static str> {
    let address = parse_address(text).ok_or("not an IP address")?;
    unusable(address).map_or(Ok(address), Err)
}

fn read_external_ips(
    spec: &api::ServiceSpec,
    settings: &Settings,
    problems: &mut Vec<Problem>,
) -> Box<[IpAddr]> {
    if !settings.external_ips {
        return Box::default();
    }
    let ips = spec.external_ips.iter().flatten().enumerate();
    sorted(ips.filter_map(|(index, ip)| {
        let known = read_address(ip);
        known
            .map_err(|reason| problems.push(Problem::new(format!("spec.externalIPs[{index}]"), ip, reason)))
            .ok()
    }))
}

/// Reads the addresses that the node serves, according to their ipMode (R11).
fn read_load_balancer_ips(service: &api::Service, problems: &mut Vec<Problem>) -> Box<[IpAddr]> {
    let balancer = service.status.as_ref().and_then(|status| status.load_balancer.as_ref());
    let ingress = balancer.and_then(|balancer| balancer.ingress.as_deref()).unwrap_or_default();
    sorted(ingress.iter().enumerate().filter_map(|(index, entry)| {
        let ip = entry.ip.as_deref().filter(|ip| !ip.is_empty())?;
        if !matches!(entry.ip_mode.as_deref(), None | Some("VIP")) {
            return None;
        }
        let field = || format!("status.loadBalancer.ingress[{index}].ip");
        read_address(ip).map_err(|reason| problems.push(Problem::new(field(), ip, reason))).ok()
    }))
}

fn read_source_ranges(spec: &api::ServiceSpec, problems: &mut Vec<Problem>) -> Box<[IpNet]> {
    let ranges = spec.load_balancer_source_ranges.iter().flatten().enumerate();
    sorted(ranges.filter_map(|(index, range)| {
        let known = parse_network(range);
        if known.is_none() {
            let field = format!("spec.loadBalancerSourceRanges[{index}]");
            problems.push(Problem::new(field, range, "not a network in CIDR notation"));
        }
        known
    }))
}

fn read_ports(spec: &api::ServiceSpec, problems: &mut Vec<Problem>) -> Box<[ServicePort]> {
    let mut ports: Vec<ServicePort> = Vec::new();
    let mut known = FxHashSet::default();
    for (index, port) in spec.ports.iter().flatten().enumerate() {
        let field = |name: &str| format!("spec.ports[{index}].{name}");
        let protocol = port.protocol.as_deref().unwrap_or("TCP");
        let Ok(protocol) = protocol.parse::<Protocol>() else {
            problems.push(Problem::new(field("protocol"), protocol, "not one of TCP, UDP and SCTP"));
            continue;
        };
        let Some(number) = port_number(Some(port.port)) else {
            problems.push(Problem::new(field("port"), &port.port.to_string(), "not a port number"));
            continue;
        };
        let name: Arc<str> = match port.name.as_deref() {
            None | Some("") => Arc::default(),
            Some(name) => name.into(),
        };
        if !known.insert((Arc::clone(&name), protocol)) {
            problems.push(Problem::new(field("name"), &name, "the name of an earlier port of this protocol"));
            continue;
        }
        let node_port = port_number(port.node_port).unwrap_or(0);
        ports.push(ServicePort { name, protocol, port: number, node_port });
    }
    ports.into()
}

/// Affinity is always by client address (A1).
fn read_affinity(spec: &api::ServiceSpec) -> Option<u32> {
    (spec.session_affinity.as_deref() == Some("ClientIP")).then(|| {
        let config = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
        let seconds = config.and_then(|config| config.timeout_seconds);
        seconds.and_then(|seconds| u32::try_from(seconds).ok()).unwrap_or(DEFAULT_AFFINITY)
    })
}

/// Reads `keep`, `reset`, or `reset-after=` with a duration in Go's form. Without the annotation connections
/// are kept.
fn read_removal(service: &api::Service, problems: &mut Vec<Problem>) -> Removal {
    let annotations = service.metadata.annotations.as_ref();
    let Some(text) = annotations.and_then(|annotations| annotations.get(ON_BACKEND_REMOVAL)) else {
        return Removal::Keep;
    };
    let wanted = match (text.as_str(), text.strip_prefix("reset-after=")) {
        ("keep", _) => Some(Removal::Keep),
        ("reset", _) => Some(Removal::Reset { after: Duration::ZERO }),
        (_, Some(after)) => read_duration(after).map(|after| Removal::Reset { after }),
        _ => None,
    };
    wanted.unwrap_or_else(|| {
        let field = format!("metadata.annotations[{ON_BACKEND_REMOVAL}]");
        problems.push(Problem::new(field, text, "not one of keep, reset and reset-after=30s"));
        Removal::Keep
    })
}

fn read_duration(text: &str) -> Option<Duration> {
    let duration = if text == "0" { SignedDuration::ZERO } else { text.parse().ok()? };
    Duration::try_from(duration).ok()
}

fn port_number(number: Option<i32>) -> Option<u16> {
    number.and_then(|number| u16::try_from(number).ok()).filter(|number| *number != 0)
}

fn sorted<T: Ord>(items: impl Iterator<Item = T>) -> Box<[T]> {
    let mut items: Vec<T> = items.collect();
    items.sort_unstable();
    items.dedup();
    items.into()
}
