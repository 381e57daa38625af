//! What the maps hold and what they cost, for metrics.
//!
//! In: the maps, by their names. Out: elements, where the maps tell or `accounts` counts them, and bytes, where the kernel
//! tells.

use std::{fs, io, os::fd::AsRawFd as _, path::Path};

use crate::sys::bpf;
use aya::maps::{Array, Map, MapData};
use proxy_ebpf::{Crowd, Flows, SEATS, Seat, account};

use super::{
    maps::{is_missing, typed},
    place::Place,
    problem::Problem,
    sizes::{SERVICES, SOCKETS},
};

/// What the kernel has for each socket beside the values of its storages.
const STORAGE: u64 = 192;
/// What the kernel has beside each value of a storage.
const VALUE: u64 = 72;

/// What a map holds and costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// The map's name.
    pub map: &'static str,
    /// Elements in it, and how many there is room for.
    pub elements: Option<(u32, u32)>,
    /// Bytes of kernel memory.
    pub bytes: Option<u64>,
}

/// What the maps of a place hold and cost. The elements of those that Services are in the plane knows.
///
/// # Errors
///
/// When a map that is there cannot be read.
pub fn usage(place: &Place) -> Result<Vec<Usage>, Problem> {
    let accounts: Array<_, u64> = typed("accounts", Map::Array(open(&place.sockets(), "accounts")?))?;
    let counted = |thing: u32| -> Result<u32, Problem> {
        let count =
            accounts.get(&account::of_all(thing), 0).map_err(|error| Problem::map("accounts", error))?;
        Ok(u32::try_from(count).unwrap_or(u32::MAX))
    };
    let mut all = Vec::new();
    let services = SERVICES.iter().map(|(map, ..)| (*map, place.services()));
    let sockets = SOCKETS.iter().map(|(map, ..)| (*map, place.sockets()));
    for (map, directory) in services.chain(sockets) {
        let data = match MapData::from_pin(directory.join(map)) {
            Ok(data) => data,
            Err(error) if is_missing(&error) => continue,
            Err(error) => return Err(Problem::map(map, error)),
        };
        let room = data.info().map_err(|error| Problem::map(map, error))?.max_entries();
        let elements = match map {
            "affinities" => Some((counted(account::CLIENTS)?, room)),
            "origins" => Some((counted(account::ORIGINS)?, room)),
            "flows" => Some((counted(account::FLOWS)?, account::MOST_FLOWS)),
            "crowds" => Some((counted(account::CROWDS)?, account::MOST_CROWDS)),
            "seats" => Some((seated(&data)?, SEATS)),
            _ => None,
        };
        let of_sockets = match (map, elements) {
            ("flows", Some((count, _))) => u64::from(count) * (STORAGE + allocated::<Flows>()),
            ("crowds", Some((count, _))) => u64::from(count) * allocated::<Crowd>(),
            _ => 0,
        };
        let bytes = memory(&data).map(|bytes| bytes + of_sockets);
        all.push(Usage { map, elements, bytes });
    }
    Ok(all)
}

fn open(maps: &Path, name: &'static str) -> Result<MapData, Problem> {
    MapData::from_pin(maps.join(name)).map_err(|error| Problem::map(name, error))
}

fn seated(seats: &MapData) -> Result<u32, Problem> {
    let mut taken = 0;
    let read = bpf::read_all(seats, |_: u32, seat: Seat| taken += u32::from(Seat::is_taken(seat.claims)));
    read.map_err(|error: io::Error| Problem::map("seats", error.into()))?;
    Ok(taken)
}

/// What the kernel allocates for a value of a socket's storage, which it does not tell.
fn allocated<T>() -> u64 {
    (size_of::<T>() as u64 + VALUE).next_power_of_two()
}

/// What a map takes by the kernel's own account.
fn memory(map: &MapData) -> Option<u64> {
    use std::os::fd::AsFd as _;
    let told = fs::read_to_string(format!("/proc/self/fdinfo/{}", map.fd().as_fd().as_raw_fd())).ok()?;
    told.lines().find_map(|line| line.strip_prefix("memlock:")?.trim().parse().ok())
}
