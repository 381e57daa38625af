//! The Service that weir replaces for DNS, and the clients that weir answers.
//!
//! In: Services, the operator's settings, and this Node's podCIDRs. Out: the cluster's DNS Service, and the
//! networks of the clients. The DNS server and the plan both read this module, because they must agree.

use std::{fmt, net::IpAddr};

use ipnet::IpNet;
use k8s_openapi::api::core::v1 as api;
use rustc_hash::FxHashMap;

use super::{DetectLocal, Family, ObjectName, PerFamily};

/// The port of the cluster's DNS Service.
pub const DNS_PORT: u16 = 53;

/// How the cluster's DNS Service is identified.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum DnsService {
    /// weir finds it by name or label.
    #[default]
    Detected,
    /// The operator named it. It may not exist yet.
    Named(ObjectName),
}

impl fmt::Display for DnsService {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Detected => f.write_str("kube-system/kube-dns, openshift-dns/dns-default or one of kube-system with the label k8s-app=kube-dns"),
            Self::Named(name) => name.fmt(f),
        }
    }
}

/// The ways to recognize the DNS Service; an earlier one wins. A Service recognized by its label must be in
/// `kube-system`, because weir forwards all other names to its endpoints, and in other namespaces users may
/// create Services.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Recognition {
    /// It has the name that kubeadm and most distributions use.
    KubeDns,
    /// It has the name that OpenShift uses.
    OpenShift,
    /// It has the label of the cluster's DNS.
    Labelled,
}

impl Recognition {
    fn of(name: &ObjectName, service: &api::Service) -> Option<Self> {
        let spec = service.spec.as_ref()?;
        let has_address = !matches!(spec.cluster_ip.as_deref(), None | Some("" | "None"));
        let answers = spec.ports.iter().flatten().any(|port| port.port == i32::from(DNS_PORT));
        if !has_address || !answers || spec.type_.as_deref() == Some("ExternalName") {
            return None;
        }
        let labels = service.metadata.labels.as_ref();
        match (name.namespace(), name.name()) {
            ("kube-system", "kube-dns") => Some(Self::KubeDns),
            ("openshift-dns", "dns-default") => Some(Self::OpenShift),
            ("kube-system", _) => {
                let app = labels.and_then(|labels| labels.get("k8s-app"));
                app.is_some_and(|app| app == "kube-dns").then_some(Self::Labelled)
            }
            _ => None,
        }
    }
}

/// The Services that may be the cluster's DNS Service.
#[derive(Debug, Default)]
pub struct DnsServices {
    setting: DnsService,
    candidates: FxHashMap<ObjectName, (Recognition, i64)>,
}

impl DnsServices {
    /// None yet; `setting` says how they are found.
    #[must_use]
    pub fn new(setting: DnsService) -> Self {
        Self { setting, candidates: FxHashMap::default() }
    }

    /// Adds or updates a Service.
    pub fn set(&mut self, name: &ObjectName, service: &api::Service) {
        if matches!(self.setting, DnsService::Named(_)) {
            return;
        }
        match Recognition::of(name, service) {
            Some(recognition) => {
                let created = service.metadata.creation_timestamp.as_ref();
                let created = created.map_or(i64::MAX, |time| time.0.as_second());
                self.candidates.insert(name.clone(), (recognition, created));
            }
            None => self.remove(name),
        }
    }

    /// Forgets a Service that is gone.
    pub fn remove(&mut self, name: &ObjectName) {
        self.candidates.remove(name);
    }

    /// The cluster's DNS Service. Among Services recognized in the same way the oldest wins, then the
    /// smallest name.
    #[must_use]
    pub fn chosen(&self) -> Option<&ObjectName> {
        match &self.setting {
            DnsService::Named(name) => Some(name),
            DnsService::Detected => {
                let best = self
                    .candidates
                    .iter()
                    .min_by_key(|(name, (recognition, created))| (*recognition, *created, *name));
                best.map(|(name, _)| name)
            }
        }
    }
}

/// Networks of DNS clients, besides this node's own, by family. In a family without networks only this node
/// is answered.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct NameClients(PerFamily<Vec<IpNet>>);

impl NameClients {
    /// The networks of pods and those that the operator added. `None` if pods cannot be recognized by their
    /// address; then weir answers every client.
    #[must_use]
    pub fn new(detect: &DetectLocal, pod_networks: &[IpNet], more: &[IpNet]) -> Option<Self> {
        let pods = match detect {
            DetectLocal::ClusterCidr(networks) => networks,
            DetectLocal::NodeCidr => pod_networks,
            DetectLocal::Bridge(_) | DetectLocal::InterfacePrefix(_) => return None,
        };
        if pods.is_empty() {
            return None;
        }
        let mut networks: PerFamily<Vec<IpNet>> = PerFamily::default();
        for network in pods.iter().chain(more) {
            networks.get_mut(Family::of(network.addr())).push(*network);
        }
        for family in Family::ALL {
            let merged = IpNet::aggregate(networks.get(family));
            *networks.get_mut(family) = merged;
        }
        Some(Self(networks))
    }

    /// Whether one of the networks contains the address.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        self.of(Family::of(address)).iter().any(|network| network.contains(&address))
    }

    /// The networks of one family.
    #[must_use]
    pub fn of(&self, family: Family) -> &[IpNet] {
        self.0.get(family)
    }
}

impl fmt::Display for NameClients {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = Family::ALL.into_iter().flat_map(|family| self.of(family));
        f.write_str(&all.map(ToString::to_string).collect::<Vec<_>>().join(","))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::model::fixture::object;

    fn service(namespace: &str, name: &str, created: &str, more: Value) -> (ObjectName, api::Service) {
        let mut value = json!({
            "metadata": {
                "namespace": namespace, "name": name, "creationTimestamp": created, "labels": { "k8s-app": "kube-dns" },
            },
            "spec": { "clusterIP": "10.0.0.10", "ports": [{ "port": 53, "protocol": "UDP" }] },
        });
        value["spec"].as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        (ObjectName::new(namespace, name), object(value))
    }

    fn chosen(setting: DnsService, services: &[(ObjectName, api::Service)]) -> Option<String> {
        let mut known = DnsServices::new(setting);
        services.iter().for_each(|(name, service)| known.set(name, service));
        known.chosen().map(ToString::to_string)
    }

    #[test]
    fn the_dns_service_is_found_by_its_name_or_by_its_label_in_kube_system() {
        let usual = service("kube-system", "kube-dns", "2026-03-01T00:00:00Z", json!({}));
        let openshift = service("openshift-dns", "dns-default", "2026-03-01T00:00:00Z", json!({}));
        let rke2 = service("kube-system", "rke2-coredns-rke2-coredns", "2026-02-01T00:00:00Z", json!({}));
        let twin = service("kube-system", "a-twin", "2026-02-01T00:00:00Z", json!({}));
        let later = service("kube-system", "a-later-one", "2026-02-02T00:00:00Z", json!({}));
        // These must not be found: a user's Service, the Service of single pods, and a Service with only the
        // metrics port.
        let no_dns = [
            service("tenant", "kube-dns", "2026-01-01T00:00:00Z", json!({})),
            service("kube-system", "headless", "2026-01-01T00:00:00Z", json!({ "clusterIP": "None" })),
            service("kube-system", "metrics", "2026-01-01T00:00:00Z", json!({ "ports": [{ "port": 9153 }] })),
        ];
        let cases = [
            (vec![], None),
            (vec![&rke2], Some("kube-system/rke2-coredns-rke2-coredns")),
            (vec![&later, &rke2], Some("kube-system/rke2-coredns-rke2-coredns")),
            (vec![&rke2, &twin], Some("kube-system/a-twin")),
            (vec![&rke2, &openshift], Some("openshift-dns/dns-default")),
            (vec![&rke2, &openshift, &usual], Some("kube-system/kube-dns")),
        ];
        for (services, wanted) in cases {
            let services: Vec<_> = services.into_iter().chain(&no_dns).cloned().collect();
            assert_eq!(chosen(DnsService::Detected, &services).as_deref(), wanted);
            let named = DnsService::Named(ObjectName::new("dns", "own"));
            assert_eq!(chosen(named, &services).as_deref(), Some("dns/own"), "the operator's choice counts");
        }
    }

    #[test]
    fn the_next_candidate_follows_a_deleted_or_changed_dns_service() {
        let (usual, object) = service("kube-system", "kube-dns", "2026-03-01T00:00:00Z", json!({}));
        let (other, its) = service("kube-system", "coredns", "2026-03-01T00:00:00Z", json!({}));
        let mut known = DnsServices::new(DnsService::Detected);
        known.set(&other, &its);
        known.set(&usual, &object);
        known.remove(&usual);
        assert_eq!(known.chosen(), Some(&other));
        let unlabelled = api::Service { metadata: Default::default(), ..its };
        known.set(&other, &unlabelled);
        assert_eq!(known.chosen(), None);
    }

    #[test]
    fn pods_are_recognized_by_their_networks_in_each_family() {
        let networks = |all: &[&str]| -> Vec<IpNet> { all.iter().map(|net| net.parse().unwrap()).collect() };
        let pods = networks(&["10.244.0.0/16"]);
        let detect = DetectLocal::ClusterCidr(pods.clone());
        let clients = NameClients::new(&detect, &[], &networks(&["192.0.2.0/24", "2001:db8::/64"])).unwrap();
        for (address, is_client) in [
            ("10.244.1.2", true),
            ("192.0.2.9", true),
            ("10.88.0.1", false),
            ("2001:db8::1", true),
            ("fd00::1", false),
        ] {
            assert_eq!(clients.contains(address.parse().unwrap()), is_client, "{address}");
        }
        let v4_only = NameClients::new(&detect, &[], &[]).unwrap();
        assert!(v4_only.of(Family::V6).is_empty() && !v4_only.contains("fd00::1".parse().unwrap()));
        assert_eq!(NameClients::new(&DetectLocal::NodeCidr, &pods, &[]), Some(v4_only));
        for nothing in [
            DetectLocal::ClusterCidr(Vec::new()),
            DetectLocal::NodeCidr,
            DetectLocal::Bridge("cni0".to_owned()),
        ] {
            assert_eq!(NameClients::new(&nothing, &[], &pods), None);
        }
    }
}
