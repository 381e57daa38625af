//! The endpoints of one Service: its EndpointSlices, stored one by one and merged when a plan needs them.
//!
//! In: the API's EndpointSlices. Out: the endpoints of a service port in one family, sorted, each once.

use std::net::IpAddr;

use k8s_openapi::api::discovery::v1 as api;
use rustc_hash::FxHashMap;
use smallvec::SmallVec;

use super::{Family, ObjectName, Problem, Protocol, parse_address};

/// A slice with this label, whatever its value, belongs to a headless Service (W2).
pub const HEADLESS_LABEL: &str = "service.kubernetes.io/headless";

/// The label with the name of the slice's Service (W7).
pub const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";

/// An endpoint of a slice, for all ports of the slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// The first address of the endpoint.
    pub address: IpAddr,
    /// Whether it should get new connections (E2).
    pub ready: bool,
    /// Whether it still answers, even if it is terminating (E2).
    pub serving: bool,
    /// Whether its pod is being deleted (E2).
    pub terminating: bool,
    /// Whether it is on this node (E1).
    pub local: bool,
    /// Whether the slice does not name its node, as in slices written by hand.
    pub unplaced: bool,
    /// Whether its node hints name this node; `None` without node hints (E9).
    pub node_hint: Option<bool>,
    /// The zones of its hints, sorted (E9).
    pub zones: Option<Box<[Box<str>]>>,
}

/// A port of a slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlicePort {
    /// The name, empty for an unnamed port.
    pub name: Box<str>,
    /// The transport protocol.
    pub protocol: Protocol,
    /// The number of the port on the endpoints (W6).
    pub port: u16,
}

impl Endpoint {
    /// Decides which of several listings of an endpoint counts (E3): first the one that is not terminating,
    /// because a new pod may have got the address of a terminating one; then the ready one, then the serving
    /// one.
    const fn weight(&self) -> (bool, bool, bool) {
        (!self.terminating, self.ready, self.serving)
    }
}

impl SlicePort {
    /// The key by which a service port finds it (W6).
    fn key(&self) -> (&str, Protocol) {
        (&self.name, self.protocol)
    }
}

/// An EndpointSlice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    /// The address family.
    pub family: Family,
    /// The ports, sorted by name and protocol.
    pub ports: Box<[SlicePort]>,
    /// The endpoints, in the order of the slice.
    pub endpoints: Box<[Endpoint]>,
}

impl Slice {
    /// Reads a slice and the name of its Service. `None` for a slice that weir does not use: headless (W2),
    /// without a Service, or without IP addresses (W7). Values that weir cannot use are left out and added to
    /// `problems`.
    #[must_use]
    pub fn read(
        slice: &api::EndpointSlice,
        node_name: &str,
        problems: &mut Vec<Problem>,
    ) -> Option<(ObjectName, Self)> {
        let label = |name: &str| slice.metadata.labels.as_ref().and_then(|labels| labels.get(name));
        if label(HEADLESS_LABEL).is_some() {
            return None;
        }
        let Some(service) = label(SERVICE_NAME_LABEL).filter(|name| !name.is_empty()) else {
            let field = format!("metadata.labels[{SERVICE_NAME_LABEL}]");
            problems.push(Problem::new(field, "", "not the name of a Service"));
            return None;
        };
        let family = Family::ALL.into_iter().find(|family| family.to_string() == slice.address_type)?;
        let endpoints = slice.endpoints.iter().flatten().enumerate();
        let mut ports: Box<[SlicePort]> = slice.ports.iter().flatten().filter_map(read_port).collect();
        // The sort is stable, so that ports of one name stay in the slice's order.
        ports.sort_by(|a, b| a.key().cmp(&b.key()));
        let read = Self {
            family,
            ports,
            endpoints: endpoints
                .filter_map(|(index, endpoint)| read_endpoint(index, endpoint, family, node_name, problems))
                .collect(),
        };
        let namespace = slice.metadata.namespace.as_deref().unwrap_or_default();
        Some((ObjectName::new(namespace, service), read))
    }
}

impl Slice {
    /// The ports with this name and protocol.
    fn named<'a>(&'a self, key: (&'a str, Protocol)) -> impl Iterator<Item = &'a SlicePort> {
        let first = self.ports.partition_point(|known| known.key() < key);
        self.ports[first..].iter().take_while(move |known| known.key() == key)
    }

    fn has(&self, port: &SlicePort) -> bool {
        self.named(port.key()).any(|known| known == port)
    }
}

/// A slice port without a name or a number is skipped (W8).
fn read_port(port: &api::EndpointPort) -> Option<SlicePort> {
    Some(SlicePort {
        name: port.name.as_deref()?.into(),
        protocol: port.protocol.as_deref().unwrap_or("TCP").parse().ok()?,
        port: u16::try_from(port.port?).ok().filter(|port| *port != 0)?,
    })
}

fn read_endpoint(
    index: usize,
    endpoint: &api::Endpoint,
    family: Family,
    node_name: &str,
    problems: &mut Vec<Problem>,
) -> Option<Endpoint> {
    let text = endpoint.addresses.first()?;
    let Some(address) = parse_address(text).filter(|address| Family::of(*address) == family) else {
        let field = format!("endpoints[{index}].addresses[0]");
        problems.push(Problem::new(field, text, "not an address of the slice's addressType"));
        return None;
    };
    let condition =
        |read: fn(&api::EndpointConditions) -> Option<bool>| endpoint.conditions.as_ref().and_then(read);
    let hints = endpoint.hints.as_ref();
    let nodes = hints.and_then(|hints| hints.for_nodes.as_deref()).filter(|nodes| !nodes.is_empty());
    let node = endpoint.node_name.as_deref().filter(|node| !node.is_empty());
    let zones = hints.and_then(|hints| hints.for_zones.as_deref()).filter(|zones| !zones.is_empty());
    Some(Endpoint {
        address,
        ready: condition(|conditions| conditions.ready).unwrap_or(true),
        serving: condition(|conditions| conditions.serving).unwrap_or(true),
        terminating: condition(|conditions| conditions.terminating).unwrap_or(false),
        local: node == Some(node_name),
        unplaced: node.is_none(),
        node_hint: nodes.map(|nodes| nodes.iter().any(|node| node.name == node_name)),
        zones: zones.map(|zones| {
            let mut zones: Vec<Box<str>> = zones.iter().map(|zone| zone.name.as_str().into()).collect();
            zones.sort_unstable();
            zones.into()
        }),
    })
}

/// An endpoint, with the number that a service port has on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate<'a> {
    /// The endpoint itself.
    pub endpoint: &'a Endpoint,
    /// The number of the port on the endpoint.
    pub port: u16,
}

/// All slices of one Service, sorted by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Endpoints {
    slices: Vec<(ObjectName, Slice)>,
}

impl Endpoints {
    /// Adds or replaces a slice. Returns whether the endpoints changed.
    pub fn set(&mut self, name: ObjectName, slice: Slice) -> bool {
        match self.slices.binary_search_by(|(known, _)| known.cmp(&name)) {
            Ok(index) if self.slices[index].1 == slice => return false,
            Ok(index) => self.slices[index].1 = slice,
            Err(index) => {
                self.slices.reserve_exact(1);
                self.slices.insert(index, (name, slice));
            }
        }
        true
    }

    /// Removes a slice. Returns whether it was there.
    pub fn remove(&mut self, name: &ObjectName) -> bool {
        let found = self.slices.binary_search_by(|(known, _)| known.cmp(name));
        found.is_ok_and(|index| {
            self.slices.remove(index);
            true
        })
    }

    /// Whether the Service has no slices.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.slices.is_empty()
    }

    /// Whether any endpoint has a zone hint.
    #[must_use]
    pub fn has_zone_hints(&self) -> bool {
        self.slices.iter().flat_map(|(_, slice)| &slice.endpoints).any(|endpoint| endpoint.zones.is_some())
    }

    /// The endpoints of a service port (W6) in one family, sorted, each address and port once. If several
    /// slices list an endpoint, the listing counts that is not terminating, then the ready one, then the
    /// serving one (E3); among equal ones that of the last slice by name.
    #[must_use]
    pub fn of(&self, port: &str, protocol: Protocol, family: Family) -> Vec<Candidate<'_>> {
        let slices = self.slices.iter().map(|(_, slice)| slice).filter(|slice| slice.family == family);
        let mut found: Vec<Candidate<'_>> = slices
            .flat_map(|slice| {
                slice.named((port, protocol)).flat_map(|known| {
                    slice.endpoints.iter().map(|endpoint| Candidate { endpoint, port: known.port })
                })
            })
            .collect();
        found.sort_by_key(|candidate| (candidate.endpoint.address, candidate.port));
        found.dedup_by(|later, kept| {
            let same = later.endpoint.address == kept.endpoint.address && later.port == kept.port;
            if same && later.endpoint.weight() >= kept.endpoint.weight() {
                *kept = *later;
            }
            same
        });
        found
    }

    /// The number of distinct addresses of local ready endpoints over all ports (H2).
    #[must_use]
    pub fn local_ready(&self, family: Family) -> usize {
        let slices = self.slices.iter().map(|(_, slice)| slice);
        let slices = slices.filter(|slice| slice.family == family && !slice.ports.is_empty());
        let mut listed: FxHashMap<IpAddr, Listings<'_>> = FxHashMap::default();
        for slice in slices {
            for endpoint in &slice.endpoints {
                listed.entry(endpoint.address).or_default().push((slice, endpoint));
            }
        }
        listed.values().filter(|listings| is_local_ready(listings)).count()
    }
}

/// The listings of an address, in the order of slice names; mostly one.
type Listings<'a> = SmallVec<[(&'a Slice, &'a Endpoint); 1]>;

/// Whether the address is that of a local ready endpoint for at least one port.
fn is_local_ready(listings: &Listings<'_>) -> bool {
    let wanted = |endpoint: &Endpoint| endpoint.local && endpoint.ready;
    let count = listings.iter().filter(|(_, endpoint)| wanted(endpoint)).count();
    if count == 0 || count == listings.len() {
        return count > 0;
    }
    // Another listing may count for another port (E3).
    listings.iter().flat_map(|(slice, _)| &slice.ports).any(|port| {
        let having = listings.iter().filter(|(slice, _)| slice.has(port)).map(|(_, endpoint)| *endpoint);
        having.max_by_key(|endpoint| endpoint.weight()).is_some_and(wanted)
    })
}
