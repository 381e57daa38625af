//! An allocator of ranges of an array: slots, records, and indices of ports.
//!
//! In: requests for ranges, and ranges that nothing refers to any more. Out: ranges. A freed range rests for
//! a while, because a program that has read a reference to it may be about to read it. Only the rest keeps
//! that program from reading another port's values there.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::{Duration, Instant},
};

/// How long a range rests before the agent waits for running programs and reuses it. So the agent does not
/// wait at every change. While a Service of 10,000 endpoints changes a hundred times a second, a million
/// slots rest.
pub(super) const REST: Duration = Duration::from_secs(1);
/// How long a range rests where the agent cannot wait for programs. A program runs for less than a
/// microsecond, unless it is interrupted.
const LONG_REST: Duration = Duration::from_secs(10);
/// The most slots that rest; when there are more, the agent waits for programs.
const MAX_RESTING: u32 = 4096;
/// The same for records: a change of a port frees one.
pub(super) const MAX_RESTING_RECORDS: u32 = 1024;
/// The same for indices of ports: a deleted port frees one.
pub(super) const MAX_RESTING_PORTS: u32 = 256;

/// Consecutive entries of an array. An empty range has no position.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) first: u32,
    pub(super) count: u32,
}

/// Allocates the smallest free range that fits.
#[derive(Debug)]
pub(super) struct RangeAllocator {
    max_resting: u32,
    /// The first entry that was never allocated.
    end: u32,
    /// Free ranges: the length by the first entry. No two are adjacent.
    free: BTreeMap<u32, u32>,
    /// The same as pairs of length and first entry.
    by_length: BTreeSet<(u32, u32)>,
    resting: VecDeque<(Instant, Range)>,
    resting_count: u32,
}

impl Default for RangeAllocator {
    fn default() -> Self {
        Self::new(MAX_RESTING)
    }
}

impl RangeAllocator {
    /// Nothing is allocated yet. When more than `max_resting` entries, and more than a quarter of all, rest,
    /// the allocator waits for programs.
    pub(super) fn new(max_resting: u32) -> Self {
        Self {
            max_resting,
            end: 0,
            free: BTreeMap::new(),
            by_length: BTreeSet::new(),
            resting: VecDeque::new(),
            resting_count: 0,
        }
    }

    /// Marks ranges as allocated. The gaps between them rest first, unless all programs that may read them
    /// have ended (`rested`).
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

    /// Allocates one entry. `wait` as in [`RangeAllocator::take`].
    pub(super) fn take_one(&mut self, now: Instant, wait: impl FnOnce() -> bool) -> u32 {
        self.take(1, now, wait).first
    }

    pub(super) fn give_one_back(&mut self, index: u32, now: Instant) {
        self.give_back(Range { first: index, count: 1 }, now);
    }

    /// The size that the array must have.
    pub(super) fn end(&self) -> u32 {
        self.end
    }

    /// Allocates a range of `count` entries. `wait` waits for running programs and returns whether it could;
    /// it is called at most once.
    pub(super) fn take(&mut self, count: u32, now: Instant, wait: impl FnOnce() -> bool) -> Range {
        if count == 0 {
            return Range::default();
        }
        self.end_rest(now, wait);
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

    /// Frees a range that nothing refers to any more.
    pub(super) fn give_back(&mut self, range: Range, now: Instant) {
        if range.count > 0 {
            self.resting_count += range.count;
            self.resting.push_back((now, range));
        }
    }

    /// Ends the rest of ranges that rested long enough, if enough of them rest to be worth the wait.
    fn end_rest(&mut self, now: Instant, wait: impl FnOnce() -> bool) {
        if self.resting_count < self.max_resting.max(self.end / 4) {
            return;
        }
        let rested = |since: &Instant, rest| now.duration_since(*since) >= rest;
        if !self.resting.front().is_some_and(|(since, _)| rested(since, REST)) {
            return;
        }
        let rest = if wait() { REST } else { LONG_REST };
        while let Some((_, range)) = self.resting.pop_front_if(|(since, _)| rested(since, rest)) {
            self.resting_count -= range.count;
            self.insert(range);
        }
    }

    /// Adds a free range and joins it with its neighbours.
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
    fn a_range_rests_before_it_is_allocated_again() {
        let mut slots = RangeAllocator::default();
        let start = Instant::now();
        let first = slots.take(MAX_RESTING, start, || panic!("nothing rests"));
        slots.give_back(first, start);
        let soon = slots.take(MAX_RESTING, start + REST / 2, || panic!("it still rests"));
        assert_ne!(soon, first);
        let mut waited = false;
        let not_yet = slots.take(MAX_RESTING, start + REST, || false);
        assert_ne!(not_yet, first, "programs that read the old range may still run");
        let wait = || {
            waited = true;
            true
        };
        let later = slots.take(MAX_RESTING, start + REST, wait);
        assert_eq!(later, first);
        assert!(waited, "programs that read the old range may still run");
    }

    #[test]
    fn the_gaps_between_allocated_ranges_are_free() {
        let taken = vec![Range { first: 6, count: 2 }, Range { first: 0, count: 2 }];
        let now = Instant::now();
        let mut slots = RangeAllocator::default().with_taken(taken, now, true);
        assert_eq!(slots.take(4, now, || true), Range { first: 2, count: 4 });
        assert_eq!(slots.take(1, now, || true), Range { first: 8, count: 1 });
    }

    #[test]
    fn a_gap_that_programs_may_still_read_rests_at_a_start_too() {
        let (taken, now) = (vec![Range { first: 1, count: 1 }], Instant::now());
        let mut slots = RangeAllocator::new(1).with_taken(taken, now, false);
        assert_eq!(slots.take_one(now, || panic!("it still rests")), 2);
        assert_eq!(slots.take_one(now + REST, || true), 0);
    }

    proptest! {
        #[test]
        fn no_entry_has_two_owners_and_free_space_is_used_again(
            steps in proptest::collection::vec((1_u32..40, any::<bool>(), any::<prop::sample::Index>()), 1..400)
        ) {
            let mut slots = RangeAllocator::default();
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
                prop_assert_eq!(free + taken + slots.resting_count, slots.end);
                prop_assert_eq!(slots.free.len(), slots.by_length.len());
            }
        }
    }
}
