//! The items of a stream of one kind: events, and objects that were skipped.
//!
//! In: the API server's data. Out: [`StreamItem`]. An object that cannot be read is not an error of the
//! stream, because an error would delay or repeat all other objects of the stream.

use kube::{
    core::ObjectMeta,
    runtime::watcher::{self, Event},
};

use crate::model::ObjectName;

/// An item of a stream.
#[derive(Debug)]
pub(super) enum StreamItem<K> {
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
    pub(super) position: String,
    /// Why the object cannot be read.
    pub(super) reason: String,
}

/// The result of polling a stream.
pub(super) type ItemResult<K> = watcher::Result<StreamItem<K>>;

impl Skipped {
    pub(super) fn new(metadata: &ObjectMeta, position: String, reason: &impl ToString) -> Self {
        let name = metadata.name.is_some().then(|| ObjectName::of(metadata));
        Self { name, position, reason: reason.to_string() }
    }
}
