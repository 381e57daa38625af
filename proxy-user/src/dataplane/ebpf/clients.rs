//! Evicts sticky clients.
//!
//! In: the entries of `affinities`. Out: the map without expired clients, and without the oldest clients of
//! groups of processes that exceed their share; `accounts` with the numbers of clients that are left.
//!
//! ```text
//! entry expired                           ──▶ evicted
//! group has used up its share             ──▶ a quarter of its clients is evicted, the oldest first, to make room for new ones
//! three quarters of the room are in use   ──▶ half of them stay: of the groups with most clients the oldest are evicted
//! ```

use std::{collections::BTreeMap, path::PathBuf};

use crate::sys::bpf;
use aya::maps::{Array, HashMap, IterableMap as _, Map, MapData};
use proxy_ebpf::{Affinity, AffinityKey, account};

use super::{
    maps::{monotonic, removed, typed},
    place::Place,
    problem::Problem,
};

/// A client, the time of its last choice, and the group that is charged for it.
type Known = (AffinityKey, u64, u32);

/// Evicts clients from the current map of a place, which may have grown since the last call. Returns how
/// many. To the programs an expired client is a new one anyway.
///
/// A client that a program updates at the same instant may be evicted too: its backend was random, and is
/// random again.
///
/// # Errors
///
/// When a map does not exist, or cannot be read.
pub fn forget_clients(place: &Place) -> Result<usize, Problem> {
    let open = |directory: PathBuf, name| {
        MapData::from_pin(directory.join(name)).map_err(|error| Problem::map(name, error))
    };
    let mut affinities: HashMap<_, AffinityKey, Affinity> =
        typed("affinities", Map::HashMap(open(place.services(), "affinities")?))?;
    let mut accounts: Array<_, u64> = typed("accounts", Map::Array(open(place.sockets(), "accounts")?))?;
    let info = affinities.map().info().map_err(|error| Problem::map("affinities", error))?;
    let (mut gone, mut known) = (Vec::new(), Vec::new());
    let now = monotonic();
    let read = bpf::read_all(affinities.map(), |key, affinity: Affinity| {
        if affinity.until < now {
            gone.push(key);
        } else {
            known.push((key, affinity.chosen, affinity.group));
        }
    });
    read.map_err(|error| Problem::map("affinities", error.into()))?;
    let counts = too_many(known, info.max_entries(), &mut gone);
    for client in &gone {
        removed("affinities", affinities.remove(client))?;
    }
    count(&mut accounts, &counts)?;
    Ok(gone.len())
}

/// Adds to `gone` the clients above their group's share of the room. Returns how many clients each group
/// keeps.
fn too_many(known: Vec<Known>, room: u32, gone: &mut Vec<AffinityKey>) -> BTreeMap<u32, u64> {
    let all = known.len();
    let is_full = all > room as usize / 4 * 3;
    let mut groups: BTreeMap<u32, Vec<Known>> = BTreeMap::new();
    for client in known {
        groups.entry(client.2 & (account::GROUPS - 1)).or_default().push(client);
    }
    let half = room as usize / 2;
    let share = if is_full { share(groups.values().map(Vec::len).collect(), half) } else { usize::MAX };
    let mut left_over: Vec<Known> = Vec::new();
    for clients in groups.values_mut() {
        clients.sort_unstable_by_key(|(_, chosen, _)| *chosen);
        let is_at_limit = !account::may_take(clients.len() as u64, all as u64, room);
        let stay = if is_at_limit { clients.len() - clients.len() / 4 } else { clients.len() };
        let quarter = clients.drain(..clients.len() - stay);
        gone.extend(quarter.map(|(key, ..)| key));
        left_over.extend(clients.drain(..clients.len().saturating_sub(share)));
    }
    // If there are more groups than entries, the oldest clients of all groups go.
    left_over.sort_unstable_by_key(|(_, chosen, _)| *chosen);
    let left = left_over.len() + groups.values().map(Vec::len).sum::<usize>();
    let stay = left_over.split_off(left.saturating_sub(half).min(left_over.len()));
    gone.extend(left_over.into_iter().map(|(key, ..)| key));
    let mut counts: BTreeMap<u32, u64> =
        groups.into_iter().map(|(group, clients)| (group, clients.len() as u64)).collect();
    for (_, _, group) in stay {
        *counts.entry(group & (account::GROUPS - 1)).or_default() += 1;
    }
    counts
}

/// The most clients for each group so that all groups together have at most `most`. Groups with more share
/// what groups with less leave.
fn share(mut counts: Vec<usize>, mut most: usize) -> usize {
    counts.sort_unstable();
    let groups = counts.len();
    for (before, count) in counts.into_iter().enumerate() {
        let each = most / (groups - before);
        if count > each {
            return each;
        }
        most -= count;
    }
    usize::MAX
}

/// Stores the number of clients of each group. Clients that come meanwhile are counted the next time.
fn count(accounts: &mut Array<MapData, u64>, counts: &BTreeMap<u32, u64>) -> Result<(), Problem> {
    let mut known = Vec::new();
    let read = bpf::read_first(accounts.map(), account::COUNT as usize, |place: u32, count: u64| {
        known.push((place, count));
    });
    read.map_err(|error| Problem::map("accounts", error.into()))?;
    let all = counts.values().sum();
    for (place, known) in known {
        let group = place.checked_sub(account::of(account::CLIENTS, 0));
        let count = match group {
            Some(group) if group < account::GROUPS => counts.get(&group).copied().unwrap_or(0),
            Some(account::GROUPS) => all,
            _ => continue,
        };
        if count != known {
            accounts.set(place, count, 0).map_err(|error| Problem::map("accounts", error))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOM: u32 = 1 << 10;

    /// Clients of a group, each chosen later than the one before.
    fn clients(group: u32, seen: std::ops::Range<u64>) -> Vec<Known> {
        seen.map(|chosen| {
            let client = proxy_ebpf::namespace(u64::from(group) << 32 | chosen);
            (AffinityKey { client, port: 7 }, chosen, group)
        })
        .collect()
    }

    fn gone_of(known: Vec<Known>) -> (Vec<Known>, BTreeMap<u32, u64>) {
        let mut gone = Vec::new();
        let counts = too_many(known.clone(), ROOM, &mut gone);
        assert_eq!(counts.values().sum::<u64>() as usize + gone.len(), known.len());
        (known.into_iter().filter(|(key, ..)| gone.contains(key)).collect(), counts)
    }

    #[test]
    fn groups_with_less_than_their_share_lose_no_client() {
        let (gone, counts) = gone_of([clients(1, 0..50), clients(2, 0..100)].concat());
        assert_eq!((gone, counts), (vec![], [(1, 50), (2, 100)].into()));
    }

    #[test]
    fn a_group_that_has_used_up_its_share_loses_its_oldest_clients_and_the_others_none() {
        let (gone, counts) = gone_of([clients(1, 1000..1120), clients(2, 0..20), clients(3, 0..1)].concat());
        assert_eq!(gone, clients(1, 1000..1030));
        assert_eq!(counts, [(1, 90), (2, 20), (3, 1)].into());
    }

    #[test]
    fn of_a_full_map_those_with_most_clients_lose_their_oldest() {
        let greedy = (10..20).flat_map(|group| clients(group, 100..180));
        let known: Vec<Known> = greedy.chain(clients(1, 0..10)).chain(clients(2, 0..3)).collect();
        let (gone, counts) = gone_of(known);
        assert_eq!((counts[&1], counts[&2]), (10, 3), "{counts:?}");
        assert!((10..20).all(|group| (49..=50).contains(&counts[&group])), "{counts:?}");
        let oldest = gone.iter().filter(|(.., group)| *group >= 10).all(|(_, chosen, _)| *chosen < 131);
        assert!(oldest, "{gone:?}");
    }

    #[test]
    fn where_every_client_is_a_group_the_oldest_of_all_go() {
        let known: Vec<Known> =
            (0..900).flat_map(|group| clients(group, u64::from(group)..u64::from(group) + 1)).collect();
        let (gone, counts) = gone_of(known);
        assert_eq!(counts.values().sum::<u64>(), u64::from(ROOM) / 2);
        assert!(gone.iter().all(|(_, chosen, _)| *chosen < 900 - u64::from(ROOM) / 2));
    }
}
