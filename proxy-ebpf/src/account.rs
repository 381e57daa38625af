//! Shares of groups of processes in the room that all of them have.
//!
//! In: how many entries a group has, and how many all groups have. Out: whether the group may have one more,
//! and the indices of both counts in `accounts`.
//!
//! An entry of `accounts` counts the entries of one kind that a group has. A group is a cgroup; cgroups whose
//! ids have the same index share one. One more entry of each kind counts the entries of all groups.

/// The number of groups, a power of two.
pub const GROUPS: u32 = 1 << 12;
/// The size of `accounts`.
pub const COUNT: u32 = 4 * (GROUPS + 1);

/// Kind: entries of `affinities`.
pub const CLIENTS: u32 = 0;
/// Kind: entries of `origins`.
pub const ORIGINS: u32 = 1;
/// Kind: sockets with a value in `flows`.
pub const FLOWS: u32 = 2;
/// Kind: sockets with a value in `crowds`.
pub const CROWDS: u32 = 3;

/// Room in `origins`: as much as connection tracking has by default, which would hold all of these
/// connections without weir.
pub const MOST_ORIGINS: u32 = 1 << 18;
/// Room in `flows`, which has no size of its own: about 450 bytes for each socket.
pub const MOST_FLOWS: u32 = 1 << 15;
/// Room in `crowds`, which has no size of its own: 4 KiB for each socket.
pub const MOST_CROWDS: u32 = 1 << 10;

/// The index of the count of one kind and group.
#[must_use]
#[inline(always)]
pub const fn of(kind: u32, group: u32) -> u32 {
    kind * (GROUPS + 1) + (group & (GROUPS - 1))
}

/// The index of the count of one kind and all groups.
#[must_use]
#[inline(always)]
pub const fn of_all(kind: u32) -> u32 {
    kind * (GROUPS + 1) + GROUPS
}

/// Whether a group may have one more entry: it may have at most an eighth of what all groups leave free. The
/// first greedy group gets a ninth of the room, and after twenty of them a tenth of it is still free.
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
        let kinds = [CLIENTS, ORIGINS, FLOWS, CROWDS];
        let all = kinds
            .into_iter()
            .flat_map(|kind| (0..GROUPS).map(move |group| of(kind, group)).chain([of_all(kind)]));
        assert!(all.eq(0..COUNT));
        assert_eq!(of(FLOWS, GROUPS + 1), of(FLOWS, 1));
    }
}
