//! `members`: which backends are in a set, and since when.
//!
//! In: backend sets of plans. Out: the map's keys and values.

use super::address::{Endpoint, mix};

/// Key of `members`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MemberKey {
    /// A [`super::set::number`].
    pub set: u32,
    /// One of the set's endpoints.
    pub backend: Endpoint,
}

impl MemberKey {
    #[inline(always)]
    const fn check(&self) -> u64 {
        mix(&self.backend.address, self.set as u64 | (self.backend.port as u64) << 32) >> 42
    }
}

/// Value of `members`: since when a backend is in a set, and, as in [`super::FrontendValue`], a check of the key.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Member(pub u64);

impl Member {
    /// Times are stored without this many low bits of their nanoseconds, so in units of 65 µs. They overflow after nine
    /// years of uptime.
    const UNIT: u32 = 16;
    const CHECK: u64 = (1 << 22) - 1;

    /// `joined` is in nanoseconds of CLOCK_MONOTONIC.
    #[must_use]
    pub const fn new(key: &MemberKey, joined: u64) -> Self {
        Self((joined >> Self::UNIT) << 22 | key.check() & Self::CHECK)
    }

    /// Whether this value belongs to the key, and not to a member that has the entry by now.
    #[must_use]
    #[inline(always)]
    pub const fn is_of(self, key: &MemberKey) -> bool {
        (self.0 ^ key.check()) & Self::CHECK == 0
    }

    /// Whether the backend joined before `time`, or within the same 65 µs.
    #[must_use]
    #[inline(always)]
    pub const fn joined_before(self, time: u64) -> bool {
        self.0 >> 22 <= time >> Self::UNIT
    }
}

const _: () = {
    assert!(size_of::<MemberKey>() == 24);
    assert!(size_of::<Member>() == 8);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_contains_a_check_of_its_key_and_when_it_joined() {
        let backend = Endpoint::new("10.244.0.2".parse().unwrap(), 8080);
        let (key, other) = (MemberKey { set: 4, backend }, MemberKey { set: 5, backend });
        let member = Member::new(&key, 1_000_000_000);
        assert!(member.is_of(&key) && !member.is_of(&other));
        assert!(member.joined_before(1_000_000_000) && !member.joined_before(999_900_000));
    }
}
