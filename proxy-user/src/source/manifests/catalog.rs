//! The objects of all files together, and those that were reported as changes.
//!
//! In: the files of the directory. Out: the [`Change`]s since the last update. If files contradict each
//! other, the first by name wins, and the other one gets an error.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    ops::RangeInclusive,
    sync::Arc,
};

use k8s_openapi::api::core::v1::Service;

use super::{
    Allocation, ManifestError, ManifestSource,
    address::{Ranges, is_headless},
    allocate::{Claim, Taken, allocate, claims, complete},
    directory::File,
    parse::Item,
};
use crate::model::{Change, HEADLESS_LABEL, Kind, Object, ObjectName, PROXY_NAME_LABEL};

type Key = (Kind, ObjectName);

/// A reported object: the object of the manifest, and its allocation.
#[derive(Debug)]
struct Reported {
    source: Arc<Object>,
    allocation: Option<Allocation>,
}

/// All objects in force.
#[derive(Debug)]
pub(super) struct Catalog {
    node: String,
    names: bool,
    ranges: Ranges,
    node_ports: RangeInclusive<u16>,
    reported: BTreeMap<Key, Reported>,
    errors: Vec<ManifestError>,
    warnings: Vec<String>,
}

/// An object with its file.
struct Entry<'a> {
    file: &'a Arc<str>,
    item: &'a Item,
}

impl Catalog {
    pub(super) fn new(settings: &ManifestSource) -> Self {
        Self {
            node: settings.node.clone(),
            names: settings.names,
            ranges: Ranges::new(&settings.service_ranges),
            node_ports: settings.node_ports.clone(),
            reported: BTreeMap::new(),
            errors: Vec::new(),
            warnings: Vec::new(),
        }
    }

    /// Errors that involve several files.
    pub(super) fn errors(&self) -> impl Iterator<Item = &ManifestError> {
        self.errors.iter()
    }

    /// Warnings that involve several files.
    pub(super) fn warnings(&self) -> impl Iterator<Item = &String> {
        self.warnings.iter()
    }

    /// The allocations, by Service.
    pub(super) fn allocations(&self) -> impl Iterator<Item = &Allocation> {
        self.reported.values().filter_map(|reported| reported.allocation.as_ref())
    }

    /// The number of objects of a kind in force.
    pub(super) fn count(&self, kind: Kind) -> usize {
        self.reported.keys().filter(|(of, _)| *of == kind).count()
    }

    /// Takes in the present content of the files. Returns the changes.
    pub(super) fn update(&mut self, files: &BTreeMap<Arc<str>, File>) -> Vec<Change> {
        self.errors.clear();
        self.warnings.clear();
        let mut entries = self.merge(files);
        let taken = self.resolve_claims(&mut entries);
        let services = entries.iter().filter_map(|((_, name), entry)| Some((name, service(entry)?)));
        let (mut allocations, shortages) = allocate(services, taken, &self.ranges, &self.node_ports);
        self.warnings.extend(shortages);
        let next = entries.into_iter().map(|(key, entry)| {
            let allocation = (key.0 == Kind::Service).then(|| allocations.remove(&key.1)).flatten();
            (key, Reported { source: Arc::clone(&entry.item.object), allocation })
        });
        let before = std::mem::replace(&mut self.reported, next.collect());
        self.warn_of_moves(&before);
        changes(&before, &self.reported)
    }

    /// The objects that weir uses, each once.
    fn merge<'a>(&mut self, files: &'a BTreeMap<Arc<str>, File>) -> BTreeMap<Key, Entry<'a>> {
        let mut entries: BTreeMap<Key, Entry<'a>> = BTreeMap::new();
        let all = files.iter().flat_map(|(file, content)| content.items.iter().map(move |item| (file, item)));
        for (file, item) in all.filter(|(_, item)| is_used(&self.node, self.names, &item.object)) {
            let (kind, name) = (item.object.kind(), item.object.name());
            if let Some(first) = entries.get(&(kind, name.clone())) {
                let (one, other) = (first.item.document, item.document);
                self.warnings.push(format!(
                    "{kind} {name} is in {} (document {one}) and in {file} (document {other}); the first one is used",
                    first.file,
                ));
            } else {
                entries.insert((kind, name), Entry { file, item });
            }
        }
        entries
    }

    /// Reserves the addresses and ports that manifests name. Removes Services that claim what another Service
    /// has.
    fn resolve_claims(&mut self, entries: &mut BTreeMap<Key, Entry<'_>>) -> Taken {
        let mut order: Vec<_> = entries.iter().filter(|(key, _)| key.0 == Kind::Service).collect();
        order.sort_by_key(|(key, entry)| (entry.file, entry.item.document, (*key).clone()));
        let mut taken = Taken::default();
        let mut holders: HashMap<Claim, &ObjectName> = HashMap::new();
        let mut losers = HashSet::new();
        for (key, entry) in order {
            let claims = service(entry).map(claims).unwrap_or_default();
            let lost = claims.iter().find_map(|(field, claim)| Some((field, *holders.get(claim)?)));
            if let Some((field, holder)) = lost {
                self.errors.push(ManifestError {
                    file: Arc::clone(entry.file),
                    document: entry.item.document,
                    object: Some(format!("Service {}", key.1)),
                    field: field.clone(),
                    reason: format!("is taken by Service {holder}"),
                });
                losers.insert(key.clone());
                continue;
            }
            for (_, claim) in claims {
                taken.take(claim);
                holders.insert(claim, &key.1);
            }
        }
        entries.retain(|key, _| !losers.contains(key));
        taken
    }

    /// Adds a warning for each Service that lost an allocated address.
    fn warn_of_moves(&mut self, before: &BTreeMap<Key, Reported>) {
        for ((_, name), reported) in &self.reported {
            let had =
                before.get(&(Kind::Service, name.clone())).and_then(|reported| reported.allocation.as_ref());
            let (Some(had), Some(has)) = (had, &reported.allocation) else { continue };
            for (had, has) in had.cluster_ips.iter().zip(&has.cluster_ips).filter(|(had, has)| had != has) {
                self.warnings.push(format!("Service {name} moves from {had} to {has}"));
            }
        }
    }
}

/// Applies the selectors of the API server's watches (W1, W2, W3). Headless Services are used if weir answers
/// DNS.
fn is_used(node: &str, names: bool, object: &Object) -> bool {
    let metadata = object.metadata();
    let labelled = |label| metadata.labels.as_ref().is_some_and(|labels| labels.contains_key(label));
    match object {
        Object::Service(service) => {
            !labelled(PROXY_NAME_LABEL) && (names || !service.spec.as_ref().is_some_and(is_headless))
        }
        Object::EndpointSlice(_) => names || !labelled(HEADLESS_LABEL),
        Object::Node(_) => metadata.name.as_deref() == Some(node),
        Object::ServiceCidr(_) => true,
    }
}

fn service<'a>(entry: &Entry<'a>) -> Option<&'a Service> {
    match &*entry.item.object {
        Object::Service(service) => Some(service),
        Object::EndpointSlice(_) | Object::Node(_) | Object::ServiceCidr(_) => None,
    }
}

fn changes(before: &BTreeMap<Key, Reported>, after: &BTreeMap<Key, Reported>) -> Vec<Change> {
    let gone = before.keys().filter(|key| !after.contains_key(key));
    let gone = gone.map(|(kind, name)| Change::Delete(*kind, name.clone()));
    let fresh =
        after.iter().filter(|(key, reported)| before.get(key).is_none_or(|before| !before.same(reported)));
    let fresh =
        fresh.map(|(_, reported)| Change::Apply(complete(&reported.source, reported.allocation.as_ref())));
    gone.chain(fresh).collect()
}

impl Reported {
    fn same(&self, other: &Self) -> bool {
        (Arc::ptr_eq(&self.source, &other.source) || self.source == other.source)
            && self.allocation == other.allocation
    }
}
