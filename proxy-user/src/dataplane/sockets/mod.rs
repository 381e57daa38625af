//! Closes sockets that the kernel programs led to a backend which does not serve any more, through sock_diag.
//!
//! In: [`Suspects`] of deltas that are in force. Out: UDP sockets of such backends are closed at once, TCP sockets as
//! their Service's annotation says ([`Removal`](crate::plan::Removal)); a process waiting in one is woken with
//! ECONNABORTED. Sockets that no program led anywhere are never touched.
//!
//! ```text
//! Suspects ──▶ Judge: what serves, what was lost when
//!                │ due
//!                ▼
//! seats, origins ──▶ sweep: which sockets have to go ──▶ if any: in each network namespace find and destroy them
//! ```
//!
//! After a restart the first, complete delta has every socket looked at, so nothing is forgotten, except that the time of
//! `reset-after` starts anew, and TCP connections through a Service that was deleted meanwhile stay.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket},
    path::{Path, PathBuf},
    sync::mpsc::{Receiver, RecvTimeoutError},
    time::{Duration, Instant},
};

use aya::maps::MapData;
use nix::time::{ClockId, clock_gettime};
use rustc_hash::FxHashMap;
use socket2::Socket;

use self::{
    judge::{Guard, Judge},
    namespaces::{Failures, Namespaces},
    sockdiag::{Found, Name, SockDiag},
    told::Origins,
};
use super::Error;
use crate::model::{Family, Protocol};

mod judge;
mod namespaces;
mod sockdiag;
mod suspect;
#[cfg(test)]
mod tests;
mod told;

pub use suspect::Suspects;

/// After a sweep the room rests this many times as long as it took, so that it never takes more than a quarter of a CPU.
const REST: u32 = 3;

/// How many sockets were closed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Closed {
    /// Over TCP.
    pub tcp: u64,
    /// Over UDP.
    pub udp: u64,
}

/// Closes sockets. Calls block.
pub struct Sockets {
    origins: Origins,
    namespaces: Namespaces,
    judge: Judge,
    complaint: Option<String>,
}

impl Sockets {
    /// Opens the maps `origins` and `seats`, pinned in a directory. `names` is where network namespaces have names, usually
    /// `/run/netns`; those of visible processes are found by themselves.
    ///
    /// # Errors
    ///
    /// When a map is not there, or this kernel or our privileges do not allow closing sockets, as [`supported`] tells.
    pub fn open(maps: &Path, names: impl Into<PathBuf>) -> Result<Self, Error> {
        let open = |name: &str| {
            let path = maps.join(name);
            MapData::from_pin(&path)
                .map_err(|error| Error::Kernel(format!("opening the map {}: {error}", path.display())))
        };
        Self::new(open("origins")?, open("seats")?, names)
    }

    /// The same with the maps themselves.
    ///
    /// # Errors
    ///
    /// As [`Sockets::open`].
    pub fn new(origins: MapData, seats: MapData, names: impl Into<PathBuf>) -> Result<Self, Error> {
        supported()?;
        let namespaces = Namespaces { names: names.into(), processes: "/proc".into() };
        Ok(Self { origins: Origins { origins, seats }, namespaces, judge: Judge::default(), complaint: None })
    }

    /// Closes sockets as `suspects` arrive and their times come, until nobody can send any more. `report` is told what
    /// was closed. To be run on a thread of its own, because the thread enters other network namespaces.
    pub fn run(mut self, suspects: &Receiver<Suspects>, mut report: impl FnMut(Closed)) {
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
            let closed = self.sweep();
            if closed != Closed::default() {
                tracing::info!(tcp = closed.tcp, udp = closed.udp, "closed sockets whose backend is gone");
                report(closed);
            }
            std::thread::sleep(started.elapsed() * REST);
        }
    }

    /// Takes in what came into force, in this order.
    pub fn take_in(&mut self, suspects: Suspects) {
        self.judge.take_in(suspects);
    }

    /// How long until [`Sockets::sweep`] has something to do; `None` when nothing is to come.
    #[must_use]
    pub fn wait(&self) -> Option<Duration> {
        self.judge.next().map(|at| Duration::from_nanos(at.saturating_sub(clock())))
    }

    /// Closes the sockets whose time has come. What cannot be done is logged, once until something else fails.
    pub fn sweep(&mut self) -> Closed {
        let now = clock();
        let due = self.judge.take_due(now);
        let mut closed = Closed::default();
        if due.is_empty() {
            return closed;
        }
        match self.close(&due, now, &mut closed) {
            Ok(Failures { first: None, .. }) => self.complaint = None,
            Ok(Failures { count, first: Some(error) }) => {
                self.complain(&format!("in {count} network namespaces: {error}"));
            }
            Err(Error::Io { context, source }) => self.complain(&format!("{context}: {source}")),
            Err(error) => self.complain(&error.to_string()),
        }
        self.judge.tidy(now);
        closed
    }

    fn close(&self, due: &BTreeSet<Protocol>, now: u64, closed: &mut Closed) -> Result<Failures, Error> {
        let mut condemned = Condemned::default();
        self.origins.read(|cookie, led| {
            if !due.contains(&led.protocol) {
                return;
            }
            let spared = self.judge.guard_of(&led, now);
            if spared.is_some() || self.judge.condemns(&led, now) {
                let led_to = led.backend;
                condemned.entry(led.protocol).or_default().insert(cookie, Verdict { led_to, spared });
            }
        })?;
        if condemned.is_empty() {
            return Ok(Failures::default());
        }
        let visited = self.namespaces.each(|| {
            let mut channel = SockDiag::open()?;
            for (protocol, sockets) in &condemned {
                let count = destroy(&mut channel, *protocol, sockets)?;
                match protocol {
                    Protocol::Tcp => closed.tcp += count,
                    Protocol::Udp | Protocol::Sctp => closed.udp += count,
                }
            }
            Ok(())
        });
        visited.map_err(failed("going through the network namespaces"))
    }

    fn complain(&mut self, problem: &str) {
        if self.complaint.as_deref() != Some(problem) {
            tracing::warn!(
                problem,
                "sockets of backends that are gone could not all be closed; this needs SYS_ADMIN"
            );
            self.complaint = Some(problem.to_owned());
        }
    }
}

/// Sockets that have to go, by their cookies.
type Condemned = BTreeMap<Protocol, FxHashMap<u64, Verdict>>;

/// That a socket has to go.
struct Verdict {
    /// If it still leads here.
    led_to: SocketAddr,
    /// Unless this lets its client in.
    spared: Option<Guard>,
}

impl Verdict {
    fn holds_for(&self, found: &Found) -> bool {
        found.peer == self.led_to && !self.spared.as_ref().is_some_and(|guard| guard.lets_in(found.own))
    }
}

/// Destroys those of these sockets that are in the channel's namespace and still lead where they were led.
fn destroy(
    channel: &mut SockDiag,
    protocol: Protocol,
    condemned: &FxHashMap<u64, Verdict>,
) -> io::Result<u64> {
    let mut names = Vec::new();
    // A socket of the IPv6 family may speak IPv4.
    for family in Family::ALL {
        channel.walk(protocol, family, |found| {
            if condemned.get(&found.cookie).is_some_and(|verdict| verdict.holds_for(&found)) {
                names.push(found.name);
            }
        })?;
    }
    channel.destroy(&names)
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
