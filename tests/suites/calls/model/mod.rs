//! The answers that each call must get: the same as if all traffic was translated by the packet, each flow to
//! the backend that was drawn for its first packet.
//!
//! In: calls with what they answered, and what happens to Services. Out: whether that is right. The draw of a new flow is free,
//! therefore the model learns it from the first answer; everything after has to follow from it. One model is for both planes:
//! where eBPF may also answer otherwise, the model asks [`Model::also`] with the [`Row`] of docs/differences.md that allows it.

use std::net::SocketAddr;

use nix::errno::Errno;

use super::{
    sequence::{Act, At, Change, Sequence, Side, To, Transport, Wire},
    servers::Server,
    world::{Ground, Plane},
};

mod allowed;
mod service;
mod streams;
mod udp;

pub(super) use allowed::Row;

use service::{Door, Service};

/// The result of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Done,
    Failed(Errno),
    /// A question was sent, and this got it.
    Reached(Server),
    /// A question was sent, and nothing got it.
    Nowhere,
    /// An answer was received, and shown as from there.
    Heard {
        question: u64,
        server: Server,
        from: Option<SocketAddr>,
    },
    Named(SocketAddr),
}

/// The event that the player has to wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Prospect {
    /// Something comes.
    Something,
    /// Nothing will come.
    Nothing,
}

/// A port that sockets have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Port {
    Shared,
    /// One that the kernel chose.
    Chosen(u32),
}

/// The destination of a connected socket in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// The address that it asked for.
    AsAsked,
    /// A backend in place of a Service, which may not be known yet.
    Led(Option<u8>),
    /// Such a backend that no longer serves, and the backend to which the Service translates packets instead.
    Moved(Option<u8>, Option<u8>),
}

impl Way {
    /// The only code that decides where a connected UDP socket sends when its backend is gone: its next
    /// datagram begins another flow, as it would by packets.
    fn after(self, service: &Service) -> Self {
        match self {
            Self::Led(None) if service.has_lost() => Self::Moved(None, None),
            Self::Led(Some(backend)) if !service.serves(backend) => Self::Moved(Some(backend), None),
            Self::Moved(end, now) => Self::Moved(end, now.filter(|backend| service.serves(*backend))),
            stays => stays,
        }
    }

    /// The backend that the kernel has for the peer, if it is one, and if it is known.
    const fn end(self) -> Option<Option<u8>> {
        match self {
            Self::AsAsked => None,
            Self::Led(end) | Self::Moved(end, _) => Some(end),
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Peer {
    to: To,
    way: Way,
}

struct Socket {
    /// No two sockets of a sequence have the same.
    id: u32,
    transport: Transport,
    port: Option<Port>,
    /// Whether it is bound to the own address.
    own: bool,
    peer: Option<Peer>,
    /// The only peer that it hears after it lost a peer: the kernel forgets an IPv6 peer's port and keeps its
    /// address (`udp_disconnect`, seen on 6.18).
    hears: Option<Peer>,
    /// The error that the next call gets.
    error: Option<Errno>,
    /// Addresses that it asked while not connected to them, and the server that each request reached.
    asked: Vec<(To, Server)>,
    /// Services that it takes for clients ([`Row::LateServices`]).
    strangers: Vec<To>,
    /// A peer that is over and still remembered ([`Row::LostPeers`]).
    over: Option<Peer>,
    /// The number of changes of its peer.
    peers: u32,
}

/// A UDP flow to a Service.
struct Flow {
    port: Port,
    socket: u32,
    to: To,
    backend: u8,
}

/// An answer that has come and was not read.
struct Waiting {
    question: u64,
    server: Server,
    asker: u32,
    to: To,
    /// The sockets that may have got it.
    at: Vec<u32>,
    /// Whether none may have got it as well.
    perhaps: bool,
    /// As [`Socket::peers`] of the one that asked, when it came.
    peers: u32,
    /// Whether its socket is connected to a removed backend, and it comes from that backend's address.
    moved: bool,
}

/// All that is known.
pub(super) struct Model {
    plane: Plane,
    side: Side,
    wire: Wire,
    ground: Ground,
    services: Vec<Service>,
    sockets: Vec<Socket>,
    flows: Vec<Flow>,
    /// Ports of sockets that were moved and have another peer now, or none, with the backends that they were moved from, where known:
    /// the rule that moves them stays for some seconds ([`Row::Moved`]).
    moved: Vec<(Port, Option<u8>)>,
    waiting: Vec<Waiting>,
    made: u32,
}

type Verdict = Result<(), String>;

impl Model {
    pub(super) fn new(plane: Plane, ground: Ground, sequence: &Sequence) -> Self {
        let services = sequence.services.iter().map(Service::new);
        let mut model = Self {
            plane,
            side: sequence.side,
            wire: sequence.wire,
            ground,
            services: services.collect(),
            sockets: Vec::new(),
            flows: Vec::new(),
            moved: Vec::new(),
            waiting: Vec::new(),
            made: 0,
        };
        for transport in &sequence.sockets {
            let socket = model.socket(*transport);
            model.sockets.push(socket);
        }
        model
    }

    /// A socket that has just been made.
    fn socket(&mut self, transport: Transport) -> Socket {
        let id = self.another();
        Socket {
            id,
            transport,
            port: None,
            own: false,
            peer: None,
            hears: None,
            error: None,
            asked: Vec::new(),
            strangers: Vec::new(),
            over: None,
            peers: 0,
        }
    }

    const fn another(&mut self) -> u32 {
        self.made += 1;
        self.made
    }

    /// The Service that a socket sees in place of the backend that it is connected to, if any.
    fn misremembered(&self, socket: &Socket) -> Option<To> {
        let over = socket.over.filter(|_| self.also(Row::LostPeers))?;
        let peer = socket.peer?;
        let is_it = match over.way.end() {
            Some(None) => matches!(peer.to, To::Backend(_)),
            _ => Self::end_of(over) == peer.to,
        };
        is_it.then_some(over.to)
    }

    /// The endpoints of a Service, which is there or not.
    pub(super) fn endpoints(&self, service: usize) -> (&[u8], &[u8]) {
        self.services[service].endpoints()
    }

    /// Whether a Service is there, and sticky.
    pub(super) fn standing(&self, service: usize) -> (bool, bool) {
        self.services[service].standing()
    }

    /// The servers at an address.
    fn door(&self, to: To) -> Door {
        match to {
            To::Backend(number) => Door::Of(vec![Server::Backend(number)]),
            To::Elsewhere => Door::Of(vec![Server::Elsewhere]),
            To::Service(number) => self.services[number].door(Some(Server::Untranslated)),
            // The node listens on no such port itself.
            To::NodePort(number) => self.services[number].door(None),
        }
    }

    /// A Service changes. Sockets that are not to be played with any more ([`Row::LostPeers`]) are said.
    pub(super) fn change(&mut self, number: usize, change: Change) -> Vec<usize> {
        let service = &mut self.services[number];
        service.change(change);
        let gone = |flow: &Flow| flow.to.service() == Some(number) && !service.serves(flow.backend);
        self.flows.retain(|flow| !gone(flow));
        let service = &self.services[number];
        for socket in self.sockets.iter_mut().filter(|socket| socket.transport == Transport::Udp) {
            if let Some(peer) = socket.peer.as_mut().filter(|peer| peer.to.service() == Some(number)) {
                peer.way = peer.way.after(service);
            }
        }
        let lost = |socket: &Socket| {
            let over = socket.over.filter(|_| self.misremembered(socket).is_some());
            let is_its =
                |over: &Peer| over.to.service() == Some(number) && over.way != over.way.after(service);
            socket.transport == Transport::Udp && over.as_ref().is_some_and(is_its)
        };
        let sockets = self.sockets.iter().enumerate();
        sockets.filter(|(_, socket)| lost(socket)).map(|(slot, _)| slot).collect()
    }

    /// Whether a call can be judged.
    pub(super) fn knows(&self, slot: usize, act: Act) -> bool {
        !matches!(act, Act::Send(to) if self.is_moved(slot, to))
    }

    /// The event that a call on a socket will cause.
    pub(super) fn prospect(&self, slot: usize, act: Act) -> Prospect {
        let socket = &self.sockets[slot];
        let something = match (act, socket.transport) {
            (Act::Send(to), Transport::Udp) => self.datagram_arrives(socket, to),
            (Act::Send(_), Transport::Tcp) => socket.peer.is_some(),
            (Act::Connect(to), Transport::Tcp) => socket.peer.is_none() && self.door(to) != Door::Closed,
            (Act::Receive { .. }, _) => socket.error.is_some() || self.has_answer(socket),
            _ => false,
        };
        if something { Prospect::Something } else { Prospect::Nothing }
    }

    /// Whether an answer is certainly there.
    fn has_answer(&self, socket: &Socket) -> bool {
        self.waiting.iter().any(|waiting| waiting.at == [socket.id] && !waiting.perhaps)
    }

    /// Judges a call, of which `question` is what it sent.
    pub(super) fn judge(&mut self, slot: usize, act: Act, question: u64, outcome: Outcome) -> Verdict {
        let transport = self.sockets[slot].transport;
        match act {
            Act::Bind(at) => self.bind(slot, at, outcome),
            Act::Connect(to) if transport == Transport::Udp => self.connect_datagrams(slot, to, outcome),
            Act::Connect(to) => self.connect_stream(slot, to, outcome),
            Act::Disconnect => self.disconnect(slot, outcome),
            Act::Send(to) if transport == Transport::Udp => self.send_datagram(slot, to, question, outcome),
            Act::Send(_) => self.send_on_stream(slot, question, outcome),
            Act::Receive { .. } => self.receive(slot, outcome),
            Act::PeerName => match self.sockets[slot].peer {
                Some(peer) => {
                    let over = self.misremembered(&self.sockets[slot]);
                    let names: Vec<Outcome> = [peer.to]
                        .into_iter()
                        .chain(over)
                        .map(|to| Outcome::Named(self.ground.at(to)))
                        .collect();
                    is(outcome, &names)
                }
                None => is(outcome, &[Outcome::Failed(Errno::ENOTCONN)]),
            },
            Act::OwnName => self.own_name(slot, outcome),
            Act::Close => {
                self.reopen(slot);
                is(outcome, &[Outcome::Done])
            }
        }
    }

    /// A socket has another peer.
    fn met(&mut self, slot: usize, peer: Peer) {
        self.let_go(slot);
        let chosen = Port::Chosen(self.another());
        let socket = &mut self.sockets[slot];
        if peer.way != Way::AsAsked || socket.port.is_some() {
            socket.over = None;
        }
        socket.port.get_or_insert(chosen);
        (socket.peer, socket.hears) = (Some(peer), None);
        socket.peers += 1;
    }

    /// A socket loses its peer.
    fn let_go(&mut self, slot: usize) {
        let Socket { port, peer, .. } = &self.sockets[slot];
        if let (Some(port), Some(Peer { way: Way::Moved(end, _), .. })) = (port, peer) {
            self.moved.push((*port, *end));
        }
    }

    /// Another socket takes the place of one.
    pub(super) fn reopen(&mut self, slot: usize) {
        self.let_go(slot);
        let socket = self.socket(self.sockets[slot].transport);
        let gone = std::mem::replace(&mut self.sockets[slot], socket).id;
        for waiting in &mut self.waiting {
            waiting.perhaps |= waiting.at.contains(&gone);
            waiting.at.retain(|id| *id != gone);
        }
    }

    /// Whether all answers were read that had to come.
    pub(super) fn is_over(&self) -> Verdict {
        match self.waiting.iter().find(|waiting| !waiting.at.is_empty() && !waiting.perhaps) {
            Some(waiting) => Err(format!("the answer to question {} never came", waiting.question)),
            None => Ok(()),
        }
    }

    fn bind(&mut self, slot: usize, at: At, outcome: Outcome) -> Verdict {
        let socket = &self.sockets[slot];
        let has_port = socket.port.is_some() || socket.peer.is_some();
        let mut wrong = Vec::new();
        if has_port {
            wrong.push(Outcome::Failed(Errno::EINVAL));
        }
        if matches!(at, At::Service(_)) {
            wrong.push(Outcome::Failed(Errno::EADDRNOTAVAIL));
        }
        if !wrong.is_empty() {
            return is(outcome, &wrong);
        }
        let chosen = Port::Chosen(self.another());
        let socket = &mut self.sockets[slot];
        (socket.port, socket.own) = match at {
            At::Shared { own } => (Some(Port::Shared), own),
            _ => (Some(chosen), at == At::Own),
        };
        is(outcome, &[Outcome::Done])
    }

    fn disconnect(&mut self, slot: usize, outcome: Outcome) -> Verdict {
        self.let_go(slot);
        let socket = &mut self.sockets[slot];
        let had = socket.peer.take();
        socket.peers += u32::from(had.is_some());
        if had.is_some_and(|peer| peer.way != Way::AsAsked) && socket.port != Some(Port::Shared) {
            socket.over = had;
        }
        if self.wire == Wire::V6 && socket.transport == Transport::Udp {
            socket.hears = had.or(socket.hears);
        }
        if (had.is_some() || socket.transport == Transport::Udp) && socket.port != Some(Port::Shared) {
            socket.port = None;
        }
        if socket.transport == Transport::Tcp && had.is_some() {
            socket.error = Some(Errno::ECONNRESET);
            let id = socket.id;
            self.waiting.retain(|waiting| waiting.asker != id);
        }
        is(outcome, &[Outcome::Done])
    }

    fn own_name(&self, slot: usize, outcome: Outcome) -> Verdict {
        let socket = &self.sockets[slot];
        let Outcome::Named(name) = outcome else { return is(outcome, &[]) };
        let shared = self.ground.shared_port();
        let wanted =
            if socket.peer.is_some() || socket.own { self.ground.own(0) } else { self.ground.any(0) };
        let port = match socket.port {
            Some(Port::Shared) => name.port() == shared,
            Some(Port::Chosen(_)) => name.port() != 0 && name.port() != shared,
            None => true,
        };
        if name.ip() == wanted.ip() && port {
            Ok(())
        } else {
            Err(format!("not {wanted}, {:?}", socket.port))
        }
    }

    fn receive(&mut self, slot: usize, outcome: Outcome) -> Verdict {
        let socket = &mut self.sockets[slot];
        if let Some(error) = socket.error.take() {
            return is(outcome, &[Outcome::Failed(error)]);
        }
        if socket.transport == Transport::Tcp && socket.peer.is_none() {
            return is(outcome, &[Outcome::Failed(Errno::ENOTCONN)]);
        }
        let socket = &self.sockets[slot];
        let Outcome::Heard { question, server, from } = outcome else {
            if self.has_answer(socket) {
                return Err("an answer is there to be heard".to_owned());
            }
            return is(outcome, &[Outcome::Failed(Errno::EAGAIN)]);
        };
        let is_it = |waiting: &Waiting| waiting.question == question && waiting.at.contains(&socket.id);
        let Some(place) = self.waiting.iter().position(is_it) else {
            return Err("no answer to that may be heard here".to_owned());
        };
        let answer = &self.waiting[place];
        if answer.server != server {
            return Err(format!("{:?} got that question", answer.server));
        }
        let shown = self.shown(socket, answer);
        let asked = answer.to;
        self.waiting.remove(place);
        if from.is_some() && server == Server::Untranslated {
            self.meet(slot, asked);
        }
        match from {
            Some(from) if shown.iter().all(|name| self.ground.at(*name) != from) => {
                Err(format!("{from} is shown as the sender, not {}", self.ground.at(asked)))
            }
            _ => Ok(()),
        }
    }
}

/// Whether what came is among what may.
fn is(outcome: Outcome, allowed: &[Outcome]) -> Verdict {
    if allowed.contains(&outcome) { Ok(()) } else { Err(format!("right would be one of {allowed:?}")) }
}
