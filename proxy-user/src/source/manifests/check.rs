//! Does what the API server would do with an object before storing it.
//!
//! In: an object of a manifest. Out: the object with defaults, and its errors by field. Only fields that weir
//! reads are checked.

use std::{collections::HashSet, net::IpAddr};

use ipnet::IpNet;
use k8s_openapi::{
    api::{
        core::v1::{Node, Service, ServicePort, ServiceSpec},
        discovery::v1::EndpointSlice,
        networking::v1::ServiceCIDR,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};

use super::address::{Problem, Ranges, families, family_of, has_cluster_ips, is_headless};
use crate::model::{Family, Object, Protocol};

/// Sets defaults without which an object would have another meaning.
pub(super) fn fill_in(object: &mut Object) {
    let namespaced = matches!(object, Object::Service(_) | Object::EndpointSlice(_));
    let metadata = object.metadata_mut();
    metadata.namespace =
        namespaced.then(|| metadata.namespace.take().unwrap_or_else(|| "default".to_owned()));
    match object {
        Object::Service(service) => {
            for port in service.spec.iter_mut().flat_map(|spec| &mut spec.ports).flatten() {
                port.protocol.get_or_insert_with(|| Protocol::Tcp.to_string());
            }
        }
        // A missing port name means the name "" (W8).
        Object::EndpointSlice(slice) => {
            for port in slice.ports.iter_mut().flatten() {
                port.name.get_or_insert_default();
                port.protocol.get_or_insert_with(|| Protocol::Tcp.to_string());
            }
        }
        Object::Node(_) | Object::ServiceCidr(_) => {}
    }
}

/// All errors of an object.
pub(super) fn check(object: &Object, ranges: &Ranges) -> Vec<Problem> {
    let mut problems = Problems(Vec::new());
    problems.metadata(object.metadata(), matches!(object, Object::Service(_)));
    match object {
        Object::Service(service) => problems.service(service, ranges),
        Object::EndpointSlice(slice) => problems.slice(slice),
        Object::Node(node) => problems.node(node),
        Object::ServiceCidr(cidr) => problems.service_cidr(cidr),
    }
    problems.0
}

struct Problems(Vec<Problem>);

impl Problems {
    fn add(&mut self, field: impl Into<String>, reason: impl Into<String>) {
        self.0.push((field.into(), reason.into()));
    }

    fn metadata(&mut self, metadata: &ObjectMeta, label: bool) {
        match metadata.name.as_deref() {
            None | Some("") => self.add("metadata.name", "is missing"),
            Some(name) if !is_name(name, label) => {
                self.add("metadata.name", format!("is `{name}`, which is not a valid name for this kind"));
            }
            Some(_) => {}
        }
        if let Some(namespace) = metadata.namespace.as_deref().filter(|namespace| !is_name(namespace, true)) {
            self.add(
                "metadata.namespace",
                format!("is `{namespace}`, which is not a valid name of a namespace"),
            );
        }
    }

    fn service(&mut self, service: &Service, ranges: &Ranges) {
        let Some(spec) = &service.spec else { return self.add("spec", "is missing") };
        let types = ["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"];
        self.one_of("spec.type", spec.type_.as_deref(), &types);
        self.one_of("spec.sessionAffinity", spec.session_affinity.as_deref(), &["None", "ClientIP"]);
        let policies = ["Cluster", "Local"];
        self.one_of("spec.internalTrafficPolicy", spec.internal_traffic_policy.as_deref(), &policies);
        self.one_of("spec.externalTrafficPolicy", spec.external_traffic_policy.as_deref(), &policies);
        self.affinity(spec);
        self.ports(spec);
        self.cluster_ips(spec, ranges);
        self.addresses("spec.externalIPs", spec.external_ips.iter().flatten());
        let source_ranges = spec.load_balancer_source_ranges.iter().flatten();
        self.networks("spec.loadBalancerSourceRanges", source_ranges);
        if let Some(port) = spec.health_check_node_port.filter(|port| *port != 0) {
            self.port("spec.healthCheckNodePort", port);
        }
        let status = service.status.as_ref().and_then(|status| status.load_balancer.as_ref());
        for (index, ingress) in status.iter().flat_map(|status| status.ingress.iter().flatten()).enumerate() {
            let at = format!("status.loadBalancer.ingress[{index}]");
            if let Some(ip) = &ingress.ip {
                self.address(format!("{at}.ip"), ip);
            }
            self.one_of(&format!("{at}.ipMode"), ingress.ip_mode.as_deref(), &["VIP", "Proxy"]);
        }
    }

    fn affinity(&mut self, spec: &ServiceSpec) {
        let client_ip = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
        if let Some(seconds) = client_ip.and_then(|client_ip| client_ip.timeout_seconds)
            && !(1..=86400).contains(&seconds)
        {
            let field = "spec.sessionAffinityConfig.clientIP.timeoutSeconds";
            self.add(field, format!("is {seconds}, which is not in 1 to 86400"));
        }
    }

    fn ports(&mut self, spec: &ServiceSpec) {
        let ports = spec.ports.as_deref().unwrap_or_default();
        if ports.is_empty() && has_cluster_ips(spec) {
            self.add("spec.ports", "is empty, but only a headless Service may have no ports");
        }
        let (mut names, mut numbers, mut node_ports) = (HashSet::new(), HashSet::new(), HashSet::new());
        for (index, port) in ports.iter().enumerate() {
            let at = format!("spec.ports[{index}]");
            self.service_port(&at, port, spec.type_.as_deref());
            let name = port.name.as_deref().unwrap_or_default();
            if name.is_empty() && ports.len() > 1 {
                self.add(format!("{at}.name"), "is missing, but the Service has more than one port");
            } else if !names.insert(name) {
                self.add(format!("{at}.name"), format!("is `{name}`, which another port has already"));
            }
            if !numbers.insert((port.port, &port.protocol)) {
                self.add(&at, "has the number and the protocol of another port");
            }
            if let Some(node_port) = port.node_port.filter(|port| *port != 0)
                && !node_ports.insert((node_port, &port.protocol))
            {
                self.add(format!("{at}.nodePort"), format!("is {node_port}, which another port has already"));
            }
        }
    }

    fn service_port(&mut self, at: &str, port: &ServicePort, kind: Option<&str>) {
        self.port(format!("{at}.port"), port.port);
        self.protocol(format!("{at}.protocol"), port.protocol.as_deref());
        if let Some(node_port) = port.node_port.filter(|port| *port != 0) {
            let field = format!("{at}.nodePort");
            if matches!(kind, Some("NodePort" | "LoadBalancer")) {
                self.port(field, node_port);
            } else {
                self.add(field, "is set, but spec.type is neither NodePort nor LoadBalancer");
            }
        }
    }

    fn cluster_ips(&mut self, spec: &ServiceSpec, ranges: &Ranges) {
        if !has_cluster_ips(spec) {
            if spec.type_.as_deref() == Some("ExternalName") && spec.external_name.is_none() {
                self.add("spec.externalName", "is missing");
            } else if is_headless(spec) && !matches!(spec.type_.as_deref(), None | Some("ClusterIP")) {
                self.add("spec.clusterIP", "is None, which only a Service of type ClusterIP can have");
            }
            return;
        }
        let before = self.0.len();
        if let Some(ip) = spec.cluster_ip.as_deref().filter(|ip| !ip.is_empty()) {
            self.address("spec.clusterIP", ip);
        }
        let ips = spec.cluster_ips.as_deref().unwrap_or_default();
        self.addresses("spec.clusterIPs", ips);
        if let (Some(ip), Some(first)) = (&spec.cluster_ip, ips.first())
            && ip != first
        {
            self.add("spec.clusterIPs[0]", format!("is {first}, but spec.clusterIP is {ip}"));
        }
        self.at_most_one_per_family("spec.clusterIPs", ips, |ip| ip.parse().ok().map(Family::of));
        let names = spec.ip_families.as_deref().unwrap_or_default();
        for (index, name) in names.iter().enumerate() {
            self.one_of(&format!("spec.ipFamilies[{index}]"), Some(name), &["IPv4", "IPv6"]);
        }
        self.at_most_one_per_family("spec.ipFamilies", names, family_of);
        let policies = ["SingleStack", "PreferDualStack", "RequireDualStack"];
        self.one_of("spec.ipFamilyPolicy", spec.ip_family_policy.as_deref(), &policies);
        if self.0.len() == before
            && let Err((field, reason)) = families(spec, ranges)
        {
            self.add(field, reason);
        }
    }

    fn at_most_one_per_family(&mut self, at: &str, values: &[String], family: fn(&str) -> Option<Family>) {
        let mut seen = HashSet::new();
        for (index, value) in values.iter().enumerate() {
            if let Some(family) = family(value)
                && !seen.insert(family)
            {
                self.add(format!("{at}[{index}]"), format!("is a second {family} one"));
            }
        }
    }

    fn slice(&mut self, slice: &EndpointSlice) {
        let kind = slice.address_type.as_str();
        if kind.is_empty() {
            return self.add("addressType", "is missing");
        }
        self.one_of("addressType", Some(kind), &["IPv4", "IPv6", "FQDN"]);
        for (index, endpoint) in slice.endpoints.iter().flatten().enumerate() {
            let at = format!("endpoints[{index}].addresses");
            if endpoint.addresses.is_empty() {
                self.add(&at, "is empty");
            }
            let Some(family) = family_of(kind) else { continue };
            for (index, address) in endpoint.addresses.iter().enumerate() {
                if address.parse::<IpAddr>().map(Family::of) != Ok(family) {
                    self.add(
                        format!("{at}[{index}]"),
                        format!("is `{address}`, which is not an {family} address"),
                    );
                }
            }
        }
        for (index, port) in slice.ports.iter().flatten().enumerate() {
            if let Some(number) = port.port {
                self.port(format!("ports[{index}].port"), number);
            }
            self.protocol(format!("ports[{index}].protocol"), port.protocol.as_deref());
        }
    }

    fn node(&mut self, node: &Node) {
        let Some(spec) = &node.spec else { return };
        if let Some(cidr) = &spec.pod_cidr {
            self.networks("spec.podCIDR", [cidr]);
        }
        self.networks("spec.podCIDRs", spec.pod_cidrs.iter().flatten());
    }

    fn service_cidr(&mut self, cidr: &ServiceCIDR) {
        let cidrs = cidr.spec.as_ref().and_then(|spec| spec.cidrs.as_deref()).unwrap_or_default();
        if cidrs.is_empty() {
            self.add("spec.cidrs", "is empty");
        }
        self.networks("spec.cidrs", cidrs);
    }

    fn one_of(&mut self, field: &str, value: Option<&str>, allowed: &[&str]) {
        if let Some(value) = value.filter(|value| !allowed.contains(value)) {
            self.add(field, format!("is `{value}`, which is not one of {}", allowed.join(", ")));
        }
    }

    fn port(&mut self, field: impl Into<String>, port: i32) {
        if !(1..=65535).contains(&port) {
            self.add(field, format!("is {port}, which is not in 1 to 65535"));
        }
    }

    fn protocol(&mut self, field: String, name: Option<&str>) {
        self.one_of(
            &field,
            name,
            &Protocol::ALL.map(|protocol| protocol.to_string()).each_ref().map(|name| &**name),
        );
    }

    fn addresses<'a>(&mut self, at: &str, values: impl IntoIterator<Item = &'a String>) {
        for (index, value) in values.into_iter().enumerate() {
            self.address(format!("{at}[{index}]"), value);
        }
    }

    fn address(&mut self, field: impl Into<String>, value: &str) {
        if value.parse::<IpAddr>().is_err() {
            self.add(field, format!("is `{value}`, which is not an IP address"));
        }
    }

    fn networks<'a>(&mut self, at: &str, values: impl IntoIterator<Item = &'a String>) {
        for (index, value) in values.into_iter().enumerate() {
            // Blanks around source ranges are allowed (W9).
            if value.trim().parse::<IpNet>().is_err() {
                self.add(format!("{at}[{index}]"), format!("is `{value}`, which is not a network"));
            }
        }
    }
}

/// Whether this is a DNS label, or for kinds that allow it several labels with dots between.
fn is_name(name: &str, label: bool) -> bool {
    let fits = name.len() <= if label { 63 } else { 253 };
    let good = |part: &str| {
        let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        !part.is_empty()
            && part.bytes().all(|byte| inner(byte) || byte == b'-')
            && !part.starts_with('-')
            && !part.ends_with('-')
    };
    fits && if label { good(name) } else { name.split('.').all(good) }
}
