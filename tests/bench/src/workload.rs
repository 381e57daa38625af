//! The Services and endpoints of a cluster during a measurement.
//!
//! In: numbers. Out: Kubernetes objects, every one of them a function of its number.

use std::{
    fmt,
    net::{Ipv4Addr, SocketAddrV4},
};

use anyhow::Result;
use k8s_openapi::{
    api::{core::v1::Service, discovery::v1::EndpointSlice},
    serde_json::{from_value, json},
};
use serde::{Deserialize, Serialize};

use super::{
    cluster::{ENDPOINTS, NODE},
    node::BACKEND_PORT,
};

/// Endpoints that go into one slice: what the controller of Kubernetes puts there.
const SLICE: u32 = 100;
/// The number of the Service with endpoints in many slices.
const WIDE: u32 = 390_000;
/// Its endpoints start here, where those of no other Service are.
const WIDE_ENDPOINTS: u32 = 3_000_000;

/// A Service of the benchmark, by number.
#[derive(Clone, Copy, Debug)]
pub(super) struct Numbered(pub u32);

impl Numbered {
    #[must_use]
    pub(super) fn name(self) -> String {
        format!("bench-{}", self.0)
    }

    /// Its only address and port.
    #[must_use]
    pub(super) fn cluster_ip(self) -> SocketAddrV4 {
        SocketAddrV4::new(Ipv4Addr::from_bits(Ipv4Addr::new(10, 100, 0, 1).to_bits() + self.0), 80)
    }

    /// Its endpoints: addresses that no other Service has.
    #[must_use]
    pub(super) fn endpoints(self) -> Vec<SocketAddrV4> {
        endpoints(self.0 * ENDPOINTS, ENDPOINTS)
    }

    /// The Service itself.
    pub(super) fn service(self) -> Result<Service> {
        Ok(from_value(json!({
            "metadata": { "name": self.name() },
            "spec": { "clusterIP": self.cluster_ip().ip(), "ports": [{ "port": 80, "targetPort": BACKEND_PORT }] },
        }))?)
    }

    /// The slice of a Service that has these endpoints.
    pub(super) fn slice(self, endpoints: &[SocketAddrV4]) -> Result<EndpointSlice> {
        self.named_slice(&self.name(), endpoints)
    }

    fn named_slice(self, name: &str, endpoints: &[SocketAddrV4]) -> Result<EndpointSlice> {
        let endpoint = |at: &SocketAddrV4| {
            json!({
                "addresses": [at.ip()],
                "conditions": { "ready": true, "serving": true, "terminating": false },
                "nodeName": if is_here(*at) { NODE } else { "elsewhere" },
            })
        };
        Ok(from_value(json!({
            "metadata": { "name": name, "labels": { "kubernetes.io/service-name": self.name() } },
            "addressType": "IPv4",
            "ports": [{ "name": "", "port": BACKEND_PORT, "protocol": "TCP" }],
            "endpoints": endpoints.iter().map(endpoint).collect::<Vec<_>>(),
        }))?)
    }
}

const FIRST_ENDPOINT: u32 = Ipv4Addr::new(10, 128, 0, 1).to_bits();
/// How many endpoints are on the node that is measured: about as many as a node has pods.
const ENDPOINTS_HERE: u32 = 100;

const fn is_here(endpoint: SocketAddrV4) -> bool {
    endpoint.ip().to_bits() < FIRST_ENDPOINT + ENDPOINTS_HERE
}

fn endpoints(first: u32, count: u32) -> Vec<SocketAddrV4> {
    let first = FIRST_ENDPOINT + first;
    (first..first + count)
        .map(|address| SocketAddrV4::new(Ipv4Addr::from_bits(address), BACKEND_PORT))
        .collect()
}

/// How many Services there are, and with how many endpoints each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Workload {
    pub services: u32,
    pub endpoints: u32,
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}", self.services, self.endpoints)
    }
}

impl Workload {
    /// Many Services with a few endpoints.
    #[must_use]
    pub(super) fn many(services: u32) -> Self {
        Self { services, endpoints: ENDPOINTS }
    }

    /// One Service with that many endpoints.
    #[must_use]
    pub(super) fn wide(endpoints: u32) -> Self {
        Self { services: 1, endpoints }
    }

    fn is_wide(self) -> bool {
        self.endpoints > ENDPOINTS
    }

    pub(super) fn services(self) -> impl Iterator<Item = Numbered> {
        let first = if self.is_wide() { WIDE } else { 0 };
        (first..first + self.services).map(Numbered)
    }

    /// How many slices there are.
    #[must_use]
    pub(super) fn slices(self) -> u32 {
        if self.is_wide() { self.endpoints.div_ceil(SLICE) } else { self.services }
    }

    /// One of the slices, with `less` of its endpoints left out.
    pub(super) fn slice(self, number: u32, less: usize) -> Result<EndpointSlice> {
        let (service, name, mut all) = if self.is_wide() {
            let service = Numbered(WIDE);
            let count = SLICE.min(self.endpoints - number * SLICE);
            let all = endpoints(WIDE_ENDPOINTS + number * SLICE, count);
            (service, format!("{}-{number}", service.name()), all)
        } else {
            let service = Numbered(number);
            (service, service.name(), service.endpoints())
        };
        all.truncate(all.len().saturating_sub(less));
        service.named_slice(&name, &all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wide_service_has_all_its_endpoints_in_slices() {
        let wide = Workload::wide(250);
        let sizes = (0..wide.slices()).map(|number| wide.slice(number, 0).unwrap().endpoints.unwrap().len());
        assert_eq!(sizes.collect::<Vec<_>>(), [100, 100, 50]);
        assert_eq!(wide.slice(0, 1).unwrap().endpoints.unwrap().len(), 99);
        assert_eq!((wide.services().count(), wide.to_string()), (1, "1x250".to_owned()));
    }

    #[test]
    fn many_services_have_a_slice_each() {
        let many = Workload::many(3);
        assert_eq!((many.slices(), many.services().count()), (3, 3));
        assert_eq!(many.slice(2, 0).unwrap().endpoints.unwrap().len(), ENDPOINTS as usize);
    }
}
