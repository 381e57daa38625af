//! UDP: a flow is a port of the client and what it asks; it has one backend for as long as that serves.

use nix::errno::Errno;

use super::{Door, Flow, Model, Outcome, Peer, Port, Row, Socket, Verdict, Waiting, Way, is};
use crate::suites::calls::{
    sequence::{BACKENDS, Side, To, Transport, Wire},
    servers::Server,
    world::Plane,
};

/// UDP for [`super::Service::remembers`].
const UDP: usize = 1;

impl Model {
    pub(super) fn connect_datagrams(&mut self, slot: usize, to: To, outcome: Outcome) -> Verdict {
        let socket = &self.sockets[slot];
        let way = match to.service() {
            Some(number) if self.plane == Plane::Sockets && !self.services[number].drawn().is_empty() => {
                let draws_anew = self.also(Row::LostPeers);
                Way::Led(if draws_anew { self.begun(socket, to) } else { self.known(socket, to) })
            }
            _ => Way::AsAsked,
        };
        self.met(slot, Peer { to, way });
        is(outcome, &[Outcome::Done])
    }

    /// The backend that a socket has already.
    fn known(&self, socket: &Socket, to: To) -> Option<u8> {
        let connected = socket.peer.filter(|peer| peer.to == to).and_then(|peer| match peer.way {
            Way::Led(backend) | Way::Moved(_, backend) => backend,
            Way::AsAsked => None,
        });
        connected.or_else(|| self.begun(socket, to))
    }

    /// The backend of a flow.
    fn begun(&self, socket: &Socket, to: To) -> Option<u8> {
        let is_its = |flow: &&Flow| {
            // A socket asks for itself in eBPF, and a port does by packets.
            flow.to == to
                && Some(flow.port) == socket.port
                && (flow.socket == socket.id || !self.also(Row::SharedPort))
        };
        self.flows.iter().find(is_its).map(|flow| flow.backend)
    }

    fn reach(&self, socket: &Socket, to: To) -> Door {
        let (Some(number), Door::Of(servers)) = (to.service(), self.door(to)) else { return self.door(to) };
        if !self.services[number].standing().0 {
            return Door::Of(servers);
        }
        // The backend was drawn when the socket connected, and may have begun to drain since.
        let is_drawn = socket.peer.is_some_and(|peer| peer.to == to && peer.way.end() == Some(None));
        if is_drawn && self.known(socket, to).is_none() {
            return Door::Of(self.services[number].serving());
        }
        let known = self.known(socket, to).filter(|_| !self.is_left_to_packets(socket, to));
        let remembered = self.services[number].remembers(UDP).filter(|_| !self.is_apart(socket, to));
        match known.or(remembered) {
            Some(backend) => Door::Of(vec![Server::Backend(backend)]),
            None => Door::Of(servers),
        }
    }

    /// Whether only the nftables plane translates for a socket, because the socket is connected as it asked
    /// or takes `to` for a client.
    fn is_left_to_packets(&self, socket: &Socket, to: To) -> bool {
        let as_asked = socket.peer.is_some_and(|peer| peer.way == Way::AsAsked);
        self.plane == Plane::Sockets && (as_asked || socket.strangers.contains(&to))
    }

    /// Whether a socket is another client than the sockets that the socket plane translates.
    fn is_apart(&self, socket: &Socket, to: To) -> bool {
        let peer = socket.peer.filter(|peer| peer.to == to);
        let is_moved = peer.is_some_and(|peer| matches!(peer.way, Way::Moved(..)));
        (is_moved || self.is_left_to_packets(socket, to)) && self.also(Row::ClientsApart)
    }

    /// A socket hears an answer from a Service's address that was not translated.
    pub(super) fn meet(&mut self, slot: usize, to: To) {
        let Some(number) = to.service() else { return };
        if self.also(Row::LateServices)
            && self.sockets[slot].peer.is_none()
            && self.services[number].standing().0
        {
            let id = self.sockets[slot].id;
            self.sockets[slot].strangers.push(to);
            self.flows.retain(|flow| flow.socket != id || flow.to != to);
        }
    }

    /// Whether packets to a backend from a socket's port are translated to a Service, because the backend was
    /// the socket's and is gone. Packets to the backend's own address, or through another Service, look the
    /// same ([`Row::OneBackend`], [`Row::Moved`]).
    pub(super) fn is_moved(&self, slot: usize, to: Option<To>) -> bool {
        let socket = &self.sockets[slot];
        let Some(to) = to.or(socket.peer.map(|peer| peer.to)) else { return false };
        let backends = match to {
            To::Backend(backend) => vec![Server::Backend(backend)],
            To::Elsewhere => return false,
            To::Service(number) | To::NodePort(number) => self.services[number].serving(),
        };
        let meets = |end: Option<u8>| {
            end.map_or(!backends.is_empty(), |end| backends.contains(&Server::Backend(end)))
        };
        let was_moved = |(port, end): &(Port, Option<u8>)| socket.port == Some(*port) && meets(*end);
        if self.moved.iter().any(was_moved) && self.also(Row::Moved) {
            return true;
        }
        let moves = |other: &&Socket| {
            let is_near = other.id == socket.id || (other.port == socket.port && other.port.is_some());
            let Some(Peer { to: peer, way: Way::Moved(end, _) }) = other.peer else { return false };
            is_near && peer != to && meets(end)
        };
        socket.transport == Transport::Udp && self.sockets.iter().any(|other| moves(&other))
    }

    pub(super) fn datagram_arrives(&self, socket: &Socket, to: Option<To>) -> bool {
        let to = to.or(socket.peer.map(|peer| peer.to));
        socket.error.is_none() && to.is_some_and(|to| matches!(self.reach(socket, to), Door::Of(_)))
    }

    /// Whether the socket's backend is gone, and its Service too.
    fn is_dropped(&self, slot: usize, to: To) -> bool {
        let peer = self.sockets[slot].peer.filter(|peer| peer.to == to);
        let is_moved = peer.is_some_and(|peer| matches!(peer.way, Way::Moved(..)));
        is_moved && to.service().is_some_and(|number| !self.services[number].present)
    }

    pub(super) fn send_datagram(
        &mut self,
        slot: usize,
        given: Option<To>,
        question: u64,
        outcome: Outcome,
    ) -> Verdict {
        let chosen = Port::Chosen(self.another());
        self.sockets[slot].port.get_or_insert(chosen);
        let Some(to) = given.or(self.sockets[slot].peer.map(|peer| peer.to)) else {
            return is(outcome, &[Outcome::Failed(Errno::EDESTADDRREQ)]);
        };
        // Where the process names the Service, packets go there as asked.
        if self.is_dropped(slot, to) && (given.is_none() || !matches!(outcome, Outcome::Reached(_))) {
            let told = if self.side == Side::Host { Outcome::Failed(Errno::EPERM) } else { Outcome::Nowhere };
            return is(outcome, &[told]);
        }
        let reach = self.reach(&self.sockets[slot], to);
        // An IPv6 socket sends to its IPv4 peer by its address.
        let by_address = given.is_some() || self.wire == Wire::Mapped;
        let at_once = Outcome::Failed(Errno::ECONNREFUSED);
        // No program refuses a datagram that is left to packets, nor one to a port of the node that no
        // Service has.
        let left = self.is_left_to_packets(&self.sockets[slot], to);
        let is_there = to.service().is_some_and(|number| self.services[number].standing().0);
        let by_program =
            by_address && is_there && (!left || self.misremembered(&self.sockets[slot]).is_some());
        if matches!(reach, Door::Closed) && by_program && self.also(Row::Refused) && outcome == at_once {
            return Ok(());
        }
        if let Some(error) = self.sockets[slot].error.take() {
            return is(outcome, &[Outcome::Failed(error)]);
        }
        let allowed = match reach {
            Door::Of(servers) => servers,
            Door::Closed => {
                // The ICMP error comes to the host's own sockets too, beside what sending answers.
                let is_host = self.side == Side::Host && matches!(to, To::Service(_));
                let may_be_deaf = self.also(Row::Moved);
                let socket = &mut self.sockets[slot];
                let peer = socket.peer.filter(|peer| peer.to == to);
                let is_deaf = peer.is_some_and(|peer| matches!(peer.way, Way::Moved(..))) && may_be_deaf;
                if peer.is_some() && !is_deaf {
                    socket.error = Some(Errno::ECONNREFUSED);
                }
                return is(
                    outcome,
                    &[if is_host { Outcome::Failed(Errno::EPERM) } else { Outcome::Nowhere }],
                );
            }
        };
        let outcomes: Vec<Outcome> = allowed.iter().copied().map(Outcome::Reached).collect();
        is(outcome, &outcomes)?;
        if let Outcome::Reached(server) = outcome {
            self.reached(slot, given, to, server, question);
        }
        Ok(())
    }

    /// A datagram got there, and the answer has come.
    fn reached(&mut self, slot: usize, given: Option<To>, to: To, server: Server, question: u64) {
        let left = self.is_left_to_packets(&self.sockets[slot], to);
        let apart = self.is_apart(&self.sockets[slot], to);
        let socket = &mut self.sockets[slot];
        let is_peer = socket.peer.is_some_and(|peer| peer.to == to);
        if let (Some(peer), Server::Backend(backend)) = (&mut socket.peer, server)
            && peer.to == to
        {
            peer.way = match peer.way {
                Way::Led(_) => Way::Led(Some(backend)),
                Way::Moved(end, _) => Way::Moved(end, Some(backend)),
                Way::AsAsked => Way::AsAsked,
            };
        }
        if given.is_some() && !is_peer {
            socket.asked.push((to, server));
        }
        let Some(port) = socket.port else { return };
        let (asker, peers) = (socket.id, socket.peers);
        if let (Some(number), Server::Backend(backend)) = (to.service(), server) {
            let is_known = |flow: &Flow| flow.to == to && flow.port == port && flow.socket == asker;
            let forgets = (is_peer || left) && self.also(Row::LostPeers);
            if !forgets && !self.flows.iter().any(is_known) {
                self.flows.push(Flow { port, socket: asker, to, backend });
            }
            if !apart {
                self.services[number].remember(UDP, backend);
            }
        }
        let peer = self.sockets[slot].peer.filter(|peer| peer.to == to);
        let moved = peer.is_some_and(|peer| matches!(peer.way, Way::Moved(..)));
        let (at, mut perhaps) = self.hearers(slot, port, to, server);
        perhaps |= left && self.misremembered(&self.sockets[slot]).is_some();
        if !at.is_empty() {
            self.waiting.push(Waiting { question, server, asker, to, at, perhaps, peers, moved });
        }
    }

    /// The sockets that may get the answer to what one of them asked, and whether none may as well.
    fn hearers(&self, slot: usize, port: Port, to: To, server: Server) -> (Vec<u32>, bool) {
        let asker = &self.sockets[slot];
        let from = self.sender(asker, to, server);
        let is_moved = asker.peer.is_some_and(|peer| peer.to == to && matches!(peer.way, Way::Moved(..)));
        let is_lost = is_moved && server == Server::Untranslated && self.also(Row::Moved);
        let on_port = |socket: &&Socket| socket.transport == Transport::Udp && socket.port == Some(port);
        let (mut certain, mut perhaps, mut open) = (Vec::new(), Vec::new(), Vec::new());
        for socket in self.sockets.iter().filter(on_port) {
            match socket.peer {
                Some(peer) if socket.id == asker.id && peer.to == to && !is_lost => certain.push(socket.id),
                None if socket.hears.is_none_or(|known| self.is_one_address(Self::end_of(known), from)) => {
                    open.push(socket.id)
                }
                // It hears a backend in place of the Service that it was connected to.
                None if self.plane == Plane::Sockets => perhaps.push(socket.id),
                None => {}
                Some(peer) if peer.way.end() == Some(None) => perhaps.push(socket.id),
                Some(peer) if Self::end_of(peer) == from => certain.push(socket.id),
                Some(_) => {}
            }
        }
        if certain.is_empty() {
            let none = open.is_empty();
            perhaps.append(&mut open);
            return (perhaps, none);
        }
        certain.append(&mut perhaps);
        (certain, false)
    }

    fn is_one_address(&self, one: To, other: To) -> bool {
        self.ground.at(one).ip() == self.ground.at(other).ip()
    }

    /// Where an answer comes from as the kernel sees it.
    fn sender(&self, socket: &Socket, to: To, server: Server) -> To {
        let peer = socket.peer.filter(|peer| peer.to == to);
        let moved = peer.filter(|peer| matches!(peer.way, Way::Moved(..)) && server != Server::Untranslated);
        if let Some(peer) = moved {
            return Self::end_of(peer);
        }
        match (to.service(), server) {
            (Some(_), Server::Backend(backend))
                if self.plane == Plane::Sockets && !self.is_left_to_packets(socket, to) =>
            {
                To::Backend(backend)
            }
            _ => to,
        }
    }

    /// The addresses that a socket may see as the sender of an answer.
    pub(super) fn shown(&self, socket: &Socket, answer: &Waiting) -> Vec<To> {
        let mut shown = vec![answer.to];
        let Server::Backend(backend) = answer.server else { return shown };
        let raw = To::Backend(backend);
        if self.also(Row::OneBackend) {
            let last = socket.asked.iter().rev().find(|(_, by)| *by == answer.server).map(|(to, _)| *to);
            shown.extend(match socket.peer {
                Some(peer) => (Self::end_of(peer) == raw || peer.way.end() == Some(None)).then_some(peer.to),
                None => last,
            });
        }
        if self.also(Row::LostPeers) {
            shown.extend(socket.over.map(|over| over.to));
        }
        if self.also(Row::SharedPort) && socket.id != answer.asker {
            shown.push(raw);
        }
        let has_moved = answer.to.service().is_some() && self.known(socket, answer.to) != Some(backend);
        let is_late = socket.peers != answer.peers || has_moved;
        if self.also(Row::ReadLate) && is_late {
            shown.push(raw);
            if answer.moved {
                shown.extend((0..BACKENDS).map(To::Backend));
            }
            // The backend that it was moved from may also be the one that another Service gave it.
            let asks_there = |(_, by): &&(To, Server)| answer.moved || *by == answer.server;
            shown.extend(socket.asked.iter().filter(asks_there).map(|(to, _)| *to));
        }
        shown
    }
}
