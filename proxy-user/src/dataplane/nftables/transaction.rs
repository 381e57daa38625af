//! One transaction: the changes of several service ports, and what of them is sent to the kernel.
//!
//! In: port changes. Out: elements that come and go, and how many uses of shared objects these are. Nothing here
//! depends on the kernel's state: `table` adds buckets and objects, and `kernel_state` takes out what the kernel has
//! already.

use std::collections::BTreeMap;

use rustc_hash::FxHashMap;

use super::{
    backend_numbers::NumberChanges,
    base_chains::Needs,
    deferred_deletes::DeferredDeletes,
    elements::{self, PlannedElement, PlannedValue, Unsupported, Verdict},
    schema::{DROP_BUCKET, Map, PASS_BUCKET, bucket_value},
    shared_chains::SharedObject,
};
use crate::plan::{PortDelta, PortPlan};
use crate::sys::libnftnl::{Bytes, Element, Value};

/// The cost of an object of a single service port, with its rules, in elements.
const OBJECT: usize = 6;

/// An element of a map that always exists.
pub(super) type ElementKey = (Map, Bytes);

/// The changes that several service ports ask for.
#[derive(Default)]
pub(super) struct PortChanges<'a> {
    pub(super) ports: Vec<&'a PortDelta>,
    /// How many uses of each object come (positive) or go.
    pub(super) uses: FxHashMap<SharedObject, i64>,
    /// The same of local backends, by their keys in [`Map::Hairpin`].
    pub(super) local_backends: FxHashMap<Bytes, i64>,
    /// How many frontends with source ranges come or go.
    pub(super) guarded: i64,
    /// Slots that ports leave while they keep their frontends.
    pub(super) vacated: DeferredDeletes,
    pub(super) gone: BTreeMap<Map, Vec<Element>>,
    /// Elements, with the object that they lead to.
    pub(super) come: BTreeMap<Map, Vec<(Element, Option<SharedObject>)>>,
    /// The cost of all this, in elements.
    pub(super) elements: usize,
}

/// The content of one transaction, in the order of its messages.
pub(super) struct Transaction {
    pub(super) objects: Vec<NewObject>,
    pub(super) numbers: NumberChanges,
    pub(super) gone: BTreeMap<Map, Vec<Element>>,
    pub(super) come: BTreeMap<Map, Vec<Element>>,
    pub(super) needs: Needs,
}

/// An object that the transaction is the first to use.
pub(super) struct NewObject {
    pub(super) object: SharedObject,
    /// The bucket that leads to it; 0 if none does.
    pub(super) bucket: u32,
    /// Whether the kernel has the set, or the bucket that leads to the chain.
    pub(super) exists: bool,
}

impl<'a> PortChanges<'a> {
    /// Adds the change of one port.
    ///
    /// # Errors
    ///
    /// When the maps cannot express the plan. Nothing of the port is added then.
    pub(super) fn add(&mut self, port: &'a PortDelta) -> Result<(), Unsupported> {
        let elements = |plan: Option<&PortPlan>| plan.map_or(Ok(Vec::new()), elements::elements);
        let after = elements(port.after.as_deref())?;
        let before = elements(port.before.as_deref())?;
        let mut before: FxHashMap<ElementKey, PlannedElement> =
            before.into_iter().map(|element| (key(&element), element)).collect();
        for element in after {
            match before.remove(&key(&element)) {
                Some(old) if old.value == element.value => {}
                Some(old) => {
                    self.remove_element(old);
                    self.add_element(element);
                }
                None => self.add_element(element),
            }
        }
        for element in before.into_values() {
            if port.after.is_some() && element.map.holds_slots() {
                self.vacated.add(element.map, element.key);
            } else {
                self.remove_element(element);
            }
        }
        for (plan, change) in [(&port.after, 1), (&port.before, -1)] {
            for object in plan.as_deref().into_iter().flat_map(elements::affinity_objects) {
                *self.uses.entry(object).or_default() += change;
                self.elements += OBJECT;
            }
            let sticky = plan.as_deref().filter(|plan| plan.affinity.is_some());
            self.elements += sticky.map_or(0, |plan| plan.cluster.len() + plan.local.len());
        }
        self.ports.push(port);
        Ok(())
    }

    fn use_object(&mut self, object: &SharedObject, change: i64) {
        for used in object.parts().chain([object]) {
            *self.uses.entry(used.clone()).or_default() += change;
        }
    }

    fn add_element(&mut self, element: PlannedElement) {
        self.elements += 1;
        if let PlannedValue::Chain(SharedObject::StickyPicker { .. } | SharedObject::Guard { .. }) =
            &element.value
        {
            self.elements += OBJECT;
        }
        if element.map == Map::Hairpin {
            *self.local_backends.entry(element.key).or_default() += 1;
            return;
        }
        let (value, object) = match element.value {
            PlannedValue::None => (Value::None, None),
            PlannedValue::Backend(backend) => (Value::Data(backend), None),
            PlannedValue::Verdict(Verdict::Drop) => (bucket_value(DROP_BUCKET), None),
            PlannedValue::Verdict(Verdict::Pass) => (bucket_value(PASS_BUCKET), None),
            PlannedValue::Chain(object) => (Value::None, Some(object)),
        };
        if let Some(object) = &object {
            self.use_object(object, 1);
        }
        self.guarded += i64::from(element.map == Map::SourceRanges);
        let come = Element { key: element.key, key_end: None, value };
        self.come.entry(element.map).or_default().push((come, object));
    }

    fn remove_element(&mut self, element: PlannedElement) {
        self.elements += 1;
        if element.map == Map::Hairpin {
            *self.local_backends.entry(element.key).or_default() -= 1;
            return;
        }
        if let PlannedValue::Chain(object) = &element.value {
            self.use_object(object, -1);
        }
        self.guarded -= i64::from(element.map == Map::SourceRanges);
        self.gone.entry(element.map).or_default().push(Element::member(element.key));
    }
}

fn key(element: &PlannedElement) -> ElementKey {
    (element.map, element.key.clone())
}
