//! The state of a source, for metrics.
//!
//! In: events and failures of the sources. Out: [`KindReport`]s. Reading never waits for a source.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use serde::Serialize;

use crate::model::Kind;

/// The state of a source, by kind. The source writes it, and any thread may read it.
#[derive(Debug, Default)]
pub struct SourceStatus {
    kinds: [KindStatus; Kind::ALL.len() + Kind::PODS.len()],
}

impl SourceStatus {
    /// The state of one kind.
    #[must_use]
    pub fn of(&self, kind: Kind) -> &KindStatus {
        &self.kinds[kind as usize]
    }

    /// The time since the API server last sent anything about a kind, for each kind about which it ever did.
    #[must_use]
    pub fn silences(&self) -> Vec<(&'static str, Duration)> {
        let kinds = Kind::ALL.into_iter().chain(Kind::PODS);
        kinds.filter_map(|kind| Some((kind.as_str(), self.of(kind).last_contact()?.elapsed()))).collect()
    }

    /// A copy of the state of the kinds in [`Kind::ALL`], in that order. It is not atomic over all kinds. For
    /// pods and namespaces use [`SourceStatus::of`].
    #[must_use]
    pub fn report(&self) -> Vec<KindReport> {
        Kind::ALL.into_iter().map(|kind| self.of(kind).report(kind)).collect()
    }
}

/// The state of the watch of one kind.
#[derive(Debug, Default)]
pub struct KindStatus {
    connected: AtomicBool,
    synced: AtomicBool,
    objects: AtomicU64,
    events: AtomicU64,
    relists: AtomicU64,
    streamed: AtomicU64,
    errors: AtomicU64,
    last_event_millis: AtomicU64,
    last_contact: Mutex<Option<Instant>>,
}

impl KindStatus {
    /// Records whether the source answers. Returns whether it did before.
    pub(super) fn set_connected(&self, connected: bool) -> bool {
        self.connected.swap(connected, Relaxed)
    }

    /// Records that the first full list is complete.
    pub(super) fn set_synced(&self) {
        self.synced.store(true, Relaxed);
    }

    /// Records that an event, a bookmark or the end of a list arrived.
    pub(super) fn record_contact(&self) {
        *self.last_contact.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// When an event, a bookmark or the end of a list last arrived.
    #[must_use]
    pub fn last_contact(&self) -> Option<Instant> {
        *self.last_contact.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records that an object arrived, and the number of objects now.
    pub(super) fn event(&self, objects: usize) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        self.record_contact();
        self.events.fetch_add(1, Relaxed);
        self.objects.store(objects as u64, Relaxed);
        self.last_event_millis.store(u64::try_from(now.as_millis()).unwrap_or(u64::MAX), Relaxed);
    }

    /// Records the start of a full list, and whether it is streamed.
    pub(super) fn relist(&self, streamed: bool) {
        self.relists.fetch_add(1, Relaxed);
        self.streamed.fetch_add(u64::from(streamed), Relaxed);
    }

    /// Records a failure.
    pub(super) fn error(&self) {
        self.errors.fetch_add(1, Relaxed);
    }

    /// A copy of the state.
    #[must_use]
    pub fn report(&self, kind: Kind) -> KindReport {
        KindReport {
            kind,
            connected: self.connected.load(Relaxed),
            synced: self.synced.load(Relaxed),
            objects: self.objects.load(Relaxed),
            events: self.events.load(Relaxed),
            relists: self.relists.load(Relaxed),
            streamed: self.streamed.load(Relaxed),
            errors: self.errors.load(Relaxed),
            last_event_millis: Some(self.last_event_millis.load(Relaxed)).filter(|millis| *millis > 0),
        }
    }
}

/// The values of [`KindStatus`] at one moment. Counters start with the source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct KindReport {
    /// The kind of the objects.
    pub kind: Kind,
    /// Whether the source answers.
    pub connected: bool,
    /// Whether the first full list is complete.
    pub synced: bool,
    /// The number of objects now.
    pub objects: u64,
    /// The number of new, changed and deleted objects, including those of lists.
    pub events: u64,
    /// The number of full lists that were started.
    pub relists: u64,
    /// The number of these that were streamed instead of read in pages.
    pub streamed: u64,
    /// The number of failures and refusals.
    pub errors: u64,
    /// When an object last arrived, in milliseconds since 1970.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_event_millis: Option<u64>,
}
