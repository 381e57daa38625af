//! Elements that are deleted one change later: slots that no frontend's number of endpoints reaches any more, and local
//! backends that no port has any more.
//!
//! In: elements that a transaction leaves behind. Out: the elements to delete. A packet looks its frontend up first and
//! the slot last. If a transaction comes into force in between, the packet has the old number of endpoints and must
//! still find that slot, or it would go on untranslated. A pod that got itself as backend must still be masqueraded
//! (R9).

use rustc_hash::FxHashSet;

use super::schema::Map;
use crate::sys::libnftnl::{Bytes, Element};

/// Elements by map and key.
#[derive(Debug, Default)]
pub(super) struct DeferredDeletes(FxHashSet<(Map, Bytes)>);

impl DeferredDeletes {
    pub(super) fn add(&mut self, map: Map, key: Bytes) {
        self.0.insert((map, key));
    }

    /// Whether the kernel still has an element with this key that is to be deleted.
    pub(super) fn holds(&self, map: Map, key: &Bytes) -> bool {
        (map.holds_slots() || map == Map::Hairpin) && self.0.contains(&(map, key.clone()))
    }

    pub(super) fn extend(&mut self, other: &Self) {
        self.0.extend(other.0.iter().cloned());
    }

    /// Keeps an element, which is in use again.
    pub(super) fn keep(&mut self, map: Map, key: &Bytes) {
        self.0.remove(&(map, key.clone()));
    }

    /// The elements of `map` to delete.
    pub(super) fn elements(&self, map: Map) -> Vec<Element> {
        let keys = self.0.iter().filter(|(of, _)| *of == map);
        keys.map(|(_, key)| Element::member(key.clone())).collect()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
