//! The items of a stream of one kind: events, and objects that were skipped.
//!
//! In: the API server's data. Out: [`News`]. An object that cannot be read is not an error of the stream,
//! because an error would delay or repeat all other objects of the stream.

use kube::{
    core::ObjectMeta,
    runtime::watcher::{self, Event},
};

use crate::model::ObjectName;

/// An item of a stream.
#[derive(Debug)]
pub(super) enum News<K> {
    /// A change of an object, or the start or end of a list.
    Event(Event<K>),
    /// An object of a list or an event that cannot be read.
    Skipped(Skipped),
}

/// An object that cannot be read.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Skipped {
    /// The name of the object, if it can be read.
    pub(super) name: Option<ObjectName>,
    /// The position: the number of a list item, or the type of an event.
    pub(super) place: String,
    /// Why the object cannot be read.
    pub(super) reason: String,
}

/// The result of polling a stream.
pub(super) type Brought<K> = watcher::Result<News<K>>;

impl Skipped {
    pub(super) fn new(metadata: &ObjectMeta, place: String, reason: &impl ToString) -> Self {
        let name = metadata.name.is_some().then(|| ObjectName::of(metadata));
        Self { name, place, reason: reason.to_string() }
    }
}
