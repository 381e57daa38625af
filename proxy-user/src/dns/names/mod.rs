//! Every Service and endpoint by name, for DNS answers.
//!
//! In: the model's [`Change`]s, including headless Services, ExternalNames and Services of other proxies. Out:
//! look-ups by name and by address. Used with `--dns` only; planning does not need it.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use k8s_openapi::api::core::v1::Node;
use rustc_hash::FxHashMap;
use smallvec::SmallVec;

use crate::model::{
    Change, DNS_PORT, DnsService, DnsServices, Kind, Object, ObjectName, Protocol, ZONE_LABEL, parse_network,
};

mod read;

pub use read::{NamedEndpoint, NamedKind, NamedPort, NamedService, NamedSlice, Nearness};

/// The zone of an endpoint without a zone.
const NO_ZONE: u16 = u16::MAX;

/// A Service and its slices, which may arrive in any order.
#[derive(Debug, Default)]
pub struct Named {
    service: Option<Box<NamedService>>,
    slices: Vec<(ObjectName, NamedSlice)>,
}

impl Named {
    /// The Service; `None` if only slices have arrived.
    #[must_use]
    pub fn service(&self) -> Option<&NamedService> {
        self.service.as_deref()
    }

    /// The slices, sorted by name.
    pub fn slices(&self) -> impl Iterator<Item = &NamedSlice> {
        self.slices.iter().map(|(_, slice)| slice)
    }

    fn is_headless(&self) -> bool {
        self.service().is_some_and(NamedService::is_headless)
    }

    fn take_slice(&mut self, name: &ObjectName) -> Option<NamedSlice> {
        let place = self.slices.binary_search_by(|(known, _)| known.cmp(name)).ok()?;
        Some(self.slices.remove(place).1)
    }
}

/// Every Service and endpoint by name.
#[derive(Debug, Default)]
pub struct Names {
    node_name: String,
    /// The number of this node's zone.
    zone: Option<u16>,
    zones: Vec<Box<str>>,
    pod_networks: Vec<IpNet>,
    dns_services: DnsServices,
    services: FxHashMap<ObjectName, Named>,
    /// The Service of each slice.
    slices: FxHashMap<ObjectName, ObjectName>,
    /// The number of Services in each namespace.
    namespaces: FxHashMap<Box<str>, usize>,
    /// The Services of each address: of ClusterIPs, and of endpoints of headless Services.
    owners: FxHashMap<IpAddr, SmallVec<[ObjectName; 1]>>,
    synced: [bool; 2],
    changes: u32,
}

impl Names {
    /// Without names, for the node `node_name`.
    #[must_use]
    pub fn new(node_name: &str) -> Self {
        Self { node_name: node_name.to_owned(), ..Self::default() }
    }

    /// With the setting that selects the cluster's DNS Service.
    #[must_use]
    pub fn with_dns_service(self, setting: DnsService) -> Self {
        Self { dns_services: DnsServices::new(setting), ..self }
    }

    /// Applies one change.
    pub fn apply(&mut self, change: &Change) {
        match change {
            Change::Apply(Object::Service(service)) => {
                let name = ObjectName::of(&service.metadata);
                self.dns_services.set(&name, service);
                self.set_service(&name, NamedService::read(service));
            }
            Change::Apply(Object::EndpointSlice(slice)) => {
                let Self { zones, node_name, .. } = self;
                let read = NamedSlice::read(slice, node_name, |zone| number(zones, zone));
                self.set_slice(&ObjectName::of(&slice.metadata), read);
            }
            Change::Apply(Object::Node(node)) => {
                if node.metadata.name.as_deref() == Some(self.node_name.as_str()) {
                    let zone = node.metadata.labels.as_ref().and_then(|labels| labels.get(ZONE_LABEL));
                    self.pod_networks = pod_networks(node);
                    self.zone = zone.map(|zone| number(&mut self.zones, Some(zone.as_str())));
                }
            }
            Change::Delete(Kind::Service, name) => {
                self.dns_services.remove(name);
                self.set_service(name, None);
            }
            Change::Delete(Kind::EndpointSlice, name) => self.set_slice(name, None),
            Change::Synced(Kind::Service) => self.synced[0] = true,
            Change::Synced(Kind::EndpointSlice) => self.synced[1] = true,
            Change::Apply(Object::ServiceCidr(_)) | Change::Delete(..) | Change::Synced(_) => return,
        }
        self.changes = self.changes.wrapping_add(1);
    }

    /// Whether the lists of Services and EndpointSlices are complete. Then an unknown name does not exist.
    #[must_use]
    pub fn is_synced(&self) -> bool {
        self.synced == [true; 2]
    }

    /// The podCIDRs of this Node.
    #[must_use]
    pub fn pod_networks(&self) -> &[IpNet] {
        &self.pod_networks
    }

    /// The number of applied changes, which is the zone's serial number.
    #[must_use]
    pub fn changes(&self) -> u32 {
        self.changes
    }

    /// The Service `namespace/name`, with its slices.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Named> {
        self.services.get(name)
    }

    /// Whether a namespace has any Service.
    #[must_use]
    pub fn has_namespace(&self, namespace: &str) -> bool {
        self.namespaces.contains_key(namespace)
    }

    /// The Services that have this address as a ClusterIP, and headless Services that have it as an endpoint.
    #[must_use]
    pub fn owners(&self, address: IpAddr) -> &[ObjectName] {
        self.owners.get(&address).map_or(&[], |owners| owners)
    }

    /// The name of the cluster's DNS Service. If the configuration names it, it need not exist.
    #[must_use]
    pub fn dns_service(&self) -> Option<&ObjectName> {
        self.dns_services.chosen()
    }

    /// The ClusterIPs of the cluster's DNS Service; `None` when it does not exist.
    #[must_use]
    pub fn dns_addresses(&self) -> Option<&[IpAddr]> {
        let service = self.services.get(self.dns_service()?)?.service()?;
        Some(match &service.kind {
            NamedKind::Addresses(ips) => ips,
            NamedKind::Endpoints | NamedKind::Alias(_) => &[],
        })
    }

    /// Address and port of each ready endpoint of the cluster's DNS Service, sorted.
    #[must_use]
    pub fn dns_endpoints(&self) -> Vec<SocketAddr> {
        let named = self.dns_service().and_then(|name| self.services.get(name));
        let Some((named, of)) = named.and_then(|named| Some((named, named.service()?))) else {
            return Vec::new();
        };
        let mut ports =
            of.ports.iter().filter(|known| known.port == DNS_PORT && known.protocol == Protocol::Udp);
        let Some(port) = ports.next() else { return Vec::new() };
        let mut found = Vec::new();
        for slice in named.slices() {
            let same = |known: &&NamedPort| known.name == port.name && known.protocol == port.protocol;
            let Some(port) = slice.ports.iter().find(same) else { continue };
            let ready = slice.endpoints.iter().filter(|endpoint| endpoint.ready);
            found.extend(ready.map(|endpoint| SocketAddr::new(endpoint.address, port.port)));
        }
        found.sort_unstable();
        found.dedup();
        found
    }

    /// Whether an endpoint is in this node's zone.
    #[must_use]
    pub fn in_zone(&self, endpoint: &NamedEndpoint) -> bool {
        self.zone == Some(endpoint.zone)
    }

    fn set_service(&mut self, name: &ObjectName, service: Option<NamedService>) {
        if service.is_none() && !self.services.contains_key(name) {
            return;
        }
        let named = self.services.entry(name.clone()).or_default();
        let (was, is) = (named.is_headless(), service.as_ref().is_some_and(NamedService::is_headless));
        let before = std::mem::replace(&mut named.service, service.map(Box::new));
        let ips = |service: Option<&NamedService>| match service.map(|service| &service.kind) {
            Some(NamedKind::Addresses(ips)) => ips.to_vec(),
            _ => Vec::new(),
        };
        let (gone, come) = (ips(before.as_deref()), ips(named.service()));
        let endpoints: Vec<IpAddr> = if was == is { Vec::new() } else { addresses(named.slices()) };
        self.count_namespace(name, before.is_some(), self.services[name].service.is_some());
        gone.into_iter().for_each(|ip| self.disown(ip, name));
        come.into_iter().for_each(|ip| self.own(ip, name));
        endpoints.into_iter().for_each(|ip| if is { self.own(ip, name) } else { self.disown(ip, name) });
        self.forget_if_empty(name);
    }

    fn set_slice(&mut self, name: &ObjectName, slice: Option<(ObjectName, NamedSlice)>) {
        if let Some(service) = self.slices.remove(name)
            && let Some(named) = self.services.get_mut(&service)
        {
            let before = named.take_slice(name);
            if named.is_headless() {
                addresses(before.iter()).into_iter().for_each(|ip| self.disown(ip, &service));
            }
            if slice.as_ref().is_none_or(|(now, _)| *now != service) {
                self.forget_if_empty(&service);
            }
        }
        let Some((service, slice)) = slice else { return };
        // All slices of a Service share one allocation of its name.
        let service = self.services.get_key_value(&service).map_or(service, |(known, _)| known.clone());
        let named = self.services.entry(service.clone()).or_default();
        let ips = if named.is_headless() { addresses([&slice].into_iter()) } else { Vec::new() };
        let place = named.slices.partition_point(|(known, _)| known < name);
        named.slices.reserve_exact(1);
        named.slices.insert(place, (name.clone(), slice));
        ips.into_iter().for_each(|ip| self.own(ip, &service));
        self.slices.insert(name.clone(), service);
    }

    fn forget_if_empty(&mut self, name: &ObjectName) {
        if self.services.get(name).is_some_and(|named| named.service.is_none() && named.slices.is_empty()) {
            self.services.remove(name);
        }
    }

    fn count_namespace(&mut self, name: &ObjectName, before: bool, now: bool) {
        let namespace = name.namespace();
        match (before, now) {
            (false, true) => *self.namespaces.entry(namespace.into()).or_default() += 1,
            (true, false) => {
                let left = self.namespaces.get_mut(namespace).map(|count| {
                    *count -= 1;
                    *count
                });
                if left == Some(0) {
                    self.namespaces.remove(namespace);
                }
            }
            _ => {}
        }
    }

    fn own(&mut self, ip: IpAddr, name: &ObjectName) {
        // One entry for each slice that lists the address: two slices may list it for a moment.
        self.owners.entry(ip).or_default().push(name.clone());
    }

    fn disown(&mut self, ip: IpAddr, name: &ObjectName) {
        let Some(owners) = self.owners.get_mut(&ip) else { return };
        if let Some(place) = owners.iter().position(|owner| owner == name) {
            owners.swap_remove(place);
        }
        if owners.is_empty() {
            self.owners.remove(&ip);
        }
    }
}

fn pod_networks(node: &Node) -> Vec<IpNet> {
    let networks = node.spec.as_ref().and_then(|spec| spec.pod_cidrs.as_deref()).unwrap_or_default();
    networks.iter().filter_map(|network| parse_network(network)).collect()
}

fn addresses<'a>(slices: impl Iterator<Item = &'a NamedSlice>) -> Vec<IpAddr> {
    slices.flat_map(|slice| &slice.endpoints).map(|endpoint| endpoint.address).collect()
}

/// The number of a zone, added if it is new. A cluster has few zones; beyond 65,535 an endpoint counts as without a
/// zone.
fn number(zones: &mut Vec<Box<str>>, zone: Option<&str>) -> u16 {
    let Some(zone) = zone.filter(|zone| !zone.is_empty()) else { return NO_ZONE };
    let known = zones.iter().position(|known| **known == *zone).or_else(|| {
        zones.push(zone.into());
        Some(zones.len() - 1)
    });
    known.and_then(|place| u16::try_from(place).ok()).unwrap_or(NO_ZONE)
}
