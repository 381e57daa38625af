//! TCP: a connection has one backend from its beginning to its end, whatever becomes of the Service.

use nix::errno::Errno;

use super::{Door, Model, Outcome, Peer, Port, Row, Socket, Verdict, Waiting, Way, is};
use crate::suites::calls::{
    sequence::{To, Transport},
    servers::Server,
    world::Plane,
};

/// TCP for [`super::Service::remembers`].
const TCP: usize = 0;

impl Model {
    pub(super) fn connect_stream(&mut self, slot: usize, to: To, outcome: Outcome) -> Verdict {
        if self.sockets[slot].peer.is_some() {
            return is(outcome, &[Outcome::Failed(Errno::EISCONN)]);
        }
        let mut allowed = self.connections(to);
        let socket = &self.sockets[slot];
        let siblings = self.siblings(socket);
        // Two connections with the same four addresses and ports are one.
        let taken = Outcome::Failed(Errno::EADDRNOTAVAIL);
        if siblings.iter().any(|peer| peer.to == to) {
            if !self.also(Row::OnePort) {
                allowed.clear();
            }
            allowed.push(taken);
        }
        if self.also(Row::OnePort) {
            let backends = siblings.into_iter().map(Self::end_of);
            for backend in backends {
                let before = allowed.len();
                allowed.retain(|outcome| !matches!(outcome, Outcome::Reached(Server::Backend(to)) if To::Backend(*to) == backend));
                if allowed.len() < before && !allowed.contains(&taken) {
                    allowed.push(taken);
                }
            }
        }
        is(outcome, &allowed)?;
        match outcome {
            Outcome::Reached(server) => self.connected(slot, to, server),
            Outcome::Failed(Errno::EADDRNOTAVAIL) => {}
            _ => self.reopen(slot),
        }
        Ok(())
    }

    /// The possible results of a new connection.
    fn connections(&self, to: To) -> Vec<Outcome> {
        let Door::Of(mut servers) = self.door(to) else {
            return vec![Outcome::Failed(Errno::ECONNREFUSED)];
        };
        if let Some(backend) = to.service().and_then(|number| self.services[number].remembers(TCP)) {
            servers = vec![Server::Backend(backend)];
        }
        servers.into_iter().map(Outcome::Reached).collect()
    }

    /// The peers of other connections from the port of a socket.
    fn siblings(&self, socket: &Socket) -> Vec<Peer> {
        let is_sibling = |other: &&Socket| {
            other.id != socket.id && other.transport == Transport::Tcp && other.port == Some(Port::Shared)
        };
        if socket.port != Some(Port::Shared) {
            return Vec::new();
        }
        self.sockets.iter().filter(is_sibling).filter_map(|other| other.peer).collect()
    }

    /// The address that the kernel has for a peer.
    pub(super) const fn end_of(peer: Peer) -> To {
        match peer.way.end() {
            Some(Some(backend)) => To::Backend(backend),
            _ => peer.to,
        }
    }

    fn connected(&mut self, slot: usize, to: To, server: Server) {
        let backend = if let Server::Backend(number) = server { Some(number) } else { None };
        let led = self.plane == Plane::Sockets && to.service().is_some() && backend.is_some();
        self.met(slot, Peer { to, way: if led { Way::Led(backend) } else { Way::AsAsked } });
        let socket = &mut self.sockets[slot];
        (socket.error, socket.asked) = (None, vec![(to, server)]);
        if let (Some(number), Some(backend)) = (to.service(), backend) {
            self.services[number].remember(TCP, backend);
        }
    }

    pub(super) fn send_on_stream(&mut self, slot: usize, question: u64, outcome: Outcome) -> Verdict {
        let socket = &mut self.sockets[slot];
        let Some(peer) = socket.peer else {
            let error = socket.error.take().unwrap_or(Errno::EPIPE);
            return is(outcome, &[Outcome::Failed(error)]);
        };
        let Some(&(to, server)) = socket.asked.last() else { return Err("it is not connected".to_owned()) };
        debug_assert_eq!(to, peer.to);
        let (asker, at, peers) = (socket.id, vec![socket.id], socket.peers);
        self.waiting.push(Waiting { question, server, asker, to, at, perhaps: false, peers, moved: false });
        is(outcome, &[Outcome::Reached(server)])
    }
}
