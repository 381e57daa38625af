//! The watch of each kind, one task a kind.
//!
//! In: the API server's lists and watches. Out: [`Change`]s, in order within a kind. A task ends only when
//! the receiver is dropped.

use std::{
    error::Error as _,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::StreamExt as _;
use k8s_openapi::api::{
    core::v1::{Node, Service},
    discovery::v1::EndpointSlice,
    networking::v1::ServiceCIDR,
};
use kube::{
    Client,
    runtime::watcher::{self, Event, InitialListStrategy},
};
use rustc_hash::FxHashSet;
use tokio::{sync::mpsc::Sender, task::JoinSet};
use tracing::{debug, warn};

use super::{
    connection::Connection,
    ledger::Ledger,
    objects::{Absent, Watched},
    responses::Responses,
    retry::{Refusal, Retry, as_asked, spread},
    stream_item::{Skipped, StreamItem},
    versions::Version,
};
use crate::{model::Change, source::SourceStatus};

/// A connection that lasted this long was good, so delays start short again after it.
const GOOD_CONNECTION: Duration = Duration::from_secs(10);
/// After this many streamed lists that ended early, weir asks for pages.
const STREAMS_BROKEN_OFF: u32 = 3;
/// The most objects for which a warning about unreadable content is remembered.
const MOST_SKIPPED: usize = 1024;

/// The receiver of changes was dropped.
struct Closed;

pub(super) async fn every_kind(
    connection: Connection,
    changes: Sender<Change>,
    status: Arc<SourceStatus>,
    names: bool,
) {
    let mut watches = JoinSet::new();
    watches.spawn(Watch::<Service>::new(&connection, &changes, &status).for_names(names).run());
    watches.spawn(Watch::<EndpointSlice>::new(&connection, &changes, &status).for_names(names).run());
    watches.spawn(Watch::<Node>::new(&connection, &changes, &status).run());
    watches.spawn(Watch::<ServiceCIDR>::new(&connection, &changes, &status).run());
    drop(changes);
    while watches.join_next().await.is_some() {}
}

pub(super) struct Watch<K: Watched> {
    node: String,
    responses: Arc<Responses>,
    known: Version,
    client: Client,
    config: watcher::Config,
    changes: Sender<Change<K::Object>>,
    status: Arc<SourceStatus>,
    ledger: Ledger,
    retry: Retry,
    /// When the last request after a failure was sent, or the last list was complete.
    well_since: Instant,
    /// Whether the list at the start of the events is complete.
    listed: bool,
    /// When the server last sent data before its last failure.
    last_contact: Option<Instant>,
    broken_off: u32,
    last_logged: String,
    /// The unreadable objects that were logged.
    skipped: FxHashSet<String>,
}

impl<K: Watched> Watch<K> {
    pub(super) fn new(
        connection: &Connection,
        changes: &Sender<Change<K::Object>>,
        status: &Arc<SourceStatus>,
    ) -> Self {
        let responses = Arc::new(Responses::new(K::KIND, status));
        let client = connection.watch_client(Arc::clone(&responses));
        Self {
            node: connection.node().to_owned(),
            responses,
            known: connection.known(K::KIND),
            client,
            config: K::selector(connection.node()).streaming_lists(),
            changes: changes.clone(),
            status: Arc::clone(status),
            ledger: Ledger::new(K::KIND),
            retry: Retry::new(),
            well_since: Instant::now(),
            listed: false,
            last_contact: None,
            broken_off: 0,
            last_logged: String::new(),
            skipped: FxHashSet::default(),
        }
    }

    /// Watches the objects that DNS answers need too.
    fn for_names(mut self, names: bool) -> Self {
        if names {
            self.config = K::selector_for_names(&self.node).streaming_lists();
        }
        self
    }

    /// Watches until the receiver is dropped.
    pub(super) async fn run(mut self) {
        // The receiver may be dropped while the server sends nothing.
        let changes = self.changes.clone();
        tokio::select! {
            () = changes.closed() => {}
            Closed = self.follow_for_ever() => {}
        }
    }

    async fn follow_for_ever(&mut self) -> Closed {
        loop {
            if let Err(closed) = self.follow().await {
                return closed;
            }
        }
    }

    /// Follows events until a new list is needed.
    async fn follow(&mut self) -> Result<(), Closed> {
        self.listed = false;
        let mut events = K::events(self.client.clone(), self.config.clone(), self.known.clone());
        while let Some(item) = events.next().await {
            let again = match item {
                Ok(StreamItem::Event(event)) => self.event(event).await?,
                Ok(StreamItem::Skipped(skipped)) => {
                    self.skip(&skipped);
                    false
                }
                Err(error) => self.error(&error).await?,
            };
            if again {
                return Ok(());
            }
        }
        Ok(())
    }

    fn streaming(&self) -> bool {
        self.config.initial_list_strategy == InitialListStrategy::StreamingList
    }

    fn ask_for_pages(&mut self) {
        debug!(kind = %K::KIND, "the API server does not stream lists; asking for pages");
        self.config.initial_list_strategy = InitialListStrategy::ListWatch;
    }

    async fn event(&mut self, event: Event<K>) -> Result<bool, Closed> {
        let event = match event {
            Event::Init => {
                if self.ledger.listing() && self.list_broke_off().await {
                    return Ok(true);
                }
                self.listed = false;
                self.status.of(K::KIND).relist(self.streaming());
                Event::Init
            }
            Event::InitDone => {
                self.recovered();
                Event::InitDone
            }
            Event::InitApply(object) => Event::InitApply(object.trimmed()),
            Event::Apply(object) => Event::Apply(object.trimmed()),
            Event::Delete(object) => Event::Delete(object.trimmed()),
        };
        self.pass_on(event).await?;
        Ok(false)
    }

    /// Continues without an object that cannot be read. Its previous version stays in force.
    fn skip(&mut self, Skipped { name, position, reason }: &Skipped) {
        self.ledger.keep(name.as_ref());
        let object = name.as_ref().map_or_else(|| position.clone(), ToString::to_string);
        if self.skipped.len() >= MOST_SKIPPED || !self.skipped.insert(object.clone()) {
            debug!(kind = %K::KIND, object, reason, "skipped an unreadable object again");
            return;
        }
        let kind = K::KIND;
        warn!(%kind, object, reason, "skipped an object that cannot be read; its previous version stays in force");
    }

    async fn pass_on(&mut self, event: Event<K::Object>) -> Result<(), Closed> {
        let about_an_object = !matches!(event, Event::Init | Event::InitDone);
        let changes = self.ledger.step(event);
        if about_an_object || !changes.is_empty() {
            self.status.of(K::KIND).event(self.ledger.len());
        }
        for change in changes {
            self.send(change).await?;
        }
        Ok(())
    }

    async fn send(&self, change: Change<K::Object>) -> Result<(), Closed> {
        if matches!(change, Change::Synced(_)) {
            self.status.of(K::KIND).set_synced();
        }
        self.changes.send(change).await.map_err(|_| Closed)
    }

    /// A list ended without an error before it was complete. Returns whether to ask for pages.
    async fn list_broke_off(&mut self) -> bool {
        self.status.of(K::KIND).error();
        let delay = self.retry.delay(Refusal::Refused, false);
        debug!(kind = %K::KIND, ?delay, "a list ended early");
        tokio::time::sleep(delay).await;
        self.stream_failed()
    }

    /// A list is complete. Delays stay long, because only later events show whether watches work too.
    fn recovered(&mut self) {
        self.status.of(K::KIND).record_contact();
        self.listed = true;
        self.broken_off = 0;
        self.well_since = Instant::now();
    }

    /// Resets the delays if the server has been well for long enough.
    fn reset_delays(&mut self) {
        if self.well_since.elapsed() > GOOD_CONNECTION {
            self.retry.reset_delays();
            self.last_logged.clear();
        }
    }

    /// A streamed list failed. Returns whether to ask for pages.
    fn stream_failed(&mut self) -> bool {
        self.broken_off += 1;
        let pages = self.streaming() && self.broken_off >= STREAMS_BROKEN_OFF;
        if pages {
            self.ask_for_pages();
        }
        pages
    }

    /// Whether to list again after this refusal.
    fn needs_list(&mut self, refusal: Refusal) -> bool {
        let last_contact = self.status.of(K::KIND).last_contact();
        let before = std::mem::replace(&mut self.last_contact, last_contact);
        let lists = self.retry.needs_list(refusal, last_contact != before);
        if lists {
            debug!(kind = %K::KIND, ?refusal, "listing again");
        }
        lists
    }

    /// Waits for the delay of the error. Returns whether to start with a list.
    async fn error(&mut self, error: &watcher::Error) -> Result<bool, Closed> {
        // An error before the list is complete concerns the streamed list; after it, it concerns the watch,
        // which needs no pages.
        let listing = !self.listed;
        let refusal = Refusal::of(error, self.streaming() && listing);
        let asked = self.responses.retry_after();
        let refusal = if asked.is_some() && refusal == Refusal::Refused { Refusal::Busy } else { refusal };
        self.ledger.abandon();
        if refusal == Refusal::NoStreaming {
            self.ask_for_pages();
            return Ok(true);
        }
        let pages = listing && refusal == Refusal::EndedAtOnce && self.stream_failed();
        let anew = self.needs_list(refusal) || pages;
        let status = Arc::clone(&self.status);
        let status = status.of(K::KIND);
        status.error();
        if status.set_connected(false) {
            self.reset_delays();
        }
        self.log_refusal(error, refusal);
        if K::ABSENT == Absent::Complete
            && refusal == Refusal::Absent
            && let Some(synced) = self.ledger.sync()
        {
            self.send(synced).await?;
        }
        tokio::time::sleep(self.delay(refusal, asked)).await;
        self.well_since = Instant::now();
        Ok(anew)
    }

    /// The delay after this refusal. `asked` is the delay that the server requires.
    fn delay(&mut self, refusal: Refusal, asked: Option<Duration>) -> Duration {
        let delay = self.retry.delay(refusal, K::ABSENT != Absent::RetryOften);
        let delay = if refusal == Refusal::Gone && self.ledger.synced() { spread(delay) } else { delay };
        asked.map_or(delay, |asked| as_asked(delay, asked))
    }

    /// Logs the server's error, once in a row. Unreachable servers and rejected credentials are logged by the
    /// connection, once for all kinds.
    fn log_refusal(&mut self, error: &watcher::Error, refusal: Refusal) {
        let text = error.source().map_or_else(|| error.to_string(), ToString::to_string);
        let logged_elsewhere = matches!(refusal, Refusal::Unreachable | Refusal::Unauthenticated);
        if logged_elsewhere || text == self.last_logged {
            debug!(kind = %K::KIND, error = text, "watch failed");
            return;
        }
        match refusal {
            Refusal::Absent if K::ABSENT == Absent::RetryRarely => {
                warn!(
                    kind = %K::KIND, error = text,
                    "cannot list; does the role allow list and watch? weir serves Services, but does not notice pods \
                     that opt out of the socket plane"
                );
            }
            Refusal::Absent => {
                warn!(kind = %K::KIND, error = text, "cannot list; does the role allow list and watch?");
            }
            _ => warn!(kind = %K::KIND, error = text, "watch failed"),
        }
        self.last_logged = text;
    }
}
