//! Wraps the responses to requests about one kind, so that each ends in an orderly way.
//!
//! In: the API server's responses. Out: the same responses; a record of each bookmark, which shows that a
//! watch without events is alive; and the delay that the server asks for before the next request.
//!
//! A watch that ends within a second without an event ends with [`EndedAtOnce`], because both watchers,
//! `kube`'s and weir's, ask again immediately after a watch that ends without an error. The end of any other
//! watch that ends early is passed on with a small delay, so that not all agents of a cluster come back to a
//! restarted server at the same moment. A response without data for too long ends with an error.

use std::{
    io,
    ops::RangeInclusive,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt as _};
use http::{Response, header};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use kube::client::Body;
use tower::BoxError;

use crate::{
    model::Kind,
    source::{KindStatus, SourceStatus},
};

/// The timeout of a watch in seconds. Each watch draws its own, so that the agents of a cluster reconnect one
/// by one.
const WATCH_TIMEOUTS: RangeInclusive<u32> = 300..=600;
/// A watch that ends sooner without an event has failed. Its end is delayed to this moment.
const SHORTEST: Duration = Duration::from_secs(1);
/// The interval over which agents spread their reconnects.
const SPREAD: Duration = Duration::from_secs(1);
/// A watch that ends this close to its timeout ended because of it.
const MARGIN: Duration = Duration::from_secs(5);
/// The longest time without data on a watch. An API server sends a bookmark about once a minute, so after
/// this time the server is gone, even if a load balancer in between still acknowledges packets.
const SILENCE: Duration = Duration::from_secs(150);

/// The longest time without data on other responses. They have no reason to pause, and HTTP/1.1, which they
/// use, has no pings.
const LIST_SILENCE: Duration = Duration::from_secs(30);

/// The longest line of a JSON watch. etcd takes no object of more than 1.5 MiB, and `kube` buffers a line
/// until it ends.
const LONGEST_EVENT: usize = 16 << 20;

/// The bytes that mark a bookmark, in JSON and in protobuf. `kube`'s watcher does not report bookmarks.
const BOOKMARK: &[u8] = b"BOOKMARK";

/// The watch ended within [`SHORTEST`] and without an event.
#[derive(Debug, thiserror::Error)]
#[error("the API server ended the watch within a second and without an event")]
pub(super) struct EndedAtOnce;

/// No data arrived for this time.
#[derive(Debug, thiserror::Error)]
#[error("no data for {0:?}")]
struct Silent(Duration);

/// The event exceeds this number of bytes.
#[derive(Debug, thiserror::Error)]
#[error("an event of the watch is longer than {0} bytes")]
struct TooLong(usize);

/// The body of a wrapped response.
pub(super) type Contents = StreamBody<BoxStream<'static, Result<Frame<Bytes>, BoxError>>>;

/// Wraps and observes the responses about one kind.
#[derive(Debug)]
pub(super) struct Responses {
    kind: Kind,
    status: Arc<SourceStatus>,
    /// The delay in seconds that the server's last response asked for; 0 if none.
    retry_after: AtomicU64,
}

impl Responses {
    pub(super) fn new(kind: Kind, status: &Arc<SourceStatus>) -> Self {
        Self { kind, status: Arc::clone(status), retry_after: AtomicU64::new(0) }
    }

    fn status(&self) -> &KindStatus {
        self.status.of(self.kind)
    }

    /// Records that a request got no response.
    pub(super) fn no_response(&self) {
        self.status().set_connected(false);
    }

    /// Takes the delay that the server's last response asked for.
    pub(super) fn retry_after(&self) -> Option<Duration> {
        Some(Duration::from_secs(self.retry_after.swap(0, Relaxed))).filter(|time| !time.is_zero())
    }

    /// Wraps the response to a request with this query. `broke_off` is called if the body ends with an error.
    pub(super) fn wrap(
        self: &Arc<Self>,
        query: &str,
        answer: Response<Body>,
        broke_off: impl Fn() + Send + 'static,
    ) -> Response<Contents> {
        self.status().set_connected(answer.status().is_success());
        // The header may also be a date, but API servers do not send one.
        let after =
            answer.headers().get(header::RETRY_AFTER).and_then(|after| after.to_str().ok()?.parse().ok());
        self.retry_after.store(after.unwrap_or_default(), Relaxed);
        let watch = answer.status().is_success().then(|| watch_timeout(query)).flatten();
        let json =
            answer.headers().get(header::CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(JSON));
        answer.map(|body| {
            contents(body, watch.map(|time| Watch { time, json }), Arc::clone(self), Box::new(broke_off))
        })
    }
}

/// Draws the timeout of a watch in seconds.
pub(super) fn random_watch_timeout() -> u32 {
    fastrand::u32(WATCH_TIMEOUTS)
}

/// Whether a request with this query is a watch.
pub(super) fn is_watch(query: Option<&str>) -> bool {
    query.is_some_and(|query| watch_timeout(query).is_some())
}

/// The timeout in the query of a watch; `None` for other requests.
fn watch_timeout(query: &str) -> Option<Duration> {
    let value = |name: &str| query.split('&').find_map(|part| part.strip_prefix(name)?.strip_prefix('='));
    let seconds = (value("watch")? == "true").then(|| value("timeoutSeconds")?.parse().ok());
    Some(Duration::from_secs(seconds?.unwrap_or_default()))
}

/// The content type of a watch in JSON, which has one event a line.
const JSON: &[u8] = b"application/json";

/// The properties of a watch.
#[derive(Clone, Copy)]
struct Watch {
    /// Its timeout.
    time: Duration,
    json: bool,
}

/// Called if a body ends with an error.
type BrokeOff = Box<dyn Fn() + Send>;

/// The unread part of a response.
struct Remaining {
    responses: Arc<Responses>,
    body: Body,
    watch: Option<Watch>,
    /// The bytes so far of the unfinished line of a JSON watch.
    line: usize,
    started: Instant,
    /// Whether any data has arrived.
    has_data: bool,
    over: bool,
    broke_off: BrokeOff,
}

fn contents(body: Body, watch: Option<Watch>, responses: Arc<Responses>, broke_off: BrokeOff) -> Contents {
    let rest = Remaining {
        responses,
        body,
        watch,
        line: 0,
        started: Instant::now(),
        has_data: false,
        over: false,
        broke_off,
    };
    let frames = stream::unfold(rest, async |mut rest| Some((rest.next().await?, rest)));
    StreamBody::new(frames.boxed())
}

impl Remaining {
    async fn next(&mut self) -> Option<Result<Frame<Bytes>, BoxError>> {
        if self.over {
            return None;
        }
        let patience = if self.watch.is_some() { SILENCE } else { LIST_SILENCE };
        let frame = match tokio::time::timeout(patience, self.body.frame()).await {
            Ok(frame) => frame,
            Err(_) => Some(Err(kube::Error::Service(Silent(patience).into()))),
        };
        if let Some(Err(_)) = &frame {
            (self.broke_off)();
        }
        match (frame, self.watch) {
            (Some(Ok(frame)), _) => {
                if let Some(data) = frame.data_ref() {
                    self.came(data);
                }
                if self.line > LONGEST_EVENT {
                    (self.broke_off)();
                    self.over = true;
                    return Some(Err(kube::Error::Service(TooLong(LONGEST_EVENT).into()).into()));
                }
                Some(Ok(frame))
            }
            (end, None) => {
                self.over = true;
                end.map(|end| end.map_err(Into::into))
            }
            (_, Some(_)) if self.ended_at_once() => {
                self.over = true;
                Some(Err(EndedAtOnce.into()))
            }
            (end, Some(watch)) => {
                self.over = true;
                tokio::time::sleep(self.pause(watch.time)).await;
                end.map(|end| end.map_err(Into::into))
            }
        }
    }

    fn came(&mut self, data: &[u8]) {
        self.has_data |= !data.is_empty();
        if self.watch.is_some_and(|watch| watch.json) {
            self.line = match data.iter().rposition(|byte| *byte == b'\n') {
                Some(end) => data.len() - end - 1,
                None => self.line + data.len(),
            };
        }
        if self.watch.is_some() && data.windows(BOOKMARK.len()).any(|part| part == BOOKMARK) {
            self.responses.status().record_contact();
        }
    }

    fn ended_at_once(&self) -> bool {
        !self.has_data && self.started.elapsed() < SHORTEST
    }

    /// The delay of the end of a watch with this timeout.
    fn pause(&self, time: Duration) -> Duration {
        let lasted = self.started.elapsed();
        if lasted + MARGIN < time {
            SHORTEST.saturating_sub(lasted) + SPREAD.mul_f32(fastrand::f32())
        } else {
            Duration::ZERO
        }
    }
}

/// Whether the error is [`EndedAtOnce`].
pub(super) fn ended_at_once(error: &kube::Error) -> bool {
    let kube::Error::ReadEvents(error) = error else { return false };
    let cause = io::Error::get_ref(error).and_then(|cause| cause.downcast_ref::<kube::Error>());
    matches!(cause, Some(kube::Error::Service(cause)) if cause.is::<EndedAtOnce>())
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT_ONCE: Option<Watch> = Some(Watch { time: Duration::ZERO, json: true });
    const FIVE_MINUTES: Option<Watch> = Some(Watch { time: Duration::from_secs(300), json: true });

    async fn all(responses: &Arc<Responses>, body: &str, watch: Option<Watch>) -> Result<Bytes, BoxError> {
        let body = Body::from(body.as_bytes().to_vec());
        Ok(http_body_util::BodyExt::collect(contents(body, watch, Arc::clone(responses), Box::new(|| ())))
            .await?
            .to_bytes())
    }

    fn new_responses() -> Arc<Responses> {
        Arc::new(Responses::new(Kind::Service, &Arc::default()))
    }

    #[test]
    fn the_query_tells_a_watch_and_its_timeout() {
        assert_eq!(watch_timeout("&watch=true&timeoutSeconds=345&x=y"), Some(Duration::from_secs(345)));
        assert_eq!(watch_timeout("watch=true"), Some(Duration::ZERO));
        for list in ["", "limit=500", "labelSelector=watch%3Dtrue", "watch=false", "rewatch=true"] {
            assert_eq!(watch_timeout(list), None, "{list}");
        }
    }

    #[tokio::test]
    async fn an_empty_watch_is_a_failure_unlike_an_empty_list_and_a_watch_with_events() {
        let responses = new_responses();
        let error = all(&responses, "", FIVE_MINUTES).await.unwrap_err();
        assert!(error.is::<EndedAtOnce>(), "{error:?}");
        all(&responses, "", None).await.unwrap();

        let started = Instant::now();
        assert_eq!(all(&responses, "event", FIVE_MINUTES).await.unwrap(), "event");
        assert!(started.elapsed() >= SHORTEST, "the next watch begins within {:?}", started.elapsed());
    }

    #[tokio::test]
    async fn an_endless_event_is_a_failure_and_many_short_ones_are_not() {
        let responses = new_responses();
        let long = "x".repeat(LONGEST_EVENT + 1);
        let error = all(&responses, &long, FIVE_MINUTES).await.unwrap_err();
        assert!(error.to_string().contains("longer than"), "{error}");
        all(&responses, &long, None).await.unwrap();
        let many = [&long[..LONGEST_EVENT / 2], "\n"].concat().repeat(3);
        all(&responses, &many, FIVE_MINUTES).await.unwrap();
    }

    #[test]
    fn watches_have_different_timeouts() {
        let times: Vec<_> = (0..100).map(|_| random_watch_timeout()).collect();
        assert!(times.iter().all(|time| WATCH_TIMEOUTS.contains(time)), "{times:?}");
        assert!(times.iter().any(|time| *time != times[0]), "{times:?}");
    }

    #[tokio::test]
    async fn a_bookmark_is_recorded_and_an_error_is_not() {
        let responses = new_responses();
        all(&responses, r#"{"type":"ERROR","object":{}}"#, AT_ONCE).await.unwrap();
        assert_eq!(responses.status().last_contact(), None);
        all(&responses, r#"{"type":"BOOKMARK","object":{}}"#, AT_ONCE).await.unwrap();
        assert!(responses.status().last_contact().is_some());
    }
}
