//! Everything that answers: the backends, a server that is no Service's, and what is met at a Service's address that nothing
//! translates.
//!
//! In: questions, which are numbers. Out: each is answered with the number and the server's [`Server::code`], and is in
//! [`Reached`] from then on. One thread serves all, so that a question which is answered says that all before it are.

use std::{
    collections::HashMap,
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsFd as _,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::poll::{PollFd, PollFlags, poll};
use weir_tests::{
    netns::Namespace,
    traffic::{Transport, bound},
};

/// The length of a question.
pub(super) const QUESTION: usize = size_of::<u64>();
/// The length of an answer.
pub(super) const ANSWER: usize = QUESTION + 1;

/// Most milliseconds that a server which is to end goes on.
const LOOK: u16 = 200;

/// A server that a question may reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Server {
    Backend(u8),
    /// No Service's.
    Elsewhere,
    /// At the address of a Service, which nothing has translated.
    Untranslated,
}

impl Server {
    const fn code(self) -> u8 {
        match self {
            Self::Backend(number) => number,
            Self::Elsewhere => 0xfe,
            Self::Untranslated => 0xff,
        }
    }

    pub(super) const fn of_code(code: u8) -> Self {
        match code {
            0xfe => Self::Elsewhere,
            0xff => Self::Untranslated,
            number => Self::Backend(number),
        }
    }
}

/// The questions that were answered, each by which server.
#[derive(Clone, Debug, Default)]
pub(super) struct Reached(Arc<(Mutex<HashMap<u64, Server>>, Condvar)>);

impl Reached {
    fn all(&self) -> MutexGuard<'_, HashMap<u64, Server>> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, question: u64, server: Server) {
        self.all().insert(question, server);
        self.0.1.notify_all();
    }

    /// The server that answered a question, within `patience`.
    pub(super) fn within(&self, patience: Duration, question: u64) -> Option<Server> {
        let waiting = |all: &mut HashMap<u64, Server>| !all.contains_key(&question);
        let waited = self.0.1.wait_timeout_while(self.all(), patience, waiting);
        waited.unwrap_or_else(PoisonError::into_inner).0.get(&question).copied()
    }

    /// Forgets all.
    pub(super) fn clear(&self) {
        self.all().clear();
    }
}

/// Servers that run until they are dropped.
#[derive(Debug)]
pub(super) struct Servers {
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Servers {
    /// Starts a server over TCP and UDP at each address.
    pub(super) fn start(
        place: &Namespace,
        addresses: &[(Server, SocketAddr)],
        cpu: impl FnOnce() + Send + 'static,
    ) -> Result<(Self, Reached)> {
        let reached = Reached::default();
        let sockets = place.run(|| Sockets::bind(addresses, reached.clone()))?;
        let end = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&end);
        let thread = place.thread(move || {
            cpu();
            sockets.serve(&ended);
        })?;
        Ok((Self { end, thread: Some(thread) }, reached))
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        self.end.store(true, Relaxed);
        let ended = self.thread.take().map_or(Ok(()), JoinHandle::join);
        assert!(ended.is_ok() || std::thread::panicking(), "the servers died");
    }
}

struct Sockets {
    datagrams: Vec<(Server, UdpSocket)>,
    listeners: Vec<(Server, TcpListener)>,
    connections: Vec<(Server, TcpStream)>,
    reached: Reached,
}

impl Sockets {
    fn bind(addresses: &[(Server, SocketAddr)], reached: Reached) -> Result<Self> {
        let mut sockets =
            Self { datagrams: Vec::new(), listeners: Vec::new(), connections: Vec::new(), reached };
        for (server, address) in addresses {
            let at = || format!("binding a server to {address}");
            let datagrams = bound(Transport::Udp, *address).with_context(at)?;
            sockets.datagrams.push((*server, datagrams.into()));
            let listener = bound(Transport::Tcp, *address).with_context(at)?;
            listener.listen(128)?;
            sockets.listeners.push((*server, listener.into()));
        }
        Ok(sockets)
    }

    fn serve(mut self, ended: &AtomicBool) {
        while !ended.load(Relaxed) {
            let mut ready = self.wait().into_iter();
            for (server, socket) in &self.datagrams {
                if ready.next() == Some(true) {
                    self.answer(*server, socket);
                }
            }
            let mut accepted = Vec::new();
            for (server, listener) in &self.listeners {
                if ready.next() == Some(true) {
                    let streams = std::iter::from_fn(|| listener.accept().ok());
                    accepted.extend(streams.map(|(stream, _)| (*server, stream)));
                }
            }
            let reached = &self.reached;
            self.connections.retain_mut(|(server, stream)| {
                ready.next() != Some(true) || converse(reached, *server, stream).is_ok()
            });
            for (server, stream) in accepted {
                if stream.set_nonblocking(true).is_ok() {
                    self.connections.push((server, stream));
                }
            }
        }
    }

    /// Waits for something to do, and says for each socket whether that is the one.
    fn wait(&self) -> Vec<bool> {
        let datagrams = self.datagrams.iter().map(|(_, socket)| socket.as_fd());
        let listeners = self.listeners.iter().map(|(_, listener)| listener.as_fd());
        let connections = self.connections.iter().map(|(_, stream)| stream.as_fd());
        let all = datagrams.chain(listeners).chain(connections);
        let mut all: Vec<PollFd<'_>> = all.map(|socket| PollFd::new(socket, PollFlags::POLLIN)).collect();
        // A failure shows nothing ready, and is tried again.
        let _ = poll(&mut all, LOOK);
        all.iter().map(|socket| socket.any().unwrap_or(false)).collect()
    }

    fn answer(&self, server: Server, socket: &UdpSocket) {
        let mut question = [0; QUESTION];
        while let Ok((QUESTION, from)) = socket.recv_from(&mut question) {
            // A client that is gone hears nothing.
            let _ = socket.send_to(&answer(server, question), from);
            self.reached.note(u64::from_be_bytes(question), server);
        }
    }
}

/// Answers all that has come.
fn converse(reached: &Reached, server: Server, stream: &mut TcpStream) -> io::Result<()> {
    let mut question = [0; QUESTION];
    loop {
        match stream.read_exact(&mut question) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            read => read?,
        }
        stream.write_all(&answer(server, question))?;
        reached.note(u64::from_be_bytes(question), server);
    }
}

fn answer(server: Server, question: [u8; QUESTION]) -> [u8; ANSWER] {
    let mut answer = [server.code(); ANSWER];
    answer[..QUESTION].copy_from_slice(&question);
    answer
}
