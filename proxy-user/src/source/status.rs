//! How a source is doing, for metrics and `weir status`.
//!
//! In: what the sources note down as they go. Out: [`KindReport`]s for whoever asks. Reading never waits for a source.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use serde::Serialize;

use crate::model::Kind;

/// How a source is doing, kind by kind. The source writes it, everybody may read it.
#[derive(Debug, Default)]
pub struct SourceStatus {
    kinds: [KindStatus; Kind::ALL.len() + Kind::PODS.len()],
}

impl SourceStatus {
    /// The part for one kind.
    #[must_use]
    pub fn of(&self, kind: Kind) -> &KindStatus {
        &self.kinds[kind as usize]
    }

    /// For how long the origin has told nothing, by the kinds of which it ever told something.
    #[must_use]
    pub fn silences(&self) -> Vec<(&'static str, Duration)> {
        let kinds = Kind::ALL.into_iter().chain(Kind::PODS);
        kinds.filter_map(|kind| Some((kind.as_str(), self.of(kind).heard()?.elapsed()))).collect()
    }

    /// A consistent enough copy of everything about Services, in the order of [`Kind::ALL`]. What of pods is asked for
    /// by [`SourceStatus::of`].
    #[must_use]
    pub fn report(&self) -> Vec<KindReport> {
        Kind::ALL.into_iter().map(|kind| self.of(kind).report(kind)).collect()
    }
}

/// How the watch of one kind is doing.
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
    heard: Mutex<Option<Instant>>,
}

impl KindStatus {
    /// Notes whether the origin can be reached; answers whether it could before.
    pub(super) fn set_connected(&self, connected: bool) -> bool {
        self.connected.swap(connected, Relaxed)
    }

    /// Notes that the first full list has been delivered.
    pub(super) fn set_synced(&self) {
        self.synced.store(true, Relaxed);
    }

    /// Notes that the origin tells of what happens: an event, a bookmark, the end of a list.
    pub(super) fn hear(&self) {
        *self.heard.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// When the origin last told of what happens, if it ever did.
    #[must_use]
    pub fn heard(&self) -> Option<Instant> {
        *self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that something arrived, and how many objects are known now.
    pub(super) fn event(&self, objects: usize) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        self.hear();
        self.events.fetch_add(1, Relaxed);
        self.objects.store(objects as u64, Relaxed);
        self.last_event_millis.store(u64::try_from(now.as_millis()).unwrap_or(u64::MAX), Relaxed);
    }

    /// Notes that everything is being listed, and whether the list comes as a stream.
    pub(super) fn relist(&self, streamed: bool) {
        self.relists.fetch_add(1, Relaxed);
        self.streamed.fetch_add(u64::from(streamed), Relaxed);
    }

    /// Notes that something went wrong.
    pub(super) fn error(&self) {
        self.errors.fetch_add(1, Relaxed);
    }

    /// A copy of what is known.
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

/// What [`KindStatus`] held at one moment. Counts are since the source started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct KindReport {
    /// The kind.
    pub kind: Kind,
    /// Whether the origin answers.
    pub connected: bool,
    /// Whether the first full list has been delivered.
    pub synced: bool,
    /// How many objects are known.
    pub objects: u64,
    /// How many times an object came, changed or went, lists included.
    pub events: u64,
    /// How many full lists were begun.
    pub relists: u64,
    /// How many of these came as a stream rather than in pages.
    pub streamed: u64,
    /// How many times the origin failed or refused.
    pub errors: u64,
    /// When an object last came, in milliseconds since 1970.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_event_millis: Option<u64>,
}
