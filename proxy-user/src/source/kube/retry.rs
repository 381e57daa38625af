//! The delay before the next request after a failure.
//!
//! In: the error. Out: a delay with jitter. weir tries an unreachable server often, because that costs the
//! server nothing, and so finds it within seconds of its return. It waits longer for a server that answers
//! with errors.

use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use kube::{core::Status, runtime::watcher::Error};

use super::responses::ended_at_once;

/// After this many refusals in a row weir lists instead of watching.
const USELESS: u32 = 3;
/// The interval over which serving agents spread their lists if an API server makes all of them list again.
const SPREAD: Duration = Duration::from_secs(3);
/// The longest delay that weir accepts from a server, because Services change meanwhile.
const LONGEST: Duration = Duration::from_secs(300);
/// The longest delay for a kind that the server lacks or forbids.
const ABSENT: Duration = Duration::from_secs(60);
/// As [`USELESS`], for an absent or forbidden kind. An API server that starts forbids everything until it has
/// read the roles, and that takes less time than this many attempts.
const ABSENT_FOR_GOOD: u32 = 6;

/// The meaning of an error for the next request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// No response: connection refused or broken, or TLS failed.
    Unreachable,
    /// The server cannot stream lists, so weir asks for pages.
    NoStreaming,
    /// The server does not have the events since the last version, so only a list helps.
    Gone,
    /// The server is overloaded.
    Busy,
    /// The server rejects the credentials, which has nothing to do with the kind.
    Unauthenticated,
    /// The server lacks the kind or forbids it.
    Absent,
    /// The server answered with another error.
    Refused,
    /// The server accepted a watch and ended it at once.
    EndedAtOnce,
}

impl Refusal {
    /// Classifies an error. `streaming` is true if a streamed list was running.
    pub(super) fn of(error: &Error, streaming: bool) -> Self {
        let status = match error {
            Error::InitialListFailed(kube::Error::Api(status))
            | Error::WatchStartFailed(kube::Error::Api(status))
            | Error::WatchFailed(kube::Error::Api(status))
            | Error::WatchError(status) => status,
            Error::NoResourceVersion => return Self::Refused,
            Error::InitialListFailed(error) | Error::WatchStartFailed(error) | Error::WatchFailed(error)
                if is_no_answer(error) =>
            {
                return Self::Refused;
            }
            Error::WatchFailed(error) if ended_at_once(error) => return Self::EndedAtOnce,
            Error::InitialListFailed(_) | Error::WatchStartFailed(_) | Error::WatchFailed(_) => {
                return Self::Unreachable;
            }
        };
        // Older servers reject the request. Newer ones accept it and then fail because of their etcd (500).
        match status.code {
            400 | 422 | 500 | 501 if streaming => Self::NoStreaming,
            _ if is_gone(status) => Self::Gone,
            401 => Self::Unauthenticated,
            403 | 404 => Self::Absent,
            429 => Self::Busy,
            _ => Self::Refused,
        }
    }
}

/// Whether the server will never accept a watch from the last version.
fn is_gone(status: &Status) -> bool {
    status.code == 410 || ["Expired", "Gone", "Invalid"].contains(&status.reason.as_str())
}

/// Whether the server sent a response that cannot be read.
fn is_no_answer(error: &kube::Error) -> bool {
    matches!(
        error,
        kube::Error::SerdeError(_) | kube::Error::FromUtf8(_) | kube::Error::LinesCodecMaxLineLengthExceeded
    )
}

/// The delays of one watch.
#[derive(Debug)]
pub(super) struct Retry {
    unreachable: ExponentialBackoff,
    refused: ExponentialBackoff,
    absent: ExponentialBackoff,
    /// The number of useless responses in a row.
    useless: u32,
}

impl Retry {
    pub(super) fn new() -> Self {
        Self {
            unreachable: delays(Duration::from_millis(50), Duration::from_millis(1500)),
            refused: delays(Duration::from_millis(250), Duration::from_secs(15)),
            absent: delays(Duration::from_millis(250), ABSENT),
            useless: 0,
        }
    }

    /// Resets the delays to short ones.
    pub(super) fn reset_delays(&mut self) {
        *self = Self { useless: self.useless, ..Self::new() };
    }

    /// Whether to list again after this refusal, because watches do not work. `has_event` is true if an event
    /// arrived since the last refusal.
    pub(super) fn needs_list(&mut self, refusal: Refusal, has_event: bool) -> bool {
        if has_event {
            self.useless = 0;
        }
        let most = match refusal {
            Refusal::Gone => return true,
            Refusal::Absent => ABSENT_FOR_GOOD,
            Refusal::Refused | Refusal::EndedAtOnce => USELESS,
            // The server did not reject the watch, and a list would cost it more.
            Refusal::Unreachable | Refusal::Busy | Refusal::Unauthenticated | Refusal::NoStreaming => {
                return false;
            }
        };
        self.useless += 1;
        let lists = self.useless >= most;
        if lists {
            self.useless = 0;
        }
        lists
    }

    /// The delay before the next request.
    pub(super) fn delay(&mut self, refusal: Refusal, optional: bool) -> Duration {
        match refusal {
            Refusal::NoStreaming => Duration::ZERO,
            Refusal::Absent if optional => self.absent.next().unwrap_or(ABSENT),
            Refusal::Unreachable => self.unreachable.next().unwrap_or(ABSENT),
            Refusal::Gone
            | Refusal::Busy
            | Refusal::Unauthenticated
            | Refusal::Absent
            | Refusal::Refused
            | Refusal::EndedAtOnce => self.refused.next().unwrap_or(ABSENT),
        }
    }
}

/// The delay before a list of an agent that keeps serving meanwhile.
pub(super) fn spread(delay: Duration) -> Duration {
    delay + SPREAD.mul_f32(fastrand::f32())
}

/// The longer one of weir's delay and the server's, with some jitter.
pub(super) fn as_asked(delay: Duration, asked: Duration) -> Duration {
    let asked = asked.min(LONGEST);
    delay.max(asked + asked.mul_f32(fastrand::f32() / 4.0))
}

/// Delays that double up to `longest`, with jitter of up to the same length.
fn delays(shortest: Duration, longest: Duration) -> ExponentialBackoff {
    ExponentialBuilder::new()
        .with_min_delay(shortest)
        .with_max_delay(longest)
        .with_factor(2.0)
        .with_jitter()
        .without_max_times()
        .build()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(code: u16) -> Box<Status> {
        Status::failure("no", "Reason").with_code(code).boxed()
    }

    #[test]
    fn an_unreachable_server_is_retried_every_few_seconds() {
        let mut retry = Retry::new();
        let delays: Vec<_> = (0..200).map(|_| retry.delay(Refusal::Unreachable, false)).collect();
        assert!(delays[0] <= Duration::from_millis(100), "{:?}", delays[0]);
        assert!(delays.iter().all(|delay| *delay <= Duration::from_secs(3)), "{delays:?}");
        assert!(delays[10..].windows(2).any(|pair| pair[0] != pair[1]), "no jitter: {delays:?}");
    }

    #[test]
    fn a_refusing_server_is_retried_with_growing_delays() {
        let mut retry = Retry::new();
        let delays: Vec<_> = (0..200).map(|_| retry.delay(Refusal::Refused, false)).collect();
        assert!(delays.iter().all(|delay| *delay <= Duration::from_secs(30)), "{delays:?}");
        assert!(delays[20..].iter().all(|delay| *delay >= Duration::from_secs(15)), "{delays:?}");
    }

    #[test]
    fn a_forbidden_kind_is_retried_soon_because_the_server_may_be_starting_and_then_rarely() {
        for optional in [true, false] {
            let mut retry = Retry::new();
            let delays: Vec<_> = (0..20).map(|_| retry.delay(Refusal::Absent, optional)).collect();
            assert!(delays[..2].iter().sum::<Duration>() <= Duration::from_millis(1500), "{delays:?}");
            let late = Duration::from_secs(if optional { 60 } else { 15 });
            assert!(delays[10..].iter().all(|delay| (late..=2 * late).contains(delay)), "{delays:?}");
        }
    }

    #[test]
    fn a_server_that_ends_watches_immediately_is_retried_with_growing_delays() {
        let mut retry = Retry::new();
        let delays: Vec<_> = (0..20).map(|_| retry.delay(Refusal::EndedAtOnce, false)).collect();
        for (doublings, delay) in delays.iter().enumerate() {
            let least = Duration::from_millis(250) * 2_u32.pow(doublings.min(5).try_into().unwrap());
            assert!(*delay >= least && *delay <= Duration::from_secs(30), "{delays:?}");
        }
    }

    #[test]
    fn a_refused_stream_means_pages() {
        let start = |code| Error::WatchStartFailed(kube::Error::Api(status(code)));
        assert_eq!(Refusal::of(&start(422), true), Refusal::NoStreaming);
        assert_eq!(Refusal::of(&start(400), true), Refusal::NoStreaming);
        assert_eq!(Refusal::of(&start(422), false), Refusal::Refused);
        assert_eq!(Refusal::of(&Error::WatchError(status(500)), true), Refusal::NoStreaming);
        assert_eq!(Refusal::of(&Error::WatchError(status(500)), false), Refusal::Refused);
        assert_eq!(Refusal::of(&start(429), true), Refusal::Busy);
        assert_eq!(Refusal::of(&start(403), true), Refusal::Absent);
        assert_eq!(Refusal::of(&start(401), true), Refusal::Unauthenticated);
        assert_eq!(Refusal::of(&Error::WatchError(status(410)), true), Refusal::Gone);
        let broken = Error::WatchFailed(kube::Error::Service("reset".into()));
        assert_eq!(Refusal::of(&broken, true), Refusal::Unreachable);
    }

    #[test]
    fn the_servers_delay_is_respected_up_to_a_limit() {
        let (short, hour) = (Duration::from_millis(250), Duration::from_secs(3600));
        let delays: Vec<_> = (0..50).map(|_| as_asked(short, Duration::from_secs(8))).collect();
        let range = Duration::from_secs(8)..=Duration::from_secs(10);
        assert!(delays.iter().all(|delay| range.contains(delay)), "{delays:?}");
        assert!(
            delays.iter().any(|delay| *delay != delays[0]),
            "all agents retry at the same time: {delays:?}"
        );
        assert!(as_asked(short, hour) <= LONGEST * 2);
        assert_eq!(as_asked(hour, Duration::from_secs(1)), hour, "weir's own delay counts too");
    }

    #[test]
    fn serving_agents_spread_their_lists() {
        let delays: Vec<_> = (0..50).map(|_| spread(Duration::ZERO)).collect();
        assert!(delays.iter().all(|delay| *delay <= SPREAD), "{delays:?}");
        assert!(delays.iter().any(|delay| *delay != delays[0]), "{delays:?}");
    }

    #[test]
    fn an_expired_version_means_a_list_and_so_does_the_third_refusal() {
        for (code, reason) in [(410, "Gone"), (410, ""), (500, "Expired"), (504, "Gone"), (422, "Invalid")] {
            let status = || Status::failure("no", reason).with_code(code).boxed();
            let start = Error::WatchStartFailed(kube::Error::Api(status()));
            for error in [start, Error::WatchError(status())] {
                let refusal = Refusal::of(&error, false);
                assert_eq!(refusal, Refusal::Gone, "{error}");
                assert!(Retry::new().needs_list(refusal, false));
            }
        }
        let mut retry = Retry::new();
        let mut lists = |refusal, has_event| retry.needs_list(refusal, has_event);
        for refusal in [Refusal::Refused, Refusal::EndedAtOnce] {
            assert_eq!([(); 6].map(|()| lists(refusal, false)), [false, false, true, false, false, true]);
        }
        assert_eq!(
            [(); 6].map(|()| lists(Refusal::Absent, false)),
            [false, false, false, false, false, true]
        );
        assert!((0..9).all(|_| !lists(Refusal::Refused, true)), "a watch with events works");
        for refusal in [Refusal::Busy, Refusal::Unreachable, Refusal::Unauthenticated] {
            assert!((0..9).all(|_| !lists(refusal, false)), "{refusal:?}");
        }
    }
}
