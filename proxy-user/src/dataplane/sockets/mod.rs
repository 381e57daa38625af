//! Closes sockets that the kernel programs led to a backend which does not serve any more, through sock_diag.
//!
//! In: [`Suspects`] of deltas that are in force. Out: UDP sockets of such backends are closed at once, TCP sockets as
//! their Service's annotation says ([`Removal`](crate::plan::Removal)); a process waiting in one is woken with
//! ECONNABORTED. Sockets that no program led anywhere are never touched.
//!
//! ```text
//! Suspects ──▶ Judge: what serves, what was lost when ──due──▶ sweep: each network namespace
//!                                                              └ TCP, UDP × IPv4, IPv6: walk with `origins`, destroy
//! ```
//!
//! After a restart the first, complete delta has every socket looked at, so nothing is forgotten, except that the time of
//! `reset-after` starts anew, and TCP connections through a Service that was deleted meanwhile stay.

use std::{
    io,
    net::{TcpListener, UdpSocket},
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::mpsc::{Receiver, RecvTimeoutError},
    time::Duration,
};

use aya::maps::MapData;
use nix::time::{ClockId, clock_gettime};

use self::{
    judge::{Judge, Led},
    namespaces::{Failures, Namespaces},
    sockdiag::{Channel, Found, Name},
};
use super::Error;
use crate::model::{Family, Protocol};

mod judge;
mod namespaces;
mod sockdiag;
mod suspect;
#[cfg(test)]
mod tests;

pub use suspect::Suspects;

/// The pinned map that says what sockets were told.
const ORIGINS: &str = "origins";

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
    origins: OwnedFd,
    namespaces: Namespaces,
    judge: Judge,
    complaint: Option<String>,
}

impl Sockets {
    /// Opens the map pinned as `origins` below `bpf_root`. `names` is where network namespaces have names, usually
    /// `/run/netns`; those of visible processes are found by themselves.
    ///
    /// # Errors
    ///
    /// When the map is not there, or this kernel or our privileges do not allow closing sockets, as [`supported`] tells.
    pub fn open(bpf_root: &Path, names: impl Into<PathBuf>) -> Result<Self, Error> {
        let path = bpf_root.join(ORIGINS);
        let map = MapData::from_pin(&path)
            .map_err(|error| Error::Kernel(format!("opening the map {}: {error}", path.display())))?;
        let map = map.fd().as_fd().try_clone_to_owned();
        Self::new(map.map_err(failed("duplicating a map's descriptor"))?, names)
    }

    /// The same with the map itself.
    ///
    /// # Errors
    ///
    /// As [`Sockets::open`].
    pub fn new(origins: OwnedFd, names: impl Into<PathBuf>) -> Result<Self, Error> {
        supported()?;
        let namespaces = Namespaces { names: names.into(), processes: "/proc".into() };
        Ok(Self { origins, namespaces, judge: Judge::default(), complaint: None })
    }

    /// Closes sockets as `suspects` arrive and their times come, until nobody can send any more. `report` is told what
    /// was closed. To be run on a thread of its own, because the thread enters other network namespaces.
    pub fn run(mut self, suspects: &Receiver<Suspects>, mut report: impl FnMut(Closed)) {
        loop {
            let first = match self.wait() {
                None => suspects.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(wait) => suspects.recv_timeout(wait),
            };
            match first {
                Ok(first) => {
                    self.take_in(first);
                    suspects.try_iter().for_each(|later| self.take_in(later));
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            let started = std::time::Instant::now();
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
        let Self { origins, namespaces, judge, .. } = self;
        let visited = namespaces.each(|| {
            let mut channel = Channel::open()?;
            for protocol in &due {
                let count = close(&mut channel, *protocol, origins, |led| judge.condemns(led, now))?;
                match protocol {
                    Protocol::Tcp => closed.tcp += count,
                    Protocol::Udp | Protocol::Sctp => closed.udp += count,
                }
            }
            Ok(())
        });
        self.complain(visited);
        self.judge.tidy(now);
        closed
    }

    fn complain(&mut self, visited: io::Result<Failures>) {
        let complaint = match visited {
            Ok(Failures { first: None, .. }) => None,
            Ok(Failures { first: Some(error), .. }) | Err(error) => Some(error.to_string()),
        };
        if let Some(error) = complaint.as_ref().filter(|_| complaint != self.complaint) {
            tracing::warn!(%error, "sockets of backends that are gone could not all be closed; this needs SYS_ADMIN");
        }
        self.complaint = complaint;
    }
}

/// Closes the condemned sockets of the channel's namespace.
fn close(
    channel: &mut Channel,
    protocol: Protocol,
    origins: &OwnedFd,
    condemns: impl Fn(&Led) -> bool,
) -> io::Result<u64> {
    let mut condemned = Vec::new();
    // A socket of the IPv6 family may speak IPv4.
    for family in Family::ALL {
        channel.walk(protocol, family, origins.as_fd(), |found| {
            if led(&found).is_some_and(|led| led.protocol == protocol && condemns(&led)) {
                condemned.push(found.name);
            }
        })?;
    }
    channel.destroy(&condemned)
}

fn led(found: &Found) -> Option<Led> {
    let Found { origin, peer, .. } = found;
    Some(Led {
        since: origin.since,
        protocol: Protocol::from_number(u8::try_from(origin.protocol).ok()?)?,
        service: (origin.service.ip(), origin.service.port()).into(),
        backend: (origin.backend.ip(), origin.backend.port()).into(),
        peer: *peer,
    })
}

/// Whether sockets can be closed here: closes two of its own on loopback.
///
/// # Errors
///
/// Says which option of the kernel or which capability is missing.
pub fn supported() -> Result<(), Error> {
    const LOOPBACK: (std::net::Ipv4Addr, u16) = (std::net::Ipv4Addr::LOCALHOST, 0);
    let probing = || failed("finding out whether sockets can be closed");
    let mut channel = Channel::open().map_err(probing())?;
    let listener = TcpListener::bind(LOOPBACK).map_err(probing())?;
    let connected = UdpSocket::bind(LOOPBACK).map_err(probing())?;
    let (tcp, udp) = (listener.local_addr().map_err(probing())?, connected.local_addr().map_err(probing())?);
    connected.connect(udp).map_err(probing())?;
    for name in [Name::between(Protocol::Tcp, tcp, None), Name::between(Protocol::Udp, udp, Some(udp))] {
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
    match channel.knows_storage() {
        Ok(true) => Ok(()),
        Ok(false) => {
            Err(Error::Kernel("this kernel does not tell what sockets were told (Linux 5.6)".to_owned()))
        }
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => Err(Error::Kernel(
            "reading what sockets were told needs the capability BPF or SYS_ADMIN".to_owned(),
        )),
        Err(error) => Err(probing()(error)),
    }
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
