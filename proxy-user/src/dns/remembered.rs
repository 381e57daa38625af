//! Answers of the upstream that still hold.
//!
//! In: questions with their answers. Out: the answers, for as long as the upstream said. An answer is kept as the bytes of
//! a message, so that what all of them take is known and bounded, however long those are that a pod asks for.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use hickory_proto::op::{Message, OpCode};
use moka::{Expiry, sync::Cache};

use super::{answer::Answer, believed::lifetime, upstream::Outside};

/// Bytes of answers, at most: some 50,000 of the usual ones.
const MOST_BYTES: u64 = 16 << 20;
/// What an answer takes besides its message, roughly: the question, and the cache's own.
const EACH: usize = 256;
/// What is remembered longer than this may have changed.
const LONGEST: Duration = Duration::from_secs(300);

/// The answers. A clone is the same memory.
#[derive(Clone)]
pub(super) struct Remembered(Cache<Outside, Kept>);

#[derive(Clone)]
struct Kept {
    message: Arc<[u8]>,
    since: Instant,
    lifetime: Duration,
}

struct Lifetime;

impl Expiry<Outside, Kept> for Lifetime {
    fn expire_after_create(&self, _: &Outside, kept: &Kept, _: Instant) -> Option<Duration> {
        Some(kept.lifetime)
    }

    fn expire_after_update(
        &self,
        _: &Outside,
        kept: &Kept,
        _: Instant,
        _: Option<Duration>,
    ) -> Option<Duration> {
        Some(kept.lifetime)
    }
}

impl Default for Remembered {
    fn default() -> Self {
        let cache = Cache::builder()
            .max_capacity(MOST_BYTES)
            .weigher(|question: &Outside, kept: &Kept| {
                u32::try_from(EACH + question.name.len() + kept.message.len()).unwrap_or(u32::MAX)
            })
            .expire_after(Lifetime);
        Self(cache.build())
    }
}

impl fmt::Debug for Remembered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Remembered").field("answers", &self.0.entry_count()).finish()
    }
}

impl Remembered {
    /// Remembers an answer, if it says for how long it holds.
    pub(super) fn insert(&self, question: Outside, answer: &Answer) {
        let Some(seconds) = lifetime(question.kind, answer).filter(|seconds| *seconds > 0) else { return };
        let mut message = Message::response(0, OpCode::Query);
        message.metadata.response_code = answer.code;
        message.metadata.authentic_data = answer.authentic;
        message.insert_answers(answer.answers.clone());
        message.insert_authorities(answer.authorities.clone());
        let Ok(bytes) = message.to_vec() else { return };
        // One that only just fitted into a message may be longer in other words.
        if !Message::from_vec(&bytes).is_ok_and(|message| !message.metadata.truncation) {
            return;
        }
        let lifetime = Duration::from_secs(seconds.into()).min(LONGEST);
        self.0.insert(question, Kept { message: bytes.into(), since: Instant::now(), lifetime });
    }

    /// The answer to a question, as old as it is by now.
    pub(super) fn get(&self, question: &Outside) -> Option<Answer> {
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
