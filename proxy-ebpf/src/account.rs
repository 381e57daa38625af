//! What groups of processes have of what all of them share.
//!
//! In: how much a group has, and how much all have. Out: whether it may have one more, and where that stands.
//!
//! An element of `accounts` is how many a group has of one thing. A group is a cgroup, and those whose numbers lead to the
//! same place are one. One more element of each thing says how many all groups have.

/// How many groups are told apart: a power of two.
pub const GROUPS: u32 = 1 << 12;
/// How many elements `accounts` has.
pub const COUNT: u32 = 4 * (GROUPS + 1);

/// Elements of `affinities`.
pub const CLIENTS: u32 = 0;
/// Elements of `origins`.
pub const ORIGINS: u32 = 1;
/// Unconnected sockets in `flows`.
pub const FLOWS: u32 = 2;
/// Unconnected sockets in `crowds`.
pub const CROWDS: u32 = 3;

/// Room in `origins`: as many connections as connection tracking has room for by default, which all of these would be in
/// without us.
pub const MOST_ORIGINS: u32 = 1 << 18;
/// Room in `flows`, which has none of its own: about 450 bytes each.
pub const MOST_FLOWS: u32 = 1 << 15;
/// Room in `crowds`, which has none of its own: 4 KiB each.
pub const MOST_CROWDS: u32 = 1 << 10;

/// Where it stands how many of one thing a group has.
#[must_use]
#[inline(always)]
pub const fn of(thing: u32, group: u32) -> u32 {
    thing * (GROUPS + 1) + (group & (GROUPS - 1))
}

/// Where it stands how many of one thing all groups have.
#[must_use]
#[inline(always)]
pub const fn of_all(thing: u32) -> u32 {
    thing * (GROUPS + 1) + GROUPS
}

/// Whether a group may have one more: it may have an eighth of what the others leave. The first that is greedy gets a
/// ninth of the room, and after twenty of them a tenth of it is still left.
#[must_use]
#[inline(always)]
pub const fn may_take(has: u64, all_have: u64, room: u32) -> bool {
    has * 8 + all_have < room as u64
}

const _: () = assert!(GROUPS.is_power_of_two());

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::*;

    #[test]
    fn after_twenty_greedy_groups_there_is_room_for_the_next() {
        const ROOM: u32 = 1 << 15;
        let (mut groups, mut all) = (Vec::new(), 0);
        for _ in 0..20 {
            let mut has = 0;
            while may_take(has, all, ROOM) {
                (has, all) = (has + 1, all + 1);
            }
            groups.push(has);
        }
        assert_eq!(groups[0], u64::from(ROOM).div_ceil(9));
        assert!(groups[19] > 300, "{groups:?}");
        assert!(u64::from(ROOM) - all > 3000, "{all} of {ROOM}");
        assert!(!may_take(0, u64::from(ROOM), ROOM));
    }

    #[test]
    fn accounts_do_not_overlap() {
        let things = [CLIENTS, ORIGINS, FLOWS, CROWDS];
        let all = things
            .into_iter()
            .flat_map(|thing| (0..GROUPS).map(move |group| of(thing, group)).chain([of_all(thing)]));
        assert!(all.eq(0..COUNT));
        assert_eq!(of(FLOWS, GROUPS + 1), of(FLOWS, 1));
    }
}
