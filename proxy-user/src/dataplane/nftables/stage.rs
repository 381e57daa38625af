//! One transaction in the making: what several service ports ask for, as elements that come and go.
//!
//! In: port changes. Out: elements by map, and how many uses of shared objects that is. Nothing here knows the kernel's
//! state; `table` does.

use std::collections::BTreeMap;

use super::{
    element::{self, Item, Leads, Verdict},
    netlink::{Bytes, Element, Value},
    object::Object,
    ruleset::Map,
    sticky::Sticky,
    table::FxHashMap,
    vacated::Vacated,
};
use crate::plan::{PortDelta, PortPlan};

/// Buckets below are verdicts without a chain.
pub(super) const FIRST_BUCKET: u32 = 16;
/// Not 1, which versions before had lead to a plain drop: one that comes back after this one must find that free.
pub(super) const DROP_BUCKET: u32 = 3;
pub(super) const PASS_BUCKET: u32 = 2;

/// An object of single service ports costs a transaction about as much as this many elements: itself and its rules.
const OBJECT: usize = 6;

/// One transaction in the making.
#[derive(Default)]
pub(super) struct Stage<'a> {
    pub(super) ports: Vec<&'a PortDelta>,
    /// How many uses of each object come or go.
    pub(super) uses: FxHashMap<Object, i64>,
    /// The same of local backends.
    pub(super) hairpins: FxHashMap<Bytes, i64>,
    /// How many guarded frontends come or go.
    pub(super) guarded: i64,
    /// Slots that ports leave behind while they stay themselves.
    pub(super) vacated: Vacated,
    pub(super) gone: BTreeMap<Map, Vec<Element>>,
    /// Elements, with the object they lead to.
    pub(super) come: BTreeMap<Map, Vec<(Element, Option<Object>)>>,
    /// How many elements that is, with what the objects of single ports come to.
    pub(super) elements: usize,
}

pub(super) type ItemKey = (Map, Bytes, Option<Bytes>);

impl<'a> Stage<'a> {
    /// Adds one port's difference.
    ///
    /// # Errors
    ///
    /// When the plan asks for something the maps cannot say; nothing of the port is added then.
    pub(super) fn take_in(&mut self, port: &'a PortDelta) -> Result<(), String> {
        let items = |plan: Option<&PortPlan>| plan.map_or(Ok(Vec::new()), element::items);
        let after = items(port.after.as_deref())?;
        let before = items(port.before.as_deref())?;
        let mut before: FxHashMap<ItemKey, Item> =
            before.into_iter().map(|item| (key(&item), item)).collect();
        for item in after {
            match before.remove(&key(&item)) {
                Some(old) if old.leads == item.leads => {}
                Some(old) => {
                    self.remove(old);
                    self.add(item);
                }
                None => self.add(item),
            }
        }
        for item in before.into_values() {
            if port.after.is_some() && item.map.holds_slots() {
                self.vacated.add(item.map, item.key);
            } else {
                self.remove(item);
            }
        }
        for (plan, change) in [(&port.after, 1), (&port.before, -1)] {
            for object in plan.as_deref().into_iter().flat_map(remembering) {
                *self.uses.entry(object).or_default() += change;
                self.elements += OBJECT;
            }
            let sticky = plan.as_deref().filter(|plan| plan.affinity.is_some());
            self.elements += sticky.map_or(0, |plan| plan.cluster.len() + plan.local.len());
        }
        self.ports.push(port);
        Ok(())
    }

    fn use_object(&mut self, object: &Object, change: i64) {
        for used in object.parts().chain([object]) {
            *self.uses.entry(used.clone()).or_default() += change;
        }
    }

    fn add(&mut self, item: Item) {
        self.elements += 1;
        if let Leads::Bucket(Object::StickyPicker { .. } | Object::Guard { .. }) = &item.leads {
            self.elements += OBJECT;
        }
        if item.map == Map::Hairpin {
            *self.hairpins.entry(item.key).or_default() += 1;
            return;
        }
        let (value, object) = match item.leads {
            Leads::Nowhere => (Value::None, None),
            Leads::To(backend) => (Value::Data(backend), None),
            Leads::Verdict(Verdict::Drop) => (bucket_value(DROP_BUCKET), None),
            Leads::Verdict(Verdict::Pass) => (bucket_value(PASS_BUCKET), None),
            Leads::Bucket(object) => (Value::None, Some(object)),
        };
        if let Some(object) = &object {
            self.use_object(object, 1);
        }
        self.guarded += i64::from(item.map == Map::Guarded);
        let element = Element { key: item.key, key_end: item.key_end, value };
        self.come.entry(item.map).or_default().push((element, object));
    }

    fn remove(&mut self, item: Item) {
        self.elements += 1;
        if item.map == Map::Hairpin {
            *self.hairpins.entry(item.key).or_default() -= 1;
            return;
        }
        if let Leads::Bucket(object) = &item.leads {
            self.use_object(object, -1);
        }
        self.guarded -= i64::from(item.map == Map::Guarded);
        let element = Element { key: item.key, key_end: item.key_end, value: Value::None };
        self.gone.entry(item.map).or_default().push(element);
    }
}

fn key(item: &Item) -> ItemKey {
    (item.map, item.key.clone(), item.key_end.clone())
}

/// What a sticky port remembers its clients with.
pub(super) fn remembering(port: &PortPlan) -> Vec<Object> {
    if port.affinity.is_none() {
        return Vec::new();
    }
    let sticky = Sticky::of(&port.id);
    element::remembered_sets(port).flat_map(|scope| Object::remembering(&sticky, scope)).collect()
}

pub(super) fn bucket_value(bucket: u32) -> Value {
    Value::Data(Bytes::from_slice(&bucket.to_ne_bytes()))
}
