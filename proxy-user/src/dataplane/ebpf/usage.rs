//! The number of entries of the maps and their memory, for metrics.
//!
//! In: the maps, by their names. Out: numbers of entries, where the kernel or `accounts` counts them, and
//! bytes, where the kernel reports them.

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

/// Bytes that the kernel needs for each socket with storage, beside the values.
const STORAGE: u64 = 192;
/// Bytes that the kernel needs for each value of a storage, beside the value.
const VALUE: u64 = 72;

/// The usage of one map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// The name of the map.
    pub map: &'static str,
    /// The number of entries, and of entries that there is room for.
    pub elements: Option<(u32, u32)>,
    /// Bytes of kernel memory.
    pub bytes: Option<u64>,
}

/// The usage of all maps of a place. The plane itself counts the entries of the maps of Services.
///
/// # Errors
///
/// When an existing map cannot be read.
pub fn usage(place: &Place) -> Result<Vec<Usage>, Problem> {
    let accounts: Array<_, u64> = typed("accounts", Map::Array(open(&place.sockets(), "accounts")?))?;
    let count_of = |kind: u32| -> Result<u32, Problem> {
        let count =
            accounts.get(&account::of_all(kind), 0).map_err(|error| Problem::map("accounts", error))?;
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
            "affinities" => Some((count_of(account::CLIENTS)?, room)),
            "origins" => Some((count_of(account::ORIGINS)?, room)),
            "flows" => Some((count_of(account::FLOWS)?, account::MOST_FLOWS)),
            "crowds" => Some((count_of(account::CROWDS)?, account::MOST_CROWDS)),
            "seats" => Some((count_seats(&data)?, SEATS)),
            _ => None,
        };
        let in_sockets = match (map, elements) {
            ("flows", Some((count, _))) => u64::from(count) * (STORAGE + allocated::<Flows>()),
            ("crowds", Some((count, _))) => u64::from(count) * allocated::<Crowd>(),
            _ => 0,
        };
        let bytes = memory(&data).map(|bytes| bytes + in_sockets);
        all.push(Usage { map, elements, bytes });
    }
    Ok(all)
}

fn open(maps: &Path, name: &'static str) -> Result<MapData, Problem> {
    MapData::from_pin(maps.join(name)).map_err(|error| Problem::map(name, error))
}

fn count_seats(seats: &MapData) -> Result<u32, Problem> {
    let mut taken = 0;
    let read = bpf::read_all(seats, |_: u32, seat: Seat| taken += u32::from(Seat::is_taken(seat.claims)));
    read.map_err(|error: io::Error| Problem::map("seats", error.into()))?;
    Ok(taken)
}

/// The bytes that the kernel allocates for a value in a socket's storage, which it does not report.
fn allocated<T>() -> u64 {
    (size_of::<T>() as u64 + VALUE).next_power_of_two()
}

/// The memory of a map, as the kernel reports it.
fn memory(map: &MapData) -> Option<u64> {
    use std::os::fd::AsFd as _;
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", map.fd().as_fd().as_raw_fd())).ok()?;
    text.lines().find_map(|line| line.strip_prefix("memlock:")?.trim().parse().ok())
}
