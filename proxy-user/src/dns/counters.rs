//! How many queries there were, by outcome.
//!
//! In: one call for each query. Out: counts for the metrics.

use std::sync::atomic::{AtomicU64, Ordering};

use hickory_proto::op::ResponseCode;

/// The result of a query.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Answered from the cluster's names.
    Answered,
    /// Answered with NXDOMAIN from the cluster's names.
    NoSuchName,
    /// Forwarded to the upstream.
    Forwarded,
    /// Forwarded to the upstream, which did not answer. Such a query is also counted as forwarded.
    UpstreamFailed,
    /// Refused, or a kind of query that weir does not answer.
    Refused,
    /// Refused because the client is neither this node nor one of its pods.
    Stranger,
    /// Not answered because the client sent too many queries.
    Dropped,
    /// Not answered because the message is no query.
    Ignored,
}

impl Outcome {
    pub(crate) const ALL: [Self; 8] = [
        Self::Answered,
        Self::NoSuchName,
        Self::Forwarded,
        Self::UpstreamFailed,
        Self::Refused,
        Self::Stranger,
        Self::Dropped,
        Self::Ignored,
    ];

    /// The outcome for the response code of an own answer.
    #[must_use]
    pub(crate) fn of(code: ResponseCode) -> Self {
        match code {
            ResponseCode::NoError => Self::Answered,
            ResponseCode::NXDomain => Self::NoSuchName,
            _ => Self::Refused,
        }
    }

    /// The value of the metric's label.
    #[must_use]
    pub(crate) const fn as_str(self) -> &'static str {
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

#[derive(Debug, Default)]
pub(crate) struct Counters([AtomicU64; Outcome::ALL.len()]);

impl Counters {
    pub(crate) fn count(&self, outcome: Outcome) {
        self.0[outcome as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// The number of queries with this outcome since the start.
    #[must_use]
    pub(crate) fn of(&self, outcome: Outcome) -> u64 {
        self.0[outcome as usize].load(Ordering::Relaxed)
    }
}
