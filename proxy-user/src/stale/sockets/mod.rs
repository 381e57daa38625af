//! Closes or moves sockets of backends that no longer serve, if a kernel program connected the sockets to them.
//!
//! In: [`Suspects`] of deltas that are in force. Out: datagrams of UDP sockets that are connected to such a backend
//! go through their Service again at once. TCP sockets are closed as their Service's annotation says
//! ([`Removal`](crate::plan::Removal)), and a process that waits in one gets ECONNABORTED. UDP sockets are closed if
//! source ranges now exclude their client, or if they use a NodePort at a loopback address, where packets cannot be
//! translated. weir never closes a socket that no program translated.
//!
//! ```text
//! Suspects ──▶ ClosePolicy: which backends serve, and since when others do not
//!                │ due
//!                ▼
//! seats, origins ──▶ sweep: select sockets ──▶ if any: find them in each network namespace ──▶ destroy them
//!                                                                                          └─▶ moved: translate them
//! ```
//!
//! This room also finds pods that listen on a Service's address themselves (`local_listeners`), because it goes
//! through all network namespaces. It does so when `Suspects` report new frontends.
//!
//! After a restart the first, complete delta makes the sweep check every socket, so no socket is missed. Only the
//! time of `reset-after` starts again, and TCP connections through a Service that was deleted meanwhile stay.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{Ipv4Addr, TcpListener, UdpSocket},
    path::{Path, PathBuf},
    sync::mpsc::{Receiver, RecvTimeoutError},
    time::{Duration, Instant},
};

use aya::maps::MapData;
use nix::time::{ClockId, clock_gettime};
use rustc_hash::FxHashMap;
use socket2::Socket;

use self::{
    close_policy::{AllowedClients, ClosePolicy, ConnectedSocket},
    local_listeners::LocalListeners,
    moved::{MOST_OF_ONE, MovedSockets},
    namespaces::{Failures, Namespaces},
    origins::Origins,
    sockdiag::{DiagSocket, Name, SockDiag, States},
};
use crate::dataplane::{Error, nftables::Moved};
use crate::model::{Family, Protocol};

mod close_policy;
mod local_listeners;
mod moved;
mod namespaces;
mod origins;
mod sockdiag;
mod start;
mod suspect;
#[cfg(test)]
mod tests;

pub(crate) use start::start;
pub use suspect::Suspects;

/// After a sweep the thread sleeps this many times the sweep's duration, so it never takes more than a quarter of a
/// CPU.
const REST: u32 = 3;

/// The time between two checks of moved sockets, in nanoseconds. A check drops closed sockets, and restores tables that
/// another program removed.
const LOOK_AT_MOVED: u64 = 5_000_000_000;

/// How many sockets a sweep closed or moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Closed TCP sockets.
    pub tcp: u64,
    /// Closed UDP sockets.
    pub udp: u64,
    /// UDP sockets whose datagrams go through their Service now.
    pub moved: u64,
}

/// Closes and moves sockets. Calls block.
pub struct Sockets {
    origins: Origins,
    namespaces: Namespaces,
    policy: ClosePolicy,
    moved: MovedSockets,
    /// The time of the next check of moved sockets.
    look_at_moved: u64,
    /// `None` in tests without pinned maps.
    listeners: Option<LocalListeners>,
    last_warning: Option<String>,
    listeners_warning: Option<String>,
}

impl Sockets {
    /// Opens the socket maps that are pinned in `maps`. The maps in `services` are opened when they are needed.
    /// `names` are directories with named network namespaces; weir finds those of visible processes in /proc.
    ///
    /// # Errors
    ///
    /// When a map is missing, or when this kernel or weir's privileges do not allow to close sockets (see
    /// [`supported`]).
    pub fn open(maps: &Path, services: &Path, names: &[&Path]) -> Result<Self, Error> {
        let open = |name: &str| {
            let path = maps.join(name);
            MapData::from_pin(&path)
                .map_err(|error| Error::Kernel(format!("opening the map {}: {error}", path.display())))
        };
        let sockets = Self::new(open("origins")?, open("seats")?, names)?;
        Ok(Self { listeners: Some(LocalListeners::new(maps, services)), ..sockets })
    }

    /// Like [`Sockets::open`] with open maps, and without the search for local listeners.
    ///
    /// # Errors
    ///
    /// As [`Sockets::open`].
    pub fn new(origins: MapData, seats: MapData, names: &[&Path]) -> Result<Self, Error> {
        supported()?;
        let namespaces =
            Namespaces { names: names.iter().map(PathBuf::from).collect(), processes: "/proc".into() };
        let (origins, policy, moved) =
            (Origins { origins, seats }, ClosePolicy::default(), MovedSockets::open()?);
        Ok(Self {
            origins,
            namespaces,
            policy,
            moved,
            look_at_moved: 0,
            listeners: None,
            last_warning: None,
            listeners_warning: None,
        })
    }

    /// Sweeps when `suspects` arrive and when sockets are due, until the sender is dropped. `report` gets the result
    /// of each sweep that changed anything. Needs a thread of its own, because it enters other network namespaces.
    pub fn run(mut self, suspects: &Receiver<Suspects>, mut report: impl FnMut(Swept)) {
        loop {
            match suspects.recv_timeout(self.wait().unwrap_or(Duration::MAX)) {
                Ok(first) => {
                    self.take_in(first);
                    suspects.try_iter().for_each(|later| self.take_in(later));
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            let started = Instant::now();
            let swept = self.sweep();
            if swept != Swept::default() {
                let Swept { tcp, udp, moved } = swept;
                tracing::info!(tcp, udp, moved, "closed or moved sockets of removed backends");
                report(swept);
            }
            std::thread::sleep(started.elapsed() * REST);
        }
    }

    /// Takes in suspects, in the order in which their deltas came into force.
    pub fn take_in(&mut self, suspects: Suspects) {
        if suspects.complete {
            self.moved.begin_anew();
        }
        if let Some(listeners) = &mut self.listeners {
            listeners.take_in(suspects.came);
        }
        self.policy.take_in(suspects);
    }

    /// The time until [`Sockets::sweep`] has work; `None` if no socket is due later.
    #[must_use]
    pub fn wait(&self) -> Option<Duration> {
        let look = if self.policy.came_back { 0 } else { self.look_at_moved };
        let moved = self.moved.is_any().then_some(look);
        let listeners = self.listeners.as_ref().and_then(LocalListeners::next);
        let next = self.policy.next().into_iter().chain(moved).chain(listeners).min();
        next.map(|at| Duration::from_nanos(at.saturating_sub(clock())))
    }

    /// Closes or moves the sockets that are due. Logs failures, each only once in a row.
    pub fn sweep(&mut self) -> Swept {
        let now = clock();
        self.look_for_listeners(now);
        let mut due = self.policy.take_due(now);
        let came_back = std::mem::take(&mut self.policy.came_back);
        if self.moved.is_any() && (came_back || self.look_at_moved <= now) {
            due.insert(Protocol::Udp);
        }
        let mut swept = Swept::default();
        if due.is_empty() {
            return swept;
        }
        let mut result = self.close_or_move(&due, now, &mut swept);
        if result.is_err() && !self.moved.has_room(0) {
            // The kernel refused to move the sockets, so they are closed.
            result = self.close_or_move(&due, now, &mut swept);
        }
        let meaning =
            "cannot close or move all sockets of removed backends; this needs the capability SYS_ADMIN";
        warn_once(&mut self.last_warning, result, meaning);
        self.policy.tidy(now);
        swept
    }

    fn close_or_move(
        &mut self,
        due: &BTreeSet<Protocol>,
        now: u64,
        swept: &mut Swept,
    ) -> Result<Failures, Error> {
        let (mut selected, mut moved) = (ToClose::default(), FxHashMap::default());
        self.origins.read(|cookie, socket| {
            if !due.contains(&socket.protocol) {
                return;
            }
            let Some(action) = self.action(&socket, now) else { return };
            match self.moved.of(cookie).and_then(|known| action.of_moved(&socket, known)) {
                Some(known) => drop(moved.insert(cookie, known)),
                None => drop(
                    selected.entry(socket.protocol).or_default().insert(cookie, Selected { socket, action }),
                ),
            }
        })?;
        let before = moved.len();
        let failures = if selected.is_empty() {
            Failures::default()
        } else {
            self.find_and_close(&selected, &mut moved, swept)?
        };
        if due.contains(&Protocol::Udp) {
            self.look_at_moved = now.saturating_add(LOOK_AT_MOVED);
            let new = moved.len() - before;
            let policy = &self.policy;
            self.moved.translate(moved, |moved, answers| policy.serves(moved.service, answers))?;
            swept.moved += new as u64;
        }
        Ok(failures)
    }

    /// The action for a socket; `None` if it may stay.
    fn action(&self, socket: &ConnectedSocket, now: u64) -> Option<Action> {
        if !self.policy.must_close(socket, now) {
            return self
                .policy
                .allowed_clients_of(socket, now)
                .map(|allowed| Action::Close { unless: Some(allowed) });
        }
        // Packets to a loopback address cannot be translated, so such a socket cannot be moved.
        let moves =
            socket.protocol == Protocol::Udp && !socket.service.ip().is_loopback() && self.moved.has_room(0);
        if !moves {
            return Some(Action::Close { unless: None });
        }
        let (only, exists) =
            (self.policy.allowed_clients(socket.service), self.policy.is_service(socket.service));
        Some(Action::Move { only, exists })
    }

    /// Finds the selected sockets in all network namespaces. Closes them, or adds them to `moved`.
    fn find_and_close(
        &self,
        selected: &ToClose,
        moved: &mut FxHashMap<u64, Moved>,
        swept: &mut Swept,
    ) -> Result<Failures, Error> {
        let visited = self.namespaces.each(|| {
            let mut channel = SockDiag::open()?;
            let mut room = MOST_OF_ONE;
            for (protocol, sockets) in selected {
                let mut closed = Vec::new();
                // A socket of the IPv6 family may have IPv4 addresses.
                for family in Family::ALL {
                    channel.walk(*protocol, family, States::Connected, |found| {
                        let Some(selected) = sockets.get(&found.cookie) else { return };
                        match selected.decide(&found, room > 0 && self.moved.has_room(moved.len())) {
                            Some(Decision::Move(to)) => {
                                room -= 1;
                                moved.insert(found.cookie, to);
                            }
                            Some(Decision::Close) => closed.push(found.name),
                            None => {}
                        }
                    })?;
                }
                let count = channel.destroy(&closed)?;
                match protocol {
                    Protocol::Tcp => swept.tcp += count,
                    Protocol::Udp | Protocol::Sctp => swept.udp += count,
                }
            }
            Ok(())
        });
        visited.map_err(failed("going through the network namespaces"))
    }

    fn look_for_listeners(&mut self, now: u64) {
        let Some(listeners) =
            self.listeners.as_mut().filter(|listeners| listeners.next().is_some_and(|next| next <= now))
        else {
            return;
        };
        let meaning = "cannot find all pods that listen on a Service's address themselves; their connections to it go to the Service";
        warn_once(&mut self.listeners_warning, listeners.look(&self.namespaces, now), meaning);
    }
}

/// Logs a warning, unless the last one had the same text.
fn warn_once(last: &mut Option<String>, result: Result<Failures, Error>, meaning: &str) {
    let problem = match result {
        Ok(Failures { first: None, .. }) => None,
        Ok(Failures { count, first: Some(error) }) => Some(format!("in {count} network namespaces: {error}")),
        Err(Error::Io { context, source }) => Some(format!("{context}: {source}")),
        Err(error) => Some(error.to_string()),
    };
    if let Some(problem) = problem.as_deref().filter(|_| problem != *last) {
        tracing::warn!(problem, "{meaning}");
    }
    *last = problem;
}

/// Sockets to close or move, by cookie.
type ToClose = BTreeMap<Protocol, FxHashMap<u64, Selected>>;

enum Action {
    /// Close it, unless its client is allowed.
    Close { unless: Option<AllowedClients> },
    /// Send its datagrams through its Service, which need not exist, if its client is allowed. Close it otherwise.
    Move { only: Option<AllowedClients>, exists: bool },
}

impl Action {
    /// The new state of a socket that was moved before; `None` if it may not stay moved.
    fn of_moved(&self, socket: &ConnectedSocket, moved: &Moved) -> Option<Moved> {
        let Self::Move { only, exists } = self else { return None };
        let goes_on = (moved.backend, moved.service) == (socket.backend, socket.service)
            && only.as_ref().is_none_or(|allowed| allowed.lets_in(moved.client.ip()));
        goes_on.then_some(Moved { exists: *exists, ..*moved })
    }
}

/// A socket to close or move.
struct Selected {
    /// As the maps have it. The process may have connected the socket elsewhere since.
    socket: ConnectedSocket,
    action: Action,
}

/// The action for a socket that the kernel still has.
enum Decision {
    Close,
    Move(Moved),
}

impl Selected {
    /// The action for the socket if it is still connected to the backend.
    fn decide(&self, found: &DiagSocket, has_room: bool) -> Option<Decision> {
        let ConnectedSocket { backend, service, .. } = self.socket;
        if found.peer != backend {
            return None;
        }
        match &self.action {
            Action::Close { unless } => {
                let stays = unless.as_ref().is_some_and(|allowed| allowed.lets_in(found.own.ip()));
                (!stays).then_some(Decision::Close)
            }
            Action::Move { only, exists } => {
                let moves = has_room && only.as_ref().is_none_or(|allowed| allowed.lets_in(found.own.ip()));
                let to = Moved { client: found.own, backend, service, exists: *exists };
                Some(if moves { Decision::Move(to) } else { Decision::Close })
            }
        }
    }
}

/// Checks that weir can close sockets, by closing two of its own.
///
/// # Errors
///
/// [`Error::Kernel`] names the missing kernel option or capability.
pub fn supported() -> Result<(), Error> {
    const ANYWHERE: (Ipv4Addr, u16) = (Ipv4Addr::UNSPECIFIED, 0);
    let probing = || failed("finding out whether sockets can be closed");
    let mut channel = SockDiag::open().map_err(probing())?;
    let listener = Socket::from(TcpListener::bind(ANYWHERE).map_err(probing())?);
    let datagrams = Socket::from(UdpSocket::bind(ANYWHERE).map_err(probing())?);
    for (protocol, socket) in [(Protocol::Tcp, listener), (Protocol::Udp, datagrams)] {
        let name = Name::of(protocol, &socket).map_err(probing())?;
        match channel.destroy(&[name]) {
            Ok(1) => {}
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                return Err(Error::Kernel("closing sockets needs the capability NET_ADMIN".to_owned()));
            }
            Err(error) if error.raw_os_error() != Some(libc::EOPNOTSUPP) => return Err(probing()(error)),
            Ok(_) | Err(_) => {
                let missing = "this kernel cannot close sockets (CONFIG_INET_DIAG_DESTROY)";
                return Err(Error::Kernel(missing.to_owned()));
            }
        }
    }
    Ok(())
}

/// CLOCK_MONOTONIC in nanoseconds, as the kernel programs read it.
fn clock() -> u64 {
    // Fails only for unknown clocks. 0 means that the policy has no state yet.
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map_or(0, |time| u64::try_from(Duration::from(time).as_nanos()).unwrap_or(u64::MAX))
}

fn failed(doing: &str) -> impl Fn(io::Error) -> Error {
    move |source| Error::Io { context: doing.to_owned(), source }
}
