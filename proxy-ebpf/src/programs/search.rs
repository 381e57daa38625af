//! Looking for one of a socket's many flows.
//!
//! In: the crowd of an unconnected socket. Out: the place of one.
//!
//! What the search knows is kept beside the flows and not in variables. The verifier tells states of a program apart by
//! the values of variables, so with the place found so far in one it follows each of 64 iterations with each of the
//! places before, and gives up after a million instructions (seen on 6.18, with `place` and `since` in registers). What
//! memory of a map holds it does not follow.

use proxy_ebpf::{Crowd, Flow, MANY};

use super::flows;

/// A search under way.
pub(super) struct Search {
    crowd: &'static mut Crowd,
}

impl Search {
    /// Nothing is found yet; any time is earlier than what [`Search::since`] says.
    #[inline(always)]
    pub(super) fn new(crowd: &'static mut Crowd) -> Self {
        Self::after(crowd, u64::MAX)
    }

    /// Nothing is found yet, and [`Search::since`] says this.
    #[inline(always)]
    pub(super) fn after(crowd: &'static mut Crowd, since: u64) -> Self {
        // SAFETY: words of the value, which is borrowed mutably.
        unsafe {
            (&raw mut crowd.since).write_volatile(since);
            (&raw mut crowd.place).write_volatile(MANY as u32);
        }
        Self { crowd }
    }

    #[inline(always)]
    pub(super) fn flow(&self, place: usize) -> &Flow {
        &self.crowd.flows[place % MANY]
    }

    /// Remembers a place, and since when its flow rests.
    #[inline(always)]
    pub(super) fn take(&mut self, place: usize) {
        // SAFETY: words of the value, which is borrowed mutably.
        unsafe {
            (&raw mut self.crowd.since).write_volatile(flows::since(&self.crowd.flows[place % MANY]));
            (&raw mut self.crowd.place).write_volatile(place as u32);
        }
    }

    /// Since when the flow found rests.
    #[inline(always)]
    pub(super) fn since(&self) -> u64 {
        // SAFETY: a word of the value.
        unsafe { (&raw const self.crowd.since).read_volatile() }
    }

    /// Whether a place was found.
    #[inline(always)]
    pub(super) fn is_over(&self) -> bool {
        // SAFETY: a word of the value.
        unsafe { (&raw const self.crowd.place).read_volatile() < MANY as u32 }
    }

    /// The flow found, or any if none was.
    #[inline(always)]
    pub(super) fn found(self) -> &'static mut Flow {
        // SAFETY: a word of the value.
        let place = unsafe { (&raw const self.crowd.place).read_volatile() };
        &mut self.crowd.flows[place as usize & (MANY - 1)]
    }
}
