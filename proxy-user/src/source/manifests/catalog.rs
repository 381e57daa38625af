//! What the files together say, and what has been told of it.
//!
//! In: the files of the directory. Out: the [`Change`]s from what was told before. Where files contradict each other,
//! the first in the order of names is right, and the other is told so.

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

/// An object that was told, as its manifest has it and with what it was given.
#[derive(Debug)]
struct Told {
    source: Arc<Object>,
    allocation: Option<Allocation>,
}

/// Everything in force.
#[derive(Debug)]
pub(super) struct Catalog {
    node: String,
    names: bool,
    ranges: Ranges,
    node_ports: RangeInclusive<u16>,
    told: BTreeMap<Key, Told>,
    errors: Vec<ManifestError>,
    warnings: Vec<String>,
}

/// An object with the place it stands at.
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
            told: BTreeMap::new(),
            errors: Vec::new(),
            warnings: Vec::new(),
        }
    }

    /// What is wrong between files.
    pub(super) fn errors(&self) -> impl Iterator<Item = &ManifestError> {
        self.errors.iter()
    }

    /// What is odd between files.
    pub(super) fn warnings(&self) -> impl Iterator<Item = &String> {
        self.warnings.iter()
    }

    /// What Services were given, by Service.
    pub(super) fn allocations(&self) -> impl Iterator<Item = &Allocation> {
        self.told.values().filter_map(|told| told.allocation.as_ref())
    }

    /// How many objects of a kind are in force.
    pub(super) fn count(&self, kind: Kind) -> usize {
        self.told.keys().filter(|(of, _)| *of == kind).count()
    }

    /// Takes over what the files say now; answers what is different.
    pub(super) fn update(&mut self, files: &BTreeMap<Arc<str>, File>) -> Vec<Change> {
        self.errors.clear();
        self.warnings.clear();
        let mut entries = self.merge(files);
        let taken = self.settle_claims(&mut entries);
        let services = entries.iter().filter_map(|((_, name), entry)| Some((name, service(entry)?)));
        let (mut allocations, shortages) = allocate(services, taken, &self.ranges, &self.node_ports);
        self.warnings.extend(shortages);
        let next = entries.into_iter().map(|(key, entry)| {
            let allocation = (key.0 == Kind::Service).then(|| allocations.remove(&key.1)).flatten();
            (key, Told { source: Arc::clone(&entry.item.object), allocation })
        });
        let before = std::mem::replace(&mut self.told, next.collect());
        self.note_moves(&before);
        changes(&before, &self.told)
    }

    /// Every object that concerns us, each once.
    fn merge<'a>(&mut self, files: &'a BTreeMap<Arc<str>, File>) -> BTreeMap<Key, Entry<'a>> {
        let mut entries: BTreeMap<Key, Entry<'a>> = BTreeMap::new();
        let all = files.iter().flat_map(|(file, content)| content.items.iter().map(move |item| (file, item)));
        for (file, item) in all.filter(|(_, item)| concerns_us(&self.node, self.names, &item.object)) {
            let (kind, name) = (item.object.kind(), item.object.name());
            if let Some(first) = entries.get(&(kind, name.clone())) {
                let (one, other) = (first.item.document, item.document);
                self.warnings.push(format!(
                    "{kind} {name} is in {} (document {one}) and in {file} (document {other}); the first one counts",
                    first.file,
                ));
            } else {
                entries.insert((kind, name), Entry { file, item });
            }
        }
        entries
    }

    /// Lets every Service have what it names, and takes out those that name what another one has.
    fn settle_claims(&mut self, entries: &mut BTreeMap<Key, Entry<'_>>) -> Taken {
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

    /// Says which Services lost an address they had been given.
    fn note_moves(&mut self, before: &BTreeMap<Key, Told>) {
        for ((_, name), told) in &self.told {
            let had = before.get(&(Kind::Service, name.clone())).and_then(|told| told.allocation.as_ref());
            let (Some(had), Some(has)) = (had, &told.allocation) else { continue };
            for (had, has) in had.cluster_ips.iter().zip(&has.cluster_ips).filter(|(had, has)| had != has) {
                self.warnings.push(format!("Service {name} moves from {had} to {has}"));
            }
        }
    }
}

/// The selectors of the API server's watches (W1, W2, W3); headless Services concern us where names do.
fn concerns_us(node: &str, names: bool, object: &Object) -> bool {
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

fn changes(before: &BTreeMap<Key, Told>, after: &BTreeMap<Key, Told>) -> Vec<Change> {
    let gone = before.keys().filter(|key| !after.contains_key(key));
    let gone = gone.map(|(kind, name)| Change::Delete(*kind, name.clone()));
    let fresh = after.iter().filter(|(key, told)| before.get(key).is_none_or(|before| !before.same(told)));
    let fresh = fresh.map(|(_, told)| Change::Apply(complete(&told.source, told.allocation.as_ref())));
    gone.chain(fresh).collect()
}

impl Told {
    fn same(&self, other: &Self) -> bool {
        (Arc::ptr_eq(&self.source, &other.source) || self.source == other.source)
            && self.allocation == other.allocation
    }
}
