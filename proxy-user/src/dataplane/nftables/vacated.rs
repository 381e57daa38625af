//! Slots that no frontend's count reaches any more and local backends that no port has any more, which stay for one more
//! change.
//!
//! In: slots that a transaction leaves behind. Out: the elements to delete, one change later. A packet looks its frontend
//! up first and the slot last; when a transaction comes into force in between, it holds the old count and must still
//! find the slot that the count allows, or it would go on untranslated. And a pod that got itself as backend must still
//! be masqueraded (R9).

use std::collections::HashSet;

use rustc_hash::FxBuildHasher;

use super::{
    netlink::{Bytes, Element, Value},
    ruleset::Map,
};

/// Vacated slots by map and key.
#[derive(Debug, Default)]
pub(super) struct Vacated(HashSet<(Map, Bytes), FxBuildHasher>);

impl Vacated {
    /// Leaves a slot behind.
    pub(super) fn add(&mut self, map: Map, key: Bytes) {
        self.0.insert((map, key));
    }

    /// Whether the kernel still has a vacated slot under this key.
    pub(super) fn holds(&self, map: Map, key: &Bytes) -> bool {
        (map.holds_slots() || map == Map::Hairpin) && self.0.contains(&(map, key.clone()))
    }

    /// Takes over what `others` left behind.
    pub(super) fn extend(&mut self, others: &Self) {
        self.0.extend(others.0.iter().cloned());
    }

    /// The slot is in use again.
    pub(super) fn forget(&mut self, map: Map, key: &Bytes) {
        self.0.remove(&(map, key.clone()));
    }

    /// Every vacated slot of `map`, to delete.
    pub(super) fn elements(&self, map: Map) -> Vec<Element> {
        let slots = self.0.iter().filter(|(of, _)| *of == map);
        slots.map(|(_, key)| Element { key: key.clone(), key_end: None, value: Value::None }).collect()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
