//! Switches service ports, many in one transaction.
//!
//! In: port changes. Out: transactions, less what the kernel has already, and the names of ports that the kernel
//! refuses.

use std::{collections::BTreeMap, io};

use rustc_hash::{FxHashMap, FxHashSet};

use super::{ELEMENTS_A_TRANSACTION, Slots, Table, refusals::Refused, rewrite};
use crate::{
    dataplane::nftables::{
        backend_numbers::NumberChanges,
        base_chains::Needs,
        schema::{Map, PASS_BUCKET, bucket_element, bucket_value},
        shared_chains::SharedObject,
        socket::{CommitError, Netlink},
        transaction::{ElementKey, NewObject, PortChanges, Transaction},
        userdata,
    },
    plan::{NodePlan, PortDelta, PortId},
    sys::libnftnl::{Batch, Bytes, ChainSpec, Element, Value},
};

impl Table {
    /// Switches service ports, many in one transaction, and names those that cannot be switched.
    ///
    /// # Errors
    ///
    /// When the table's content is unknown afterwards.
    pub(in crate::dataplane::nftables) fn apply_ports(
        &mut self,
        netlink: &mut Netlink,
        ports: &[&PortDelta],
        node: &NodePlan,
    ) -> Result<Vec<(PortId, String)>, CommitError> {
        self.delete_vacated(netlink)?;
        let mut refused = Refused::default();
        let mut start = 0;
        while start < ports.len() {
            let mut changes = PortChanges::default();
            let mut next = start;
            while next < ports.len() && changes.elements < ELEMENTS_A_TRANSACTION {
                if let Err(problem) = changes.add(ports[next]) {
                    refused.add(ports[next], problem.to_string());
                }
                next += 1;
            }
            match self.commit(netlink, &changes, node) {
                Ok(()) => {}
                Err(error) => self.sort_out(netlink, changes.ports, node, error, &mut refused)?,
            }
            start = next;
        }
        self.remove_unused(netlink);
        Ok(refused.ports)
    }

    /// Deletes the elements that earlier changes left behind.
    fn delete_vacated(&mut self, netlink: &mut Netlink) -> Result<(), CommitError> {
        if self.vacated.is_empty() {
            return Ok(());
        }
        let vacated = std::mem::take(&mut self.vacated);
        let mut maps = [Map::Backends, Map::NodePortBackends, Map::Hairpin].into_iter();
        let deleted = maps.try_for_each(|map| self.delete_elements(netlink, map, &vacated.elements(map)));
        if deleted.is_err() {
            self.vacated = vacated;
        }
        deleted
    }

    /// Sends a transaction and, once it is in force, takes over what it changed.
    pub(super) fn commit(
        &mut self,
        netlink: &mut Netlink,
        changes: &PortChanges<'_>,
        node: &NodePlan,
    ) -> Result<(), CommitError> {
        let numbers = self.number_changes(netlink, changes)?;
        let (mut transaction, mut found) = self.transaction(changes, numbers, &Slots::default());
        match self.send(netlink, &transaction, node) {
            Err(error) if error.is_conflict() => {
                let foreign = self.foreign_slots(netlink, changes)?;
                if foreign.is_empty() {
                    return Err(error);
                }
                (transaction, found) = self.transaction(changes, transaction.numbers, &foreign);
                self.send(netlink, &transaction, node)?;
            }
            result => result?,
        }
        let Transaction { objects, numbers, needs, .. } = transaction;
        self.needs = needs;
        self.vacated.extend(&changes.vacated);
        for (map, elements) in changes.come.iter().filter(|(map, _)| map.holds_slots()) {
            elements.iter().for_each(|(element, _)| self.vacated.keep(*map, &element.key));
        }
        self.kernel.claim(changes, found);
        self.numbers.apply(numbers);
        self.count_uses(changes, objects);
        Ok(())
    }

    /// The content of a transaction, less what the kernel has already, and the elements that were found there.
    pub(super) fn transaction(
        &self,
        changes: &PortChanges<'_>,
        numbers: NumberChanges,
        foreign: &Slots,
    ) -> (Transaction, Vec<ElementKey>) {
        let mut transaction = Transaction {
            objects: self.new_objects(changes),
            numbers,
            gone: changes.gone.clone(),
            come: BTreeMap::new(),
            needs: self.needs_after(changes),
        };
        self.add_local_backends(&mut transaction, changes);
        self.add_elements(&mut transaction, changes, foreign);
        let found = self.kernel.reduce(&mut transaction);
        (transaction, found)
    }

    fn send(
        &self,
        netlink: &mut Netlink,
        transaction: &Transaction,
        node: &NodePlan,
    ) -> Result<(), CommitError> {
        let mut batch = Batch::new(&self.raw);
        self.write(&mut batch, transaction, node);
        netlink.commit(&batch.finish())
    }

    pub(super) fn write(&self, batch: &mut Batch<'_>, transaction: &Transaction, node: &NodePlan) {
        self.write_objects(batch, &transaction.objects, node);
        self.write_numbers(batch, &transaction.numbers);
        for (map, elements) in &transaction.gone {
            batch.delete_elements(map.name(), elements);
        }
        for (map, elements) in &transaction.come {
            if map.holds_slots() {
                batch.add_missing_elements(map.name(), elements);
            } else {
                batch.add_elements(map.name(), elements);
            }
        }
        self.follow_needs(batch, node, transaction.needs);
    }

    /// The chains that Services need once `changes` are in force.
    pub(super) fn needs_after(&self, changes: &PortChanges<'_>) -> Needs {
        let guarded = self.guarded.saturating_add_signed(changes.guarded) > 0;
        Needs { guards: guarded || self.kernel.needs_guards() }
    }

    /// The objects that `changes` are the first to use, sorted: maps before the chains that name them, and chains
    /// before those that lead to them.
    fn new_objects(&self, changes: &PortChanges<'_>) -> Vec<NewObject> {
        let mut wanted: Vec<_> = changes.uses.iter().filter(|(_, change)| **change > 0).collect();
        wanted.sort_unstable();
        let mut objects = Vec::new();
        let mut next = self.next_bucket;
        for (object, _) in wanted {
            let needs_bucket = object.bucket_map().is_some();
            // A chain without its bucket is left over, and could not be removed yet.
            if self.objects.get(object).is_some_and(|usage| usage.bucket > 0 || !needs_bucket) {
                continue;
            }
            let bucket = if needs_bucket {
                self.kernel.bucket(&object.name()).unwrap_or_else(|| {
                    next += 1;
                    next - 1
                })
            } else {
                0
            };
            objects.push(NewObject { object: object.clone(), bucket, exists: false });
        }
        objects
    }

    /// Adds local backends that no service port had before. One that no port has any more stays for one more change.
    fn add_local_backends(&self, transaction: &mut Transaction, changes: &PortChanges<'_>) {
        for (key, change) in &changes.local_backends {
            let uses = i64::from(self.local_backends.get(key).copied().unwrap_or(0));
            if uses > 0 || uses + change <= 0 {
                continue;
            }
            let element = Element::member(key.clone());
            if self.vacated.holds(Map::Hairpin, key) {
                transaction.gone.entry(Map::Hairpin).or_default().push(element.clone());
            }
            transaction.come.entry(Map::Hairpin).or_default().push(element);
        }
    }

    /// Adds the elements that come, with their buckets. A slot that is vacated or holds something else is deleted
    /// first.
    fn add_elements(&self, transaction: &mut Transaction, changes: &PortChanges<'_>, foreign: &Slots) {
        let made = transaction.objects.iter().map(|new| (&new.object, new.bucket));
        let made: FxHashMap<&SharedObject, u32> = made.collect();
        for (map, elements) in &changes.come {
            let is_replaced = |key: &Bytes| {
                self.is_vacated(changes, *map, key)
                    || !foreign.is_empty() && foreign.contains(&(*map, key.clone()))
            };
            let all = elements.iter().map(|(element, _)| element);
            let replaced = all.filter(|element| is_replaced(&element.key)).cloned();
            transaction.gone.entry(*map).or_default().extend(replaced);
            let come = elements.iter().map(|(element, object)| match object {
                Some(object) => {
                    let bucket = self.objects.get(object).map(|usage| usage.bucket);
                    let bucket = made.get(object).copied().or(bucket).unwrap_or(PASS_BUCKET);
                    Element { value: bucket_value(bucket), ..element.clone() }
                }
                None => element.clone(),
            });
            transaction.come.entry(*map).or_default().extend(come);
        }
    }

    /// Whether this or an earlier transaction leaves the slot behind.
    fn is_vacated(&self, changes: &PortChanges<'_>, map: Map, key: &Bytes) -> bool {
        self.vacated.holds(map, key) || changes.vacated.holds(map, key)
    }

    /// The slots that `changes` fill and that hold something of which this agent does not know: endpoints changed while
    /// no agent ran, an agent ended before it deleted vacated slots, or another program wrote them.
    pub(super) fn foreign_slots(
        &self,
        netlink: &mut Netlink,
        changes: &PortChanges<'_>,
    ) -> io::Result<Slots> {
        let gone = changes.gone.iter();
        let gone = gone.flat_map(|(map, gone)| gone.iter().map(|element| (*map, &element.key)));
        let gone: FxHashSet<(Map, &Bytes)> = gone.collect();
        let mut foreign = Slots::default();
        for (map, elements) in changes.come.iter().filter(|(map, _)| map.holds_slots()) {
            for (Element { key, value, .. }, _) in elements {
                if self.is_vacated(changes, *map, key) || gone.contains(&(*map, key)) {
                    continue;
                }
                let held = netlink.element(&self.raw, map.name(), key)?;
                if held.is_some_and(|held| held != *value) {
                    foreign.insert((*map, key.clone()));
                }
            }
        }
        Ok(foreign)
    }

    fn write_objects(&self, batch: &mut Batch<'_>, objects: &[NewObject], node: &NodePlan) {
        for NewObject { object, bucket, exists } in objects {
            let name = object.name();
            if let Some(spec) = object.set_spec(self.family) {
                let elements = object.fixed_elements();
                if !exists {
                    batch.add_set(&spec);
                } else if !elements.is_empty() {
                    batch.flush_set(&name);
                }
                batch.add_elements(&name, &elements);
                continue;
            }
            let userdata = object.comment().map(userdata::comment_of_chain).unwrap_or_default();
            batch.add_chain(&ChainSpec { userdata, ..ChainSpec::regular(&name) });
            rewrite(batch, object, self.family, node);
            if let Some(buckets) = object.bucket_map().filter(|_| !exists) {
                batch.add_elements(buckets.name(), &[bucket_element(*bucket, Value::Goto(name))]);
            }
        }
    }
}
