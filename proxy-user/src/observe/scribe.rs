//! Writes events: one for each object and reason in the whole cluster, and never many.
//!
//! In: [`Trouble`]s. Out: event objects at the API server.
//!
//! Most trouble with a Service is seen by every node alike, and a cluster has thousands. Therefore an event's name follows
//! from the Service and the reason, each node waits for a random time before it writes, and the node that comes first is
//! the only one that writes. What comes together becomes one note. Budgets bound what is left.

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

use super::{Metrics, Subject, Trouble};

/// Troubles that wait for their time; more are only logged.
const WAITING: usize = 256;
/// The same trouble is told again no sooner than this.
const AGAIN: Duration = Duration::from_secs(120);
/// How long the API server keeps events, if not told otherwise. Later one is written anew.
const KEPT: Duration = Duration::from_secs(3600);

// So many about one object are written at once, and after that one in so much time.
const OF_OBJECT: NonZeroU32 = NonZeroU32::MIN.saturating_add(24);
const OF_OBJECT_EVERY: Duration = Duration::from_secs(300);
/// So many the agent writes in an hour.
const OF_AGENT: NonZeroU32 = NonZeroU32::MIN.saturating_add(99);
/// So many objects are remembered for their budgets before those that have it whole are forgotten.
const MOST_OBJECTS: usize = 1024;

// What an API server takes, in bytes.
const LONGEST_NOTE: usize = 1024;
const LONGEST_INSTANCE: usize = 128;
const LONGEST_NAME: usize = 253;

/// What an event is about, and why.
type Key = (Subject, &'static str);

/// A trouble that waits, with the notes of those that came meanwhile.
struct Waiting {
    trouble: Trouble,
    due: Instant,
}

/// Troubles that wait for their time, at most one for each object and reason.
#[derive(Default)]
struct Queue(Vec<Waiting>);

impl Queue {
    /// Takes one in; answers whether there is room for it.
    fn push(&mut self, trouble: Trouble, due: Instant) -> bool {
        let full = self.0.len() >= WAITING;
        match self.0.iter_mut().find(|waiting| waiting.trouble.key() == trouble.key()) {
            Some(known) => add(&mut known.trouble.note, &trouble.note),
            None if full => return false,
            None => self.0.push(Waiting { trouble, due }),
        }
        true
    }

    /// When the next one is due.
    fn due(&self) -> Option<Instant> {
        self.0.iter().map(|waiting| waiting.due).min()
    }

    /// The one that is due first; of several the one that came first.
    fn pop(&mut self) -> Option<Trouble> {
        let first = self.0.iter().enumerate().min_by_key(|(_, waiting)| waiting.due)?.0;
        Some(self.0.remove(first).trouble)
    }
}

/// Sums notes up, as far as an API server takes them.
fn add(note: &mut String, more: &str) {
    if note.len() < LONGEST_NOTE && !note.contains(more) {
        note.push_str("; ");
        note.push_str(more);
    }
}

/// How much may still be written.
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

    /// Whether one more event about an object may be written, which it then counts as.
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

/// Writes what comes in.
pub(super) struct Scribe {
    client: Client,
    node: String,
    metrics: Metrics,
    /// The longest that trouble waits which other nodes see too.
    spread: Duration,
    queue: Queue,
    budgets: Budgets,
    /// What was told lately, with its note.
    told: HashMap<(Key, String), Instant>,
    /// By namespace and name.
    written: HashMap<(String, String), Written>,
    /// Whether the role allows to look for an event before it is written, as far as is known.
    may_get: bool,
    complaint: String,
}

impl Scribe {
    pub(super) fn new(client: Client, node: &str, metrics: Metrics, spread: Duration) -> Self {
        Self {
            client,
            node: node.to_owned(),
            metrics,
            spread,
            queue: Queue::default(),
            budgets: Budgets::new(),
            told: HashMap::new(),
            written: HashMap::new(),
            may_get: true,
            complaint: String::new(),
        }
    }

    /// Writes until the other end of `troubles` is gone.
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
                        self.tell(trouble).await;
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

    async fn tell(&mut self, trouble: Trouble) {
        self.told.retain(|_, at| at.elapsed() < AGAIN);
        self.written.retain(|_, written| written.at.elapsed() < KEPT);
        let told = (trouble.key(), trouble.note.clone());
        if self.told.contains_key(&told) {
            return;
        }
        if !self.budgets.allow(&trouble.about) {
            tracing::debug!(about = ?trouble.about, reason = trouble.reason, "event not written: rate limit reached");
            self.metrics.event_dropped();
            return;
        }
        match self.publish(&trouble).await {
            Ok(()) => self.complaint.clear(),
            Err(error) => self.complain(&error),
        }
        // Also after a failure, or trouble that comes ten times a second would ask the API server that often.
        self.told.insert(told, Instant::now());
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
            // Another node came first, and says the same.
            Err(kube::Error::Api(status)) if status.is_already_exists() => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// How often the trouble was counted in the event of this name, if there is one. Of an event that another node keeps
    /// there is nothing to count.
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
            // kube-proxy's role does not allow it. Then the attempt to create one says whether it is there.
            Err(kube::Error::Api(status)) if status.is_forbidden() => {
                self.may_get = false;
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Counts an event on. A name that is gone meanwhile is written anew the next time.
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

    /// Namespace and name of the event, and what it is about. There is none for a Service without a uid, because
    /// `kubectl describe` would not find it.
    fn place(&self, trouble: &Trouble) -> Option<(String, String, ObjectReference)> {
        let reason = trouble.reason.to_lowercase();
        match &trouble.about {
            // As kube-proxy and the kubelet have it, the uid is the name. Each start is an event of its own.
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

    /// Warns that events cannot be written, once in a row.
    fn complain(&mut self, error: &kube::Error) {
        let text = error.to_string();
        if text != self.complaint {
            tracing::warn!(error = text, "cannot write events; does the role allow create and patch?");
        }
        self.complaint = text;
    }
}

/// What an event that is there already counts.
enum Count {
    /// This node wrote it.
    Own(i32),
    /// Another node wrote it.
    Foreign,
}

/// A random time up to the longest.
fn random(longest: Duration) -> Duration {
    // Each state has keys of its own.
    let number = RandomState::new().build_hasher().finish();
    longest.mul_f64(f64::from(u32::try_from(number >> 32).unwrap_or_default()) / f64::from(u32::MAX))
}

/// The name of an event about an object, no longer than names can be.
fn event_name(object: &str, rest: &str) -> String {
    let object = shortened(object, LONGEST_NAME.saturating_sub(rest.len() + 1));
    format!("{}.{rest}", object.trim_end_matches(['.', '-']))
}

/// As much of the start of `text` as fits into so many bytes.
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
    fn what_comes_together_about_one_service_becomes_one_note_that_fits() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        for number in 0..10_000 {
            assert!(queue.push(trouble("cart", &format!("port {number} fails")), now + AGAIN));
        }
        assert!(queue.push(trouble("cart", "port 7 fails"), now));
        assert!(queue.push(trouble("till", "it fails"), now));
        assert_eq!(queue.due(), Some(now), "a later trouble does not wait for an earlier one");
        assert_eq!(queue.pop(), Some(trouble("till", "it fails")));
        let note = queue.pop().unwrap().note;
        assert!(note.starts_with("port 0 fails; port 1 fails; port 2 fails; "), "{note}");
        assert_eq!(note.matches("port 7 fails").count(), 1, "{note}");
        assert!(note.len() < LONGEST_NOTE + 100);
        assert_eq!(queue.pop(), None);
    }

    #[test]
    fn no_more_waits_than_there_is_room_for_and_the_others_are_not_lost_with_it() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        let taken = (0..WAITING + 50).filter(|number| queue.push(trouble(&format!("s{number}"), "x"), now));
        assert_eq!(taken.count(), WAITING);
        assert!(queue.push(trouble("s0", "more of what waits"), now));
        assert_eq!(queue.pop().unwrap().about, trouble("s0", "").about, "first come, first told");
    }

    #[test]
    fn one_object_cannot_use_up_what_the_others_need_and_all_have_an_end() {
        let budgets = Budgets::new();
        let service = |name: &str| Subject::Service(ObjectName::new("shop", name));
        let allowed = |name: &str, times: u32| (0..times).filter(|_| budgets.allow(&service(name))).count();
        assert_eq!(allowed("loud", 1000), 25);
        assert_eq!(allowed("quiet", 3), 3);
        let others: usize = (0..401).map(|number| allowed(&format!("s{number}"), 1)).sum();
        assert_eq!(others, 100 - 25 - 3, "an agent writes 100 in an hour");
    }

    /// A client of an API server that has no events and takes every one, and what it is asked, as method and path.
    fn server() -> (Client, Arc<Mutex<Vec<String>>>) {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&asked);
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
        (Client::new(service, "default"), asked)
    }

    #[tokio::test]
    async fn trouble_with_hundreds_of_services_asks_little_of_the_api_server() {
        let ((client, asked), metrics) = (server(), Metrics::new());
        let scribe = Scribe::new(client, "n1", metrics.clone(), Duration::ZERO);
        let (tell, troubles) = mpsc::channel(401);
        for number in 0..401_u32 {
            let uid = Uid::read(&format!("00000000-0000-0000-0000-{number:012x}"));
            tell.send(trouble(&format!("s{number}"), "it fails").with_uid(uid)).await.unwrap();
        }
        let writing = tokio::spawn(scribe.write(troubles));
        let done = async {
            while !metrics.render().contains("\nweir_events_dropped_total 301\n") {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), done).await.expect("all are written or dropped");
        writing.abort();
        let asked = asked.lock().unwrap();
        let place = "/apis/events.k8s.io/v1/namespaces/shop/events";
        let created = asked.iter().filter(|request| **request == format!("POST {place}")).count();
        let looked = asked.iter().filter(|request| request.starts_with(&format!("GET {place}/"))).count();
        assert_eq!((created, looked, asked.len()), (100, 100, 200), "{asked:#?}");
    }

    #[test]
    fn what_is_too_long_is_cut_between_letters() {
        assert_eq!(shortened("short", 10), "short");
        assert_eq!(shortened("déjà", 4), "déj");
        assert_eq!(shortened("déjà", 2), "d");
        assert_eq!(event_name("web", "fails.1"), "web.fails.1");
        let long = event_name(&format!("{}.{}", "a".repeat(242), "b".repeat(50)), "fails.123");
        assert_eq!(long, format!("{}.fails.123", "a".repeat(242)));
    }

    #[test]
    fn the_wait_is_never_longer_than_it_may_be() {
        let longest = Duration::from_secs(60);
        let waits: Vec<_> = (0..1000).map(|_| random(longest)).collect();
        assert!(waits.iter().all(|wait| *wait <= longest));
        assert!(waits.iter().any(|wait| *wait != waits[0]), "it is the same for every node");
        assert_eq!(random(Duration::ZERO), Duration::ZERO);
    }
}
