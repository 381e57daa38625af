//! How long to wait before the API server is asked again.
//!
//! In: what went wrong. Out: a delay with jitter. A server that cannot be reached costs nobody anything, so it is tried
//! often and found within seconds of its return; one that answers but refuses is left alone for longer.

use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use kube::{core::Status, runtime::watcher::Error};

use super::answers::ended_at_once;

/// After this many refusals in a row a list is asked for instead of a watch.
const USELESS: u32 = 3;
/// Over how long agents that serve spread their lists when an API server has all of them list anew.
const SPREAD: Duration = Duration::from_secs(3);
/// A server that wants to be left alone for longer is asked all the same, because what it should serve changes meanwhile.
const LONGEST: Duration = Duration::from_secs(300);
/// The longest between attempts at what this server or this account does not have.
const ABSENT: Duration = Duration::from_secs(60);
/// The same as [`USELESS`] where something is absent or forbidden: an API server that starts forbids everything until it has
/// read the roles, and so many refusals take longer than that.
const ABSENT_FOR_GOOD: u32 = 6;

/// What an error says about asking again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// No answer: nothing listens, the connection broke, TLS failed.
    Unreachable,
    /// The server cannot stream lists: ask for pages.
    NoStreaming,
    /// What happened since the last event is not known any more: only a list tells.
    Gone,
    /// The server has too much to do.
    Busy,
    /// The server does not accept our credentials, which says nothing of what was asked for.
    Unauthenticated,
    /// The kind does not exist on the server or is forbidden to us.
    Absent,
    /// The server answered with some other error.
    Refused,
    /// The server took the request for a watch and ended it at once.
    Fruitless,
}

impl Refusal {
    /// What `error` says. `streaming` tells that it came while a list was to be streamed.
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
            Error::WatchFailed(error) if ended_at_once(error) => return Self::Fruitless,
            Error::InitialListFailed(_) | Error::WatchStartFailed(_) | Error::WatchFailed(_) => {
                return Self::Unreachable;
            }
        };
        // Older servers do not take the request; newer ones take it and then miss something in their etcd (500).
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

/// Whether a watch from where the last one ended is refused for good.
fn is_gone(status: &Status) -> bool {
    status.code == 410 || ["Expired", "Gone", "Invalid"].contains(&status.reason.as_str())
}

/// Whether the server answers, with what cannot be read.
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
    /// How many answers in a row were of no use.
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

    /// Starts with short delays again.
    pub(super) fn forgive(&mut self) {
        *self = Self { useless: self.useless, ..Self::new() };
    }

    /// Whether to list anew after this refusal, because watches are of no use. `news` tells whether anything came since the
    /// last one.
    pub(super) fn lists(&mut self, refusal: Refusal, news: bool) -> bool {
        if news {
            self.useless = 0;
        }
        let most = match refusal {
            Refusal::Gone => return true,
            Refusal::Absent => ABSENT_FOR_GOOD,
            Refusal::Refused | Refusal::Fruitless => USELESS,
            // The server said nothing against the watch, and a list would be more work for it.
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

    /// How long to wait now.
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
            | Refusal::Fruitless => self.refused.next().unwrap_or(ABSENT),
        }
    }
}

/// The delay before an agent lists anew that serves all the while.
pub(super) fn spread(delay: Duration) -> Duration {
    delay + SPREAD.mul_f32(fastrand::f32())
}

/// The delay, which is no shorter than the server asks for, and a little longer for some agents than for others.
pub(super) fn as_asked(delay: Duration, asked: Duration) -> Duration {
    let asked = asked.min(LONGEST);
    delay.max(asked + asked.mul_f32(fastrand::f32() / 4.0))
}

/// Doubling delays up to `longest`; jitter adds up to as much again.
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
    fn an_unreachable_server_is_found_within_seconds_however_long_it_was_away() {
        let mut retry = Retry::new();
        let delays: Vec<_> = (0..200).map(|_| retry.delay(Refusal::Unreachable, false)).collect();
        assert!(delays[0] <= Duration::from_millis(100), "{:?}", delays[0]);
        assert!(delays.iter().all(|delay| *delay <= Duration::from_secs(3)), "{delays:?}");
        assert!(delays[10..].windows(2).any(|pair| pair[0] != pair[1]), "no jitter: {delays:?}");
    }

    #[test]
    fn a_refusing_server_is_asked_every_half_minute_at_most_and_not_hammered() {
        let mut retry = Retry::new();
        let delays: Vec<_> = (0..200).map(|_| retry.delay(Refusal::Refused, false)).collect();
        assert!(delays.iter().all(|delay| *delay <= Duration::from_secs(30)), "{delays:?}");
        assert!(delays[20..].iter().all(|delay| *delay >= Duration::from_secs(15)), "{delays:?}");
    }

    #[test]
    fn what_is_forbidden_is_asked_for_again_at_once_because_a_server_may_be_starting_and_then_seldom() {
        for optional in [true, false] {
            let mut retry = Retry::new();
            let delays: Vec<_> = (0..20).map(|_| retry.delay(Refusal::Absent, optional)).collect();
            assert!(delays[..2].iter().sum::<Duration>() <= Duration::from_millis(1500), "{delays:?}");
            let late = Duration::from_secs(if optional { 60 } else { 15 });
            assert!(delays[10..].iter().all(|delay| (late..=2 * late).contains(delay)), "{delays:?}");
        }
    }

    #[test]
    fn a_server_that_ends_watches_at_once_is_left_alone_longer_and_longer() {
        let mut retry = Retry::new();
        let delays: Vec<_> = (0..20).map(|_| retry.delay(Refusal::Fruitless, false)).collect();
        for (doublings, delay) in delays.iter().enumerate() {
            let least = Duration::from_millis(250) * 2_u32.pow(doublings.min(5).try_into().unwrap());
            assert!(*delay >= least && *delay <= Duration::from_secs(30), "{delays:?}");
        }
    }

    #[test]
    fn pages_are_the_way_when_a_stream_is_refused_for_good() {
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
    fn a_server_is_left_alone_as_long_as_it_asks_for_and_no_longer_than_makes_sense() {
        let (short, hour) = (Duration::from_millis(250), Duration::from_secs(3600));
        let delays: Vec<_> = (0..50).map(|_| as_asked(short, Duration::from_secs(8))).collect();
        let range = Duration::from_secs(8)..=Duration::from_secs(10);
        assert!(delays.iter().all(|delay| range.contains(delay)), "{delays:?}");
        assert!(delays.iter().any(|delay| *delay != delays[0]), "all agents come back together: {delays:?}");
        assert!(as_asked(short, hour) <= LONGEST * 2);
        assert_eq!(as_asked(hour, Duration::from_secs(1)), hour, "its own patience counts too");
    }

    #[test]
    fn agents_that_serve_do_not_all_list_anew_in_one_moment() {
        let delays: Vec<_> = (0..50).map(|_| spread(Duration::ZERO)).collect();
        assert!(delays.iter().all(|delay| *delay <= SPREAD), "{delays:?}");
        assert!(delays.iter().any(|delay| *delay != delays[0]), "{delays:?}");
    }

    #[test]
    fn what_is_gone_is_listed_and_what_is_refused_is_listed_the_third_time() {
        for (code, reason) in [(410, "Gone"), (410, ""), (500, "Expired"), (504, "Gone"), (422, "Invalid")] {
            let status = || Status::failure("no", reason).with_code(code).boxed();
            let start = Error::WatchStartFailed(kube::Error::Api(status()));
            for error in [start, Error::WatchError(status())] {
                let refusal = Refusal::of(&error, false);
                assert_eq!(refusal, Refusal::Gone, "{error}");
                assert!(Retry::new().lists(refusal, false));
            }
        }
        let mut retry = Retry::new();
        let mut lists = |refusal, news| retry.lists(refusal, news);
        for refusal in [Refusal::Refused, Refusal::Fruitless] {
            assert_eq!([(); 6].map(|()| lists(refusal, false)), [false, false, true, false, false, true]);
        }
        assert_eq!(
            [(); 6].map(|()| lists(Refusal::Absent, false)),
            [false, false, false, false, false, true]
        );
        assert!((0..9).all(|_| !lists(Refusal::Refused, true)), "a watch that brings news is of use");
        for refusal in [Refusal::Busy, Refusal::Unreachable, Refusal::Unauthenticated] {
            assert!((0..9).all(|_| !lists(refusal, false)), "{refusal:?}");
        }
    }
}
