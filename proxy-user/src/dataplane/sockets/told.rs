//! What every socket on the machine was told by the kernel programs.
//!
//! In: the maps `seats` and `origins`, of which the second has the sockets that found their seat taken. Out: what they hold,
//! each with the cookie of its socket. One read is enough for all network namespaces.
//!
//! A program removes what a socket was told when a process closes it. For sockets that the kernel itself opened, as NFS
//! does, no program runs then, so their elements, which are all in `origins`, are removed here when it fills up.

use std::{io, net::SocketAddr};

use aya::maps::{IterableMap as _, Map, MapData};
use proxy_ebpf::{Endpoint, Origin, Seat, system};
use rustc_hash::FxHashSet;

use super::{failed, judge::Led};
use crate::{dataplane::Error, model::Protocol};

/// An element this young may be of a socket that is about to connect.
const YOUNG: u64 = 60_000_000_000;

/// The maps.
pub(super) struct Origins {
    origins: aya::maps::HashMap<MapData, u64, Origin>,
    seats: MapData,
    room: usize,
}

impl Origins {
    pub(super) fn new(origins: MapData, seats: MapData) -> Result<Self, Error> {
        let unfit = |error: &dyn std::error::Error| Error::Kernel(format!("the map `origins`: {error}"));
        let room = origins.info().map_err(|error| unfit(&error))?.max_entries();
        let origins = Map::HashMap(origins).try_into().map_err(|error| unfit(&error))?;
        Ok(Self { origins, seats, room: room as usize })
    }

    /// Hands every socket that was led somewhere to `visit`, with its cookie.
    pub(super) fn read(&self, mut visit: impl FnMut(u64, Led)) -> Result<(), Error> {
        let read = self.read_elements(&mut visit).and_then(|()| self.read_seats(&mut visit));
        read.map_err(failed("reading what sockets were told"))
    }

    fn read_elements(&self, mut visit: impl FnMut(u64, Led)) -> io::Result<()> {
        system::read_all(self.origins.map(), |cookie, origin| {
            if let Some(led) = led(&origin) {
                visit(cookie, led);
            }
        })
    }

    /// A seat that is not the same a moment later is being taken just now.
    fn read_seats(&self, mut visit: impl FnMut(u64, Led)) -> io::Result<()> {
        let mut before = Vec::new();
        system::read_all(&self.seats, |_: u32, seat: Seat| before.push(seat))?;
        system::read_all(&self.seats, |number: u32, seat: Seat| {
            let rests =
                before.get(number as usize) == Some(&seat) && Seat::is_taken(seat.claims) && seat.since > 0;
            if let Some(led) = led(&seat.origin()).filter(|_| rests) {
                visit(seat.cookie, led);
            }
        })
    }

    /// The sockets whose elements may be left over, if there are so many elements that it matters.
    pub(super) fn old(&self, now: u64) -> Result<FxHashSet<u64>, Error> {
        let (mut all, mut old) = (0, FxHashSet::default());
        let read = self.read_elements(|cookie, led| {
            all += 1;
            if led.since.saturating_add(YOUNG) < now {
                old.insert(cookie);
            }
        });
        read.map_err(failed("reading what sockets were told"))?;
        Ok(if all * 2 > self.room { old } else { FxHashSet::default() })
    }

    /// Removes the elements of these sockets.
    pub(super) fn forget(&mut self, sockets: &FxHashSet<u64>) {
        for cookie in sockets {
            // One that is gone by now was closed meanwhile.
            let _ = self.origins.remove(cookie);
        }
    }
}

fn led(origin: &Origin) -> Option<Led> {
    let end = |endpoint: Endpoint| SocketAddr::new(endpoint.ip(), endpoint.port());
    Some(Led {
        since: origin.since,
        protocol: Protocol::from_number(u8::try_from(origin.protocol).ok()?)?,
        service: end(origin.service),
        backend: end(origin.backend),
    })
}
