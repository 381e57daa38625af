//! Which numbers the backends of sticky ports have.
//!
//! In: port changes, and what the kernel held before. Out: elements and rules of the same transaction. A client remembers
//! a number, and a backend that leaves takes its number with it; so nothing that is remembered is ever read or deleted
//! here, however many clients there are. A number is never given again, also not by the next agent: how many were given
//! away stands in the kernel.

use std::{collections::BTreeMap, io};

use super::{FxHashMap, Table, bucket_element};
use crate::{
    dataplane::nftables::{
        adopt::Found,
        choice::{self, NUMBER},
        element,
        netlink::{Bytes, Element, Transaction, Value},
        object::{Object, Scope},
        ruleset::Map,
        socket::Netlink,
        stage::{Stage, bucket_value},
        sticky::Sticky,
    },
    plan::PortPlan,
};

/// How many numbers are set aside in the kernel at once.
const SET_ASIDE: u32 = 4096;

/// One backend set of a sticky port.
pub(super) type SetId = (Sticky, Scope);

/// What one backend set has in the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Numbered {
    /// Slot → number.
    slots: BTreeMap<u32, u32>,
    /// Number → backend.
    backends: BTreeMap<u32, Bytes>,
    /// How long clients are remembered, as the rules say; `None` where they are not known.
    seconds: Option<u32>,
}

/// Numbers given to backends.
#[derive(Debug, Default)]
pub(super) struct Numbers {
    sets: FxHashMap<SetId, Numbered>,
    /// The next one, without its mark.
    next: u32,
    /// The first that the kernel does not know to be given away.
    set_aside: u32,
}

/// How one backend set changes.
struct Step {
    set: SetId,
    before: Numbered,
    /// `None` where the port is not sticky any more.
    after: Option<Numbered>,
}

/// What a transaction does to numbers.
pub(super) struct Steps {
    steps: Vec<Step>,
    next: u32,
    set_aside: u32,
}

impl Numbers {
    /// Goes on where the agent before ended.
    pub(super) fn after(found: &Found) -> Self {
        let given = given_by(found).unwrap_or(0);
        Self { sets: FxHashMap::default(), next: given, set_aside: given }
    }
}

/// How many numbers were given away by those before; `None` where that is not known.
pub(in crate::dataplane::nftables) fn given_by(found: &Found) -> Option<u32> {
    let Value::Data(bytes) = found.get(Map::NumbersGiven, &given_key(), None)? else { return None };
    Some(u32::from_ne_bytes(*bytes.first_chunk::<4>()?) & !NUMBER)
}

fn given_key() -> Bytes {
    number_key(0)
}

/// The element that says how many numbers are given away.
pub(super) fn given(number: u32) -> Element {
    bucket_element(0, bucket_value(number | NUMBER))
}

fn number_key(number: u32) -> Bytes {
    Bytes::from_slice(&number.to_ne_bytes())
}

fn number_of(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.first_chunk::<4>()?))
}

impl Table {
    /// What `stage` means for backend sets of sticky ports.
    pub(super) fn number_steps(&self, netlink: &mut Netlink, stage: &Stage<'_>) -> io::Result<Steps> {
        let mut steps =
            Steps { steps: Vec::new(), next: self.numbers.next, set_aside: self.numbers.set_aside };
        for port in &stage.ports {
            let sticky = |plan: &&PortPlan| plan.affinity.is_some();
            let after = port.after.as_deref().filter(sticky);
            let before = port.before.as_deref().filter(sticky);
            let Some(plan) = after.or(before) else { continue };
            for scope in [Scope::Cluster, Scope::Local] {
                let set = (Sticky::of(&plan.id), scope);
                let wanted =
                    after.filter(|plan| element::remembered_sets(plan).any(|in_use| in_use == scope));
                let had = match self.numbers.sets.get(&set) {
                    Some(had) => had.clone(),
                    None if wanted.is_some() => self.found_numbers(netlink, &set)?,
                    None => continue,
                };
                let after = wanted.map(|plan| had.settled(plan, scope, &mut steps.next));
                steps.steps.push(Step { set, before: had, after });
            }
        }
        if steps.next > steps.set_aside {
            steps.set_aside = steps.next.saturating_add(SET_ASIDE);
        }
        Ok(steps)
    }

    /// What a backend set has in the kernel that was not written by this agent.
    fn found_numbers(&self, netlink: &mut Netlink, (sticky, scope): &SetId) -> io::Result<Numbered> {
        let map = Object::Slots { sticky: sticky.clone(), scope: *scope };
        if !self.held().sets.contains(&map.name()) && !self.objects.contains_key(&map) {
            return Ok(Numbered::default());
        }
        let mut numbered = Numbered::default();
        for Element { key, value, .. } in Found::elements(netlink, &self.raw, &map.name())? {
            let Value::Data(value) = value else { continue };
            let (Some(slot), Some(number)) = (number_of(&key), number_of(&value)) else { continue };
            numbered.slots.insert(slot, number);
            let backend = Found::element(netlink, &self.raw, Map::Numbered.name(), &number_key(number))?;
            if let Some(Value::Data(backend)) = backend {
                numbered.backends.insert(number, backend);
            }
        }
        Ok(numbered)
    }

    /// Writes the elements and the rules.
    pub(super) fn write_numbers(&self, transaction: &mut Transaction<'_>, steps: &Steps) {
        if steps.set_aside != self.numbers.set_aside {
            transaction.delete_elements(Map::NumbersGiven.name(), &[given(self.numbers.set_aside)]);
            transaction.add_elements(Map::NumbersGiven.name(), &[given(steps.set_aside)]);
        }
        let nothing = Numbered::default();
        let (mut gone, mut come) = (Vec::new(), Vec::new());
        for Step { before, after, .. } in &steps.steps {
            let after = after.as_ref().unwrap_or(&nothing);
            gone.extend(before.backends_beyond(after));
            come.extend(after.backends_beyond(before));
        }
        transaction.delete_elements(Map::Numbered.name(), &gone);
        transaction.add_elements(Map::Numbered.name(), &come);
        for Step { set: (sticky, scope), before, after } in &steps.steps {
            let Some(after) = after else { continue };
            let slots = Object::Slots { sticky: sticky.clone(), scope: *scope }.name();
            transaction.delete_elements(&slots, &before.slots_beyond(after));
            transaction.add_elements(&slots, &after.slots_beyond(before));
            let (count, seconds) = (after.count(), after.seconds.unwrap_or(0));
            let sticky = || sticky.clone();
            if before.count() != count || before.seconds != after.seconds {
                let draw = Object::Draw { sticky: sticky(), scope: *scope };
                let rules = choice::draw(self.family, &sticky(), *scope, count, seconds);
                transaction.replace_rules(&draw.name(), &rules);
            }
            if before.seconds != after.seconds {
                let choice = Object::Choice { sticky: sticky(), scope: *scope };
                let rules = choice::choice(self.family, &sticky(), *scope, seconds);
                transaction.replace_rules(&choice.name(), &rules);
            }
        }
    }

    /// The transaction is in force.
    pub(super) fn remember_numbers(&mut self, steps: Steps) {
        self.numbers.next = steps.next;
        self.numbers.set_aside = steps.set_aside;
        for Step { set, after, .. } in steps.steps {
            match after {
                Some(after) => self.numbers.sets.insert(set, after),
                None => self.numbers.sets.remove(&set),
            };
        }
    }

    /// The numbers of backend sets that were found and that no port asked for: their backends go with them.
    pub(super) fn numbers_left_over(&self, netlink: &mut Netlink, found: &Found) -> io::Result<Vec<Element>> {
        let mut gone = Vec::new();
        for object in found.sets.iter().filter_map(|name| Object::parse(name)) {
            if let Object::Slots { sticky, scope } = &object
                && !self.numbers.sets.contains_key(&(sticky.clone(), *scope))
            {
                for Element { value, .. } in Found::elements(netlink, &self.raw, &object.name())? {
                    let Value::Data(number) = value else { continue };
                    let is_there =
                        Found::element(netlink, &self.raw, Map::Numbered.name(), &number)?.is_some();
                    gone.extend(is_there.then(|| super::member(number)));
                }
            }
        }
        Ok(gone)
    }
}

impl Numbered {
    fn count(&self) -> u32 {
        u32::try_from(self.slots.len()).unwrap_or(u32::MAX)
    }

    /// The set as `plan` wants it: a backend that stays keeps its number, others get new ones.
    fn settled(&self, plan: &PortPlan, scope: Scope, next: &mut u32) -> Self {
        let numbers: FxHashMap<&Bytes, u32> =
            self.backends.iter().map(|(number, backend)| (backend, *number)).collect();
        let mut settled = Self { seconds: plan.affinity, ..Self::default() };
        for (slot, backend) in (0..).zip(element::backends(plan, scope)) {
            let backend = element::backend_value(backend);
            let number = numbers.get(&backend).copied().unwrap_or_else(|| {
                *next = (*next + 1) & !NUMBER;
                *next | NUMBER
            });
            settled.slots.insert(slot, number);
            settled.backends.insert(number, backend);
        }
        settled
    }

    fn backends_beyond<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = Element> + 'a {
        let beyond =
            self.backends.iter().filter(|(number, backend)| other.backends.get(number) != Some(backend));
        beyond.map(|(number, backend)| bucket_element(*number, Value::Data(backend.clone())))
    }

    fn slots_beyond(&self, other: &Self) -> Vec<Element> {
        let beyond = self.slots.iter().filter(|(slot, number)| other.slots.get(slot) != Some(number));
        beyond.map(|(slot, number)| bucket_element(*slot, bucket_value(*number))).collect()
    }
}
