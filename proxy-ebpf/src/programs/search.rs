//! Looking for one of a socket's flows.
//!
//! In: the flows of an unconnected socket. Out: the place of one.
//!
//! What the search knows is kept beside the flows and not in variables. The verifier tells states of a program apart by
//! the values of variables, so with the place found so far in one it follows each of 64 iterations with each of the
//! places before, and gives up after a million instructions (seen on 6.18, with `place` and `since` in registers). What
//! memory of a map holds it does not follow.

use proxy_ebpf::{FLOWS, Flows, Origin};

/// A search under way.
pub(super) struct Search<'a> {
    flows: &'a mut Flows,
}

impl<'a> Search<'a> {
    /// Nothing is found yet; any time is earlier than what [`Search::since`] says.
    #[inline(always)]
    pub(super) fn new(flows: &'a mut Flows) -> Self {
        Self::after(flows, u64::MAX)
    }

    /// Nothing is found yet, and [`Search::since`] says this.
    #[inline(always)]
    pub(super) fn after(flows: &'a mut Flows, since: u64) -> Self {
        // SAFETY: words of the value, which is borrowed mutably.
        unsafe {
            (&raw mut flows.since).write_volatile(since);
            (&raw mut flows.place).write_volatile(FLOWS as u32);
        }
        Self { flows }
    }

    #[inline(always)]
    pub(super) fn flow(&self, place: usize) -> &Origin {
        &self.flows.origins[place % FLOWS]
    }

    /// Remembers a place, and since when its flow rests.
    #[inline(always)]
    pub(super) fn take(&mut self, place: usize) {
        // SAFETY: words of the value, which is borrowed mutably.
        unsafe {
            (&raw mut self.flows.since).write_volatile(self.flows.origins[place % FLOWS].since);
            (&raw mut self.flows.place).write_volatile(place as u32);
        }
    }

    /// Since when the flow found rests.
    #[inline(always)]
    pub(super) fn since(&self) -> u64 {
        // SAFETY: a word of the value.
        unsafe { (&raw const self.flows.since).read_volatile() }
    }

    /// Whether a place was found.
    #[inline(always)]
    pub(super) fn is_over(&self) -> bool {
        // SAFETY: a word of the value.
        unsafe { (&raw const self.flows.place).read_volatile() < FLOWS as u32 }
    }

    /// The place found, or any if none was.
    #[inline(always)]
    pub(super) fn found(self) -> usize {
        // SAFETY: a word of the value.
        let place = unsafe { (&raw const self.flows.place).read_volatile() };
        place as usize & (FLOWS - 1)
    }
}
