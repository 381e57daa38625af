//! Allocates ClusterIPs and NodePorts for Services with a manifest that leaves them open.
//!
//! In: all Services of the directory and the configured ranges. Out: an [`Allocation`] for each Service that
//! needs one. The search starts at a position that is a hash of the Service's name, so the same directory
//! gives the same result on every node and after every restart. An address or port that a manifest names is
//! never allocated to another Service.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ops::RangeInclusive,
};

use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Service, ServicePort, ServiceSpec};
use rustc_hash::FxHashSet;

use super::{
    Allocation, NodePortAllocation,
    address::{Ranges, explicit_ips, families, has_cluster_ips},
};
use crate::model::{Family, Object, ObjectName, Protocol};

/// The addresses and ports that manifests name or that are allocated already.
#[derive(Debug, Default)]
pub(super) struct Taken {
    addresses: FxHashSet<IpAddr>,
    ports: FxHashSet<(Protocol, u16)>,
}

/// An address or port that a Service's manifest names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Claim {
    Address(IpAddr),
    Port(Protocol, u16),
}

/// The claims of a Service, each with its field.
pub(super) fn claims(service: &Service) -> Vec<(String, Claim)> {
    let Some(spec) = service.spec.as_ref().filter(|spec| has_cluster_ips(spec)) else { return Vec::new() };
    let field = |index| match spec.cluster_ips.as_ref().is_some_and(|ips| !ips.is_empty()) {
        true => format!("spec.clusterIPs[{index}]"),
        false => "spec.clusterIP".to_owned(),
    };
    let ips = explicit_ips(spec).into_iter().enumerate();
    let mut claims: Vec<_> = ips.map(|(index, ip)| (field(index), Claim::Address(ip))).collect();
    for (index, port) in spec.ports.iter().flatten().enumerate() {
        if let Some(number) = number(port.node_port) {
            claims.push((format!("spec.ports[{index}].nodePort"), Claim::Port(protocol(port), number)));
        }
    }
    if let Some(number) = number(spec.health_check_node_port) {
        claims.push(("spec.healthCheckNodePort".to_owned(), Claim::Port(Protocol::Tcp, number)));
    }
    claims
}

impl Taken {
    /// Reserves an address or port.
    pub(super) fn take(&mut self, claim: Claim) {
        match claim {
            Claim::Address(address) => self.addresses.insert(address),
            Claim::Port(protocol, port) => self.ports.insert((protocol, port)),
        };
    }
}

/// Allocates what Services lack, in the order of their names. `taken` has the claims of all Services.
///
/// Returns the allocations, and a message for each that failed.
pub(super) fn allocate<'a>(
    services: impl Iterator<Item = (&'a ObjectName, &'a Service)>,
    mut taken: Taken,
    ranges: &Ranges,
    node_ports: &RangeInclusive<u16>,
) -> (BTreeMap<ObjectName, Allocation>, Vec<String>) {
    let (mut allocations, mut shortages) = (BTreeMap::new(), Vec::new());
    for (name, service) in services {
        let Some(spec) = service.spec.as_ref().filter(|spec| has_cluster_ips(spec)) else { continue };
        let mut one = Allocator { name, spec, taken: &mut taken, shortages: &mut shortages };
        let allocation = Allocation {
            service: name.to_string(),
            cluster_ips: one.cluster_ips(ranges),
            node_ports: one.node_ports(node_ports),
            health_check_node_port: one.health_check(node_ports),
        };
        if !allocation.is_empty() {
            allocations.insert(name.clone(), allocation);
        }
    }
    (allocations, shortages)
}

/// Allocates for one Service.
struct Allocator<'a> {
    name: &'a ObjectName,
    spec: &'a ServiceSpec,
    taken: &'a mut Taken,
    shortages: &'a mut Vec<String>,
}

impl Allocator<'_> {
    fn cluster_ips(&mut self, ranges: &Ranges) -> Vec<IpAddr> {
        let mut ips = explicit_ips(self.spec);
        // `check` has already reported an error.
        let families = families(self.spec, ranges).unwrap_or_default();
        if families.len() <= ips.len() {
            return Vec::new();
        }
        for family in families.into_iter().skip(ips.len()) {
            let taken = &mut self.taken.addresses;
            let start = hash(&format!("{}/{family}", self.name));
            match ranges.of(family).find_map(|range| free_address(range, start, taken)) {
                Some(ip) => ips.push(ip),
                None => {
                    self.shortages
                        .push(format!("Service {}: no {family} ClusterIP is left to allocate", self.name));
                    break;
                }
            }
        }
        ips
    }

    fn node_ports(&mut self, range: &RangeInclusive<u16>) -> Vec<NodePortAllocation> {
        let wanted = match self.spec.type_.as_deref() {
            Some("NodePort") => true,
            Some("LoadBalancer") => self.spec.allocate_load_balancer_node_ports != Some(false),
            _ => false,
        };
        let ports: &[ServicePort] = if wanted { self.spec.ports.as_deref().unwrap_or_default() } else { &[] };
        let lacking = ports.iter().filter(|port| number(port.node_port).is_none());
        let asked: Vec<_> =
            lacking.filter_map(|port| Some((protocol(port), u16::try_from(port.port).ok()?))).collect();
        let mut given = Vec::new();
        for (protocol, port) in asked {
            if let Some(node_port) = self.node_port(protocol, &port.to_string(), range) {
                given.push(NodePortAllocation { port, protocol, node_port });
            }
        }
        given
    }

    fn health_check(&mut self, range: &RangeInclusive<u16>) -> Option<u16> {
        let spec = self.spec;
        let wanted = spec.type_.as_deref() == Some("LoadBalancer")
            && spec.external_traffic_policy.as_deref() == Some("Local")
            && number(spec.health_check_node_port).is_none();
        wanted.then(|| self.node_port(Protocol::Tcp, "health", range)).flatten()
    }

    fn node_port(&mut self, protocol: Protocol, which: &str, range: &RangeInclusive<u16>) -> Option<u16> {
        let start = hash(&format!("{}/{which}", self.name));
        let size = u128::from(range.end().saturating_sub(*range.start())) + 1;
        let ports = &mut self.taken.ports;
        let port = positions(size, reserved(size, 32, 128), start)
            .filter_map(|position| range.start().checked_add(u16::try_from(position).ok()?))
            .find(|port| ports.insert((protocol, *port)));
        if port.is_none() {
            self.shortages.push(format!("Service {}: no NodePort is left to allocate", self.name));
        }
        port
    }
}

/// The first free address of the range, from `start` on. The network's own address and the last one of an
/// IPv4 range are never allocated.
fn free_address(range: IpNet, start: u64, taken: &mut FxHashSet<IpAddr>) -> Option<IpAddr> {
    let bits = u32::from(range.max_prefix_len() - range.prefix_len());
    let size = 1u128.checked_shl(bits.min(64)).unwrap_or(1);
    let usable = if matches!(range, IpNet::V4(_)) { size - 1 } else { size };
    positions(usable, reserved(size, 16, 256), start)
        .filter(|position| *position > 0)
        .map(|position| at(range.network(), position))
        .find(|ip| taken.insert(*ip))
}

/// The size of the part at the start of a range that is kept for explicit choices, as in Kubernetes.
fn reserved(size: u128, part: u128, most: u128) -> u128 {
    (size / part).clamp(16.min(size), most)
}

/// The positions of a range of `size`, from a start that depends on `start`, with the reserved ones last.
fn positions(size: u128, reserved: u128, start: u64) -> impl Iterator<Item = u128> {
    let upper = size.saturating_sub(reserved);
    let first = u128::from(start).checked_rem(upper).unwrap_or(0);
    (0..upper).map(move |step| reserved + (first + step) % upper).chain(0..reserved.min(size))
}

fn at(network: IpAddr, position: u128) -> IpAddr {
    match network {
        IpAddr::V4(network) => {
            Ipv4Addr::from_bits(network.to_bits().wrapping_add(u32::try_from(position).unwrap_or(0))).into()
        }
        IpAddr::V6(network) => Ipv6Addr::from_bits(network.to_bits().wrapping_add(position)).into(),
    }
}

/// FNV-1a, written out, because the result must be the same in every version of weir.
pub(super) fn hash(text: &str) -> u64 {
    text.bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

fn number(port: Option<i32>) -> Option<u16> {
    port.and_then(|port| u16::try_from(port).ok()).filter(|port| *port != 0)
}

fn protocol(port: &ServicePort) -> Protocol {
    port.protocol.as_deref().and_then(|name| name.parse().ok()).unwrap_or(Protocol::Tcp)
}

/// The Service as the API server would store it. Other objects are unchanged.
pub(super) fn complete(object: &Object, allocation: Option<&Allocation>) -> Object {
    let mut object = object.clone();
    let Object::Service(service) = &mut object else { return object };
    let Some(spec) = service.spec.as_mut().filter(|spec| has_cluster_ips(spec)) else { return object };
    let allocated = allocation.map_or(&[][..], |allocation| &allocation.cluster_ips);
    let ips = if allocated.is_empty() { explicit_ips(spec) } else { allocated.to_vec() };
    if !ips.is_empty() {
        spec.cluster_ip = ips.first().map(ToString::to_string);
        spec.cluster_ips = Some(ips.iter().map(ToString::to_string).collect());
        spec.ip_families = Some(ips.iter().map(|ip| Family::of(*ip).to_string()).collect());
    }
    let Some(allocation) = allocation else { return object };
    for port in spec.ports.iter_mut().flatten().filter(|port| number(port.node_port).is_none()) {
        let given = allocation
            .node_ports
            .iter()
            .find(|given| i32::from(given.port) == port.port && given.protocol == protocol(port));
        port.node_port = given.map(|given| given.node_port.into());
    }
    if let Some(port) = allocation.health_check_node_port {
        spec.health_check_node_port = Some(port.into());
    }
    object
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_has_the_published_test_values() {
        assert_eq!(hash(""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(hash("a"), 0xaf63_dc4c_8601_ec8c);
    }

    #[test]
    fn each_usable_address_of_a_range_is_allocated_once_and_the_first_ones_last() {
        let range: IpNet = "192.0.2.0/27".parse().unwrap();
        let mut taken = FxHashSet::default();
        let all: Vec<_> = std::iter::from_fn(|| free_address(range, 7, &mut taken)).collect();
        assert_eq!(all[0].to_string(), "192.0.2.23");
        assert_eq!(all.len(), 30, "neither .0 nor .31");
        assert_eq!(all[15..].iter().min(), Some(&"192.0.2.1".parse().unwrap()));
        assert!(all[..15].iter().all(|ip| *ip >= "192.0.2.16".parse::<IpAddr>().unwrap()));
    }

    #[test]
    fn very_small_and_very_large_ranges_work() {
        let mut taken = FxHashSet::default();
        let one: IpNet = "2001:db8::7/128".parse().unwrap();
        assert_eq!(free_address(one, 3, &mut taken), None, "the first address of a range is not allocated");
        let huge: IpNet = "2001:db8::/32".parse().unwrap();
        let given = free_address(huge, u64::MAX, &mut taken).unwrap();
        assert!(huge.contains(&given));
    }
}
