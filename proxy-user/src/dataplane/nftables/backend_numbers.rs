//! The numbers of sticky ports' backends.
//!
//! In: service ports before and after, and the numbers in the kernel. Out: numbers for new backends, and the elements
//! that differ. The kernel remembers a number for each client, and weir removes the number of a backend that leaves. So
//! weir never reads or deletes remembered clients, however many there are. weir never gives a number twice, also not
//! after a restart: the kernel stores the highest number that may have been given.

use std::collections::BTreeMap;

use rustc_hash::FxHashMap;

use super::{
    affinity_rules::NUMBER,
    schema::{backend_value, bucket_element, bucket_value},
    sticky::Sticky,
};
use crate::plan::{BackendSet, PortPlan};
use crate::sys::libnftnl::{Bytes, Element, Value};

/// How many numbers weir reserves in the kernel at once.
const RESERVED_AT_ONCE: u32 = 4096;

/// One backend set of a sticky port.
pub(super) type SetId = (Sticky, BackendSet);

/// The numbers of one backend set, as the kernel has them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct SetNumbers {
    /// Slot → number.
    pub(super) slots: BTreeMap<u32, u32>,
    /// Number → backend.
    pub(super) backends: BTreeMap<u32, Bytes>,
    /// The timeout in the rules; `None` if unknown.
    pub(super) seconds: Option<u32>,
}

#[derive(Debug, Default)]
pub(super) struct BackendNumbers {
    sets: FxHashMap<SetId, SetNumbers>,
    /// The last number that was given, without [`NUMBER`].
    last: u32,
    /// The highest number that the kernel stores as given.
    pub(super) reserved: u32,
}

/// The change of one backend set.
pub(super) struct NumberChange {
    pub(super) set: SetId,
    pub(super) before: SetNumbers,
    /// `None` if the port is not sticky any more.
    pub(super) after: Option<SetNumbers>,
}

/// The changes of one transaction.
pub(super) struct NumberChanges {
    pub(super) changes: Vec<NumberChange>,
    pub(super) last: u32,
    pub(super) reserved: u32,
}

impl BackendNumbers {
    /// Continues after the highest number that an earlier agent may have given.
    pub(super) fn after(last: u32) -> Self {
        Self { sets: FxHashMap::default(), last, reserved: last }
    }

    pub(super) fn get(&self, set: &SetId) -> Option<&SetNumbers> {
        self.sets.get(set)
    }

    /// Starts the changes of one transaction.
    pub(super) fn no_changes(&self) -> NumberChanges {
        NumberChanges { changes: Vec::new(), last: self.last, reserved: self.reserved }
    }

    /// Takes over changes that are in force.
    pub(super) fn apply(&mut self, changes: NumberChanges) {
        self.last = changes.last;
        self.reserved = changes.reserved;
        for NumberChange { set, after, .. } in changes.changes {
            match after {
                Some(after) => self.sets.insert(set, after),
                None => self.sets.remove(&set),
            };
        }
    }
}

impl NumberChanges {
    /// Adds the change of one set, from `before` to the backends of `plan`.
    pub(super) fn add(&mut self, set: SetId, before: SetNumbers, plan: Option<&PortPlan>) {
        let after = plan.map(|plan| before.followed_by(plan, set.1, &mut self.last));
        self.changes.push(NumberChange { set, before, after });
    }

    /// Reserves more numbers if those in the kernel are used up.
    pub(super) fn reserve(&mut self) {
        if self.last > self.reserved {
            self.reserved = self.last.saturating_add(RESERVED_AT_ONCE);
        }
    }
}

impl SetNumbers {
    pub(super) fn count(&self) -> u32 {
        u32::try_from(self.slots.len()).unwrap_or(u32::MAX)
    }

    /// The same set with the backends of `plan`: a backend that stays keeps its number, a new one gets the next.
    fn followed_by(&self, plan: &PortPlan, set: BackendSet, last: &mut u32) -> Self {
        let numbers: FxHashMap<&Bytes, u32> =
            self.backends.iter().map(|(number, backend)| (backend, *number)).collect();
        let mut after = Self { seconds: plan.affinity, ..Self::default() };
        for (slot, backend) in (0..).zip(plan.backends(set)) {
            let backend = backend_value(backend);
            let number = numbers.get(&backend).copied().unwrap_or_else(|| {
                *last = (*last + 1) & !NUMBER;
                *last | NUMBER
            });
            after.slots.insert(slot, number);
            after.backends.insert(number, backend);
        }
        after
    }

    /// The elements number → backend that `other` does not have.
    pub(super) fn backends_beyond<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = Element> + 'a {
        let beyond =
            self.backends.iter().filter(|(number, backend)| other.backends.get(number) != Some(backend));
        beyond.map(|(number, backend)| bucket_element(*number, Value::Data(backend.clone())))
    }

    /// The elements slot → number that `other` does not have.
    pub(super) fn slots_beyond(&self, other: &Self) -> Vec<Element> {
        let beyond = self.slots.iter().filter(|(slot, number)| other.slots.get(slot) != Some(number));
        beyond.map(|(slot, number)| bucket_element(*slot, bucket_value(*number))).collect()
    }
}

/// The only element of [`Map::LastNumber`](super::schema::Map::LastNumber).
pub(super) fn last_number(number: u32) -> Element {
    bucket_element(0, bucket_value(number | NUMBER))
}

/// The number in that element's value.
pub(super) fn last_number_of(value: &Value) -> Option<u32> {
    let Value::Data(bytes) = value else { return None };
    Some(number_of(bytes)? & !NUMBER)
}

pub(super) fn number_key(number: u32) -> Bytes {
    Bytes::from_slice(&number.to_ne_bytes())
}

pub(super) fn number_of(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.first_chunk::<4>()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        model::{Family, ObjectName, Protocol, Removal},
        plan::{Backend, PortId},
    };

    fn plan(backends: &[u8]) -> PortPlan {
        let service = ObjectName::new("default", "web");
        let id = PortId { service, port: "http".into(), protocol: Protocol::Tcp, family: Family::V4 };
        let backend = |last: &u8| Backend { address: [10, 244, 0, *last].into(), port: 8080, local: false };
        PortPlan {
            id,
            cluster: backends.iter().map(backend).collect(),
            local: Vec::new(),
            frontends: Vec::new(),
            affinity: Some(60),
            on_removal: Removal::default(),
            serving: Vec::new(),
        }
    }

    /// Switches the Cluster set to these backends, and returns their numbers without [`NUMBER`].
    fn switch(numbers: &mut BackendNumbers, backends: &[u8]) -> Vec<u32> {
        let plan = plan(backends);
        let set = (Sticky::of(&plan.id), BackendSet::Cluster);
        let mut changes = numbers.no_changes();
        changes.add(set.clone(), numbers.get(&set).cloned().unwrap_or_default(), Some(&plan));
        changes.reserve();
        numbers.apply(changes);
        let given = numbers.get(&set).map(|set| set.slots.values().map(|number| number & !NUMBER));
        given.into_iter().flatten().collect()
    }

    #[test]
    fn a_backend_that_stays_keeps_its_number_and_no_number_is_given_twice() {
        let mut numbers = BackendNumbers::after(4096);
        assert_eq!(switch(&mut numbers, &[1, 2]), [4097, 4098]);
        assert_eq!(numbers.reserved, 4098 + RESERVED_AT_ONCE);
        assert_eq!(switch(&mut numbers, &[2]), [4098]);
        assert_eq!(switch(&mut numbers, &[1, 2]), [4099, 4098], "its clients have forgotten the first");
        assert_eq!(numbers.reserved, 4098 + RESERVED_AT_ONCE, "enough for a while");
        let stored = last_number(numbers.reserved);
        assert_eq!(last_number_of(&stored.value), Some(numbers.reserved));
    }
}
