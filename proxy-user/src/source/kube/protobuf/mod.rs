//! Lists and watches in Kubernetes' protobuf encoding, which costs an API server a fraction of what JSON does.
//!
//! In: the API server's lists and watches of kinds of which there are many. Out: the same events that `kube`'s watcher
//! makes of JSON, with what nobody reads left out. Objects are read one by one as they come, of a list too, so that it is
//! never here as a whole. The first list is no older than what the agent before this one knew, and as of now where that is
//! not known: an older one, which is what kube-proxy starts with, would have an agent that starts anew take out what its
//! predecessor programmed last.
//!
//! ```text
//! Listing ──whole──▶ Listed ──asked──▶ Watching ─┐       Json: a server without protobuf
//!    ▲                  ▲                        │
//!    └─failed─┘         └───────ended────────────┘
//! ```
//!
//! A watch that the server refuses is asked for again. Where only a list helps, the events are asked for anew.

use std::{
    fmt::Debug,
    io::{self, Write as _},
};

use bytes::{Bytes, BytesMut};
use flate2::write::GzDecoder;
use futures::{
    StreamExt as _, TryStreamExt as _,
    stream::{self, BoxStream},
};
use http::{HeaderValue, Response, header};
use http_body_util::BodyExt as _;
use k8s_openapi::serde_json;
use kube::{
    Client, Resource,
    api::{ListParams, VersionMatch, WatchParams},
    client::Body,
    core::{ObjectMeta, Request, Status},
    runtime::watcher::{self, Config, Event},
};
use prost::Message as _;
use serde::de::DeserializeOwned;
use tokio_util::{
    codec::{FramedRead, LengthDelimitedCodec},
    io::StreamReader,
};
use tracing::{debug, info};

pub(super) use self::object::FromProtobuf;
use self::{
    list::{Part, Parts},
    object::{identity, text},
};
use super::{
    answers::some_watch_time,
    json,
    news::{Brought, News, Skipped},
    versions::Version,
};

mod list;
mod message;
mod object;
#[cfg(test)]
mod tests;

/// What API servers call it.
const MEDIA_TYPE: &str = "application/vnd.kubernetes.protobuf";
const LIST: HeaderValue = HeaderValue::from_static("application/vnd.kubernetes.protobuf, application/json");
const WATCH: HeaderValue =
    HeaderValue::from_static("application/vnd.kubernetes.protobuf;stream=watch, application/json");
/// The same, of metadata alone.
const LIST_METADATA: HeaderValue = HeaderValue::from_static(
    "application/vnd.kubernetes.protobuf;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1, \
     application/vnd.kubernetes.protobuf, application/json",
);
const WATCH_METADATA: HeaderValue = HeaderValue::from_static(
    "application/vnd.kubernetes.protobuf;stream=watch;as=PartialObjectMetadata;g=meta.k8s.io;v=v1, \
     application/vnd.kubernetes.protobuf;stream=watch, application/json",
);
/// How an API server may compress what is large and no watch.
const GZIP: HeaderValue = HeaderValue::from_static("gzip");
/// What an object begins with.
const MAGIC: &[u8] = b"k8s\0";
/// Larger than any object that etcd takes.
const LARGEST: usize = 16 << 20;
/// What is read at once.
const CHUNK: usize = 64 << 10;

/// Why an answer cannot be read.
#[derive(Debug, thiserror::Error)]
enum Unreadable {
    #[error("an object does not begin as objects in protobuf do")]
    Magic,
    #[error("an object is no protobuf: {0}")]
    Protobuf(#[from] prost::DecodeError),
    #[error("a list is not laid out as lists are")]
    List,
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl From<Unreadable> for watcher::Error {
    fn from(error: Unreadable) -> Self {
        match error {
            Unreadable::Io(error) => Self::WatchFailed(kube::Error::ReadEvents(error)),
            other => Self::WatchError(Status::failure(&other.to_string(), "Unreadable").boxed()),
        }
    }
}

/// What a server was asked for, and does not have in protobuf.
struct NoProtobuf;

type Bytestream = StreamReader<BoxStream<'static, io::Result<Bytes>>, Bytes>;
type Events = FramedRead<Bytestream, LengthDelimitedCodec>;

/// What it takes to follow a kind, be it in protobuf or, where there is none, in JSON.
pub(super) trait Many:
    FromProtobuf + Resource<DynamicType = ()> + Clone + Debug + Default + DeserializeOwned + Send + 'static
{
}

impl<K> Many for K where
    K: FromProtobuf
        + Resource<DynamicType = ()>
        + Clone
        + Debug
        + Default
        + DeserializeOwned
        + Send
        + 'static
{
}

/// Events of a kind, for ever; after an error the next poll tries again.
pub(super) fn events<K: Many>(
    client: Client,
    config: Config,
    known: Version,
) -> BoxStream<'static, Brought<K>> {
    let follower = Follower { client, config, known, state: State::Start };
    let events = stream::unfold(follower, |mut follower| async {
        loop {
            if let Some(news) = follower.step().await.transpose() {
                return Some((news, follower));
            }
        }
    });
    events.boxed()
}

struct Follower<K> {
    client: Client,
    config: Config,
    /// As of when the kind is known, here and to the next agent.
    known: Version,
    state: State<K>,
}

enum State<K> {
    Start,
    /// The version comes first in a list.
    Listing {
        parts: FramedRead<Bytestream, Parts>,
        version: String,
        /// How many items have come.
        items: usize,
    },
    Listed {
        version: String,
    },
    Watching {
        events: Events,
        version: String,
    },
    Json(BoxStream<'static, Brought<K>>),
}

impl<K: Many> Follower<K> {
    /// Goes one step; answers with what it brought.
    async fn step(&mut self) -> watcher::Result<Option<News<K>>> {
        match std::mem::replace(&mut self.state, State::Start) {
            State::Start => self.list().await,
            State::Listing { mut parts, version, items } => {
                match parts.next().await.transpose().map_err(list_failed)? {
                    Some(Part::Version(version)) => {
                        self.known.forget();
                        self.known.keep(&version);
                        self.state = State::Listing { parts, version, items };
                        Ok(None)
                    }
                    Some(Part::Item(raw)) => {
                        self.state = State::Listing { parts, version, items: items + 1 };
                        Ok(Some(read(raw, Event::InitApply, || format!("item {items} of the list"))))
                    }
                    None if version.is_empty() => Err(watcher::Error::NoResourceVersion),
                    None => {
                        self.state = State::Listed { version };
                        Ok(Some(News::Event(Event::InitDone)))
                    }
                }
            }
            State::Listed { version } => self.watch(version).await,
            State::Watching { mut events, version } => match events.next().await {
                Some(event) => self.event(event, events, version),
                None => {
                    self.state = State::Listed { version };
                    Ok(None)
                }
            },
            State::Json(mut events) => {
                let news = events.next().await.transpose();
                self.state = State::Json(events);
                news
            }
        }
    }

    async fn list(&mut self) -> watcher::Result<Option<News<K>>> {
        let mut answer = self.ask_for_list().await;
        if self.known.of_before().is_some()
            && let Err(kube::Error::Api(status)) = &answer
            && is_about_versions(status)
        {
            info!(
                kind = %K::kind(&()), error = %status,
                "the API server does not know what the agent before this one knew; listing as of now"
            );
            self.known.forget();
            answer = self.ask_for_list().await;
        }
        match answer.map_err(watcher::Error::InitialListFailed)? {
            Ok(body) => {
                self.state = State::Listing {
                    parts: FramedRead::with_capacity(body, Parts::new(), CHUNK),
                    version: String::new(),
                    items: 0,
                };
                Ok(Some(News::Event(Event::Init)))
            }
            Err(NoProtobuf) => Ok(self.resort_to_json()),
        }
    }

    async fn ask_for_list(&mut self) -> kube::Result<Result<Bytestream, NoProtobuf>> {
        let version = self.known.of_before();
        let parameters = ListParams {
            label_selector: self.config.label_selector.clone(),
            field_selector: self.config.field_selector.clone(),
            version_match: version.is_some().then_some(VersionMatch::NotOlderThan),
            resource_version: version,
            ..ListParams::default()
        };
        let mut request =
            Request::new(K::url_path(&(), None)).list(&parameters).map_err(kube::Error::BuildRequest)?;
        request.headers_mut().insert(header::ACCEPT_ENCODING, GZIP);
        ask(&self.client, request, if K::METADATA_ONLY { LIST_METADATA } else { LIST }).await
    }

    async fn watch(&mut self, version: String) -> watcher::Result<Option<News<K>>> {
        let parameters = WatchParams {
            label_selector: self.config.label_selector.clone(),
            field_selector: self.config.field_selector.clone(),
            timeout: Some(some_watch_time()),
            bookmarks: true,
            ..WatchParams::default()
        };
        let request = Request::new(K::url_path(&(), None)).watch(&parameters, &version);
        self.state = State::Listed { version: version.clone() };
        let failed = watcher::Error::WatchStartFailed;
        let request = request.map_err(|error| failed(kube::Error::BuildRequest(error)))?;
        let accepted = if K::METADATA_ONLY { WATCH_METADATA } else { WATCH };
        match ask(&self.client, request, accepted).await.map_err(failed)? {
            Ok(body) => {
                let codec = LengthDelimitedCodec::builder().max_frame_length(LARGEST).new_codec();
                self.state = State::Watching { events: FramedRead::new(body, codec), version };
                Ok(None)
            }
            Err(NoProtobuf) => Ok(self.resort_to_json()),
        }
    }

    /// Takes in what a watch brought. The watch goes on whatever one event is about.
    fn event(
        &mut self,
        event: io::Result<BytesMut>,
        events: Events,
        version: String,
    ) -> watcher::Result<Option<News<K>>> {
        let event = match event {
            Ok(event) => event,
            Err(error) => {
                self.state = State::Listed { version };
                return Err(Unreadable::Io(error).into());
            }
        };
        let mut message = message::WatchEvent::default();
        let whole = message.merge(event.freeze()).map_err(Unreadable::from);
        let kind = text(&message.kind);
        let raw = whole.and_then(|()| object(message.object.unwrap_or_default().raw));
        if kind == "ERROR" {
            // Nothing comes behind it.
            self.state = State::Listed { version };
            let status = raw.and_then(status)?;
            return Err(watcher::Error::WatchError(status.boxed()));
        }
        let metadata = raw.as_ref().map(|raw| identity(raw.clone())).unwrap_or_default();
        // From where to go on if the watch ends: behind this event, if it says where that is.
        let version = metadata.resource_version.clone().unwrap_or(version);
        self.known.keep(&version);
        self.state = State::Watching { events, version };
        let place = || format!("an event {kind}");
        Ok(match (kind.as_str(), raw) {
            ("ADDED" | "MODIFIED", Ok(raw)) => Some(read(raw, Event::Apply, place)),
            ("DELETED", Ok(_)) if metadata.name.is_some() => {
                Some(News::Event(Event::Delete(deleted(metadata))))
            }
            ("BOOKMARK", Ok(_)) => None,
            (_, Ok(_)) => {
                Some(News::Skipped(Skipped::new(&metadata, place(), &"such an event cannot be used")))
            }
            (_, Err(error)) => Some(News::Skipped(Skipped::new(&metadata, place(), &error))),
        })
    }

    fn resort_to_json(&mut self) -> Option<News<K>> {
        debug!(kind = %K::kind(&()), "the API server does not speak protobuf; asking for JSON");
        // Nothing is kept of those lists and watches, and what is there would become too old.
        self.known.keep("");
        self.state = State::Json(json::events(self.client.clone(), self.config.clone()));
        None
    }
}

/// The object, as part of such an event.
fn read<K: FromProtobuf>(raw: Bytes, event: fn(K) -> Event<K>, place: impl Fn() -> String) -> News<K> {
    match K::read(raw.clone()) {
        Ok(object) => News::Event(event(object)),
        Err(error) => News::Skipped(Skipped::new(&identity(raw), place(), &error)),
    }
}

/// An object of which only the name matters any more.
fn deleted<K: Many>(metadata: ObjectMeta) -> K {
    let mut object = K::default();
    *object.meta_mut() = metadata;
    object
}

/// Asks; an answer in another encoding than `accepted` names first is none.
async fn ask(
    client: &Client,
    mut request: http::Request<Vec<u8>>,
    accepted: HeaderValue,
) -> kube::Result<Result<Bytestream, NoProtobuf>> {
    request.headers_mut().insert(header::ACCEPT, accepted);
    let answer = client.send(request.map(Body::from)).await?;
    if !answer.status().is_success() {
        return Err(refusal(answer).await?);
    }
    if !is_protobuf(&answer) {
        return Ok(Err(NoProtobuf));
    }
    let compressed = answer.headers().get(header::CONTENT_ENCODING) == Some(&GZIP);
    let bytes = answer.into_body().into_data_stream().map_err(io::Error::other).boxed();
    Ok(Ok(StreamReader::new(if compressed { inflated(bytes) } else { bytes })))
}

/// What is compressed in these bytes, as it comes. That some are missing at the end shows in what they are.
fn inflated(bytes: BoxStream<'static, io::Result<Bytes>>) -> BoxStream<'static, io::Result<Bytes>> {
    let mut decoder = GzDecoder::new(Vec::new());
    let pieces = bytes.map(move |piece| {
        decoder.write_all(&piece?)?;
        decoder.flush()?;
        Ok(Bytes::from(std::mem::take(decoder.get_mut())))
    });
    pieces.try_filter(|piece| std::future::ready(!piece.is_empty())).boxed()
}

fn list_failed(error: Unreadable) -> watcher::Error {
    match error {
        Unreadable::Io(error) => watcher::Error::InitialListFailed(kube::Error::ReadEvents(error)),
        other => other.into(),
    }
}

fn is_protobuf(answer: &Response<Body>) -> bool {
    let kind = answer.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    kind.is_some_and(|kind| kind.starts_with(MEDIA_TYPE))
}

/// An object's message, whatever kind it says it is.
fn object(bytes: Bytes) -> Result<Bytes, Unreadable> {
    if !bytes.starts_with(MAGIC) {
        return Err(Unreadable::Magic);
    }
    Ok(message::Unknown::decode(bytes.slice(MAGIC.len()..))?.raw)
}

fn status(raw: Bytes) -> Result<Status, Unreadable> {
    let message::Status { message, reason, code } = message::Status::decode(raw)?;
    Ok(Status::failure(&text(&message), &text(&reason)).with_code(u16::try_from(code).unwrap_or_default()))
}

/// Whether a list is refused for what it says of versions: the server has not come so far (504), as after its etcd was
/// restored from a backup, or cannot read them.
fn is_about_versions(status: &Status) -> bool {
    matches!(status.code, 400 | 410 | 422 | 504)
}

/// What the server says why not, in whichever encoding.
async fn refusal(answer: Response<Body>) -> kube::Result<kube::Error> {
    let (code, in_protobuf) = (answer.status(), is_protobuf(&answer));
    let text = answer.into_body().collect().await?.to_bytes();
    let said = if in_protobuf {
        object(text.clone()).and_then(status).ok()
    } else {
        serde_json::from_slice(&text).ok()
    };
    let said = said.unwrap_or_else(|| Status::failure(&String::from_utf8_lossy(&text), code.as_str()));
    Ok(kube::Error::Api(said.with_code(code.as_u16()).boxed()))
}
