//! Takes sockets away from backends that do not serve any more, if the kernel programs led them there.
//!
//! In: [`Suspects`] of deltas that are in force. Out: datagrams of UDP sockets that are connected to such a backend go to their Service
//! again at once; TCP sockets are closed as their Service's annotation says ([`Removal`](crate::plan::Removal)), and a process waiting
//! in one is woken with ECONNABORTED. So are UDP sockets whose clients a Service does not let in any more, and those that asked for
//! a NodePort at a loopback address, where no packet can be led. Sockets that no program led anywhere are never touched.
//!
//! ```text
//! Suspects ──▶ Judge: what serves, what was lost when
//!                │ due
//!                ▼
//! seats, origins ──▶ sweep: which sockets have to go ──▶ if any: in each network namespace find them ──▶ destroy them
//!                                                                                                    └─▶ moved: lead them
//! ```
//!
//! The same room finds pods that had bound a Service's address before (`homes`), because it goes through all network
//! namespaces: `Suspects` say that addresses came.
//!
//! After a restart the first, complete delta has every socket looked at, so nothing is forgotten, except that the time of
//! `reset-after` starts anew, and TCP connections through a Service that was deleted meanwhile stay.

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
    homes::Homes,
    judge::{Guard, Judge, Led},
    moved::{MOST_OF_ONE, MovedSockets},
    namespaces::{Failures, Namespaces},
    sockdiag::{Found, Name, SockDiag, States},
    told::Origins,
};
use crate::dataplane::{Error, nftables::Moved};
use crate::model::{Family, Protocol};

mod homes;
mod judge;
mod moved;
mod namespaces;
mod sockdiag;
mod start;
mod suspect;
#[cfg(test)]
mod tests;
mod told;

pub(crate) use start::start;
pub use suspect::Suspects;

/// After a sweep the room rests this many times as long as it took, so that it never takes more than a quarter of a CPU.
const REST: u32 = 3;

/// How often moved sockets are looked at, for those that are closed meanwhile, and for tables that another program removed.
const LOOK_AT_MOVED: u64 = 5_000_000_000;

/// How many sockets were taken away from their backends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// Closed, over TCP.
    pub tcp: u64,
    /// Closed, over UDP.
    pub udp: u64,
    /// Over UDP, whose datagrams go to their Service now.
    pub moved: u64,
}

/// Takes sockets away from their backends. Calls block.
pub struct Sockets {
    origins: Origins,
    namespaces: Namespaces,
    judge: Judge,
    moved: MovedSockets,
    /// When moved sockets are to be looked at.
    look_at_moved: u64,
    /// Pods that had bound a Service's address before; only where the maps have names.
    homes: Option<Homes>,
    complaint: Option<String>,
    homes_complaint: Option<String>,
}

impl Sockets {
    /// Opens the maps of sockets, pinned in a directory; those of `services` are opened when they are needed. `names` are directories in which network namespaces have names;
    /// those of visible processes are found by themselves.
    ///
    /// # Errors
    ///
    /// When a map is not there, or this kernel or our privileges do not allow closing sockets, as [`supported`] tells.
    pub fn open(maps: &Path, services: &Path, names: &[&Path]) -> Result<Self, Error> {
        let open = |name: &str| {
            let path = maps.join(name);
            MapData::from_pin(&path)
                .map_err(|error| Error::Kernel(format!("opening the map {}: {error}", path.display())))
        };
        let sockets = Self::new(open("origins")?, open("seats")?, names)?;
        Ok(Self { homes: Some(Homes::new(maps, services)), ..sockets })
    }

    /// The same with the maps `origins` and `seats` themselves, and without a look for pods that are bound to Services' addresses.
    ///
    /// # Errors
    ///
    /// As [`Sockets::open`].
    pub fn new(origins: MapData, seats: MapData, names: &[&Path]) -> Result<Self, Error> {
        supported()?;
        let namespaces =
            Namespaces { names: names.iter().map(PathBuf::from).collect(), processes: "/proc".into() };
        let (origins, judge, moved) = (Origins { origins, seats }, Judge::default(), MovedSockets::open()?);
        Ok(Self {
            origins,
            namespaces,
            judge,
            moved,
            look_at_moved: 0,
            homes: None,
            complaint: None,
            homes_complaint: None,
        })
    }

    /// Takes sockets away as `suspects` arrive and their times come, until nothing can send any more. `report` is told what
    /// was done. To be run on a thread of its own, because the thread enters other network namespaces.
    pub fn run(mut self, suspects: &Receiver<Suspects>, mut report: impl FnMut(Taken)) {
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
            let taken = self.sweep();
            if taken != Taken::default() {
                let Taken { tcp, udp, moved } = taken;
                tracing::info!(tcp, udp, moved, "closed or moved sockets of removed backends");
                report(taken);
            }
            std::thread::sleep(started.elapsed() * REST);
        }
    }

    /// Takes in what came into force, in this order.
    pub fn take_in(&mut self, suspects: Suspects) {
        if suspects.complete {
            self.moved.begin_anew();
        }
        if let Some(homes) = &mut self.homes {
            homes.take_in(suspects.came);
        }
        self.judge.take_in(suspects);
    }

    /// How long until [`Sockets::sweep`] has something to do; `None` when nothing is to come.
    #[must_use]
    pub fn wait(&self) -> Option<Duration> {
        let look = if self.judge.came_back { 0 } else { self.look_at_moved };
        let moved = self.moved.is_any().then_some(look);
        let homes = self.homes.as_ref().and_then(Homes::next);
        let next = self.judge.next().into_iter().chain(moved).chain(homes).min();
        next.map(|at| Duration::from_nanos(at.saturating_sub(clock())))
    }

    /// Takes away the sockets whose time has come. What cannot be done is logged, once until something else fails.
    pub fn sweep(&mut self) -> Taken {
        let now = clock();
        self.look_for_homes(now);
        let mut due = self.judge.take_due(now);
        let came_back = std::mem::take(&mut self.judge.came_back);
        if self.moved.is_any() && (came_back || self.look_at_moved <= now) {
            due.insert(Protocol::Udp);
        }
        let mut taken = Taken::default();
        if due.is_empty() {
            return taken;
        }
        let mut result = self.take_away(&due, now, &mut taken);
        if result.is_err() && !self.moved.has_room(0) {
            // What cannot be moved is closed.
            result = self.take_away(&due, now, &mut taken);
        }
        let meaning =
            "cannot close or move all sockets of removed backends; this needs the capability SYS_ADMIN";
        complain(&mut self.complaint, result, meaning);
        self.judge.tidy(now);
        taken
    }

    fn take_away(
        &mut self,
        due: &BTreeSet<Protocol>,
        now: u64,
        taken: &mut Taken,
    ) -> Result<Failures, Error> {
        let (mut condemned, mut moved) = (Condemned::default(), FxHashMap::default());
        self.origins.read(|cookie, led| {
            if !due.contains(&led.protocol) {
                return;
            }
            let Some(fate) = self.fate(&led, now) else { return };
            match self.moved.of(cookie).and_then(|known| fate.of_moved(&led, known)) {
                Some(known) => drop(moved.insert(cookie, known)),
                None => {
                    drop(condemned.entry(led.protocol).or_default().insert(cookie, Verdict { led, fate }))
                }
            }
        })?;
        let before = moved.len();
        let failures = if condemned.is_empty() {
            Failures::default()
        } else {
            self.find_and_take(&condemned, &mut moved, taken)?
        };
        if due.contains(&Protocol::Udp) {
            self.look_at_moved = now.saturating_add(LOOK_AT_MOVED);
            let new = moved.len() - before;
            let judge = &self.judge;
            self.moved.lead(moved, |moved, answers| judge.leads(moved.service, answers))?;
            taken.moved += new as u64;
        }
        Ok(failures)
    }

    /// What becomes of a socket; nothing if it may stay.
    fn fate(&self, led: &Led, now: u64) -> Option<Fate> {
        if !self.judge.condemns(led, now) {
            return self.judge.guard_of(led, now).map(|guard| Fate::Closed { unless: Some(guard) });
        }
        // What a Service at a loopback address leads to, sockets alone know.
        let moves =
            led.protocol == Protocol::Udp && !led.service.ip().is_loopback() && self.moved.has_room(0);
        if !moves {
            return Some(Fate::Closed { unless: None });
        }
        let (only, exists) = (self.judge.guard_at(led.service), self.judge.is_service(led.service));
        Some(Fate::Moved { only, exists })
    }

    /// Goes through all network namespaces for these sockets. Those to move are added to `moved`, the others are closed.
    fn find_and_take(
        &self,
        condemned: &Condemned,
        moved: &mut FxHashMap<u64, Moved>,
        taken: &mut Taken,
    ) -> Result<Failures, Error> {
        let visited = self.namespaces.each(|| {
            let mut channel = SockDiag::open()?;
            let mut room = MOST_OF_ONE;
            for (protocol, sockets) in condemned {
                let mut closed = Vec::new();
                // A socket of the IPv6 family may speak IPv4.
                for family in Family::ALL {
                    channel.walk(*protocol, family, States::Connected, |found| {
                        let Some(verdict) = sockets.get(&found.cookie) else { return };
                        match verdict.over(&found, room > 0 && self.moved.has_room(moved.len())) {
                            Some(Sentence::Move(to)) => {
                                room -= 1;
                                moved.insert(found.cookie, to);
                            }
                            Some(Sentence::Close) => closed.push(found.name),
                            None => {}
                        }
                    })?;
                }
                let count = channel.destroy(&closed)?;
                match protocol {
                    Protocol::Tcp => taken.tcp += count,
                    Protocol::Udp | Protocol::Sctp => taken.udp += count,
                }
            }
            Ok(())
        });
        visited.map_err(failed("going through the network namespaces"))
    }

    fn look_for_homes(&mut self, now: u64) {
        let Some(homes) = self.homes.as_mut().filter(|homes| homes.next().is_some_and(|next| next <= now))
        else {
            return;
        };
        let meaning = "cannot find all pods that listen on a Service's address themselves; their connections to it go to the Service";
        complain(&mut self.homes_complaint, homes.look(&self.namespaces, now), meaning);
    }
}

/// Warns of what went wrong, once until it goes well or something else fails.
fn complain(last: &mut Option<String>, result: Result<Failures, Error>, meaning: &str) {
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

/// Sockets that have to go, by their cookies.
type Condemned = BTreeMap<Protocol, FxHashMap<u64, Verdict>>;

/// What becomes of a socket.
enum Fate {
    /// It is closed, unless this lets its client in.
    Closed { unless: Option<Guard> },
    /// Its datagrams go to its Service, which may exist or not, if this lets its client in. Otherwise it is closed.
    Moved { only: Option<Guard>, exists: bool },
}

impl Fate {
    /// How a socket that was moved before goes on, if it may.
    fn of_moved(&self, led: &Led, moved: &Moved) -> Option<Moved> {
        let Self::Moved { only, exists } = self else { return None };
        let goes_on = (moved.backend, moved.service) == (led.backend, led.service)
            && only.as_ref().is_none_or(|guard| guard.lets_in(moved.client.ip()));
        goes_on.then_some(Moved { exists: *exists, ..*moved })
    }
}

/// That a socket has to go.
struct Verdict {
    /// Where it was led. It may be elsewhere now.
    led: Led,
    fate: Fate,
}

/// What is done to a socket that was found.
enum Sentence {
    Close,
    Move(Moved),
}

impl Verdict {
    /// What is done to the socket, if it is still where it was led.
    fn over(&self, found: &Found, has_room: bool) -> Option<Sentence> {
        let Led { backend, service, .. } = self.led;
        if found.peer != backend {
            return None;
        }
        match &self.fate {
            Fate::Closed { unless } => {
                let stays = unless.as_ref().is_some_and(|guard| guard.lets_in(found.own.ip()));
                (!stays).then_some(Sentence::Close)
            }
            Fate::Moved { only, exists } => {
                let moves = has_room && only.as_ref().is_none_or(|guard| guard.lets_in(found.own.ip()));
                let to = Moved { client: found.own, backend, service, exists: *exists };
                Some(if moves { Sentence::Move(to) } else { Sentence::Close })
            }
        }
    }
}

/// Whether sockets can be closed here: closes two of its own.
///
/// # Errors
///
/// [`Error::Kernel`] says which option of the kernel or which capability is missing.
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
    // Fails only for clocks the kernel does not have; 0 means that nothing is known yet.
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map_or(0, |time| u64::try_from(Duration::from(time).as_nanos()).unwrap_or(u64::MAX))
}

fn failed(doing: &str) -> impl Fn(io::Error) -> Error {
    move |source| Error::Io { context: doing.to_owned(), source }
}
