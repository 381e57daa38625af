//! What every socket on the machine was told by the kernel programs.
//!
//! In: the maps `seats` and `origins`, of which the second has the sockets that found their seat taken. Out: what they hold,
//! each with the cookie of its socket. One read is enough for all network namespaces.
//!
//! A program removes what a socket was told when a process closes it; sockets of the kernel's own are told nothing. So all of
//! them are open, and nothing is ever removed here.

use std::{io, net::SocketAddr};

use crate::sys::bpf;
use aya::maps::MapData;
use proxy_ebpf::{Endpoint, Origin, Seat};

use super::{failed, judge::Led};
use crate::{dataplane::Error, model::Protocol};

/// The maps.
pub(super) struct Origins {
    pub(super) origins: MapData,
    pub(super) seats: MapData,
}

impl Origins {
    /// Hands every socket that was led somewhere to `visit`, with its cookie.
    pub(super) fn read(&self, mut visit: impl FnMut(u64, Led)) -> Result<(), Error> {
        let read = self.read_elements(&mut visit).and_then(|()| self.read_seats(&mut visit));
        read.map_err(failed("reading what sockets were told"))
    }

    fn read_elements(&self, mut visit: impl FnMut(u64, Led)) -> io::Result<()> {
        bpf::read_all(&self.origins, |cookie: u64, origin: Origin| {
            if let Some(led) = led(&origin) {
                visit(cookie, led);
            }
        })
    }

    /// A seat that is not the same a moment later is being taken just now.
    fn read_seats(&self, mut visit: impl FnMut(u64, Led)) -> io::Result<()> {
        let mut before = Vec::new();
        bpf::read_all(&self.seats, |_: u32, seat: Seat| before.push(seat))?;
        bpf::read_all(&self.seats, |number: u32, seat: Seat| {
            let rests =
                before.get(number as usize) == Some(&seat) && Seat::is_taken(seat.claims) && seat.since > 0;
            if let Some(led) = led(&seat.origin()).filter(|_| rests) {
                visit(seat.cookie, led);
            }
        })
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
