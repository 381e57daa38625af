//! Lists and watches in Kubernetes' protobuf encoding, which costs an API server a fraction of what JSON
//! costs.
//!
//! In: the API server's lists and watches of kinds with many objects. Out: the same events that `kube`'s
//! watcher makes of JSON, without unused fields. Objects are decoded one by one as they arrive, so that a
//! list is never in memory as a whole. The first list is no older than the version that the previous agent
//! stored, and the newest state if none is stored. An older one, which kube-proxy starts with, would make a
//! restarted agent remove what its predecessor programmed last.
//!
//! ```text
//! Listing ──whole──▶ Listed ──asked──▶ Watching ─┐       Json: a server without protobuf
//!    ▲                  ▲                        │
//!    └─failed─┘         └───────ended────────────┘
//! ```
//!
//! A watch that the server refuses is requested again. If only a list helps, the caller starts a new stream.

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
    json,
    responses::random_watch_timeout,
    stream_item::{ItemResult, Skipped, StreamItem},
    versions::Version,
};

mod list;
mod message;
mod object;
#[cfg(test)]
mod tests;

/// The media type of protobuf.
const MEDIA_TYPE: &str = "application/vnd.kubernetes.protobuf";
const LIST: HeaderValue = HeaderValue::from_static("application/vnd.kubernetes.protobuf, application/json");
const WATCH: HeaderValue =
    HeaderValue::from_static("application/vnd.kubernetes.protobuf;stream=watch, application/json");
/// The media type for metadata alone.
const LIST_METADATA: HeaderValue = HeaderValue::from_static(
    "application/vnd.kubernetes.protobuf;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1, \
     application/vnd.kubernetes.protobuf, application/json",
);
const WATCH_METADATA: HeaderValue = HeaderValue::from_static(
    "application/vnd.kubernetes.protobuf;stream=watch;as=PartialObjectMetadata;g=meta.k8s.io;v=v1, \
     application/vnd.kubernetes.protobuf;stream=watch, application/json",
);
/// The compression that weir accepts for lists.
const GZIP: HeaderValue = HeaderValue::from_static("gzip");
/// The prefix of an object.
const MAGIC: &[u8] = b"k8s\0";
/// Larger than any object that etcd accepts.
const LARGEST: usize = 16 << 20;
/// The size of a read in bytes.
const CHUNK: usize = 64 << 10;

/// Why a response cannot be read.
#[derive(Debug, thiserror::Error)]
enum Unreadable {
    #[error("an object does not start with the prefix of protobuf objects")]
    Magic,
    #[error("an object is not valid protobuf: {0}")]
    Protobuf(#[from] prost::DecodeError),
    #[error("a list does not have the layout of a protobuf list")]
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

/// The server does not offer protobuf for the request.
struct NoProtobuf;

type Bytestream = StreamReader<BoxStream<'static, io::Result<Bytes>>, Bytes>;
type Events = FramedRead<Bytestream, LengthDelimitedCodec>;

/// A kind that is read in protobuf, or in JSON if the server has no protobuf.
pub(super) trait ProtobufKind:
    FromProtobuf + Resource<DynamicType = ()> + Clone + Debug + Default + DeserializeOwned + Send + 'static
{
}

impl<K> ProtobufKind for K where
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

/// An endless stream of events of a kind. After an error the next poll tries again.
pub(super) fn events<K: ProtobufKind>(
    client: Client,
    config: Config,
    known: Version,
) -> BoxStream<'static, ItemResult<K>> {
    let follower = Follower { client, config, known, state: State::Start };
    let events = stream::unfold(follower, |mut follower| async {
        loop {
            if let Some(item) = follower.step().await.transpose() {
                return Some((item, follower));
            }
        }
    });
    events.boxed()
}

struct Follower<K> {
    client: Client,
    config: Config,
    /// The stored version of the kind.
    known: Version,
    state: State<K>,
}

enum State<K> {
    Start,
    /// The version is the first part of a list.
    Listing {
        parts: FramedRead<Bytestream, Parts>,
        version: String,
        /// The number of items so far.
        items: usize,
    },
    Listed {
        version: String,
    },
    Watching {
        events: Events,
        version: String,
    },
    Json(BoxStream<'static, ItemResult<K>>),
}

impl<K: ProtobufKind> Follower<K> {
    /// Runs one step of the state machine and returns its item.
    async fn step(&mut self) -> watcher::Result<Option<StreamItem<K>>> {
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
                        Ok(Some(StreamItem::Event(Event::InitDone)))
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
                let item = events.next().await.transpose();
                self.state = State::Json(events);
                item
            }
        }
    }

    async fn list(&mut self) -> watcher::Result<Option<StreamItem<K>>> {
        let mut answer = self.ask_for_list().await;
        if self.known.previous().is_some()
            && let Err(kube::Error::Api(status)) = &answer
            && is_about_versions(status)
        {
            info!(
                kind = %K::kind(&()), error = %status,
                "the API server does not have the stored resource version; reading the newest list"
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
                Ok(Some(StreamItem::Event(Event::Init)))
            }
            Err(NoProtobuf) => Ok(self.resort_to_json()),
        }
    }

    async fn ask_for_list(&mut self) -> kube::Result<Result<Bytestream, NoProtobuf>> {
        let version = self.known.previous();
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

    async fn watch(&mut self, version: String) -> watcher::Result<Option<StreamItem<K>>> {
        let parameters = WatchParams {
            label_selector: self.config.label_selector.clone(),
            field_selector: self.config.field_selector.clone(),
            timeout: Some(random_watch_timeout()),
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

    /// Takes in an event of a watch. An event that cannot be read does not end the watch.
    fn event(
        &mut self,
        event: io::Result<BytesMut>,
        events: Events,
        version: String,
    ) -> watcher::Result<Option<StreamItem<K>>> {
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
            // An error is the last event of a watch.
            self.state = State::Listed { version };
            let status = raw.and_then(status)?;
            return Err(watcher::Error::WatchError(status.boxed()));
        }
        let metadata = raw.as_ref().map(|raw| identity(raw.clone())).unwrap_or_default();
        // If the watch ends, it resumes after this event, if the event has a version.
        let version = metadata.resource_version.clone().unwrap_or(version);
        self.known.keep(&version);
        self.state = State::Watching { events, version };
        let position = || format!("an event {kind}");
        Ok(match (kind.as_str(), raw) {
            ("ADDED" | "MODIFIED", Ok(raw)) => Some(read(raw, Event::Apply, position)),
            ("DELETED", Ok(_)) if metadata.name.is_some() => {
                Some(StreamItem::Event(Event::Delete(deleted(metadata))))
            }
            ("BOOKMARK", Ok(_)) => None,
            (_, Ok(_)) => Some(StreamItem::Skipped(Skipped::new(
                &metadata,
                position(),
                &"such an event cannot be used",
            ))),
            (_, Err(error)) => Some(StreamItem::Skipped(Skipped::new(&metadata, position(), &error))),
        })
    }

    fn resort_to_json(&mut self) -> Option<StreamItem<K>> {
        debug!(kind = %K::kind(&()), "the API server does not speak protobuf; asking for JSON");
        // JSON watches store no versions, and the stored one would become too old.
        self.known.keep("");
        self.state = State::Json(json::events(self.client.clone(), self.config.clone()));
        None
    }
}

/// Decodes an object of an event.
fn read<K: FromProtobuf>(
    raw: Bytes,
    event: fn(K) -> Event<K>,
    position: impl Fn() -> String,
) -> StreamItem<K> {
    match K::read(raw.clone()) {
        Ok(object) => StreamItem::Event(event(object)),
        Err(error) => StreamItem::Skipped(Skipped::new(&identity(raw), position(), &error)),
    }
}

/// An object of which only the name is used.
fn deleted<K: ProtobufKind>(metadata: ObjectMeta) -> K {
    let mut object = K::default();
    *object.meta_mut() = metadata;
    object
}

/// Sends a request. A response in another encoding than the first of `accepted` is [`NoProtobuf`].
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

/// Decompresses a stream. Missing bytes at its end are detected by the decoder of the content.
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

/// The message of an object, without its envelope.
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

/// Whether a list is refused because of its version: the server has not reached it (504), as after a restore
/// of etcd from a backup, or cannot parse it.
fn is_about_versions(status: &Status) -> bool {
    matches!(status.code, 400 | 410 | 422 | 504)
}

/// The error in a response, in either encoding.
async fn refusal(answer: Response<Body>) -> kube::Result<kube::Error> {
    let (code, in_protobuf) = (answer.status(), is_protobuf(&answer));
    let text = answer.into_body().collect().await?.to_bytes();
    let status = if in_protobuf {
        object(text.clone()).and_then(status).ok()
    } else {
        serde_json::from_slice(&text).ok()
    };
    let status = status.unwrap_or_else(|| Status::failure(&String::from_utf8_lossy(&text), code.as_str()));
    Ok(kube::Error::Api(status.with_code(code.as_u16()).boxed()))
}
