//! The names of the objects of one kind that the source has reported.
//!
//! In: a watcher's events. Out: the resulting [`Change`]s. Objects that a full list lacks are reported as
//! deleted only once the list is complete.

use kube::runtime::watcher::Event;
use rustc_hash::FxHashMap;
use smallvec::SmallVec;

use crate::model::{Change, Kind, ObjectName};

/// The changes of one event, mostly one.
pub(super) type Changes<O> = SmallVec<[Change<O>; 1]>;

/// An object with a name.
pub(super) trait Named {
    /// Namespace and name of the object.
    fn name(&self) -> ObjectName;
}

/// The names reported so far, each with the number of the last list that had it.
#[derive(Debug)]
pub(super) struct Ledger {
    kind: Kind,
    known: FxHashMap<ObjectName, u32>,
    list: u32,
    listing: bool,
    /// Whether the running list has an object with an unreadable name.
    unnamed: bool,
    synced: bool,
}

impl Ledger {
    pub(super) fn new(kind: Kind) -> Self {
        Self { kind, known: FxHashMap::default(), list: 0, listing: false, unnamed: false, synced: false }
    }

    /// The number of known objects.
    pub(super) fn len(&self) -> usize {
        self.known.len()
    }

    /// Whether a list is running.
    pub(super) fn listing(&self) -> bool {
        self.listing
    }

    /// Whether a list of this kind was ever complete.
    pub(super) fn synced(&self) -> bool {
        self.synced
    }

    /// Records that the running list failed. Its objects stay, and so do objects that it lacks.
    pub(super) fn abandon(&mut self) {
        self.listing = false;
    }

    /// The change that reports this kind as complete; `None` if it was reported before.
    pub(super) fn sync<O>(&mut self) -> Option<Change<O>> {
        (!std::mem::replace(&mut self.synced, true)).then_some(Change::Synced(self.kind))
    }

    /// Records that an object exists but cannot be read, so that its previous version stays. Without its name
    /// it may be any object, so the running list then deletes nothing.
    pub(super) fn keep(&mut self, name: Option<&ObjectName>) {
        match name {
            Some(name) => {
                if let Some(last) = self.known.get_mut(name) {
                    *last = self.list;
                }
            }
            None => self.unnamed = true,
        }
    }

    /// Takes in one event.
    pub(super) fn step<O: Named>(&mut self, event: Event<O>) -> Changes<O> {
        match event {
            Event::Init => {
                self.list = self.list.wrapping_add(1);
                self.listing = true;
                self.unnamed = false;
                Changes::new()
            }
            Event::InitApply(object) | Event::Apply(object) => {
                self.known.insert(object.name(), self.list);
                Changes::from_buf([Change::Apply(object)])
            }
            Event::Delete(object) => {
                let name = object.name();
                self.known.remove(&name).map(|_| Change::Delete(self.kind, name)).into_iter().collect()
            }
            Event::InitDone => self.complete(),
        }
    }

    fn complete<O>(&mut self) -> Changes<O> {
        let (list, unnamed) = (self.list, self.unnamed);
        self.listing = false;
        let kind = self.kind;
        let mut changes: Changes<O> = self
            .known
            .extract_if(|_, last| *last != list && !unnamed)
            .map(|(name, _)| Change::Delete(kind, name))
            .collect();
        if self.known.capacity() > 4 * self.known.len() {
            self.known.shrink_to_fit();
        }
        changes.extend(self.sync());
        changes
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Service;

    use super::*;
    use crate::model::Object;

    fn service(name: &str) -> Object {
        let mut service = Service::default();
        service.metadata.namespace = Some("shop".to_owned());
        service.metadata.name = Some(name.to_owned());
        Object::Service(Box::new(service))
    }

    /// Plays events and returns each change as a word.
    fn play(ledger: &mut Ledger, events: impl IntoIterator<Item = Event<Object>>) -> Vec<String> {
        let changes = events.into_iter().flat_map(|event| ledger.step(event));
        changes
            .map(|change| match change {
                Change::Apply(object) => format!("+{}", object.name().name()),
                Change::Delete(_, name) => format!("-{}", name.name()),
                Change::Synced(kind) => format!("{kind} synced"),
            })
            .collect()
    }

    fn listed(names: &[&str]) -> Vec<Event<Object>> {
        let objects = names.iter().map(|name| Event::InitApply(service(name)));
        std::iter::once(Event::Init).chain(objects).chain([Event::InitDone]).collect()
    }

    #[test]
    fn the_first_list_is_passed_on_and_then_synced() {
        let mut ledger = Ledger::new(Kind::Service);
        assert_eq!(play(&mut ledger, listed(&["a", "b"])), ["+a", "+b", "Service synced"]);
        assert_eq!(ledger.len(), 2);
    }

    #[test]
    fn an_empty_first_list_is_synced() {
        assert_eq!(play(&mut Ledger::new(Kind::Node), listed(&[])), ["Node synced"]);
    }

    #[test]
    fn objects_that_a_later_complete_list_lacks_are_deleted_and_synced_is_not_repeated() {
        let mut ledger = Ledger::new(Kind::Service);
        play(&mut ledger, listed(&["a", "b", "c"]));
        let before_end = [Event::Init, Event::InitApply(service("b"))];
        assert_eq!(play(&mut ledger, before_end), ["+b"]);
        let mut gone = play(&mut ledger, [Event::InitDone]);
        gone.sort();
        assert_eq!(gone, ["-a", "-c"]);
    }

    #[test]
    fn unreadable_objects_of_a_list_keep_their_previous_version() {
        let mut ledger = Ledger::new(Kind::Service);
        play(&mut ledger, listed(&["a", "b", "c"]));
        play(&mut ledger, [Event::Init, Event::InitApply(service("a"))]);
        ledger.keep(Some(&service("b").name()));
        ledger.keep(Some(&service("unknown").name()));
        assert_eq!(play(&mut ledger, [Event::InitDone]), ["-c"]);
        play(&mut ledger, [Event::Init]);
        ledger.keep(None);
        assert_eq!(
            play(&mut ledger, [Event::InitDone]),
            Vec::<String>::new(),
            "the object may be any of them"
        );
        assert_eq!(play(&mut ledger, listed(&["a"])), ["+a", "-b"], "the next list is complete");
    }

    #[test]
    fn a_list_that_breaks_off_deletes_nothing() {
        let mut ledger = Ledger::new(Kind::Service);
        play(&mut ledger, listed(&["a", "b"]));
        assert_eq!(play(&mut ledger, [Event::Init, Event::InitApply(service("c"))]), ["+c"]);
        ledger.abandon();
        // Only a complete list deletes objects, also those of the list that broke off.
        assert_eq!(play(&mut ledger, listed(&["a"])).len(), 3);
        assert_eq!(ledger.len(), 1);
    }

    #[test]
    fn objects_that_change_during_a_list_are_reported_once() {
        let mut ledger = Ledger::new(Kind::Service);
        play(&mut ledger, [Event::Init, Event::InitApply(service("a"))]);
        assert_eq!(play(&mut ledger, [Event::Delete(service("a"))]), ["-a"]);
        assert_eq!(play(&mut ledger, [Event::InitDone]), ["Service synced"]);
    }

    #[test]
    fn deletes_of_unknown_objects_are_not_reported() {
        let mut ledger = Ledger::new(Kind::Service);
        play(&mut ledger, listed(&["a"]));
        assert_eq!(play(&mut ledger, [Event::Delete(service("b"))]), Vec::<String>::new());
        assert_eq!(
            play(&mut ledger, [Event::Apply(service("b")), Event::Delete(service("b"))]),
            ["+b", "-b"]
        );
    }

    #[test]
    fn a_kind_that_counts_as_complete_without_a_list_is_not_synced_again() {
        let mut ledger = Ledger::new(Kind::ServiceCidr);
        assert_eq!(ledger.sync::<Object>(), Some(Change::Synced(Kind::ServiceCidr)));
        assert_eq!(play(&mut ledger, listed(&["a"])), ["+a"]);
    }
}
