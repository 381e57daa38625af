//! What a stream of one kind brings: events, and word of objects that cannot be read.
//!
//! In: what the API server sends. Out: [`News`]. An object that cannot be read is no error of the stream, because an
//! error would delay or repeat everything else that the stream brings.

use kube::{
    core::ObjectMeta,
    runtime::watcher::{self, Event},
};

use crate::model::ObjectName;

/// One thing that a stream brings.
#[derive(Debug)]
pub(super) enum News<K> {
    /// Something happened to an object, or to a list.
    Event(Event<K>),
    /// An object of a list or of an event was left out.
    Skipped(Skipped),
}

/// An object that cannot be read.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Skipped {
    /// Its name, if at least that can be read.
    pub(super) name: Option<ObjectName>,
    /// Where it was: the number of an item, the type of an event.
    pub(super) place: String,
    /// What is wrong with it.
    pub(super) reason: String,
}

/// What a stream brings next.
pub(super) type Brought<K> = watcher::Result<News<K>>;

impl Skipped {
    pub(super) fn new(metadata: &ObjectMeta, place: String, reason: &impl ToString) -> Self {
        let name = metadata.name.is_some().then(|| ObjectName::of(metadata));
        Self { name, place, reason: reason.to_string() }
    }
}
