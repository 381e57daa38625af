//! The answers about one kind, each made to end in good order.
//!
//! In: the API server's answers. Out: the same answers, word of each bookmark, which says that a watch without news is
//! alive, and when the server wants to be asked again.
//!
//! A watch that ends within a second without a word ends with [`EndedAtOnce`], because `kube`'s watcher and ours ask again
//! at once after a watch that just ends. Any other watch that ends before its time ends a little later, so that the agents
//! of a cluster do not all come back to a new server in one moment. An answer that goes silent is given up.

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

/// How long a server is asked to keep a watch up, in seconds. Each watch has a time of its own, so that the agents of a
/// cluster come back one by one.
const WATCH_TIMES: RangeInclusive<u32> = 300..=600;
/// A watch that ends sooner without a word has failed, and no watch ends sooner.
const SHORTEST: Duration = Duration::from_secs(1);
/// Over how long agents spread whose watches end in one moment.
const SPREAD: Duration = Duration::from_secs(1);
/// A watch that ends so long before its time ends by itself.
const MARGIN: Duration = Duration::from_secs(5);
/// An API server sends a bookmark about once a minute, so one that says nothing for so long is not there any more,
/// whatever a load balancer in between acknowledges.
const SILENCE: Duration = Duration::from_secs(150);

/// What is not a watch has no reason to pause, and HTTP/1.1, by which it comes, has no pings.
const LIST_SILENCE: Duration = Duration::from_secs(30);

/// No event is so long: etcd takes no object of more than 1.5 MiB. `kube` keeps a line of JSON until it ends.
const LONGEST_EVENT: usize = 16 << 20;

/// What is in a bookmark, in JSON and in protobuf. `kube`'s watcher keeps bookmarks to itself.
const BOOKMARK: &[u8] = b"BOOKMARK";

/// A watch ended as soon as it began.
#[derive(Debug, thiserror::Error)]
#[error("the API server ends the watch within a second and without an event")]
pub(super) struct EndedAtOnce;

/// An answer that says no more.
#[derive(Debug, thiserror::Error)]
#[error("nothing came for {0:?}")]
struct Silent(Duration);

/// An event that does not end.
#[derive(Debug, thiserror::Error)]
#[error("an event of the watch is longer than {0} bytes")]
struct TooLong(usize);

/// What comes of an answer.
pub(super) type Contents = StreamBody<BoxStream<'static, Result<Frame<Bytes>, BoxError>>>;

/// Hears the answers about one kind.
#[derive(Debug)]
pub(super) struct Answers {
    kind: Kind,
    status: Arc<SourceStatus>,
    /// After how many seconds the server wants to be asked again; 0 when it does not say.
    retry_after: AtomicU64,
}

impl Answers {
    pub(super) fn new(kind: Kind, status: &Arc<SourceStatus>) -> Self {
        Self { kind, status: Arc::clone(status), retry_after: AtomicU64::new(0) }
    }

    fn status(&self) -> &KindStatus {
        self.status.of(self.kind)
    }

    /// No answer came.
    pub(super) fn none(&self) {
        self.status().set_connected(false);
    }

    /// After what time the server wants to be asked again, according to its last answer.
    pub(super) fn retry_after(&self) -> Option<Duration> {
        Some(Duration::from_secs(self.retry_after.swap(0, Relaxed))).filter(|time| !time.is_zero())
    }

    /// An answer began to a request with this query.
    /// `broke_off` is called if it does not come to its end.
    pub(super) fn begun(
        self: &Arc<Self>,
        query: &str,
        answer: Response<Body>,
        broke_off: impl Fn() + Send + 'static,
    ) -> Response<Contents> {
        self.status().set_connected(answer.status().is_success());
        // A date may stand there too, of which API servers make no use.
        let after =
            answer.headers().get(header::RETRY_AFTER).and_then(|after| after.to_str().ok()?.parse().ok());
        self.retry_after.store(after.unwrap_or_default(), Relaxed);
        let watch = answer.status().is_success().then(|| watch_time(query)).flatten();
        let json =
            answer.headers().get(header::CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(JSON));
        answer.map(|body| {
            contents(body, watch.map(|time| Watch { time, json }), Arc::clone(self), Box::new(broke_off))
        })
    }
}

/// For how many seconds to ask for a watch.
pub(super) fn some_watch_time() -> u32 {
    fastrand::u32(WATCH_TIMES)
}

/// Whether a request with this query is for a watch.
pub(super) fn is_watch(query: Option<&str>) -> bool {
    query.is_some_and(|query| watch_time(query).is_some())
}

/// How long the watch is to last that this query asks for, if it asks for one.
fn watch_time(query: &str) -> Option<Duration> {
    let value = |name: &str| query.split('&').find_map(|part| part.strip_prefix(name)?.strip_prefix('='));
    let seconds = (value("watch")? == "true").then(|| value("timeoutSeconds")?.parse().ok());
    Some(Duration::from_secs(seconds?.unwrap_or_default()))
}

/// How a watch begins that is in JSON, a line for each event.
const JSON: &[u8] = b"application/json";

/// A watch.
#[derive(Clone, Copy)]
struct Watch {
    /// How long it is to last.
    time: Duration,
    json: bool,
}

/// Is called when an answer does not come to its end.
type BrokeOff = Box<dyn Fn() + Send>;

/// What is left of an answer.
struct Rest {
    answers: Arc<Answers>,
    body: Body,
    watch: Option<Watch>,
    /// How much there is of the line that has not ended, in a watch in JSON.
    line: usize,
    began: Instant,
    /// Whether anything has come.
    brought: bool,
    over: bool,
    broke_off: BrokeOff,
}

fn contents(body: Body, watch: Option<Watch>, answers: Arc<Answers>, broke_off: BrokeOff) -> Contents {
    let rest =
        Rest { answers, body, watch, line: 0, began: Instant::now(), brought: false, over: false, broke_off };
    let frames = stream::unfold(rest, async |mut rest| Some((rest.next().await?, rest)));
    StreamBody::new(frames.boxed())
}

impl Rest {
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
        self.brought |= !data.is_empty();
        if self.watch.is_some_and(|watch| watch.json) {
            self.line = match data.iter().rposition(|byte| *byte == b'\n') {
                Some(end) => data.len() - end - 1,
                None => self.line + data.len(),
            };
        }
        if self.watch.is_some() && data.windows(BOOKMARK.len()).any(|part| part == BOOKMARK) {
            self.answers.status().hear();
        }
    }

    fn ended_at_once(&self) -> bool {
        !self.brought && self.began.elapsed() < SHORTEST
    }

    /// How much later a watch ends that was to last so long.
    fn pause(&self, time: Duration) -> Duration {
        let lasted = self.began.elapsed();
        if lasted + MARGIN < time {
            SHORTEST.saturating_sub(lasted) + SPREAD.mul_f32(fastrand::f32())
        } else {
            Duration::ZERO
        }
    }
}

/// Whether this says that a watch ended as soon as it began.
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

    async fn all(answers: &Arc<Answers>, body: &str, watch: Option<Watch>) -> Result<Bytes, BoxError> {
        let body = Body::from(body.as_bytes().to_vec());
        Ok(http_body_util::BodyExt::collect(contents(body, watch, Arc::clone(answers), Box::new(|| ())))
            .await?
            .to_bytes())
    }

    fn answers() -> Arc<Answers> {
        Arc::new(Answers::new(Kind::Service, &Arc::default()))
    }

    #[test]
    fn a_watch_is_told_by_its_query_and_lasts_as_long_as_that_says() {
        assert_eq!(watch_time("&watch=true&timeoutSeconds=345&x=y"), Some(Duration::from_secs(345)));
        assert_eq!(watch_time("watch=true"), Some(Duration::ZERO));
        for list in ["", "limit=500", "labelSelector=watch%3Dtrue", "watch=false", "rewatch=true"] {
            assert_eq!(watch_time(list), None, "{list}");
        }
    }

    #[tokio::test]
    async fn an_empty_watch_is_a_failure_and_an_empty_list_and_a_watch_with_events_are_none() {
        let answers = answers();
        let error = all(&answers, "", FIVE_MINUTES).await.unwrap_err();
        assert!(error.is::<EndedAtOnce>(), "{error:?}");
        all(&answers, "", None).await.unwrap();

        let began = Instant::now();
        assert_eq!(all(&answers, "event", FIVE_MINUTES).await.unwrap(), "event");
        assert!(began.elapsed() >= SHORTEST, "the next watch begins within {:?}", began.elapsed());
    }

    #[tokio::test]
    async fn an_event_that_does_not_end_is_given_up_and_many_short_ones_are_not() {
        let answers = answers();
        let long = "x".repeat(LONGEST_EVENT + 1);
        let error = all(&answers, &long, FIVE_MINUTES).await.unwrap_err();
        assert!(error.to_string().contains("longer than"), "{error}");
        all(&answers, &long, None).await.unwrap();
        let many = [&long[..LONGEST_EVENT / 2], "\n"].concat().repeat(3);
        all(&answers, &many, FIVE_MINUTES).await.unwrap();
    }

    #[test]
    fn watches_have_times_of_their_own() {
        let times: Vec<_> = (0..100).map(|_| some_watch_time()).collect();
        assert!(times.iter().all(|time| WATCH_TIMES.contains(time)), "{times:?}");
        assert!(times.iter().any(|time| *time != times[0]), "{times:?}");
    }

    #[tokio::test]
    async fn a_bookmark_is_heard_and_an_error_is_not() {
        let answers = answers();
        all(&answers, r#"{"type":"ERROR","object":{}}"#, AT_ONCE).await.unwrap();
        assert_eq!(answers.status().heard(), None);
        all(&answers, r#"{"type":"BOOKMARK","object":{}}"#, AT_ONCE).await.unwrap();
        assert!(answers.status().heard().is_some());
    }
}
