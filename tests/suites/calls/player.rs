//! Plays sequences on real sockets.
//!
//! In: a world and a sequence. Out: what went otherwise than the model allows, with all that was called before. After each datagram
//! the player waits until its answer is there, or whatever else became of it, so that every next call finds the same.

use std::{
    fmt::Write as _,
    io,
    net::{SocketAddr, UdpSocket},
    os::fd::AsFd as _,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    errno::Errno,
    libc::{MSG_DONTWAIT, MSG_NOSIGNAL},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{
        setsockopt,
        sockopt::{Ipv4RecvErr, Ipv6RecvErr},
    },
};
use rustix::net::{RecvFlags, recv, recvfrom};
use socket2::{Domain, SockAddr, Socket, Type};

use super::{
    model::{Model, Outcome, Prospect},
    sequence::{Act, At, Change, Sequence, Sharing, Step, To, Transport, Wire},
    servers::{ANSWER, QUESTION, Server},
    world::{Ground, World},
};

/// No two questions are the same.
static QUESTIONS: AtomicU64 = AtomicU64::new(1);

/// Why a sequence did not come to its end.
#[derive(Debug)]
pub(super) enum Trouble {
    /// A call was answered otherwise than it has to be.
    Wrong(String),
    /// It could not be played.
    Broken(anyhow::Error),
}

impl From<anyhow::Error> for Trouble {
    fn from(error: anyhow::Error) -> Self {
        Self::Broken(error)
    }
}

/// Plays a sequence, and waits this long for what has to come.
pub(super) fn play(world: &Arc<World>, sequence: &Sequence, patience: Duration) -> Result<(), Trouble> {
    let ground = world.begin(sequence.side, sequence.wire);
    let mut changes: Vec<_> = ground.clear().collect();
    for (number, shape) in sequence.services.iter().enumerate() {
        changes.push(ground.endpoints_are(number, &shape.endpoints, &[]));
        changes.extend(shape.present.then(|| ground.service_is(number, shape.sticky)));
    }
    world.tell(changes)?;
    world.reached.clear();
    let (client, sequence) = (Arc::clone(world), sequence.clone());
    world.at(sequence.side, move || Player::new(client, ground, &sequence, patience)?.play(&sequence))?
}

struct Player {
    world: Arc<World>,
    ground: Ground,
    wire: Wire,
    sharing: Sharing,
    patience: Duration,
    model: Model,
    sockets: Vec<(Transport, Socket)>,
    /// Asks a server past all Services.
    control: UdpSocket,
    said: String,
}

impl Player {
    fn new(world: Arc<World>, ground: Ground, sequence: &Sequence, patience: Duration) -> Result<Self> {
        let model = Model::new(world.plane, ground, sequence);
        let &Sequence { wire, sharing, .. } = sequence;
        let sockets = sequence.sockets.iter();
        let sockets = sockets.map(|transport| Ok((*transport, socket(*transport, wire, sharing, patience)?)));
        let sockets = sockets.collect::<Result<_>>()?;
        let control = UdpSocket::bind(ground.any(0))?;
        control.connect(ground.at(To::Elsewhere))?;
        control.set_read_timeout(Some(super::world::PATIENCE))?;
        Ok(Self { world, ground, wire, sharing, patience, model, sockets, control, said: String::new() })
    }

    fn play(mut self, sequence: &Sequence) -> Result<(), Trouble> {
        for (step, number) in sequence.steps.iter().zip(1..) {
            let _ = write!(self.said, "{number:3}. {step}");
            match *step {
                Step::Change(service, change) => self.change(service, change)?,
                Step::Call(slot, act) if self.model.knows(slot, act) => self.judged(slot, act)?,
                Step::Call(..) => self.said.push_str(" is not played\n"),
            }
        }
        for slot in 0..self.sockets.len() {
            loop {
                let _ = write!(self.said, "     socket {slot}: recvfrom(), after all");
                let before = self.said.len();
                self.judged(slot, Act::Receive { from: true })?;
                if !self.said[before..].contains("Heard")
                    && self.model.prospect(slot, Act::Receive { from: true }) == Prospect::Nothing
                {
                    break;
                }
            }
        }
        self.model.is_over().map_err(|wrong| self.wrong(&wrong))
    }

    fn wrong(&self, wrong: &str) -> Trouble {
        Trouble::Wrong(format!("{}     wrong with {:?}: {wrong}", self.said, self.world.plane))
    }

    fn judged(&mut self, slot: usize, act: Act) -> Result<(), Trouble> {
        let question = QUESTIONS.fetch_add(1, Relaxed);
        let outcome = self.call(slot, act, question)?;
        let _ = writeln!(
            self.said,
            " -> {outcome:?}{}",
            if matches!(act, Act::Send(_)) { format!(", question {question}") } else { String::new() }
        );
        self.model.judge(slot, act, question, outcome).map_err(|wrong| self.wrong(&wrong))?;
        if matches!(act, Act::Connect(_)) && outcome == Outcome::Failed(Errno::ECONNREFUSED) {
            // The state of such a socket differs from system to system, so clients make another one.
            self.reopen(slot)?;
        }
        Ok(())
    }

    fn change(&mut self, number: usize, change: Change) -> Result<(), Trouble> {
        let lost = self.model.change(number, change);
        let (present, sticky) = self.model.standing(number);
        let told = match change {
            Change::Joins(_) | Change::Drains(_) | Change::Leaves(_) => {
                let (ready, drain) = self.model.endpoints(number);
                self.ground.endpoints_are(number, ready, drain)
            }
            _ if present => self.ground.service_is(number, sticky),
            _ => self.ground.service_goes(number),
        };
        self.world.tell(vec![told])?;
        for slot in &lost {
            self.model.reopen(*slot);
            self.reopen(*slot)?;
        }
        let _ = writeln!(
            self.said,
            "{}",
            if lost.is_empty() { String::new() } else { format!(" -> sockets {lost:?} are made anew") }
        );
        Ok(())
    }

    fn reopen(&mut self, slot: usize) -> Result<()> {
        let transport = self.sockets[slot].0;
        self.sockets[slot].1 = socket(transport, self.wire, self.sharing, self.patience)?;
        Ok(())
    }

    fn call(&mut self, slot: usize, act: Act, question: u64) -> Result<Outcome> {
        let prospect = self.model.prospect(slot, act);
        let (transport, socket) = (self.sockets[slot].0, &self.sockets[slot].1);
        match act {
            Act::Bind(at) => {
                let address = match at {
                    At::Any => self.ground.any(0),
                    At::Own => self.ground.own(0),
                    At::Service(number) => self.ground.at(To::Service(number)),
                    At::Shared { own: false } => self.ground.any(self.ground.shared_port()),
                    At::Shared { own: true } => self.ground.own(self.ground.shared_port()),
                };
                Ok(done(socket.bind(&address.into())))
            }
            Act::Connect(to) if transport == Transport::Tcp => self.connect(socket, to, prospect, question),
            Act::Connect(to) => Ok(done(socket.connect(&self.ground.at(to).into()))),
            Act::Disconnect => Ok(done(rustix::net::connect_unspec(socket).map_err(Into::into))),
            Act::Send(to) => {
                let to = to.map(|to| self.ground.at(to));
                self.send(socket, to, prospect, question)
            }
            Act::Receive { from } => self.receive(transport, socket, from, prospect),
            Act::PeerName => named(socket.peer_addr()),
            Act::OwnName => named(socket.local_addr()),
            Act::Close => self.reopen(slot).map(|()| Outcome::Done),
        }
    }

    fn connect(&self, socket: &Socket, to: To, prospect: Prospect, question: u64) -> Result<Outcome> {
        // An ICMP error may come before the kernel waits for it, which a process that waits for the connection itself does
        // not notice before the next SYN is due.
        socket.set_nonblocking(prospect == Prospect::Nothing)?;
        let mut connected = socket.connect(&self.ground.at(to).into());
        if connected.as_ref().is_err_and(|error| error.raw_os_error() == Some(Errno::EINPROGRESS as i32)) {
            ready(socket, PollFlags::POLLOUT, self.patience)?;
            connected = socket.take_error()?.map_or(Ok(()), Err);
        }
        socket.set_nonblocking(false)?;
        if connected.is_err() {
            return Ok(done(connected));
        }
        let sent = self.send(socket, None, Prospect::Something, question)?;
        let Outcome::Reached(server) = sent else { return Ok(sent) };
        match self.receive(Transport::Tcp, socket, false, Prospect::Something)? {
            Outcome::Heard { question: answered, server: by, .. } if (answered, by) == (question, server) => {
                Ok(sent)
            }
            other => bail!("a new connection heard {other:?} after {sent:?}"),
        }
    }

    fn send(
        &self,
        socket: &Socket,
        to: Option<SocketAddr>,
        prospect: Prospect,
        question: u64,
    ) -> Result<Outcome> {
        let words = question.to_be_bytes();
        let flags = MSG_DONTWAIT | MSG_NOSIGNAL;
        let sent = match to {
            Some(to) => socket.send_to_with_flags(&words, &to.into(), flags),
            None => socket.send_with_flags(&words, flags),
        };
        if let Err(error) = sent {
            self.rest()?;
            return Ok(done(Err(error)));
        }
        if prospect == Prospect::Nothing {
            self.rest()?;
            return Ok(self
                .world
                .reached
                .within(Duration::ZERO, question)
                .map_or(Outcome::Nowhere, Outcome::Reached));
        }
        let reached = self.world.reached.within(self.patience, question);
        self.rest()?;
        Ok(reached.map_or(Outcome::Nowhere, Outcome::Reached))
    }

    /// Waits until all is there that was under way: what is sent later on one CPU comes later.
    fn rest(&self) -> Result<()> {
        let question = QUESTIONS.fetch_add(1, Relaxed).to_be_bytes();
        self.control.send(&question)?;
        let mut answer = [0; ANSWER];
        let length = self.control.recv(&mut answer).context("nothing answers any more")?;
        ensure!(answer[..length].starts_with(&question), "the answer to another question");
        Ok(())
    }

    fn receive(
        &self,
        transport: Transport,
        socket: &Socket,
        from: bool,
        prospect: Prospect,
    ) -> Result<Outcome> {
        if prospect == Prospect::Something {
            ready(socket, PollFlags::POLLIN, self.patience)?;
        }
        let mut answer = [0; ANSWER];
        let flags = RecvFlags::DONTWAIT;
        let received = if from {
            recvfrom(socket, &mut answer, flags).map(|(_, length, from)| (length, from))
        } else {
            recv(socket, &mut answer, flags).map(|(_, length)| (length, None))
        };
        let (length, from) = match received {
            Ok(received) => received,
            Err(error) => return Ok(done(Err(error.into()))),
        };
        ensure!(length == ANSWER, "an answer of {length} bytes");
        let mut question = [0; QUESTION];
        question.copy_from_slice(&answer[..QUESTION]);
        // A connection shows nothing of this.
        let from = from.filter(|_| transport == Transport::Udp).map(SocketAddr::try_from).transpose()?;
        Ok(Outcome::Heard {
            question: u64::from_be_bytes(question),
            server: Server::of_code(answer[QUESTION]),
            from,
        })
    }
}

fn socket(transport: Transport, wire: Wire, sharing: Sharing, patience: Duration) -> Result<Socket> {
    let domain = if wire == Wire::V4 { Domain::IPV4 } else { Domain::IPV6 };
    let kind = if transport == Transport::Tcp { Type::STREAM } else { Type::DGRAM };
    let socket = Socket::new(domain, kind, None)?;
    if domain == Domain::IPV6 {
        socket.set_only_v6(false)?;
    }
    match sharing {
        Sharing::ReusePort => socket.set_reuse_port(true)?,
        Sharing::ReuseAddress => socket.set_reuse_address(true)?,
    }
    if transport == Transport::Tcp {
        // Without this an ICMP error that comes before connect() has returned is lost.
        setsockopt(&socket, Ipv4RecvErr, &true)?;
        if domain == Domain::IPV6 {
            setsockopt(&socket, Ipv6RecvErr, &true)?;
        }
        // A connection ends with a reset, so that its port is free at once.
        socket.set_linger(Some(Duration::ZERO))?;
        socket.set_write_timeout(Some(patience))?;
    }
    Ok(socket)
}

/// Waits until a socket is ready, or has an error, or it took too long.
fn ready(socket: &Socket, what: PollFlags, patience: Duration) -> Result<()> {
    let mut sockets = [PollFd::new(socket.as_fd(), what)];
    poll(&mut sockets, PollTimeout::try_from(patience)?)?;
    Ok(())
}

fn done(result: io::Result<()>) -> Outcome {
    match result {
        Ok(()) => Outcome::Done,
        Err(error) => Outcome::Failed(Errno::from_raw(error.raw_os_error().unwrap_or_default())),
    }
}

fn named(result: io::Result<SockAddr>) -> Result<Outcome> {
    match result {
        Ok(name) => Ok(Outcome::Named(name.as_socket().context("a name without an address")?)),
        Err(error) => Ok(done(Err(error))),
    }
}
