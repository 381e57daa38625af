//! What every socket on the machine was told by the kernel programs.
//!
//! In: the map `origins`. Out: its elements, each with the cookie of its socket. One read is enough for all network
//! namespaces.
//!
//! A program removes the element when a process closes the socket. For sockets that the kernel itself opened, as NFS does,
//! no program runs then, so their elements are removed here, when the map fills up.

use std::{net::SocketAddr, os::fd::AsFd as _};

use aya::maps::{IterableMap as _, Map, MapData};
use proxy_ebpf::{Endpoint, Origin, system};
use rustc_hash::FxHashSet;

use super::{failed, judge::Led};
use crate::{dataplane::Error, model::Protocol};

/// An element this young may be of a socket that is about to connect.
const YOUNG: u64 = 60_000_000_000;

/// The map.
pub(super) struct Origins {
    map: aya::maps::HashMap<MapData, u64, Origin>,
    room: usize,
}

impl Origins {
    pub(super) fn new(map: MapData) -> Result<Self, Error> {
        let unfit = |error: &dyn std::error::Error| Error::Kernel(format!("the map `origins`: {error}"));
        let room = map.info().map_err(|error| unfit(&error))?.max_entries();
        let map = Map::HashMap(map).try_into().map_err(|error| unfit(&error))?;
        Ok(Self { map, room: room as usize })
    }

    /// Hands every socket that was led somewhere to `visit`, with its cookie.
    pub(super) fn read(&self, mut visit: impl FnMut(u64, Led)) -> Result<(), Error> {
        let map = self.map.map().fd().as_fd();
        let read = system::read_origins(map, |cookie, origin| {
            if let Some(led) = led(&origin) {
                visit(cookie, led);
            }
        });
        read.map_err(failed("reading what sockets were told"))
    }

    /// The sockets whose elements may be left over, if there are so many elements that it matters.
    pub(super) fn old(&self, now: u64) -> Result<FxHashSet<u64>, Error> {
        let (mut all, mut old) = (0, FxHashSet::default());
        self.read(|cookie, led| {
            all += 1;
            if led.since.saturating_add(YOUNG) < now {
                old.insert(cookie);
            }
        })?;
        Ok(if all * 2 > self.room { old } else { FxHashSet::default() })
    }

    /// Removes the elements of these sockets.
    pub(super) fn forget(&mut self, sockets: &FxHashSet<u64>) {
        for cookie in sockets {
            // One that is gone by now was closed meanwhile.
            let _ = self.map.remove(cookie);
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
