//! One family's table: turns deltas into transactions of elements.
//!
//! In: service ports before and after. Out: batches to the kernel. What is kept here is only what no service port knows
//! by itself: which shared objects exist, how many uses each has, and which bucket number leads where.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque},
    io,
};

use rustc_hash::FxBuildHasher;

mod adoption;
mod affinity;
mod node;
mod refusal;

use refusal::Refused;

pub(super) use affinity::given_by;
use affinity::{Numbers, Steps};

use super::{
    Knowledge,
    adopt::Found,
    netlink::{Bytes, ChainSpec, Element, Transaction, Value, c_string},
    object::Object,
    ruleset::{self, Map, Needs, address_bytes, userdata},
    socket::Netlink,
    stage::{FIRST_BUCKET, ItemKey, PASS_BUCKET, Stage, bucket_value},
    vacated::Vacated,
};
use crate::{
    model::Family,
    plan::{ClusterIpDelta, Delta, Frontend, NodePlan, PortDelta, PortId},
};

pub(super) type FxHashMap<K, V> = HashMap<K, V, FxBuildHasher>;
type FxHashSet<T> = HashSet<T, FxBuildHasher>;
type Slots = FxHashSet<(Map, Bytes)>;

/// Most elements in one transaction. The kernel holds the lock of all nf_tables in the namespace for as long as it
/// works on one, and everybody else who changes rules waits.
const ELEMENTS_A_TRANSACTION: usize = 8192;

/// Most chains that stay though no service port uses them: a number of endpoints that a Service had is often had again.
const MOST_IDLE: usize = 16;

/// An object that exists in the kernel.
#[derive(Clone, Copy, Debug)]
struct Live {
    uses: u64,
    /// How many forks lead to it, used or not.
    held: u32,
    /// The bucket that leads to it, 0 for what has none.
    bucket: u32,
}

impl Live {
    /// Whether nothing leads to it any more.
    const fn is_free(&self) -> bool {
        self.uses == 0 && self.held == 0
    }
}

pub(super) struct Table {
    pub(super) family: Family,
    pub(super) raw: nftnl::Table,
    objects: FxHashMap<Object, Live>,
    /// Local backends may serve several ports.
    hairpins: FxHashMap<Bytes, u32>,
    next_bucket: u32,
    /// What Services need of chains that are there only for them.
    needs: Needs,
    /// How many frontends let only some sources in.
    guarded: u64,
    /// Slots to delete with the next change.
    vacated: Vacated,
    /// Chains for all that no service port uses now, the longest unused first.
    idle: VecDeque<Object>,
    /// Objects without a use that could not be removed yet.
    trash: Vec<Object>,
    /// UDP frontends that were found and not asked for.
    pub(super) left_over: Vec<Frontend>,
    /// How often objects without a use were left because the kernel would not remove them.
    pub(super) failed_removals: u64,
    /// The numbers of sticky ports' backends.
    numbers: Numbers,
    /// What the chains were last written for.
    written_for: Option<NodePlan>,
    /// What the set of this node's addresses holds.
    node_ips: Vec<Element>,
    /// What the kernel held when it was last read, less what has been asked for since. `None` in normal work.
    pub(super) found: Option<Found>,
    /// What was found of service ports that the kernel refused to change.
    kept: Found,
    /// Whether a delta can be applied, and of which kind.
    pub(super) knowledge: Knowledge,
    /// The generation of the rule set when it was last read.
    pub(super) read_at: Option<u32>,
    /// How often in a row the kernel refused what every node has.
    node_refusals: u32,
    /// Whether the table is there that served while this one was built anew.
    pub(super) has_stand_in: bool,
}

impl Table {
    pub(super) fn new(family: Family) -> Self {
        Self::named(ruleset::TABLE, family)
    }

    /// The table that serves while the other one is built anew.
    pub(super) fn stand_in(family: Family) -> Self {
        Self::named(ruleset::STAND_IN, family)
    }

    fn named(name: &str, family: Family) -> Self {
        let protocol = match family {
            Family::V4 => nftnl::ProtoFamily::Ipv4,
            Family::V6 => nftnl::ProtoFamily::Ipv6,
        };
        Self {
            family,
            raw: nftnl::Table::new(c_string(name), protocol),
            objects: FxHashMap::default(),
            hairpins: FxHashMap::default(),
            next_bucket: FIRST_BUCKET,
            needs: Needs::default(),
            guarded: 0,
            vacated: Vacated::default(),
            idle: VecDeque::new(),
            trash: Vec::new(),
            left_over: Vec::new(),
            failed_removals: 0,
            numbers: Numbers::default(),
            written_for: None,
            node_ips: Vec::new(),
            found: None,
            kept: Found::nothing(family),
            knowledge: Knowledge::Lost,
            read_at: None,
            node_refusals: 0,
            has_stand_in: false,
        }
    }

    /// Forgets everything in favour of what the kernel holds.
    fn begin_anew(&mut self, found: Found) {
        let name = self.raw.get_name().to_string_lossy();
        let any = |names: &[&str]| names.iter().any(|name| found.chains.contains(*name));
        *self = Self {
            next_bucket: found
                .buckets
                .values()
                .max()
                .map_or(FIRST_BUCKET, |most| (most + 1).max(FIRST_BUCKET)),
            needs: Needs { guards: any(&ruleset::GUARD) },
            numbers: Numbers::after(&found),
            node_refusals: self.node_refusals,
            knowledge: self.knowledge,
            read_at: self.read_at,
            has_stand_in: found.has_stand_in,
            found: Some(found),
            ..Self::named(&name, self.family)
        };
    }

    /// What the kernel is known to hold besides what was written.
    fn held(&self) -> &Found {
        self.found.as_ref().unwrap_or(&self.kept)
    }

    /// Removes ClusterIPs, and where all that stay are named also those that were found beside them.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub(super) fn remove_cluster_ips(&mut self, netlink: &mut Netlink, delta: &Delta) -> io::Result<()> {
        let mut gone: Vec<Element> = self.cluster_ips(delta, false).collect();
        let stay: FxHashSet<Bytes> = self.cluster_ips(delta, true).map(|element| element.key).collect();
        if let Some(found) = self.found.as_mut().filter(|_| delta.complete) {
            let found = found.elements.entry(Map::ClusterIps).or_default();
            gone.extend(found.extract_if(|(key, _), _| !stay.contains(key)).map(|((key, _), _)| member(key)));
        }
        for (gone, _) in chunks(&gone, &[]) {
            let mut transaction = Transaction::new(&self.raw);
            transaction.delete_elements(Map::ClusterIps.name(), gone);
            netlink.commit(&transaction.finish())?;
        }
        Ok(())
    }

    /// Adds ClusterIPs.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub(super) fn add_cluster_ips(&mut self, netlink: &mut Netlink, delta: &Delta) -> io::Result<()> {
        let mut come: Vec<Element> = self.cluster_ips(delta, true).collect();
        if let Some(found) = &mut self.found {
            come.retain(|element| found.take(Map::ClusterIps, &element.key, None).is_none());
        }
        for (_, come) in chunks(&[], &come) {
            let mut transaction = Transaction::new(&self.raw);
            transaction.add_elements(Map::ClusterIps.name(), come);
            netlink.commit(&transaction.finish())?;
        }
        Ok(())
    }

    /// The ClusterIPs of this family that come, or those that go.
    fn cluster_ips(&self, delta: &Delta, come: bool) -> impl Iterator<Item = Element> {
        let family = self.family;
        delta
            .cluster_ips
            .iter()
            .filter_map(move |change| match change {
                ClusterIpDelta::Add(address) if come => Some(*address),
                ClusterIpDelta::Remove(address) if !come => Some(*address),
                _ => None,
            })
            .filter(move |address| Family::of(*address) == family)
            .map(|address| member(Bytes::from_vec(address_bytes(address))))
    }

    /// Switches service ports, many in one transaction, and names those that cannot be.
    ///
    /// # Errors
    ///
    /// When the table's state is unknown afterwards.
    pub(super) fn apply_ports(
        &mut self,
        netlink: &mut Netlink,
        ports: &[&PortDelta],
        node: &NodePlan,
    ) -> io::Result<Vec<(PortId, String)>> {
        self.delete_vacated(netlink)?;
        let mut failed = Refused::default();
        let mut start = 0;
        while start < ports.len() {
            let mut stage = Stage::default();
            let mut next = start;
            while next < ports.len() && stage.elements < ELEMENTS_A_TRANSACTION {
                if let Err(problem) = stage.take_in(ports[next]) {
                    failed.add(ports[next], problem);
                }
                next += 1;
            }
            match self.commit(netlink, &stage, node) {
                Ok(()) => {}
                Err(error) => self.sort_out(netlink, stage.ports, node, error, &mut failed)?,
            }
            start = next;
        }
        self.empty_trash(netlink);
        Ok(failed.ports)
    }

    /// Deletes the slots that earlier changes left behind.
    fn delete_vacated(&mut self, netlink: &mut Netlink) -> io::Result<()> {
        if self.vacated.is_empty() {
            return Ok(());
        }
        let vacated = std::mem::take(&mut self.vacated);
        for map in [Map::Backends, Map::NodePortBackends, Map::Hairpin] {
            let slots = vacated.elements(map);
            for (gone, _) in chunks(&slots, &[]) {
                let mut transaction = Transaction::new(&self.raw);
                transaction.delete_elements(map.name(), gone);
                if let Err(error) = netlink.commit(&transaction.finish()) {
                    self.vacated = vacated;
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Sends a transaction and, once the kernel has taken it, remembers what it changed.
    fn commit(&mut self, netlink: &mut Netlink, stage: &Stage<'_>, node: &NodePlan) -> io::Result<()> {
        let numbers = self.number_steps(netlink, stage)?;
        let needs = self.needs_after(stage);
        let (made, taken) = match self.send(netlink, stage, &numbers, node, needs, &Slots::default()) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EEXIST | libc::EBUSY)) => {
                let others = self.others(netlink, stage)?;
                if others.is_empty() {
                    return Err(error);
                }
                self.send(netlink, stage, &numbers, node, needs, &others)?
            }
            result => result?,
        };
        self.needs = needs;
        self.vacated.extend(&stage.vacated);
        for (map, elements) in stage.come.iter().filter(|(map, _)| map.holds_slots()) {
            elements.iter().for_each(|(element, _)| self.vacated.forget(*map, &element.key));
        }
        let held = self.found.as_mut().unwrap_or(&mut self.kept);
        for (map, elements) in &stage.come {
            elements
                .iter()
                .for_each(|(element, object)| held.leave_slots(*map, &element.key, object.as_ref()));
        }
        for (map, key, end) in taken {
            held.take(map, &key, end.as_ref());
        }
        self.remember_numbers(numbers);
        self.remember_uses(stage, made);
        Ok(())
    }

    /// Sends a transaction, in which the slots that hold `others` are replaced; answers with the objects it makes and
    /// the elements that were found there already.
    fn send(
        &self,
        netlink: &mut Netlink,
        stage: &Stage<'_>,
        numbers: &Steps,
        node: &NodePlan,
        needs: Needs,
        others: &Slots,
    ) -> io::Result<(FxHashMap<Object, u32>, Vec<ItemKey>)> {
        let mut transaction = Transaction::new(&self.raw);
        let written = self.write(&mut transaction, stage, numbers, node, needs, others);
        netlink.commit(&transaction.finish())?;
        Ok(written)
    }

    fn write(
        &self,
        transaction: &mut Transaction<'_>,
        stage: &Stage<'_>,
        numbers: &Steps,
        node: &NodePlan,
        needs: Needs,
        others: &Slots,
    ) -> (FxHashMap<Object, u32>, Vec<ItemKey>) {
        let made = self.make_objects(transaction, stage, node);
        self.write_numbers(transaction, numbers);
        let taken = self.write_elements(transaction, stage, &made, others);
        self.follow_needs(transaction, node, needs);
        (made, taken)
    }

    /// Whether this or an earlier transaction leaves the slot behind.
    fn is_vacated(&self, stage: &Stage<'_>, map: Map, key: &Bytes) -> bool {
        self.vacated.holds(map, key) || stage.vacated.holds(map, key)
    }

    /// What is needed once `stage` is in force. What was found stays until everything has been asked for.
    fn needs_after(&self, stage: &Stage<'_>) -> Needs {
        let adopting = self.found.is_some();
        let kept = |map| self.kept.elements.get(&map).is_some_and(|elements| !elements.is_empty());
        let guarded = self.guarded.saturating_add_signed(stage.guarded) > 0;
        Needs { guards: guarded || kept(Map::Guarded) || adopting && self.needs.guards }
    }

    /// Writes the objects that `stage` is the first to use; answers with their bucket numbers.
    fn make_objects(
        &self,
        transaction: &mut Transaction<'_>,
        stage: &Stage<'_>,
        node: &NodePlan,
    ) -> FxHashMap<Object, u32> {
        // Sorted: maps come before the chains that name them, and chains before those that lead to them.
        let mut wanted: Vec<_> = stage.uses.iter().filter(|(_, change)| **change > 0).collect();
        wanted.sort_unstable();
        let mut made = FxHashMap::default();
        let mut next = self.next_bucket;
        for (object, _) in wanted {
            // One without its bucket is left over, and could not be removed yet.
            if self.objects.get(object).is_some_and(|live| live.bucket > 0 || object.buckets().is_none()) {
                continue;
            }
            let name = object.name();
            let held = self.held();
            if let Some(spec) = object.map(self.family) {
                let elements = object.elements();
                if !held.sets.contains(&name) {
                    transaction.add_set(&spec);
                } else if !elements.is_empty() {
                    transaction.flush_set(&name);
                }
                transaction.add_elements(&name, &elements);
                made.insert(object.clone(), 0);
                continue;
            }
            let userdata = object.comment().map(userdata::comment_of_chain).unwrap_or_default();
            transaction.add_chain(&ChainSpec { userdata, ..ChainSpec::regular(&name) });
            rewrite(transaction, object, self.family, node);
            let known = held.buckets.get(&name).copied();
            let bucket = match (object.buckets(), known) {
                (Some(buckets), None) => {
                    let bucket = next;
                    next += 1;
                    transaction.add_elements(buckets.name(), &[bucket_element(bucket, Value::Goto(name))]);
                    bucket
                }
                (_, known) => known.unwrap_or(0),
            };
            made.insert(object.clone(), bucket);
        }
        made
    }

    /// Writes the elements; answers with those that were found there already.
    fn write_elements(
        &self,
        transaction: &mut Transaction<'_>,
        stage: &Stage<'_>,
        made: &FxHashMap<Object, u32>,
        others: &Slots,
    ) -> Vec<ItemKey> {
        let mut taken = Vec::new();
        let mut gone = stage.gone.clone();
        let mut come: BTreeMap<Map, Vec<Element>> = BTreeMap::new();
        let hairpins = stage.hairpins.iter().filter_map(|(key, change)| {
            let uses = i64::from(self.hairpins.get(key).copied().unwrap_or(0));
            let (was, is) = (uses > 0, uses + change > 0);
            (was != is).then(|| (member(key.clone()), is))
        });
        for (element, is) in hairpins {
            // One that goes stays for one more change.
            if is {
                if self.vacated.holds(Map::Hairpin, &element.key) {
                    gone.entry(Map::Hairpin).or_default().push(element.clone());
                }
                come.entry(Map::Hairpin).or_default().push(element);
            }
        }
        for (map, elements) in &stage.come {
            let replaced = |key: &Bytes| {
                self.is_vacated(stage, *map, key)
                    || !others.is_empty() && others.contains(&(*map, key.clone()))
            };
            let back = elements.iter().map(|(element, _)| element).filter(|element| replaced(&element.key));
            gone.entry(*map).or_default().extend(back.cloned());
            let elements = elements.iter().map(|(element, object)| {
                let mut element = element.clone();
                if let Some(object) = object.as_ref().filter(|object| object.buckets().is_some()) {
                    let live = self.objects.get(object).map(|live| live.bucket);
                    let bucket = made.get(object).copied().or(live).unwrap_or(PASS_BUCKET);
                    element.value = bucket_value(bucket);
                }
                element
            });
            come.entry(*map).or_default().extend(elements);
        }
        let held = self.held();
        for (map, elements) in &mut come {
            elements.retain(|element| match held.get(*map, &element.key, element.key_end.as_ref()) {
                None => true,
                Some(value) => {
                    taken.push((*map, element.key.clone(), element.key_end.clone()));
                    let same = *value == element.value;
                    // Whether a slot that is left over is still there is not known yet.
                    if !same && !map.holds_slots() {
                        gone.entry(*map).or_default().push(element.clone());
                    }
                    !same
                }
            });
        }
        for (map, elements) in &gone {
            transaction.delete_elements(map.name(), elements);
        }
        for (map, elements) in &come {
            if map.holds_slots() {
                transaction.add_missing_elements(map.name(), elements);
            } else {
                transaction.add_elements(map.name(), elements);
            }
        }
        taken
    }

    fn remember_uses(&mut self, stage: &Stage<'_>, made: FxHashMap<Object, u32>) {
        let mut new = Vec::new();
        for (object, bucket) in made {
            self.next_bucket = self.next_bucket.max(bucket + 1);
            let before = self.objects.get(&object).copied();
            let held = before.map_or(0, |live| live.held);
            self.objects.insert(object.clone(), Live { uses: 0, held, bucket });
            if before.is_none() {
                new.push(object);
            }
        }
        new.iter().for_each(|object| self.hold_parts(object, 1));
        for (object, change) in &stage.uses {
            let Some(live) = self.objects.get_mut(object) else { continue };
            live.uses = live.uses.saturating_add_signed(*change);
            if live.is_free() {
                self.set_aside(object);
            }
        }
        self.guarded = self.guarded.saturating_add_signed(stage.guarded);
        for (key, change) in &stage.hairpins {
            let uses = i64::from(self.hairpins.get(key).copied().unwrap_or_default()) + change;
            if let Ok(uses @ 1..) = u32::try_from(uses) {
                self.hairpins.insert(key.clone(), uses);
                self.vacated.forget(Map::Hairpin, key);
            } else if self.hairpins.remove(key).is_some() {
                self.vacated.add(Map::Hairpin, key.clone());
            }
        }
    }

    /// Counts a fork in or out at the chains it leads to.
    fn hold_parts(&mut self, fork: &Object, change: i32) {
        for part in fork.parts() {
            let Some(live) = self.objects.get_mut(part) else { continue };
            live.held = live.held.saturating_add_signed(change);
            if live.is_free() {
                self.set_aside(part);
            }
        }
    }

    /// What all service ports may have in common stays for a while. The rest goes at once.
    fn set_aside(&mut self, object: &Object) {
        if !object.is_worth_keeping() {
            self.trash.push(object.clone());
            return;
        }
        self.idle.retain(|idle| idle != object);
        self.idle.push_back(object.clone());
        let too_many = self.idle.len().saturating_sub(MOST_IDLE);
        self.trash.extend(self.idle.drain(..too_many));
    }

    /// Removes objects without a use. Before kernel 6.2 a chain counts as used for a while after the last element that
    /// led to it is gone; what cannot be removed is tried again after the next change.
    fn empty_trash(&mut self, netlink: &mut Netlink) {
        let mut trash: BTreeSet<Object> = std::mem::take(&mut self.trash).into_iter().collect();
        let mut left = Vec::new();
        // Last made, first removed: chains go before the maps and the chains that they name, and these may be free only then.
        while let Some(object) = trash.pop_last() {
            if !self.objects.get(&object).is_some_and(Live::is_free) {
                continue;
            }
            match self.delete_object(netlink, &object) {
                Ok(()) => {
                    self.kept.forget(&object.name());
                    self.objects.remove(&object);
                    self.hold_parts(&object, -1);
                    trash.extend(self.trash.drain(..));
                }
                Err(error) => {
                    tracing::debug!(object = object.name(), %error, "is still in use, will be removed later");
                    left.push(object);
                }
            }
        }
        self.failed_removals += u64::from(!left.is_empty());
        self.trash = left;
    }

    fn delete_object(&self, netlink: &mut Netlink, object: &Object) -> io::Result<()> {
        let name = object.name();
        let mut transaction = Transaction::new(&self.raw);
        if object.map(self.family).is_some() {
            transaction.delete_set(&name);
        } else {
            if let (Some(buckets), Some(Live { bucket: bucket @ FIRST_BUCKET.., .. })) =
                (object.buckets(), self.objects.get(object))
            {
                transaction.delete_elements(buckets.name(), &[bucket_element(*bucket, Value::None)]);
            }
            transaction.flush_chain(&name);
            transaction.delete_chain(&name);
        }
        netlink.commit(&transaction.finish())
    }
}

/// Empties a chain and writes its rules, if the node has a say in them.
fn rewrite(transaction: &mut Transaction<'_>, object: &Object, family: Family, node: &NodePlan) {
    let rules = object.rules(family, node);
    if rules.is_empty() {
        return;
    }
    let name = object.name();
    transaction.flush_chain(&name);
    for rule in rules {
        transaction.add_rule(&name, &rule);
    }
}

const fn member(key: Bytes) -> Element {
    Element { key, key_end: None, value: Value::None }
}

fn bucket_element(bucket: u32, value: Value) -> Element {
    Element { key: Bytes::from_slice(&bucket.to_ne_bytes()), key_end: None, value }
}

/// Cuts two lists into pieces of one transaction each.
fn chunks<'a>(gone: &'a [Element], come: &'a [Element]) -> Vec<(&'a [Element], &'a [Element])> {
    let none: &[Element] = &[];
    let pieces = |elements: &'a [Element]| elements.chunks(ELEMENTS_A_TRANSACTION);
    pieces(gone).map(|gone| (gone, none)).chain(pieces(come).map(|come| (none, come))).collect()
}
