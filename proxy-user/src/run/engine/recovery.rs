//! Retry policy: for one family's table as a whole, and for refused service ports.
//!
//! In: failures, changes by other programs and successes, each with its time. Out: what is due. This module neither waits nor reads
//! a clock.

use std::time::{Duration, Instant};

/// The first wait after a failure; it doubles up to the configured syncPeriod.
pub(super) const FIRST_RETRY: Duration = Duration::from_millis(100);

/// The first failures in a row, and the first repairs, have no wait, because a table that another program deleted should be back
/// at once. After more failures a short wait does not help.
const AT_ONCE: u32 = 3;

/// After this long without a repair, the next repair has no wait.
const CALM: Duration = Duration::from_secs(10);

/// The longest wait between two repairs. It keeps two programs that undo each other's work from using a whole CPU, and still
/// restores the table within a second.
const LONGEST_REPAIR: Duration = Duration::from_millis(500);

/// The wait after `number` failures.
fn wait(number: u32, longest: Duration) -> Duration {
    match number.checked_sub(AT_ONCE) {
        None => Duration::ZERO,
        Some(doublings) => FIRST_RETRY.saturating_mul(1 << doublings.min(16)).min(longest),
    }
}

/// When a family's table is compared with the plan.
#[derive(Debug)]
pub(super) struct Recovery {
    due: Option<(&'static str, Instant)>,
    /// Whether the table's content is unknown.
    lost: bool,
    failures: u32,
    /// Repairs in a row.
    repairs: u32,
    repaired: Option<Instant>,
}

impl Recovery {
    pub(super) fn at_start(now: Instant) -> Self {
        Self { due: Some(("start", now)), lost: true, failures: 0, repairs: 0, repaired: None }
    }

    /// Whether changes can be written.
    pub(super) fn is_lost(&self) -> bool {
        self.lost
    }

    /// Why the table is to be compared now, if it is.
    pub(super) fn due(&self, now: Instant) -> Option<&'static str> {
        self.due.filter(|(_, at)| *at <= now).map(|(reason, _)| reason)
    }

    /// When it is to be compared, if ever.
    pub(super) fn next(&self) -> Option<Instant> {
        self.due.map(|(_, at)| at)
    }

    /// The table could not be written or read.
    pub(super) fn failed(&mut self, now: Instant, longest: Duration) {
        self.due = Some(("failure", now + wait(self.failures, longest)));
        self.failures = self.failures.saturating_add(1);
        self.lost = true;
    }

    /// Another program changed the table. Any number of notifications before the repair make one repair. Answers the wait, unless
    /// an earlier comparison is due.
    pub(super) fn touched(&mut self, now: Instant) -> Option<Duration> {
        if self.repaired.is_none_or(|last| now.saturating_duration_since(last) >= CALM) {
            self.repairs = 0;
        }
        let wait = wait(self.repairs, LONGEST_REPAIR);
        self.by("foreign", now + wait).then_some(wait)
    }

    /// Schedules a comparison at this time or earlier. Answers whether none was due before.
    pub(super) fn by(&mut self, reason: &'static str, at: Instant) -> bool {
        let later = self.due.is_none_or(|(_, known)| known > at);
        if later {
            self.due = Some((reason, at));
        }
        later
    }

    /// The table equals the plan.
    pub(super) fn done(&mut self, now: Instant) {
        if let Some(("foreign" | "failure", _)) = self.due.take() {
            self.repairs = self.repairs.saturating_add(1);
            self.repaired = Some(now);
        }
        (self.lost, self.failures) = (false, 0);
    }
}

/// When refused service ports are tried again.
#[derive(Debug, Default)]
pub(super) struct Retries {
    at: Option<Instant>,
    failures: u32,
}

impl Retries {
    /// Ports are refused; `fresh` if some were not before.
    pub(super) fn refused(&mut self, fresh: bool, now: Instant, longest: Duration) {
        if fresh {
            self.failures = 0;
        } else if self.at.is_some() {
            return;
        }
        let wait = FIRST_RETRY.saturating_mul(1 << self.failures.min(16)).min(longest);
        self.failures = self.failures.saturating_add(1);
        self.at = Some(now + wait);
    }

    /// No port is refused any more.
    pub(super) fn settled(&mut self) {
        *self = Self::default();
    }

    /// Whether the ports are due; then they are no longer.
    pub(super) fn take_due(&mut self, now: Instant) -> bool {
        self.at.take_if(|at| *at <= now).is_some()
    }

    /// When they are to be tried.
    pub(super) fn next(&self) -> Option<Instant> {
        self.at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONGEST: Duration = Duration::from_secs(30);

    fn waits(recovery: &mut Recovery, now: Instant, count: usize) -> Vec<Duration> {
        let mut wait = || {
            recovery.failed(now, LONGEST);
            recovery.next().map_or(Duration::MAX, |at| at - now)
        };
        (0..count).map(|_| wait()).collect()
    }

    #[test]
    fn what_fails_is_tried_again_at_once_and_then_ever_less_often() {
        let now = Instant::now();
        let mut recovery = Recovery::at_start(now);
        let millis = |numbers: &[u64]| numbers.iter().copied().map(Duration::from_millis).collect::<Vec<_>>();
        assert_eq!(waits(&mut recovery, now, 6), millis(&[0, 0, 0, 100, 200, 400]));
        assert_eq!(waits(&mut recovery, now, 20).last(), Some(&LONGEST));
        assert!(recovery.is_lost() && recovery.due(now).is_none());
        recovery.done(now);
        assert!(!recovery.is_lost() && recovery.next().is_none());
        assert_eq!(waits(&mut recovery, now, 1), millis(&[0]), "it worked meanwhile");
    }

    #[test]
    fn a_foreign_change_is_one_repair_however_many_notices_it_makes() {
        let now = Instant::now();
        let mut recovery = Recovery::at_start(now);
        recovery.done(now);
        for _ in 0..3 {
            assert_eq!(recovery.touched(now), Some(Duration::ZERO));
            assert!((0..20).all(|_| recovery.touched(now).is_none()), "that is known");
            assert_eq!(recovery.due(now), Some("foreign"));
            recovery.done(now);
        }
        assert_eq!(recovery.touched(now), Some(FIRST_RETRY), "the fourth repair in a row waits");
        recovery.done(now);
        assert_eq!(recovery.touched(now + CALM), Some(Duration::ZERO));
    }

    #[test]
    fn a_foreign_change_has_a_table_tried_that_waits_after_a_failure() {
        let now = Instant::now();
        let mut recovery = Recovery::at_start(now);
        waits(&mut recovery, now, 12);
        assert_eq!((recovery.due(now), recovery.touched(now)), (None, Some(Duration::ZERO)));
        assert!(recovery.due(now).is_some() && recovery.is_lost());
    }

    #[test]
    fn refused_ports_wait_ever_longer_unless_others_are_refused_too() {
        let (mut retries, mut now) = (Retries::default(), Instant::now());
        retries.refused(true, now, LONGEST);
        for doublings in 0..4 {
            assert_eq!(retries.next(), Some(now + FIRST_RETRY * (1 << doublings)));
            assert!(!retries.take_due(now));
            now += FIRST_RETRY * (1 << doublings);
            assert!(retries.take_due(now));
            retries.refused(false, now, LONGEST);
        }
        retries.refused(false, now + FIRST_RETRY, LONGEST);
        assert_eq!(retries.next(), Some(now + FIRST_RETRY * 16), "other changes do not put it off");
        retries.refused(true, now, LONGEST);
        assert_eq!(retries.next(), Some(now + FIRST_RETRY));
        retries.settled();
        assert_eq!(retries.next(), None);
    }
}
