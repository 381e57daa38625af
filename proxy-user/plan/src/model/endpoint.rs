//! The endpoints of one Service: its EndpointSlices, kept apart and merged when asked.
//!
//! In: the API's EndpointSlices, one by one. Out: for a service port and family, every endpoint once, sorted.

use std::net::IpAddr;

use k8s_openapi::api::discovery::v1 as api;
use rustc_hash::FxHashMap;
use smallvec::SmallVec;

use super::{Family, ObjectName, Problem, Protocol, parse_address};

/// A slice with this label, whatever its value, belongs to a headless Service (W2).
pub const HEADLESS_LABEL: &str = "service.kubernetes.io/headless";

/// The label that says which Service a slice belongs to (W7).
pub const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";

/// One endpoint of a slice, whichever of the slice's ports is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Its address.
    pub address: IpAddr,
    /// Whether it wants traffic (E2).
    pub ready: bool,
    /// Whether it can answer, even if it is about to go (E2).
    pub serving: bool,
    /// Whether it is about to go (E2).
    pub terminating: bool,
    /// Whether it is on this node (E1).
    pub local: bool,
    /// Whether nothing says which node it is on, as in slices written by hand.
    pub unplaced: bool,
    /// Whether its node hints name this node; `None` without node hints (E9).
    pub node_hint: Option<bool>,
    /// The zones its hints name, sorted (E9).
    pub zones: Option<Box<[Box<str>]>>,
}

/// One port of a slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlicePort {
    /// Its name, empty for an unnamed one.
    pub name: Box<str>,
    /// Its protocol.
    pub protocol: Protocol,
    /// Its number on the endpoints (W6).
    pub port: u16,
}

impl Endpoint {
    /// How much counts what is said of an endpoint here, where it is listed elsewhere too: more if it is not about to go,
    /// because a pod may have been given the address of one that is, then more if it is ready, then if it serves (E3).
    const fn weight(&self) -> (bool, bool, bool) {
        (!self.terminating, self.ready, self.serving)
    }
}

impl SlicePort {
    /// By what a service port finds it (W6).
    fn key(&self) -> (&str, Protocol) {
        (&self.name, self.protocol)
    }
}

/// One EndpointSlice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    /// The family of its addresses.
    pub family: Family,
    /// Its ports, sorted by name and protocol.
    pub ports: Box<[SlicePort]>,
    /// Its endpoints.
    pub endpoints: Box<[Endpoint]>,
}

impl Slice {
    /// The slice and the Service it belongs to, or nothing when it is not ours: headless (W2), of no Service, or not of
    /// IP addresses (W7). What cannot be understood is left out and told in `problems`.
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
            problems.push(Problem::new(field, "", "the slice names no Service"));
            return None;
        };
        let family = Family::ALL.into_iter().find(|family| family.to_string() == slice.address_type)?;
        let endpoints = slice.endpoints.iter().flatten().enumerate();
        let mut ports: Box<[SlicePort]> = slice.ports.iter().flatten().filter_map(read_port).collect();
        // Stable, so that ports of one name stay in the slice's order.
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
    /// The ports of this name and protocol.
    fn named<'a>(&'a self, key: (&'a str, Protocol)) -> impl Iterator<Item = &'a SlicePort> {
        let first = self.ports.partition_point(|known| known.key() < key);
        self.ports[first..].iter().take_while(move |known| known.key() == key)
    }

    fn has(&self, port: &SlicePort) -> bool {
        self.named(port.key()).any(|known| known == port)
    }
}

/// A slice port that lacks a name or a number stands for nothing (W8).
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

/// An endpoint with the port number that a service port has on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate<'a> {
    /// The endpoint.
    pub endpoint: &'a Endpoint,
    /// The port's number on it.
    pub port: u16,
}

/// Every slice of one Service, sorted by the slices' names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Endpoints {
    slices: Vec<(ObjectName, Slice)>,
}

impl Endpoints {
    /// Puts a slice in its place and says whether that changes anything.
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

    /// Takes a slice out and says whether it was there.
    pub fn remove(&mut self, name: &ObjectName) -> bool {
        let found = self.slices.binary_search_by(|(known, _)| known.cmp(name));
        found.is_ok_and(|index| {
            self.slices.remove(index);
            true
        })
    }

    /// Whether there is no slice at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.slices.is_empty()
    }

    /// Whether any endpoint carries a zone hint.
    #[must_use]
    pub fn has_zone_hints(&self) -> bool {
        self.slices.iter().flat_map(|(_, slice)| &slice.endpoints).any(|endpoint| endpoint.zones.is_some())
    }

    /// Every endpoint of a service port (W6) in one family, each address and port once, sorted by them. Of one that several
    /// slices list, the one counts that is not terminating, then the ready one, then the serving one (E3), and of equal ones
    /// that of the last slice by name.
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

    /// How many distinct addresses of local ready endpoints there are, over all ports (H2).
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

/// Where an address is listed, in the order of slice names: mostly once.
type Listings<'a> = SmallVec<[(&'a Slice, &'a Endpoint); 1]>;

/// Whether an address is one of a local ready endpoint for at least one port.
fn is_local_ready(listings: &Listings<'_>) -> bool {
    let wanted = |endpoint: &Endpoint| endpoint.local && endpoint.ready;
    let count = listings.iter().filter(|(_, endpoint)| wanted(endpoint)).count();
    if count == 0 || count == listings.len() {
        return count > 0;
    }
    // Which of the listings counts (E3) may be another one from port to port.
    listings.iter().flat_map(|(slice, _)| &slice.ports).any(|port| {
        let having = listings.iter().filter(|(slice, _)| slice.has(port)).map(|(_, endpoint)| *endpoint);
        having.max_by_key(|endpoint| endpoint.weight()).is_some_and(wanted)
    })
}
