//! Service ports for tests.

use std::sync::Arc;

use ipnet::IpNet;

use crate::{
    model::{Family, ObjectName, Protocol},
    plan::{
        Backend, Destination, Frontend, FrontendPlan, PortId, PortPlan, Removal, Route, Target, Treatment,
    },
};

/// A TCP port of the Service `ns/name` with these backends, and no frontend.
pub(super) fn port(name: &str, backends: &[&str]) -> PortPlan {
    PortPlan {
        id: PortId {
            service: ObjectName::new("ns", name),
            port: "".into(),
            protocol: Protocol::Tcp,
            family: Family::V4,
        },
        cluster: backends.iter().map(|backend| self::backend(backend)).collect(),
        local: Vec::new(),
        frontends: Vec::new(),
        affinity: None,
        on_removal: Removal::Keep,
        serving: Vec::new(),
    }
}

/// Adds frontends to a service port.
pub(super) trait WithFrontends {
    /// Adds a frontend: pods get the first target and the host the second.
    fn at(self, destination: Destination, port: u16, targets: [Target; 2]) -> Self;

    /// Adds a ClusterIP that serves pods and the host from the cluster set.
    fn at_ip(self, ip: &str) -> Self;

    /// Adds this source range to every frontend.
    fn guarded(self, source: &str) -> Self;
}

impl WithFrontends for PortPlan {
    fn at(mut self, destination: Destination, port: u16, targets: [Target; 2]) -> Self {
        let [pod, host] = targets.map(|target| Treatment { target, masquerade: false });
        let frontend = Frontend { destination, protocol: self.id.protocol, port };
        let route = Route { pod, host, outside: pod };
        self.frontends.push(FrontendPlan { frontend, route, allowed_sources: None, answered_here: false });
        self
    }

    fn at_ip(self, ip: &str) -> Self {
        self.at(address(ip), 80, [Target::Cluster; 2])
    }

    fn guarded(mut self, source: &str) -> Self {
        let source: IpNet = source.parse().unwrap();
        self.frontends.iter_mut().for_each(|planned| planned.allowed_sources = Some(Arc::new([source])));
        self
    }
}

pub(super) fn address(ip: &str) -> Destination {
    Destination::Address(ip.parse().unwrap())
}

pub(super) fn backend(ip: &str) -> Backend {
    Backend { address: ip.parse().unwrap(), port: 8080, local: false }
}
