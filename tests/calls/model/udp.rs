//! UDP: a flow is a port of the client and what it asks; it has one backend for as long as that serves.

use nix::errno::Errno;

use super::{Fault, Flow, Model, Outcome, Peer, Port, Row, Socket, Verdict, Waiting, Way, is};
use crate::{
    sequence::{Side, To, Transport, Wire},
    servers::Server,
    world::Plane,
};

/// The place of UDP in [`super::Service::remembered`].
const UDP: usize = 1;

/// Where a datagram may get.
enum Reach {
    To(Vec<Server>),
    Refused,
}

impl Model {
    pub(super) fn connect_datagrams(&mut self, slot: usize, to: To, outcome: Outcome) -> Verdict {
        let socket = &self.sockets[slot];
        let way = match to {
            To::Service(number) if self.plane == Plane::Sockets && self.serves(number) => {
                let draws_anew = self.excused(Fault::DrawsAnew);
                Way::Led(if draws_anew { self.begun(socket, to) } else { self.known(socket, to) })
            }
            _ => Way::AsAsked,
        };
        self.met(slot, Peer { to, way });
        is(outcome, &[Outcome::Done])
    }

    fn serves(&self, number: usize) -> bool {
        self.services[number].present && !self.services[number].endpoints.is_empty()
    }

    /// The backend that a socket has already.
    fn known(&self, socket: &Socket, to: To) -> Option<u8> {
        let connected = socket.peer.filter(|peer| peer.to == to).and_then(|peer| match peer.way {
            Way::Led(backend) => backend,
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

    fn reach(&self, socket: &Socket, to: To) -> Reach {
        let number = match to {
            To::Backend(number) => return Reach::To(vec![Server::Backend(number)]),
            To::Elsewhere => return Reach::To(vec![Server::Elsewhere]),
            To::Service(number) => number,
        };
        let service = &self.services[number];
        if !service.present {
            return Reach::To(vec![Server::Untranslated]);
        }
        if service.endpoints.is_empty() {
            return Reach::Refused;
        }
        let apart = self.is_left_to_packets(socket, to) && self.also(Row::ClientsApart);
        if let Some(backend) = self.known(socket, to).filter(|_| !apart) {
            return Reach::To(vec![Server::Backend(backend)]);
        }
        match service.remembered[UDP].filter(|_| service.sticky && !apart) {
            Some(backend) => Reach::To(vec![Server::Backend(backend)]),
            None => Reach::To(service.endpoints.iter().copied().map(Server::Backend).collect()),
        }
    }

    /// Whether a socket is connected as it asked, so that only packets are led, or answers what it takes for a client there.
    fn is_left_to_packets(&self, socket: &Socket, to: To) -> bool {
        socket.peer.is_some_and(|peer| peer.way == Way::AsAsked) || socket.strangers.contains(&to)
    }

    /// A socket hears an answer from a Service's address that was not translated.
    pub(super) fn meet(&mut self, slot: usize, to: To) {
        let To::Service(number) = to else { return };
        if self.excused(Fault::TakenForClient)
            && self.sockets[slot].peer.is_none()
            && self.services[number].present
        {
            let id = self.sockets[slot].id;
            self.sockets[slot].strangers.push(to);
            self.flows.retain(|flow| flow.socket != id || flow.to != to);
        }
    }

    pub(super) fn datagram_arrives(&self, socket: &Socket, to: Option<To>) -> bool {
        let to = to.or(socket.peer.map(|peer| peer.to));
        socket.error.is_none() && to.is_some_and(|to| matches!(self.reach(socket, to), Reach::To(_)))
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
        let reach = self.reach(&self.sockets[slot], to);
        // An IPv6 socket sends to its IPv4 peer by its address.
        let by_address = given.is_some() || self.wire == Wire::Mapped;
        let at_once = Outcome::Failed(Errno::ECONNREFUSED);
        let left = self.is_left_to_packets(&self.sockets[slot], to);
        let by_program = by_address && (!left || self.misremembered(&self.sockets[slot]).is_some());
        if matches!(reach, Reach::Refused) && by_program && self.also(Row::Refused) && outcome == at_once {
            return Ok(());
        }
        if let Some(error) = self.sockets[slot].error.take() {
            return is(outcome, &[Outcome::Failed(error)]);
        }
        let allowed = match reach {
            Reach::To(servers) => servers,
            Reach::Refused => {
                // The ICMP error comes to the host's own sockets too, beside what sending answers.
                let is_host = self.side == Side::Host;
                let socket = &mut self.sockets[slot];
                if socket.peer.is_some_and(|peer| peer.to == to) {
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
        let apart = self.is_left_to_packets(&self.sockets[slot], to);
        let socket = &mut self.sockets[slot];
        let is_peer = socket.peer.is_some_and(|peer| peer.to == to);
        if let (Some(peer), Server::Backend(backend)) = (&mut socket.peer, server)
            && peer.to == to
            && peer.way == Way::Led(None)
        {
            peer.way = Way::Led(Some(backend));
        }
        if given.is_some() && !is_peer {
            socket.asked.push((to, server));
        }
        let Some(port) = socket.port else { return };
        let (asker, peers) = (socket.id, socket.peers);
        if let (To::Service(number), Server::Backend(backend)) = (to, server) {
            let is_known = |flow: &Flow| flow.to == to && flow.port == port && flow.socket == asker;
            let forgets = is_peer && self.excused(Fault::DrawsAnew);
            if !forgets && !self.flows.iter().any(is_known) {
                self.flows.push(Flow { port, socket: asker, to, backend });
            }
            if !(apart && self.also(Row::ClientsApart)) {
                self.services[number].remembered[UDP].get_or_insert(backend);
            }
        }
        let (at, mut perhaps) = self.hearers(slot, port, to, server);
        perhaps |= apart && self.excused(Fault::LedFromPeer);
        if !at.is_empty() {
            self.waiting.push(Waiting { question, server, asker, to, at, perhaps, peers });
        }
    }

    /// The sockets that may get the answer to what one of them asked, and whether none may as well.
    fn hearers(&self, slot: usize, port: Port, to: To, server: Server) -> (Vec<u32>, bool) {
        let from = self.sender(&self.sockets[slot], to, server);
        let on_port = |socket: &&Socket| socket.transport == Transport::Udp && socket.port == Some(port);
        let (mut certain, mut perhaps, mut open) = (Vec::new(), Vec::new(), Vec::new());
        for socket in self.sockets.iter().filter(on_port) {
            match socket.peer {
                None if socket.hears.is_none_or(|known| Self::end_of(known) == from) => open.push(socket.id),
                // What it hears is a backend in place of the Service that it was connected to.
                None if self.plane == Plane::Sockets => perhaps.push(socket.id),
                None => {}
                Some(peer) if peer.way == Way::Led(None) => perhaps.push(socket.id),
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

    /// Where an answer comes from as the kernel sees it.
    fn sender(&self, socket: &Socket, to: To, server: Server) -> To {
        match (to, server) {
            (To::Service(_), Server::Backend(backend))
                if self.plane == Plane::Sockets && !self.is_left_to_packets(socket, to) =>
            {
                To::Backend(backend)
            }
            _ => to,
        }
    }

    /// What a socket may be shown as the sender of an answer.
    pub(super) fn shown(&self, socket: &Socket, answer: &Waiting) -> Vec<To> {
        let mut shown = vec![answer.to];
        let Server::Backend(backend) = answer.server else { return shown };
        let raw = To::Backend(backend);
        if self.also(Row::OneBackend) {
            let last = socket.asked.iter().rev().find(|(_, by)| *by == answer.server).map(|(to, _)| *to);
            shown.extend(match socket.peer {
                Some(peer) => (Self::end_of(peer) == raw || peer.way == Way::Led(None)).then_some(peer.to),
                None => last,
            });
        }
        if self.excused(Fault::Remembered) {
            shown.extend(socket.over.map(|over| over.to));
        }
        if self.also(Row::SharedPort) && socket.id != answer.asker {
            shown.push(raw);
        }
        let is_late = socket.peers != answer.peers || self.known(socket, answer.to) != Some(backend);
        if self.also(Row::ReadLate) && is_late {
            shown.push(raw);
            shown.extend(socket.asked.iter().filter(|(_, by)| *by == answer.server).map(|(to, _)| *to));
        }
        shown
    }
}
