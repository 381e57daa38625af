//! A cache of the upstream's answers.
//!
//! In: questions with their answers. Out: the answers, for their TTL. An answer is stored as the bytes of a message,
//! so the cache knows and limits its size, however long the answers are that a pod asks for.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use hickory_proto::op::{Message, OpCode};
use moka::{Expiry, sync::Cache};

use super::{answer::Answer, relevant::lifetime, upstream::UpstreamQuestion};

/// The size of the cache, for about 50,000 usual answers.
const MOST_BYTES: u64 = 16 << 20;
/// The approximate size of an entry without its message, in bytes.
const EACH: usize = 256;
/// The longest lifetime of an entry, whatever its TTL.
const LONGEST: Duration = Duration::from_secs(300);

/// The answers. Clones share them.
#[derive(Clone)]
pub(super) struct AnswerCache(Cache<UpstreamQuestion, CachedAnswer>);

#[derive(Clone)]
struct CachedAnswer {
    message: Arc<[u8]>,
    since: Instant,
    lifetime: Duration,
}

struct Lifetime;

impl Expiry<UpstreamQuestion, CachedAnswer> for Lifetime {
    fn expire_after_create(&self, _: &UpstreamQuestion, kept: &CachedAnswer, _: Instant) -> Option<Duration> {
        Some(kept.lifetime)
    }

    fn expire_after_update(
        &self,
        _: &UpstreamQuestion,
        kept: &CachedAnswer,
        _: Instant,
        _: Option<Duration>,
    ) -> Option<Duration> {
        Some(kept.lifetime)
    }
}

impl Default for AnswerCache {
    fn default() -> Self {
        let cache = Cache::builder()
            .max_capacity(MOST_BYTES)
            .weigher(|question: &UpstreamQuestion, kept: &CachedAnswer| {
                u32::try_from(EACH + question.name.len() + kept.message.len()).unwrap_or(u32::MAX)
            })
            .expire_after(Lifetime);
        Self(cache.build())
    }
}

impl fmt::Debug for AnswerCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AnswerCache").field("answers", &self.0.entry_count()).finish()
    }
}

impl AnswerCache {
    /// Stores an answer, if it has a TTL.
    pub(super) fn insert(&self, question: UpstreamQuestion, answer: &Answer) {
        let Some(seconds) = lifetime(question.kind, answer).filter(|seconds| *seconds > 0) else { return };
        let mut message = Message::response(0, OpCode::Query);
        message.metadata.response_code = answer.code;
        message.metadata.authentic_data = answer.authentic;
        message.insert_answers(answer.answers.clone());
        message.insert_authorities(answer.authorities.clone());
        let Ok(bytes) = message.to_vec() else { return };
        // An answer that just fitted into a message may be longer when it is encoded again.
        if !Message::from_vec(&bytes).is_ok_and(|message| !message.metadata.truncation) {
            return;
        }
        let lifetime = Duration::from_secs(seconds.into()).min(LONGEST);
        self.0.insert(question, CachedAnswer { message: bytes.into(), since: Instant::now(), lifetime });
    }

    /// The answer to a question, with TTLs reduced by its age.
    pub(super) fn get(&self, question: &UpstreamQuestion) -> Option<Answer> {
        let kept = self.0.get(question)?;
        let message = Message::from_vec(&kept.message).ok()?;
        let age = u32::try_from(kept.since.elapsed().as_secs()).unwrap_or(u32::MAX);
        let mut answer = Answer {
            authentic: message.metadata.authentic_data,
            answers: message.answers,
            authorities: message.authorities,
            ..Answer::without_records(message.metadata.response_code)
        };
        for record in answer.answers.iter_mut().chain(&mut answer.authorities) {
            record.ttl = record.ttl.saturating_sub(age);
        }
        Some(answer)
    }
}
