//! A Service and an EndpointSlice as far as names are made of them.
//!
//! In: the API's objects. Out: [`NamedService`] and [`NamedSlice`], compact and without what only routing needs. What
//! cannot be understood is left out without a word: the model tells of it already, where it concerns a proxy.

use std::{net::IpAddr, sync::Arc};

use k8s_openapi::api::{core::v1 as core, discovery::v1 as discovery};

use crate::model::{Family, ObjectName, Protocol, SERVICE_NAME_LABEL, ServicePort, parse_address};

/// What the name of a Service stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NamedKind {
    /// Its ClusterIPs, at most one of each family.
    Addresses(Box<[IpAddr]>),
    /// Its endpoints: it is headless.
    Endpoints,
    /// Another name: it is an ExternalName.
    Alias(Box<str>),
}

/// Which endpoints of a headless Service are best from a node, as `spec.trafficDistribution` says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Nearness {
    /// All the same.
    #[default]
    Any,
    /// Those in the node's zone.
    SameZone,
    /// Those on the node, then those in its zone.
    SameNode,
}

/// A Service as its names have it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedService {
    /// What its name stands for.
    pub kind: NamedKind,
    /// Its ports, with their names; NodePorts are not told.
    pub ports: Box<[ServicePort]>,
    /// Whether endpoints that are not ready count too.
    pub publish_not_ready: bool,
    /// Which endpoints come first where it is headless.
    pub nearness: Nearness,
}

impl NamedService {
    pub(super) fn read(service: &core::Service) -> Option<Self> {
        let spec = service.spec.as_ref()?;
        let kind = match (spec.type_.as_deref(), spec.cluster_ip.as_deref()) {
            (Some("ExternalName"), _) => {
                let target = spec.external_name.as_deref()?.trim_end_matches('.');
                // CoreDNS knows no such Service either: an address is no name.
                if target.is_empty() || target.parse::<IpAddr>().is_ok() {
                    return None;
                }
                NamedKind::Alias(target.into())
            }
            (_, Some("None")) => NamedKind::Endpoints,
            (_, first) => NamedKind::Addresses(cluster_ips(spec, first)?),
        };
        Some(Self {
            kind,
            ports: spec.ports.iter().flatten().filter_map(read_port).collect(),
            publish_not_ready: spec.publish_not_ready_addresses.unwrap_or(false),
            nearness: match spec.traffic_distribution.as_deref() {
                Some("PreferSameNode") => Nearness::SameNode,
                Some("PreferClose" | "PreferSameZone") => Nearness::SameZone,
                _ => Nearness::Any,
            },
        })
    }

    /// Whether its names are made of endpoints.
    #[must_use]
    pub fn is_headless(&self) -> bool {
        self.kind == NamedKind::Endpoints
    }
}

fn cluster_ips(spec: &core::ServiceSpec, first: Option<&str>) -> Option<Box<[IpAddr]>> {
    let all = spec.cluster_ips.iter().flatten().map(String::as_str);
    let mut ips: Vec<IpAddr> = first.into_iter().chain(all).filter_map(parse_address).collect();
    let mut seen = Vec::with_capacity(2);
    ips.retain(|ip| {
        let new = !seen.contains(&Family::of(*ip));
        seen.push(Family::of(*ip));
        new
    });
    (!ips.is_empty()).then(|| ips.into())
}

fn read_port(port: &core::ServicePort) -> Option<ServicePort> {
    Some(ServicePort {
        name: port.name.as_deref().unwrap_or_default().into(),
        protocol: port.protocol.as_deref().unwrap_or("TCP").parse().ok()?,
        port: u16::try_from(port.port).ok().filter(|port| *port != 0)?,
        node_port: 0,
    })
}

/// One port of a slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedPort {
    /// Its name, empty for an unnamed one.
    pub name: Arc<str>,
    /// Its protocol.
    pub protocol: Protocol,
    /// Its number on the endpoints.
    pub port: u16,
}

/// One endpoint of a slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedEndpoint {
    /// Its address.
    pub address: IpAddr,
    /// Whether it is ready.
    pub ready: bool,
    /// Whether it is on this node.
    pub local: bool,
    /// Its zone, as [`super::Names`] numbers them.
    pub zone: u16,
    /// Its host name, where it was given one.
    pub hostname: Option<Box<str>>,
}

impl NamedEndpoint {
    /// The label its own name starts with: its host name, or one made of its address as CoreDNS makes it.
    #[must_use]
    pub fn label(&self) -> String {
        match (&self.hostname, self.address) {
            (Some(hostname), _) => hostname.to_string(),
            (None, IpAddr::V4(address)) => address.to_string().replace('.', "-"),
            (None, IpAddr::V6(address)) => {
                let label = address.to_string().replace(':', "-");
                // A label may not end with a dash.
                if label.ends_with('-') { label + "0" } else { label }
            }
        }
    }
}

/// One EndpointSlice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedSlice {
    /// Its ports.
    pub ports: Box<[NamedPort]>,
    /// Its endpoints.
    pub endpoints: Box<[NamedEndpoint]>,
}

impl NamedSlice {
    /// The slice and the Service it belongs to; `zone` numbers the zones.
    pub(super) fn read(
        slice: &discovery::EndpointSlice,
        node_name: &str,
        mut zone: impl FnMut(Option<&str>) -> u16,
    ) -> Option<(ObjectName, Self)> {
        let service =
            slice.metadata.labels.as_ref()?.get(SERVICE_NAME_LABEL).filter(|name| !name.is_empty())?;
        let family = Family::ALL.into_iter().find(|family| family.to_string() == slice.address_type)?;
        let endpoints = slice.endpoints.iter().flatten().filter_map(|endpoint| {
            let address = parse_address(endpoint.addresses.first()?)?;
            let hostname = endpoint.hostname.as_deref().filter(|name| !name.is_empty());
            (Family::of(address) == family).then(|| NamedEndpoint {
                address,
                ready: endpoint.conditions.as_ref().and_then(|known| known.ready).unwrap_or(true),
                local: !node_name.is_empty() && endpoint.node_name.as_deref() == Some(node_name),
                zone: zone(endpoint.zone.as_deref()),
                hostname: hostname.map(|name| name.to_ascii_lowercase().into()),
            })
        });
        let endpoints = endpoints.collect();
        let ports = slice.ports.iter().flatten().filter_map(|port| {
            Some(NamedPort {
                name: port.name.as_deref().unwrap_or_default().into(),
                protocol: port.protocol.as_deref().unwrap_or("TCP").parse().ok()?,
                port: u16::try_from(port.port?).ok().filter(|port| *port != 0)?,
            })
        });
        let namespace = slice.metadata.namespace.as_deref().unwrap_or_default();
        Some((ObjectName::new(namespace, service), Self { ports: ports.collect(), endpoints }))
    }
}
