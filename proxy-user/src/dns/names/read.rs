//! Reads the fields of Services and EndpointSlices that DNS answers need.
//!
//! In: the API's objects. Out: [`NamedService`] and [`NamedSlice`], compact and without the fields that only planning
//! needs. Fields that cannot be read are skipped without a log line, because the model already reports those that
//! concern a proxy.

use std::{net::IpAddr, sync::Arc};

use k8s_openapi::api::{core::v1 as core, discovery::v1 as discovery};

use crate::model::{Family, ObjectName, Protocol, SERVICE_NAME_LABEL, ServicePort, parse_address};

/// The records behind the name of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NamedKind {
    /// ClusterIPs, at most one of each family.
    Addresses(Box<[IpAddr]>),
    /// The endpoints of a headless Service.
    Endpoints,
    /// The target of an ExternalName.
    Alias(Box<str>),
}

/// Which endpoints of a headless Service a node prefers, by `spec.trafficDistribution`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Nearness {
    /// All endpoints alike.
    #[default]
    Any,
    /// Endpoints in the node's zone.
    SameZone,
    /// Endpoints on the node, else endpoints in its zone.
    SameNode,
}

/// A Service, with the fields for DNS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedService {
    /// ClusterIPs, endpoints or an alias.
    pub kind: NamedKind,
    /// The ports with their names, without NodePorts.
    pub ports: Box<[ServicePort]>,
    /// `publishNotReadyAddresses`: endpoints that are not ready count too.
    pub publish_not_ready: bool,
    /// Only for headless Services.
    pub nearness: Nearness,
}

impl NamedService {
    pub(super) fn read(service: &core::Service) -> Option<Self> {
        let spec = service.spec.as_ref()?;
        let kind = match (spec.type_.as_deref(), spec.cluster_ip.as_deref()) {
            (Some("ExternalName"), _) => {
                let target = spec.external_name.as_deref()?.trim_end_matches('.');
                // CoreDNS ignores such a Service too, because an address cannot be the target of an alias.
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

    /// Whether its records are those of its endpoints.
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
    /// Empty for an unnamed port.
    pub name: Arc<str>,
    /// TCP by default.
    pub protocol: Protocol,
    /// The number on the endpoints.
    pub port: u16,
}

/// One endpoint of a slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedEndpoint {
    /// The first of its addresses (W8).
    pub address: IpAddr,
    /// True if the condition is not set (E2).
    pub ready: bool,
    /// Whether it is on this node.
    pub local: bool,
    /// Its zone, by the numbers of [`super::Names`].
    pub zone: u16,
    /// In lower case.
    pub hostname: Option<Box<str>>,
}

impl NamedEndpoint {
    /// The first label of the endpoint's own name: its host name, or its address in CoreDNS's form.
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

/// An EndpointSlice, with the fields for DNS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedSlice {
    /// The ports of all its endpoints.
    pub ports: Box<[NamedPort]>,
    /// Only those with an address of the slice's family.
    pub endpoints: Box<[NamedEndpoint]>,
}

impl NamedSlice {
    /// The slice and its Service; `zone` returns the number of a zone.
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
