//! The task that writes events: one for each object and reason in the whole cluster, within budgets.
//!
//! In: [`Trouble`]s. Out: event objects at the API server.
//!
//! Thousands of nodes can see the same trouble with a Service. An event's name is therefore made of the Service and
//! the reason, each node waits for a random time before it writes, and only the first node creates the event. Notes
//! of troubles that wait together are joined. Budgets limit the events of one object and of one agent.

use std::{
    collections::HashMap,
    hash::{BuildHasher as _, Hasher as _, RandomState},
    num::NonZeroU32,
    time::Duration,
};

use governor::{DefaultDirectRateLimiter, DefaultKeyedRateLimiter, Quota};
use k8s_openapi::{
    api::{core::v1::ObjectReference, events::v1::Event},
    apimachinery::pkg::apis::meta::v1::MicroTime,
    jiff::Timestamp,
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
    core::ObjectMeta,
};
use serde_json::json;
use tokio::{sync::mpsc, time::Instant};

use super::{
    Metrics,
    trouble::{Subject, Trouble},
};

/// Troubles that may wait for their time. Further ones are only logged.
const WAITING: usize = 256;
/// The shortest time between two events about the same trouble.
const AGAIN: Duration = Duration::from_secs(120);
/// How long an API server keeps events by default. After that weir creates the event again.
const KEPT: Duration = Duration::from_secs(3600);

// An object may have this many events at once, and then one in each period.
const OF_OBJECT: NonZeroU32 = NonZeroU32::MIN.saturating_add(24);
const OF_OBJECT_EVERY: Duration = Duration::from_secs(300);
/// Events of the agent in an hour.
const OF_AGENT: NonZeroU32 = NonZeroU32::MIN.saturating_add(99);
/// Beyond this many objects, weir drops the budgets that are full again.
const MOST_OBJECTS: usize = 1024;

// The longest texts that an API server accepts, in bytes.
const LONGEST_NOTE: usize = 1024;
const LONGEST_INSTANCE: usize = 128;
const LONGEST_NAME: usize = 253;

/// An event's subject and reason.
type Key = (Subject, &'static str);

/// A trouble that waits, with the notes of later ones of the same key.
struct Waiting {
    trouble: Trouble,
    due: Instant,
}

/// Troubles that wait for their time, at most one for each object and reason.
#[derive(Default)]
struct Queue(Vec<Waiting>);

impl Queue {
    /// Adds a trouble. Returns false if the queue is full.
    fn push(&mut self, trouble: Trouble, due: Instant) -> bool {
        let full = self.0.len() >= WAITING;
        match self.0.iter_mut().find(|waiting| waiting.trouble.key() == trouble.key()) {
            Some(known) => add(&mut known.trouble.note, &trouble.note),
            None if full => return false,
            None => self.0.push(Waiting { trouble, due }),
        }
        true
    }

    /// When the next trouble is due.
    fn due(&self) -> Option<Instant> {
        self.0.iter().map(|waiting| waiting.due).min()
    }

    /// Takes the trouble that is due first; of several the one that was added first.
    fn pop(&mut self) -> Option<Trouble> {
        let first = self.0.iter().enumerate().min_by_key(|(_, waiting)| waiting.due)?.0;
        Some(self.0.remove(first).trouble)
    }
}

/// Joins notes, up to the length that an API server accepts.
fn add(note: &mut String, more: &str) {
    if note.len() < LONGEST_NOTE && !note.contains(more) {
        note.push_str("; ");
        note.push_str(more);
    }
}

/// How many events may still be written.
struct Budgets {
    objects: DefaultKeyedRateLimiter<Subject>,
    agent: DefaultDirectRateLimiter,
}

impl Budgets {
    fn new() -> Self {
        let object = Quota::with_period(OF_OBJECT_EVERY).map(|quota| quota.allow_burst(OF_OBJECT));
        let object = object.unwrap_or_else(|| Quota::per_hour(OF_OBJECT));
        Self {
            objects: DefaultKeyedRateLimiter::keyed(object),
            agent: DefaultDirectRateLimiter::direct(Quota::per_hour(OF_AGENT)),
        }
    }

    /// Takes one event about an object from the budgets. Returns false if a budget is empty.
    fn allow(&self, about: &Subject) -> bool {
        if self.objects.len() > MOST_OBJECTS {
            self.objects.retain_recent();
        }
        self.objects.check_key(about).is_ok() && self.agent.check().is_ok()
    }
}

/// An event that this agent wrote.
struct Written {
    count: i32,
    at: Instant,
}

/// Writes the events of an agent.
pub(super) struct EventWriter {
    client: Client,
    node: String,
    metrics: Metrics,
    /// The longest random delay of a trouble that every node sees.
    spread: Duration,
    queue: Queue,
    budgets: Budgets,
    /// When an event with this key and note was sent last.
    sent: HashMap<(Key, String), Instant>,
    /// Events of this agent, by namespace and name.
    written: HashMap<(String, String), Written>,
    /// False once the API server has refused to get an event.
    may_get: bool,
    last_warning: String,
}

impl EventWriter {
    pub(super) fn new(client: Client, node: &str, metrics: Metrics, spread: Duration) -> Self {
        Self {
            client,
            node: node.to_owned(),
            metrics,
            spread,
            queue: Queue::default(),
            budgets: Budgets::new(),
            sent: HashMap::new(),
            written: HashMap::new(),
            may_get: true,
            last_warning: String::new(),
        }
    }

    /// Writes until the sender of `troubles` is dropped.
    pub(super) async fn write(mut self, mut troubles: mpsc::Receiver<Trouble>) {
        loop {
            let due = self.queue.due();
            let due = async {
                match due {
                    Some(due) => tokio::time::sleep_until(due).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                trouble = troubles.recv() => match trouble {
                    Some(trouble) => self.take_in(trouble),
                    None => return,
                },
                () = due => {
                    if let Some(trouble) = self.queue.pop() {
                        self.send(trouble).await;
                    }
                }
            }
        }
    }

    fn take_in(&mut self, trouble: Trouble) {
        let wait = if trouble.everywhere { random(self.spread) } else { Duration::ZERO };
        if !self.queue.push(trouble, Instant::now() + wait) {
            self.metrics.event_dropped();
        }
    }

    async fn send(&mut self, trouble: Trouble) {
        self.sent.retain(|_, at| at.elapsed() < AGAIN);
        self.written.retain(|_, written| written.at.elapsed() < KEPT);
        let event = (trouble.key(), trouble.note.clone());
        if self.sent.contains_key(&event) {
            return;
        }
        if !self.budgets.allow(&trouble.about) {
            tracing::debug!(about = ?trouble.about, reason = trouble.reason, "event not written: rate limit reached");
            self.metrics.event_dropped();
            return;
        }
        match self.publish(&trouble).await {
            Ok(()) => self.last_warning.clear(),
            Err(error) => self.warn(&error),
        }
        // Also after a failure, because a trouble may repeat ten times a second.
        self.sent.insert(event, Instant::now());
    }

    async fn publish(&mut self, trouble: &Trouble) -> Result<(), kube::Error> {
        let Some((namespace, name, regarding)) = self.place(trouble) else { return Ok(()) };
        let events = Api::namespaced(self.client.clone(), &namespace);
        let key = (namespace, name);
        if let Some(count) = self.count(&events, &key).await? {
            return self.count_on(&events, key, count).await;
        }
        match events.create(&PostParams::default(), &self.event(&key, trouble, regarding)).await {
            Ok(_) => {
                self.written.insert(key, Written { count: 1, at: Instant::now() });
                Ok(())
            }
            // Another node created the same event first.
            Err(kube::Error::Api(status)) if status.is_already_exists() => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// The count in the event of this name, if the event exists.
    async fn count(
        &mut self,
        events: &Api<Event>,
        key: &(String, String),
    ) -> Result<Option<Count>, kube::Error> {
        if let Some(written) = self.written.get(key) {
            return Ok(Some(Count::Own(written.count)));
        }
        if !self.may_get {
            return Ok(None);
        }
        match events.get_opt(&key.1).await {
            Ok(None) => Ok(None),
            Ok(Some(event)) if event.reporting_instance.as_deref() == Some(self.instance()) => {
                Ok(Some(Count::Own(event.series.map_or(1, |series| series.count))))
            }
            Ok(Some(_)) => Ok(Some(Count::Foreign)),
            // kube-proxy's role does not allow get. The answer to create then shows whether the event exists.
            Err(kube::Error::Api(status)) if status.is_forbidden() => {
                self.may_get = false;
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Raises the count of an event. If the API server has deleted the event, the next trouble creates it again.
    async fn count_on(
        &mut self,
        events: &Api<Event>,
        key: (String, String),
        count: Count,
    ) -> Result<(), kube::Error> {
        let Count::Own(count) = count else { return Ok(()) };
        let count = count.saturating_add(1);
        let series = json!({ "series": { "count": count, "lastObservedTime": MicroTime(Timestamp::now()) } });
        let patched = events.patch(&key.1, &PatchParams::default(), &Patch::Merge(series)).await;
        if patched.is_ok() {
            self.written.insert(key, Written { count, at: Instant::now() });
        } else {
            self.written.remove(&key);
        }
        patched.map(drop)
    }

    /// Namespace and name of the event, and the object that it is about. `None` for a Service without a uid, because
    /// `kubectl describe` would not find the event.
    fn place(&self, trouble: &Trouble) -> Option<(String, String, ObjectReference)> {
        let reason = trouble.reason.to_lowercase();
        match &trouble.about {
            // Kube-proxy and the kubelet use the Node's name as its uid, too. Each start is a separate event.
            Subject::Node => {
                let now = Timestamp::now().as_nanosecond();
                let regarding = ObjectReference {
                    kind: Some("Node".to_owned()),
                    name: Some(self.node.clone()),
                    uid: Some(self.node.clone()),
                    ..ObjectReference::default()
                };
                Some(("default".to_owned(), event_name(&self.node, &format!("{reason}.{now:x}")), regarding))
            }
            Subject::Service(service) => {
                let uid = trouble.uid?.to_string();
                let name = event_name(service.name(), &format!("{reason}.{uid}"));
                let regarding = ObjectReference {
                    api_version: Some("v1".to_owned()),
                    kind: Some("Service".to_owned()),
                    namespace: Some(service.namespace().to_owned()),
                    name: Some(service.name().to_owned()),
                    uid: Some(uid),
                    ..ObjectReference::default()
                };
                Some((service.namespace().to_owned(), name, regarding))
            }
        }
    }

    fn event(
        &self,
        (namespace, name): &(String, String),
        trouble: &Trouble,
        regarding: ObjectReference,
    ) -> Event {
        let kind = if trouble.normal { "Normal" } else { "Warning" };
        let metadata =
            ObjectMeta { namespace: Some(namespace.clone()), name: Some(name.clone()), ..Default::default() };
        Event {
            metadata,
            type_: Some(kind.to_owned()),
            reason: Some(trouble.reason.to_owned()),
            action: Some(trouble.action.to_owned()),
            note: Some(shortened(&trouble.note, LONGEST_NOTE).to_owned()),
            event_time: Some(MicroTime(Timestamp::now())),
            regarding: Some(regarding),
            reporting_controller: Some("weir".to_owned()),
            reporting_instance: Some(self.instance().to_owned()),
            ..Event::default()
        }
    }

    fn instance(&self) -> &str {
        shortened(&self.node, LONGEST_INSTANCE)
    }

    /// Warns that events cannot be written, once for each error in a row.
    fn warn(&mut self, error: &kube::Error) {
        let text = error.to_string();
        if text != self.last_warning {
            tracing::warn!(error = text, "cannot write events; does the role allow create and patch?");
        }
        self.last_warning = text;
    }
}

/// The count of an event that exists.
enum Count {
    /// This node wrote it.
    Own(i32),
    /// Another node wrote it, and counts.
    Foreign,
}

/// A random time of at most `longest`.
fn random(longest: Duration) -> Duration {
    // Each `RandomState` has different keys.
    let number = RandomState::new().build_hasher().finish();
    longest.mul_f64(f64::from(u32::try_from(number >> 32).unwrap_or_default()) / f64::from(u32::MAX))
}

/// The name of an event about an object, cut to the length that names may have.
fn event_name(object: &str, rest: &str) -> String {
    let object = shortened(object, LONGEST_NAME.saturating_sub(rest.len() + 1));
    format!("{}.{rest}", object.trim_end_matches(['.', '-']))
}

/// The start of `text`, in at most `longest` bytes.
fn shortened(text: &str, longest: usize) -> &str {
    &text[..text.floor_char_boundary(longest)]
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use http_body_util::BodyExt as _;
    use kube::client::Body;

    use super::*;
    use crate::model::{ObjectName, Uid};

    fn trouble(service: &str, note: &str) -> Trouble {
        Trouble::of_service(ObjectName::new("shop", service), "Fails", "Try", note.to_owned())
    }

    #[test]
    fn notes_about_one_service_that_wait_together_are_joined_up_to_the_limit() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        for number in 0..10_000 {
            assert!(queue.push(trouble("cart", &format!("port {number} fails")), now + AGAIN));
        }
        assert!(queue.push(trouble("cart", "port 7 fails"), now));
        assert!(queue.push(trouble("till", "it fails"), now));
        assert_eq!(queue.due(), Some(now), "the queue is ordered by time");
        assert_eq!(queue.pop(), Some(trouble("till", "it fails")));
        let note = queue.pop().unwrap().note;
        assert!(note.starts_with("port 0 fails; port 1 fails; port 2 fails; "), "{note}");
        assert_eq!(note.matches("port 7 fails").count(), 1, "{note}");
        assert!(note.len() < LONGEST_NOTE + 100);
        assert_eq!(queue.pop(), None);
    }

    #[test]
    fn a_full_queue_refuses_new_troubles_and_still_joins_notes() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        let taken = (0..WAITING + 50).filter(|number| queue.push(trouble(&format!("s{number}"), "x"), now));
        assert_eq!(taken.count(), WAITING);
        assert!(queue.push(trouble("s0", "another note"), now));
        assert_eq!(queue.pop().unwrap().about, trouble("s0", "").about, "first in, first out");
    }

    #[test]
    fn one_object_cannot_use_up_the_budget_of_the_others() {
        let budgets = Budgets::new();
        let service = |name: &str| Subject::Service(ObjectName::new("shop", name));
        let allowed = |name: &str, times: u32| (0..times).filter(|_| budgets.allow(&service(name))).count();
        assert_eq!(allowed("loud", 1000), 25);
        assert_eq!(allowed("quiet", 3), 3);
        let others: usize = (0..401).map(|number| allowed(&format!("s{number}"), 1)).sum();
        assert_eq!(others, 100 - 25 - 3, "an agent writes 100 in an hour");
    }

    /// A client of an API server that has no events and accepts every event, and its requests as method and path.
    fn server() -> (Client, Arc<Mutex<Vec<String>>>) {
        let requests = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&requests);
        let service = tower::service_fn(move |request: http::Request<Body>| {
            let (parts, body) = request.into_parts();
            seen.lock().unwrap().push(format!("{} {}", parts.method, parts.uri.path()));
            async move {
                let missing =
                    json!({ "status": "Failure", "reason": "NotFound", "message": "no", "code": 404 });
                let (code, text) = match parts.method {
                    http::Method::GET => (404, serde_json::to_vec(&missing)?.into()),
                    _ => (201, body.collect().await?.to_bytes()),
                };
                Ok::<_, tower::BoxError>(
                    http::Response::builder().status(code).body(Body::from(text.to_vec()))?,
                )
            }
        });
        (Client::new(service, "default"), requests)
    }

    #[tokio::test]
    async fn trouble_with_hundreds_of_services_causes_few_requests_to_the_api_server() {
        let ((client, requests), metrics) = (server(), Metrics::new());
        let writer = EventWriter::new(client, "n1", metrics.clone(), Duration::ZERO);
        let (sender, troubles) = mpsc::channel(401);
        for number in 0..401_u32 {
            let uid = Uid::read(&format!("00000000-0000-0000-0000-{number:012x}"));
            sender.send(trouble(&format!("s{number}"), "it fails").with_uid(uid)).await.unwrap();
        }
        let writing = tokio::spawn(writer.write(troubles));
        let done = async {
            while !metrics.render().contains("\nweir_events_dropped_total 301\n") {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), done).await.expect("all are written or dropped");
        writing.abort();
        let requests = requests.lock().unwrap();
        let place = "/apis/events.k8s.io/v1/namespaces/shop/events";
        let created = requests.iter().filter(|request| **request == format!("POST {place}")).count();
        let looked_up =
            requests.iter().filter(|request| request.starts_with(&format!("GET {place}/"))).count();
        assert_eq!((created, looked_up, requests.len()), (100, 100, 200), "{requests:#?}");
    }

    #[test]
    fn long_text_is_cut_between_letters() {
        assert_eq!(shortened("short", 10), "short");
        assert_eq!(shortened("déjà", 4), "déj");
        assert_eq!(shortened("déjà", 2), "d");
        assert_eq!(event_name("web", "fails.1"), "web.fails.1");
        let long = event_name(&format!("{}.{}", "a".repeat(242), "b".repeat(50)), "fails.123");
        assert_eq!(long, format!("{}.fails.123", "a".repeat(242)));
    }

    #[test]
    fn the_random_delay_has_a_limit() {
        let longest = Duration::from_secs(60);
        let waits: Vec<_> = (0..1000).map(|_| random(longest)).collect();
        assert!(waits.iter().all(|wait| *wait <= longest));
        assert!(waits.iter().any(|wait| *wait != waits[0]), "it is the same for every node");
        assert_eq!(random(Duration::ZERO), Duration::ZERO);
    }
}
