//! Every socket on the machine that the kernel programs connected to a backend.
//!
//! In: the maps `seats` and `origins`. `origins` has the sockets whose entry in the array `seats` was taken. Out:
//! sockets with their cookies. The maps cover all network namespaces.
//!
//! A program removes the entry of a socket when a process closes it, and sockets of the kernel itself have no entry.
//! So all entries belong to open sockets, and this file never removes one.

use std::{io, net::SocketAddr};

use crate::sys::bpf;
use aya::maps::MapData;
use proxy_ebpf::{Endpoint, Origin, Seat};

use super::{close_policy::ConnectedSocket, failed};
use crate::{dataplane::Error, model::Protocol};

pub(super) struct Origins {
    pub(super) origins: MapData,
    pub(super) seats: MapData,
}

impl Origins {
    /// Calls `visit` with the cookie of every socket, and the socket.
    pub(super) fn read(&self, mut visit: impl FnMut(u64, ConnectedSocket)) -> Result<(), Error> {
        let read = self.read_elements(&mut visit).and_then(|()| self.read_seats(&mut visit));
        read.map_err(failed("reading the maps of connected sockets"))
    }

    fn read_elements(&self, mut visit: impl FnMut(u64, ConnectedSocket)) -> io::Result<()> {
        bpf::read_all(&self.origins, |cookie: u64, origin: Origin| {
            if let Some(socket) = connected(&origin) {
                visit(cookie, socket);
            }
        })
    }

    /// Reads the array twice, because a program may be writing an entry. An entry counts only if both reads agree.
    fn read_seats(&self, mut visit: impl FnMut(u64, ConnectedSocket)) -> io::Result<()> {
        let mut before = Vec::new();
        bpf::read_all(&self.seats, |_: u32, seat: Seat| before.push(seat))?;
        bpf::read_all(&self.seats, |number: u32, seat: Seat| {
            let is_stable =
                before.get(number as usize) == Some(&seat) && Seat::is_taken(seat.claims) && seat.since > 0;
            if let Some(socket) = connected(&seat.origin()).filter(|_| is_stable) {
                visit(seat.cookie, socket);
            }
        })
    }
}

fn connected(origin: &Origin) -> Option<ConnectedSocket> {
    let end = |endpoint: Endpoint| SocketAddr::new(endpoint.ip(), endpoint.port());
    Some(ConnectedSocket {
        since: origin.since,
        protocol: Protocol::from_number(u8::try_from(origin.protocol).ok()?)?,
        service: end(origin.service),
        backend: end(origin.backend),
    })
}
