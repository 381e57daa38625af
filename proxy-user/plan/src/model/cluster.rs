//! [`Model`]: the state of the cluster, and the Services that a change affects.
//!
//! In: [`Change`]s in any order. Out: the names of Services to plan again, and the parts
//! that plans are made of.

use std::{collections::BTreeMap, mem, net::IpAddr};

use ipnet::IpNet;
use k8s_openapi::api::{
    core::v1::{Node as NodeObject, Service as ServiceObject},
    discovery::v1::EndpointSlice,
    networking::v1::ServiceCIDR,
};
use rustc_hash::{FxHashMap, FxHashSet};
use tracing::warn;

use super::{
    Change, DetectLocal, Endpoints, Kind, NameClients, Node, NodeView, Object, ObjectName, Problem, Service,
    Settings, Slice, Uid, dns::DnsServices, parse_network,
};

/// The state under one Service name: the Service, its slices, or only one of them so far.
#[derive(Debug, Default)]
struct Entry {
    service: Option<Box<Service>>,
    endpoints: Endpoints,
}

/// The cluster, as far as this node needs it.
#[derive(Debug)]
pub struct Model {
    settings: Settings,
    services: FxHashMap<ObjectName, Entry>,
    /// The Service of each slice.
    slices: FxHashMap<ObjectName, ObjectName>,
    service_cidrs: BTreeMap<ObjectName, Box<[IpNet]>>,
    /// The candidates for the cluster's DNS Service, if weir answers DNS in its place.
    dns_services: Option<DnsServices>,
    node: Option<Node>,
    node_deleted: bool,
    view: NodeView,
    host_addresses: Option<Box<[IpAddr]>>,
    synced: Vec<Kind>,
    dirty: FxHashSet<ObjectName>,
    /// Problems of Services since the last call of [`Model::take_ignored`].
    ignored: BTreeMap<ObjectName, (Option<Uid>, String)>,
}

impl Model {
    /// A model of an empty cluster.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        let dns_services = settings.dns_service.clone().map(DnsServices::new);
        let chosen = dns_services.as_ref().and_then(DnsServices::chosen).cloned();
        Self {
            view: NodeView { dns_service: chosen, ..NodeView::new(&settings, None) },
            dns_services,
            settings,
            services: FxHashMap::default(),
            slices: FxHashMap::default(),
            service_cidrs: BTreeMap::new(),
            node: None,
            node_deleted: false,
            host_addresses: None,
            synced: Vec::new(),
            dirty: FxHashSet::default(),
            ignored: BTreeMap::new(),
        }
    }

    /// Takes in one change. A change without effect on the meaning of an object marks no Service.
    pub fn apply(&mut self, change: Change) {
        match change {
            Change::Apply(Object::Service(service)) => self.set_service(&service),
            Change::Apply(Object::EndpointSlice(slice)) => self.set_slice(&slice),
            Change::Apply(Object::Node(node)) => self.set_node(&node),
            Change::Apply(Object::ServiceCidr(cidr)) => self.set_service_cidr(&cidr),
            Change::Delete(Kind::Service, name) => self.remove_service(&name),
            Change::Delete(Kind::EndpointSlice, name) => self.remove_slice(&name),
            // The deleted Node's values stay in use for the node's traffic. Only load balancers must avoid it
            // now.
            Change::Delete(Kind::Node, name) => self.node_deleted |= self.is_this_node(&name),
            Change::Delete(Kind::ServiceCidr, name) => {
                self.service_cidrs.remove(&name);
            }
            // Pods and namespaces have a stream of their own, which goes to `Pods`.
            Change::Delete(Kind::Pod | Kind::Namespace, _) => {}
            Change::Synced(kind) => {
                if !self.synced.contains(&kind) {
                    self.synced.push(kind);
                }
            }
        }
    }

    /// Sets the addresses of the host's interfaces (R14).
    pub fn set_host_addresses(&mut self, mut addresses: Vec<IpAddr>) {
        addresses.sort_unstable();
        addresses.dedup();
        self.host_addresses = Some(addresses.into());
    }

    /// Whether the model is complete enough to program the kernel: Services and EndpointSlices are, and the
    /// Node if the settings make frontends or routes depend on it. A list may be empty.
    #[must_use]
    pub fn is_synced(&self) -> bool {
        let by_node =
            self.settings.node_port_addresses.primary || self.settings.detect_local == DetectLocal::NodeCidr;
        let needed = [Kind::Service, Kind::EndpointSlice].into_iter().chain(by_node.then_some(Kind::Node));
        needed.into_iter().all(|kind| self.synced.contains(&kind))
    }

    /// The sorted names of Services to plan again since the last call. Deleted Services are among them.
    pub fn take_dirty(&mut self) -> Vec<ObjectName> {
        let mut dirty: Vec<ObjectName> = mem::take(&mut self.dirty).into_iter().collect();
        dirty.sort_unstable();
        dirty
    }

    /// The values that weir ignored in Services since the last call, each with the reason.
    pub fn take_ignored(&mut self) -> BTreeMap<ObjectName, (Option<Uid>, String)> {
        mem::take(&mut self.ignored)
    }

    /// The uid of a Service, which differs from that of a deleted Service of the same name.
    #[must_use]
    pub fn uid(&self, name: &ObjectName) -> Option<Uid> {
        self.services.get(name)?.service.as_ref()?.uid
    }

    /// A Service and its endpoints, if weir serves it.
    #[must_use]
    pub fn service(&self, name: &ObjectName) -> Option<(&Service, &Endpoints)> {
        let entry = self.services.get(name)?;
        Some((entry.service.as_deref()?, &entry.endpoints))
    }

    /// The names of all served Services, in no particular order.
    pub fn service_names(&self) -> impl Iterator<Item = &ObjectName> {
        self.services.iter().filter(|(_, entry)| entry.service.is_some()).map(|(name, _)| name)
    }

    /// The part of the state that plans depend on besides the Service.
    #[must_use]
    pub fn node_view(&self) -> &NodeView {
        &self.view
    }

    /// The settings of this model.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The sorted addresses of the host's interfaces; `None` until they are set.
    #[must_use]
    pub fn host_addresses(&self) -> Option<&[IpAddr]> {
        self.host_addresses.as_deref()
    }

    /// The networks of DNS clients that weir answers; `None` means all.
    #[must_use]
    pub fn name_clients(&self) -> Option<NameClients> {
        let pods = self.node.as_ref().map(|node| node.pod_networks).unwrap_or_default();
        let pods: Vec<IpNet> = pods.v4.into_iter().chain(pods.v6).collect();
        NameClients::new(&self.settings.detect_local, &pods, &self.settings.dns_clients)
    }

    /// The networks of all ServiceCIDRs, in no particular order.
    pub fn service_cidrs(&self) -> impl Iterator<Item = IpNet> + '_ {
        self.service_cidrs.values().flatten().copied()
    }

    /// Whether load balancers may send traffic to this node: its Node is known, not being deleted, and not
    /// about to be scaled away (P3).
    #[must_use]
    pub fn node_eligible(&self) -> bool {
        !self.node_deleted && self.node.as_ref().is_some_and(|node| node.eligible)
    }

    /// Whether the model has ever seen this node's Node.
    #[must_use]
    pub fn knows_node(&self) -> bool {
        self.node.is_some()
    }

    fn set_service(&mut self, object: &ServiceObject) {
        let name = ObjectName::of(&object.metadata);
        if let Some(known) = &mut self.dns_services {
            known.set(&name, object);
            self.follow_dns_service();
        }
        let mut problems = Vec::new();
        let read = Service::read(object, &self.settings, &mut problems);
        report("Service", &name, &problems);
        match problems.is_empty() {
            true => self.ignored.remove(&name),
            false => {
                let uid = object.metadata.uid.as_deref().and_then(Uid::read);
                self.ignored.insert(name.clone(), (uid, note(&problems)))
            }
        };
        let Some(service) = read else { return self.forget_service(&name) };
        let entry = self.services.entry(service.name.clone()).or_default();
        if entry.service.as_deref() != Some(&service) {
            self.dirty.insert(service.name.clone());
            entry.service = Some(Box::new(service));
        }
    }

    /// Updates the view if another Service is the cluster's DNS Service now.
    fn follow_dns_service(&mut self) {
        let chosen = self.dns_services.as_ref().and_then(DnsServices::chosen);
        if self.view.dns_service.as_ref() == chosen {
            return;
        }
        let chosen = chosen.cloned();
        self.dirty.extend(chosen.iter().chain(&self.view.dns_service).cloned());
        self.view.dns_service = chosen;
    }

    fn remove_service(&mut self, name: &ObjectName) {
        if let Some(known) = &mut self.dns_services {
            known.remove(name);
            self.follow_dns_service();
        }
        self.forget_service(name);
    }

    fn forget_service(&mut self, name: &ObjectName) {
        let Some(entry) = self.services.get_mut(name) else { return };
        if entry.service.take().is_some() {
            self.dirty.insert(name.clone());
        }
        if entry.endpoints.is_empty() {
            self.services.remove(name);
        }
    }

    fn set_slice(&mut self, object: &EndpointSlice) {
        let name = ObjectName::of(&object.metadata);
        let mut problems = Vec::new();
        let read = Slice::read(object, &self.settings.node_name, &mut problems);
        report("EndpointSlice", &name, &problems);
        let Some((service, slice)) = read else { return self.remove_slice(&name) };
        // All slices of a Service share one allocation of its name.
        let service = self.services.get_key_value(&service).map_or(service, |(known, _)| known.clone());
        if self.slices.get(&name).is_some_and(|known| *known != service) {
            self.remove_slice(&name);
        }
        let entry = self.services.entry(service.clone()).or_default();
        if entry.endpoints.set(name.clone(), slice) && entry.service.is_some() {
            self.dirty.insert(service.clone());
        }
        self.slices.insert(name, service);
    }

    fn remove_slice(&mut self, name: &ObjectName) {
        let Some(service) = self.slices.remove(name) else { return };
        let Some(entry) = self.services.get_mut(&service) else { return };
        let changed = entry.endpoints.remove(name);
        if entry.service.is_none() && entry.endpoints.is_empty() {
            self.services.remove(&service);
        } else if changed && entry.service.is_some() {
            self.dirty.insert(service);
        }
    }

    fn is_this_node(&self, name: &ObjectName) -> bool {
        name.name() == self.settings.node_name
    }

    fn set_node(&mut self, object: &NodeObject) {
        let name = ObjectName::of(&object.metadata);
        if !self.is_this_node(&name) {
            return;
        }
        let mut problems = Vec::new();
        let node = Node::read(object, &mut problems);
        report("Node", &name, &problems);
        let dns_service = self.view.dns_service.clone();
        let view = NodeView { dns_service, ..NodeView::new(&self.settings, Some(&node)) };
        self.node = Some(node);
        self.node_deleted = false;
        let before = mem::replace(&mut self.view, view);
        self.mark_dirty_by_node(&before);
    }

    /// Marks the Services that depend on what changed since `before`.
    fn mark_dirty_by_node(&mut self, before: &NodeView) {
        let zone = before.zone != self.view.zone;
        let addresses = before.addresses != self.view.addresses;
        let others = *before
            != NodeView { zone: before.zone.clone(), addresses: before.addresses, ..self.view.clone() };
        // The kubelet writes the Node every few minutes as a heartbeat.
        if !(zone || addresses || others) {
            return;
        }
        for (name, entry) in &self.services {
            let Some(service) = &entry.service else { continue };
            let concerned = others
                || (zone && entry.endpoints.has_zone_hints())
                || (addresses && !service.source_ranges.is_empty());
            if concerned {
                self.dirty.insert(name.clone());
            }
        }
    }

    fn set_service_cidr(&mut self, object: &ServiceCIDR) {
        let name = ObjectName::of(&object.metadata);
        let cidrs = object.spec.as_ref().and_then(|spec| spec.cidrs.as_deref()).unwrap_or_default();
        let mut problems = Vec::new();
        let networks = cidrs.iter().enumerate().filter_map(|(index, cidr)| {
            let network = parse_network(cidr);
            if network.is_none() {
                let field = format!("spec.cidrs[{index}]");
                problems.push(Problem::new(field, cidr, "not a network in CIDR notation"));
            }
            network
        });
        let networks = networks.collect();
        report("ServiceCIDR", &name, &problems);
        self.service_cidrs.insert(name, networks);
    }
}

/// The most problems of one object that are logged and noted. More are only counted.
const REPORTED: usize = 5;

/// Logs the problems of an object.
pub fn report(kind: &str, name: &ObjectName, problems: &[Problem]) {
    for Problem { field, value, reason } in problems.iter().take(REPORTED) {
        warn!(kind, object = %name, field, value, "ignored a value: {reason}");
    }
    if problems.len() > REPORTED {
        warn!(kind, object = %name, more = problems.len() - REPORTED, "ignored more values");
    }
}

/// The problems of an object in one text.
fn note(problems: &[Problem]) -> String {
    let mut words: Vec<String> = problems.iter().take(REPORTED).map(ToString::to_string).collect();
    if problems.len() > REPORTED {
        words.push(format!("and {} more", problems.len() - REPORTED));
    }
    words.join("; ")
}
