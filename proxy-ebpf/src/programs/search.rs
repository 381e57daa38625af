//! A search through the 64 flows of a `Crowd`.
//!
//! In: the `Crowd` of an unconnected socket. Out: one of its entries.
//!
//! The state of the search is in the map's value and not in variables. The verifier distinguishes states of a
//! program by the values of its variables. With the best index so far in a variable it follows each of 64
//! iterations with each of the indices before, and gives up after a million instructions (seen on 6.18, with
//! `place` and `since` in registers). It does not follow the content of a map's memory.

use proxy_ebpf::{Crowd, Flow, MANY};

use super::flows;

pub(super) struct Search {
    crowd: &'static mut Crowd,
}

impl Search {
    /// Starts with a [`Search::since`] that is later than every time.
    #[inline(always)]
    pub(super) fn new(crowd: &'static mut Crowd) -> Self {
        Self::after(crowd, u64::MAX)
    }

    /// Starts with this [`Search::since`].
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

    /// Stores an entry as the best so far.
    #[inline(always)]
    pub(super) fn take(&mut self, place: usize) {
        // SAFETY: words of the value, which is borrowed mutably.
        unsafe {
            (&raw mut self.crowd.since).write_volatile(flows::since(&self.crowd.flows[place % MANY]));
            (&raw mut self.crowd.place).write_volatile(place as u32);
        }
    }

    /// When the socket last sent to the best entry so far.
    #[inline(always)]
    pub(super) fn since(&self) -> u64 {
        // SAFETY: a word of the value.
        unsafe { (&raw const self.crowd.since).read_volatile() }
    }

    /// Whether there is a best entry.
    #[inline(always)]
    pub(super) fn has_found(&self) -> bool {
        // SAFETY: a word of the value.
        unsafe { (&raw const self.crowd.place).read_volatile() < MANY as u32 }
    }

    /// Returns the best entry, or any entry if there is none.
    #[inline(always)]
    pub(super) fn found(self) -> &'static mut Flow {
        // SAFETY: a word of the value.
        let place = unsafe { (&raw const self.crowd.place).read_volatile() };
        &mut self.crowd.flows[place as usize & (MANY - 1)]
    }
}
