//! A stand-in for an API server. Its watches fail as a test demands.
//!
//! In: objects and faults. Out: lists and watches over HTTP, Services and EndpointSlices in protobuf, other kinds in JSON;
//! and what was asked for. A real API server does nearly none of this on demand.

use std::{
    collections::BTreeMap,
    io::Write as _,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use anyhow::{Context as _, Result};
use axum::{
    Router,
    body::{Body, Bytes},
    extract::State,
    http::{HeaderMap, Response, StatusCode, Uri, header},
};
use flate2::{Compression, write::GzEncoder};
use futures::{
    StreamExt as _,
    stream::{self, BoxStream},
};
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::watch, task::JoinHandle};

mod protobuf;

/// The behaviour of the watches of a kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fault {
    /// They bring what happens.
    #[default]
    None,
    /// They begin, and end without an event.
    EndAtOnce,
    /// They are refused with this code, and with so many seconds after which to ask again.
    Refused(u16, Option<u32>),
    /// They bring an ERROR event with this code and reason, and end.
    Error(u16, &'static str),
}

/// A request, and when it came.
#[derive(Clone, Debug)]
pub struct Asked {
    /// Whether it is for a watch that does not list.
    pub watch: bool,
    pub query: String,
    /// The client's `User-Agent`.
    pub user_agent: String,
    /// The client's `Accept` header.
    pub accept: String,
    /// When it came.
    pub at: Instant,
}

#[derive(Default)]
struct Kind {
    fault: Fault,
    /// Whether only the next watch fails.
    once: bool,
    /// Names by the version they came with.
    objects: BTreeMap<u64, String>,
    asked: Vec<Asked>,
}

struct Shared {
    kinds: Mutex<BTreeMap<String, Kind>>,
    version: watch::Sender<u64>,
}

impl Shared {
    fn kinds(&self) -> MutexGuard<'_, BTreeMap<String, Kind>> {
        self.kinds.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The server. It is gone once it is dropped.
pub struct StandIn {
    address: SocketAddr,
    shared: Arc<Shared>,
    directory: tempfile::TempDir,
    serving: JoinHandle<()>,
}

impl Drop for StandIn {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl StandIn {
    /// Starts it on a port of its own.
    ///
    /// # Errors
    ///
    /// When there is no port for it.
    pub async fn start() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared { kinds: Mutex::default(), version: watch::Sender::new(1) });
        let app = Router::new().fallback(answer).with_state(Arc::clone(&shared));
        let serving = tokio::spawn(async move {
            // It ends with the test, which notices by itself when nothing answers.
            let _ = axum::serve(listener, app).await;
        });
        Ok(Self { address, shared, directory: tempfile::tempdir()?, serving })
    }

    /// How to reach it.
    ///
    /// # Errors
    ///
    /// When the file cannot be written.
    pub fn kubeconfig(&self) -> Result<PathBuf> {
        let path = self.directory.path().join("kubeconfig");
        let named = |what: &str, value: Value| json!([{"name": "it", what: value}]);
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "it",
            "clusters": named("cluster", json!({"server": format!("http://{}", self.address)})),
            "users": named("user", json!({})),
            "contexts": named("context", json!({"cluster": "it", "user": "it"})),
        });
        std::fs::write(&path, config.to_string()).context("writing a kubeconfig")?;
        Ok(path)
    }

    /// From now on watches of a kind, by the plural, fail so.
    pub fn fail(&self, plural: &str, fault: Fault) {
        self.set(plural, fault, false);
    }

    /// The next watch of a kind fails so, and those behind it do not.
    pub fn fail_once(&self, plural: &str, fault: Fault) {
        self.set(plural, fault, true);
    }

    fn set(&self, plural: &str, fault: Fault, once: bool) {
        let mut kinds = self.shared.kinds();
        let kind = kinds.entry(plural.to_owned()).or_default();
        (kind.fault, kind.once) = (fault, once);
    }

    pub fn put(&self, plural: &str, name: &str) {
        self.shared.version.send_modify(|version| {
            *version += 1;
            let mut kinds = self.shared.kinds();
            kinds.entry(plural.to_owned()).or_default().objects.insert(*version, name.to_owned());
        });
    }

    /// Takes all objects away and begins with the first version again, as a cluster of which a backup is restored.
    pub fn restore(&self) {
        self.shared.version.send_modify(|version| {
            *version = 1;
            self.shared.kinds().values_mut().for_each(|kind| kind.objects.clear());
        });
    }

    /// The requests for a kind.
    #[must_use]
    pub fn asked(&self, plural: &str) -> Vec<Asked> {
        self.shared.kinds().get(plural).map(|kind| kind.asked.clone()).unwrap_or_default()
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Encoding {
    Json,
    Protobuf,
}

impl Encoding {
    fn list(self, objects: &BTreeMap<u64, String>, version: u64) -> Vec<u8> {
        if self == Self::Protobuf {
            return protobuf::list(objects, version);
        }
        let items: Vec<Value> = objects.iter().map(|(version, name)| object(name, *version)).collect();
        let version = version.to_string();
        let list = json!({"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": version}, "items": items});
        list.to_string().into_bytes()
    }

    fn event(self, kind: &str, name: &str, version: u64) -> Vec<u8> {
        match self {
            Self::Protobuf => protobuf::event(kind, &protobuf::object(name, version)),
            Self::Json => line(&json!({"type": kind, "object": object(name, version)})),
        }
    }

    fn error(self, code: u16, reason: &str) -> Vec<u8> {
        match self {
            Self::Protobuf => protobuf::event("ERROR", &protobuf::status(code, reason)),
            Self::Json => line(&json!({"type": "ERROR", "object": status(code, reason)})),
        }
    }

    const fn content_type(self) -> &'static str {
        match self {
            Self::Json => "application/json",
            Self::Protobuf => protobuf::MEDIA_TYPE,
        }
    }
}

fn line(value: &Value) -> Vec<u8> {
    format!("{value}\n").into_bytes()
}

fn object(name: &str, version: u64) -> Value {
    json!({"metadata": {"name": name, "resourceVersion": version.to_string()}, "spec": {}})
}

fn status(code: u16, reason: &str) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason, "message": "no"})
}

/// The event that ends a streamed list.
fn end_of_list(version: u64) -> Vec<u8> {
    let metadata =
        json!({"resourceVersion": version.to_string(), "annotations": {"k8s.io/initial-events-end": "true"}});
    let bookmark = json!({"kind": "Object", "apiVersion": "v1", "metadata": metadata});
    line(&json!({"type": "BOOKMARK", "object": bookmark}))
}

async fn answer(State(shared): State<Arc<Shared>>, uri: Uri, headers: HeaderMap) -> Response<Body> {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let query = uri.query().unwrap_or_default().to_owned();
    let value = |name: &str| query.split('&').find_map(|part| part.strip_prefix(name)?.strip_prefix('='));
    let (watch, lists) = (value("watch") == Some("true"), value("sendInitialEvents") == Some("true"));
    let plural = uri.path().rsplit('/').next().unwrap_or_default().to_owned();
    let protobuf = text(header::ACCEPT).starts_with(protobuf::MEDIA_TYPE);
    let encoding = if protobuf { Encoding::Protobuf } else { Encoding::Json };
    let from = value("resourceVersion").and_then(|version| version.parse().ok()).unwrap_or_default();

    let version = *shared.version.borrow();
    let (fault, ends, listed) = {
        let mut kinds = shared.kinds();
        let kind = kinds.entry(plural.clone()).or_default();
        let user_agent = text(header::USER_AGENT).to_owned();
        kind.asked.push(Asked {
            watch: watch && !lists,
            query: query.clone(),
            user_agent,
            accept: text(header::ACCEPT).to_owned(),
            at: Instant::now(),
        });
        // A streamed list goes on as a watch, which is to fail too.
        let ends = kind.fault != Fault::None;
        let fault = if watch && !lists { kind.fault } else { Fault::None };
        // The answer of real servers that have not come so far.
        let fault = if !watch && from > version { Fault::Refused(504, None) } else { fault };
        if fault != Fault::None && kind.once {
            kind.fault = Fault::None;
        }
        (fault, ends, kind.objects.clone())
    };
    let written = if matches!(fault, Fault::Refused(..)) { Encoding::Json } else { encoding };
    let answer = Response::builder().header(header::CONTENT_TYPE, written.content_type());
    let (answer, body) = match fault {
        Fault::Refused(code, after) => {
            let answer = answer.status(code);
            let answer =
                after.into_iter().fold(answer, |answer, after| answer.header(header::RETRY_AFTER, after));
            (answer, Body::from(status(code, "Fault").to_string()))
        }
        Fault::EndAtOnce => (answer, Body::empty()),
        Fault::Error(code, reason) => (answer, Body::from(encoding.error(code, reason))),
        Fault::None if watch => {
            let first = lists.then(|| end_of_list(version));
            let events = first_events(encoding, listed, from, version).into_iter().chain(first);
            let later =
                if ends { stream::empty().boxed() } else { later_events(shared, plural, encoding, version) };
            let events =
                stream::iter(events).chain(later).map(|event| Ok::<_, std::io::Error>(Bytes::from(event)));
            (answer, Body::from_stream(events))
        }
        Fault::None if text(header::ACCEPT_ENCODING) == "gzip" => {
            let answer = answer.header(header::CONTENT_ENCODING, "gzip");
            (answer, Body::from(compressed(&encoding.list(&listed, version))))
        }
        Fault::None => (answer, Body::from(encoding.list(&listed, version))),
    };
    answer.body(body).unwrap_or_else(|_| {
        let mut answer = Response::new(Body::empty());
        *answer.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
        answer
    })
}

/// As an API server compresses lists of more than 128 KiB.
fn compressed(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    // Nothing can fail where memory is written to.
    let _ = encoder.write_all(bytes);
    encoder.finish().unwrap_or_default()
}

fn first_events(encoding: Encoding, objects: BTreeMap<u64, String>, from: u64, to: u64) -> Vec<Vec<u8>> {
    let new = objects.into_iter().filter(|(version, _)| (from + 1..=to).contains(version));
    new.map(|(version, name)| encoding.event("ADDED", &name, version)).collect()
}

/// The events after this version, without end.
fn later_events(
    shared: Arc<Shared>,
    plural: String,
    encoding: Encoding,
    from: u64,
) -> BoxStream<'static, Vec<u8>> {
    let versions = shared.version.subscribe();
    let chunks = stream::unfold((versions, from), move |(mut versions, from)| {
        let (shared, plural) = (Arc::clone(&shared), plural.clone());
        async move {
            let to = *versions.wait_for(|version| *version > from).await.ok()?;
            let objects = shared.kinds().get(&plural).map(|kind| kind.objects.clone()).unwrap_or_default();
            Some((first_events(encoding, objects, from, to).concat(), (versions, to)))
        }
    });
    chunks.filter(|chunk| std::future::ready(!chunk.is_empty())).boxed()
}
