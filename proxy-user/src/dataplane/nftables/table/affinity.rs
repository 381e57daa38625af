//! The numbers of sticky ports' backends in a table.
//!
//! In: port changes, and the maps of slots in the kernel. Out: elements and rules of the same transaction.

use std::io;

use super::Table;
use crate::{
    dataplane::nftables::{
        affinity_rules,
        backend_numbers::{
            NumberChange, NumberChanges, SetId, SetNumbers, last_number, number_key, number_of,
        },
        elements,
        kernel_state::KernelState,
        schema::Map,
        shared_chains::SharedObject,
        socket::Netlink,
        sticky::Sticky,
        transaction::PortChanges,
    },
    plan::{BackendSet, PortPlan},
    sys::libnftnl::{Batch, Element, Value},
};

impl Table {
    /// Changes of the backend sets of sticky ports that follow from `changes`.
    pub(super) fn number_changes(
        &self,
        netlink: &mut Netlink,
        changes: &PortChanges<'_>,
    ) -> io::Result<NumberChanges> {
        let mut numbers = self.numbers.no_changes();
        for port in &changes.ports {
            let sticky = |plan: &&PortPlan| plan.affinity.is_some();
            let after = port.after.as_deref().filter(sticky);
            let before = port.before.as_deref().filter(sticky);
            let Some(plan) = after.or(before) else { continue };
            for set in BackendSet::ALL {
                let id = (Sticky::of(&plan.id), set);
                let wanted = after.filter(|plan| elements::remembered_sets(plan).any(|in_use| in_use == set));
                let before = match self.numbers.get(&id) {
                    Some(before) => before.clone(),
                    None if wanted.is_some() => self.read_numbers(netlink, &id)?,
                    None => continue,
                };
                numbers.add(id, before, wanted);
            }
        }
        numbers.reserve();
        Ok(numbers)
    }

    /// Reads the numbers of a backend set that this agent did not write.
    fn read_numbers(&self, netlink: &mut Netlink, (sticky, set): &SetId) -> io::Result<SetNumbers> {
        let map = SharedObject::Slots { sticky: sticky.clone(), set: *set };
        let mut numbers = SetNumbers::default();
        if !self.kernel.sets.contains(&map.name()) && !self.objects.contains_key(&map) {
            return Ok(numbers);
        }
        for Element { key, value, .. } in netlink.elements(&self.raw, &map.name())? {
            let Value::Data(value) = value else { continue };
            let (Some(slot), Some(number)) = (number_of(&key), number_of(&value)) else { continue };
            numbers.slots.insert(slot, number);
            let backend = netlink.element(&self.raw, Map::Numbered.name(), &number_key(number))?;
            if let Some(Value::Data(backend)) = backend {
                numbers.backends.insert(number, backend);
            }
        }
        Ok(numbers)
    }

    /// Writes the elements and the rules.
    pub(super) fn write_numbers(&self, batch: &mut Batch<'_>, numbers: &NumberChanges) {
        let reserved = self.numbers.reserved;
        if numbers.reserved != reserved {
            batch.delete_elements(Map::LastNumber.name(), &[last_number(reserved)]);
            batch.add_elements(Map::LastNumber.name(), &[last_number(numbers.reserved)]);
        }
        let nothing = SetNumbers::default();
        let (mut gone, mut come) = (Vec::new(), Vec::new());
        for NumberChange { before, after, .. } in &numbers.changes {
            let after = after.as_ref().unwrap_or(&nothing);
            gone.extend(before.backends_beyond(after));
            come.extend(after.backends_beyond(before));
        }
        batch.delete_elements(Map::Numbered.name(), &gone);
        batch.add_elements(Map::Numbered.name(), &come);
        for NumberChange { set: (sticky, set), before, after } in &numbers.changes {
            let Some(after) = after else { continue };
            let (sticky, set) = (|| sticky.clone(), *set);
            let slots = SharedObject::Slots { sticky: sticky(), set }.name();
            batch.delete_elements(&slots, &before.slots_beyond(after));
            batch.add_elements(&slots, &after.slots_beyond(before));
            let (count, seconds) = (after.count(), after.seconds.unwrap_or(0));
            if before.count() != count || before.seconds != after.seconds {
                let draw = SharedObject::Draw { sticky: sticky(), set };
                let rules = affinity_rules::draw(self.family, &sticky(), set, count, seconds);
                batch.replace_rules(&draw.name(), &rules);
            }
            if before.seconds != after.seconds {
                let choice = SharedObject::Choice { sticky: sticky(), set };
                let rules = affinity_rules::choice(self.family, &sticky(), set, seconds);
                batch.replace_rules(&choice.name(), &rules);
            }
        }
    }

    /// The elements of backend sets that are left over, which go with them.
    pub(super) fn numbers_left_over(
        &self,
        netlink: &mut Netlink,
        leftovers: &KernelState,
    ) -> io::Result<Vec<Element>> {
        let mut gone = Vec::new();
        for object in leftovers.sets.iter().filter_map(|name| SharedObject::parse(name)) {
            let SharedObject::Slots { sticky, set } = &object else { continue };
            if self.numbers.get(&(sticky.clone(), *set)).is_some() {
                continue;
            }
            for Element { value, .. } in netlink.elements(&self.raw, &object.name())? {
                let Value::Data(number) = value else { continue };
                let held = netlink.element(&self.raw, Map::Numbered.name(), &number)?;
                gone.extend(held.is_some().then(|| Element::member(number)));
            }
        }
        Ok(gone)
    }
}
