//! Which port has which elements of an array: slots, records and the numbers of ports.
//!
//! In: sets of backends that want a range of slots, ports that want a number and a record, and what is led to no more.
//! Out: ranges. One that was given back rests for a while: a program that read what led to it may still be about to read
//! it. Nothing else keeps it from reading another port's there.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::{Duration, Instant},
};

/// How long a range rests before the programs are waited for and somebody else gets it: so that they are not waited for
/// with every change. While a Service of 10,000 endpoints changes a hundred times a second, a million slots rest.
pub(super) const REST: Duration = Duration::from_secs(1);
/// How long where programs cannot be waited for. One runs for less than a microsecond, unless it is interrupted.
const LONG_REST: Duration = Duration::from_secs(10);
/// Most slots that rest while there are others; then the programs are waited for.
const MOST_RESTING: u32 = 4096;
/// Most records that do: one for each change of a port.
pub(super) const MOST_RESTING_RECORDS: u32 = 1024;
/// Most numbers that do: one for each port that goes.
pub(super) const MOST_RESTING_NUMBERS: u32 = 256;

/// Some slots in a row. An empty one has no place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) first: u32,
    pub(super) count: u32,
}

/// Hands out ranges, the smallest that fits first.
#[derive(Debug)]
pub(super) struct Slots {
    most_resting: u32,
    /// Everything from here on was never given out.
    end: u32,
    /// Free ranges by where they begin; no two touch.
    free: BTreeMap<u32, u32>,
    /// The same by length.
    by_length: BTreeSet<(u32, u32)>,
    resting: VecDeque<(Instant, Range)>,
    resting_slots: u32,
}

impl Default for Slots {
    fn default() -> Self {
        Self::new(MOST_RESTING)
    }
}

impl Slots {
    /// None taken yet, of which so many may rest.
    pub(super) fn new(most_resting: u32) -> Self {
        Self {
            most_resting,
            end: 0,
            free: BTreeMap::new(),
            by_length: BTreeSet::new(),
            resting: VecDeque::new(),
            resting_slots: 0,
        }
    }

    /// The same of which these ranges are taken. The others have to rest first when programs may still run that were led
    /// there.
    pub(super) fn with_taken(mut self, mut taken: Vec<Range>, now: Instant, rested: bool) -> Self {
        taken.sort_unstable_by_key(|range| range.first);
        for range in taken.into_iter().filter(|range| range.count > 0) {
            if range.first > self.end {
                let hole = Range { first: self.end, count: range.first - self.end };
                if rested { self.insert(hole) } else { self.give_back(hole, now) }
            }
            self.end = self.end.max(range.first.saturating_add(range.count));
        }
        self
    }

    /// One of them. `settled` as in [`Slots::take`].
    pub(super) fn take_one(&mut self, now: Instant, settled: impl FnOnce() -> bool) -> u32 {
        self.take(1, now, settled).first
    }

    /// Takes one back.
    pub(super) fn give_one_back(&mut self, place: u32, now: Instant) {
        self.give_back(Range { first: place, count: 1 }, now);
    }

    /// How many slots there have to be.
    pub(super) fn end(&self) -> u32 {
        self.end
    }

    /// A range of this many. `settled` waits for the programs that run, or says that it cannot, and is called at most
    /// once.
    pub(super) fn take(&mut self, count: u32, now: Instant, settled: impl FnOnce() -> bool) -> Range {
        if count == 0 {
            return Range::default();
        }
        self.wake(now, settled);
        let fit = self.by_length.range((count, 0)..).next().copied();
        let Some((length, first)) = fit else {
            let first = self.end;
            self.end = self.end.saturating_add(count);
            return Range { first, count };
        };
        self.remove(first, length);
        self.insert(Range { first: first + count, count: length - count });
        Range { first, count }
    }

    /// Takes back a range that nothing leads to any more.
    pub(super) fn give_back(&mut self, range: Range, now: Instant) {
        if range.count > 0 {
            self.resting_slots += range.count;
            self.resting.push_back((now, range));
        }
    }

    /// Frees what rested long enough, when it is worth the waiting.
    fn wake(&mut self, now: Instant, settled: impl FnOnce() -> bool) {
        if self.resting_slots < self.most_resting.max(self.end / 4) {
            return;
        }
        let rested = |since: &Instant, rest| now.duration_since(*since) >= rest;
        if !self.resting.front().is_some_and(|(since, _)| rested(since, REST)) {
            return;
        }
        let rest = if settled() { REST } else { LONG_REST };
        while let Some((_, range)) = self.resting.pop_front_if(|(since, _)| rested(since, rest)) {
            self.resting_slots -= range.count;
            self.insert(range);
        }
    }

    /// Makes a range free, joined with its neighbours.
    fn insert(&mut self, mut range: Range) {
        if range.count == 0 {
            return;
        }
        if let Some((first, count)) = self.free.range(..range.first).next_back().map(|(a, b)| (*a, *b))
            && first + count == range.first
        {
            self.remove(first, count);
            range = Range { first, count: count + range.count };
        }
        let end = range.first + range.count;
        if let Some(count) = self.free.get(&end).copied() {
            self.remove(end, count);
            range.count += count;
        }
        self.free.insert(range.first, range.count);
        self.by_length.insert((range.count, range.first));
    }

    fn remove(&mut self, first: u32, count: u32) {
        self.free.remove(&first);
        self.by_length.remove(&(count, first));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_range_rests_before_another_gets_it() {
        let mut slots = Slots::default();
        let start = Instant::now();
        let first = slots.take(MOST_RESTING, start, || panic!("nothing rests"));
        slots.give_back(first, start);
        let soon = slots.take(MOST_RESTING, start + REST / 2, || panic!("it still rests"));
        assert_ne!(soon, first);
        let mut waited = false;
        let not_yet = slots.take(MOST_RESTING, start + REST, || false);
        assert_ne!(not_yet, first, "nobody knows whether programs still run that know the old owner");
        let settled = || {
            waited = true;
            true
        };
        let later = slots.take(MOST_RESTING, start + REST, settled);
        assert_eq!(later, first);
        assert!(waited, "programs may still run that know the old owner");
    }

    #[test]
    fn what_lies_between_taken_ranges_is_free() {
        let taken = vec![Range { first: 6, count: 2 }, Range { first: 0, count: 2 }];
        let now = Instant::now();
        let mut slots = Slots::default().with_taken(taken, now, true);
        assert_eq!(slots.take(4, now, || true), Range { first: 2, count: 4 });
        assert_eq!(slots.take(1, now, || true), Range { first: 8, count: 1 });
    }

    #[test]
    fn what_may_still_be_read_rests_at_a_start_too() {
        let (taken, now) = (vec![Range { first: 1, count: 1 }], Instant::now());
        let mut slots = Slots::new(1).with_taken(taken, now, false);
        assert_eq!(slots.take_one(now, || panic!("it still rests")), 2);
        assert_eq!(slots.take_one(now + REST, || true), 0);
    }

    proptest! {
        #[test]
        fn no_slot_has_two_owners_and_space_is_used_again(
            steps in proptest::collection::vec((1_u32..40, any::<bool>(), any::<prop::sample::Index>()), 1..400)
        ) {
            let mut slots = Slots::default();
            let mut now = Instant::now();
            let mut held: Vec<Range> = Vec::new();
            for (count, give_back, which) in steps {
                now += REST;
                if give_back && !held.is_empty() {
                    let range = held.swap_remove(which.index(held.len()));
                    slots.give_back(range, now);
                } else {
                    let range = slots.take(count, now, || true);
                    prop_assert_eq!(range.count, count);
                    for other in &held {
                        let apart = range.first + range.count <= other.first
                            || other.first + other.count <= range.first;
                        prop_assert!(apart, "{:?} and {:?}", range, other);
                    }
                    held.push(range);
                }
                let free: u32 = slots.free.values().sum();
                let taken: u32 = held.iter().map(|range| range.count).sum();
                prop_assert_eq!(free + taken + slots.resting_slots, slots.end);
                prop_assert_eq!(slots.free.len(), slots.by_length.len());
            }
        }
    }
}
