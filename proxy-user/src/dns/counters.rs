//! How many queries there were, by what became of them.

use std::sync::atomic::{AtomicU64, Ordering};

use hickory_proto::op::ResponseCode;

/// What became of a query.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Answered from what is known here.
    Answered,
    /// Answered with NXDOMAIN from what is known here.
    NoSuchName,
    /// Asked of the upstream.
    Forwarded,
    /// Asked of the upstream, which did not answer. Counted besides.
    UpstreamFailed,
    /// Refused, or no query we answer.
    Refused,
    /// Refused because the client is none of this node's.
    Stranger,
    /// Not answered because there were too many.
    Dropped,
    /// Not answered because it was no query.
    Ignored,
}

impl Outcome {
    /// Every outcome.
    pub const ALL: [Self; 8] = [
        Self::Answered,
        Self::NoSuchName,
        Self::Forwarded,
        Self::UpstreamFailed,
        Self::Refused,
        Self::Stranger,
        Self::Dropped,
        Self::Ignored,
    ];

    /// The outcome that a code of our own answers is.
    #[must_use]
    pub fn of(code: ResponseCode) -> Self {
        match code {
            ResponseCode::NoError => Self::Answered,
            ResponseCode::NXDomain => Self::NoSuchName,
            _ => Self::Refused,
        }
    }

    /// How the metric calls it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Answered => "answered",
            Self::NoSuchName => "no-such-name",
            Self::Forwarded => "forwarded",
            Self::UpstreamFailed => "upstream-failed",
            Self::Refused => "refused",
            Self::Stranger => "stranger",
            Self::Dropped => "dropped",
            Self::Ignored => "ignored",
        }
    }
}

/// One count for each outcome.
#[derive(Debug, Default)]
pub struct Counters([AtomicU64; Outcome::ALL.len()]);

impl Counters {
    /// Counts one.
    pub fn count(&self, outcome: Outcome) {
        self.0[outcome as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// How many there were.
    #[must_use]
    pub fn of(&self, outcome: Outcome) -> u64 {
        self.0[outcome as usize].load(Ordering::Relaxed)
    }
}
