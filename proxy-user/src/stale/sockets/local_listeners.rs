//! Pods that listen on a Service's address since before weir knew the Service, or ran.
//!
//! In: the listening sockets of every network namespace, and the frontends in the kernel. Out: the map `early_homes`,
//! which has an entry for each namespace with such a socket. The kernel programs see every later bind, so one search
//! after new frontends is enough.
//!
//! An entry stays until the next search, even after its sockets are closed. Until then a connect in that namespace
//! costs a search for a listener.

use std::{
    collections::BTreeSet,
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use crate::sys::bpf;
use aya::maps::{Array, HashMap, IterableMap as _, Map, MapData, MapError};
use proxy_ebpf::{FrontendKey, FrontendValue, home_index};
use socket2::{Domain, Socket, Type};

use super::{
    failed,
    namespaces::{Failures, Namespaces},
    sockdiag::{SockDiag, States},
};
use crate::{
    dataplane::Error,
    model::{Family, Protocol},
};

/// The least time between two searches, in nanoseconds, because each search goes through all pods.
const PAUSE: u64 = 10_000_000_000;

/// Searches for such pods.
pub(super) struct LocalListeners {
    /// The directory with `early_homes`.
    sockets: PathBuf,
    /// The directory with `frontends`. weir replaces that map when it grows, so each search opens it.
    services: PathBuf,
    /// Whether there are new frontends since the last search.
    came: bool,
    /// The earliest time of the next search.
    next: u64,
}

impl LocalListeners {
    pub(super) fn new(sockets: &Path, services: &Path) -> Self {
        Self { sockets: sockets.to_owned(), services: services.to_owned(), came: false, next: 0 }
    }

    /// Notes new frontends.
    pub(super) fn take_in(&mut self, came: bool) {
        self.came |= came;
    }

    /// The time of the next search; `None` without new frontends.
    pub(super) fn next(&self) -> Option<u64> {
        self.came.then_some(self.next)
    }

    /// Searches all network namespaces.
    pub(super) fn look(&mut self, namespaces: &Namespaces, now: u64) -> Result<Failures, Error> {
        (self.came, self.next) = (false, now.saturating_add(PAUSE));
        let frontends = Frontends::open(&self.services)?;
        let own = cookie().map_err(failed("asking for the cookie of a network namespace"))?;
        let mut places = BTreeSet::new();
        let visited = namespaces.each(|| {
            let namespace = cookie()?;
            // The programs always translate sockets of the host's own namespace.
            if namespace != own && has_listener(&frontends)? {
                places.insert(home_index(namespace));
            }
            Ok(())
        });
        let failures = visited.map_err(failed("going through the network namespaces"))?;
        self.write(&places)?;
        Ok(failures)
    }

    fn write(&self, places: &BTreeSet<u32>) -> Result<(), Error> {
        let wrong = |error| unusable("early_homes", error);
        let mut map: Array<_, u64> = opened(&self.sockets, "early_homes", Map::Array)?;
        let mut known = BTreeSet::new();
        let read = bpf::read_all(map.map(), |place: u32, there: u64| {
            if there != 0 {
                known.insert(place);
            }
        });
        read.map_err(failed("reading the map early_homes"))?;
        for place in known.symmetric_difference(places) {
            map.set(*place, u64::from(places.contains(place)), 0).map_err(wrong)?;
        }
        Ok(())
    }
}

/// The frontends of all Services, in the kernel.
struct Frontends(HashMap<MapData, FrontendKey, FrontendValue>);

impl Frontends {
    fn open(services: &Path) -> Result<Self, Error> {
        opened(services, "frontends", Map::HashMap).map(Self)
    }

    fn has(&self, protocol: Protocol, at: SocketAddr) -> bool {
        let key = FrontendKey::new(at.ip(), at.port(), protocol.number());
        self.0.get(&key, 0).is_ok_and(|value| value.is_of(&key))
    }
}

/// Whether a socket of the thread's network namespace listens on a Service's address.
fn has_listener(frontends: &Frontends) -> io::Result<bool> {
    let mut channel = SockDiag::open()?;
    let mut is_any = false;
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        for family in Family::ALL {
            channel.walk(protocol, family, States::Waiting, |found| {
                is_any |= !found.own.ip().is_unspecified() && frontends.has(protocol, found.own);
            })?;
        }
    }
    Ok(is_any)
}

/// The cookie of the thread's network namespace.
fn cookie() -> io::Result<u64> {
    bpf::namespace_cookie(Socket::new(Domain::IPV4, Type::DGRAM, None)?)
}

fn opened<M>(directory: &Path, name: &str, kind: fn(MapData) -> Map) -> Result<M, Error>
where
    M: TryFrom<Map, Error = MapError>,
{
    let map = MapData::from_pin(directory.join(name)).map_err(|error| unusable(name, error))?;
    M::try_from(kind(map)).map_err(|error| unusable(name, error))
}

fn unusable(name: &str, error: MapError) -> Error {
    Error::Kernel(format!("using the map {name}: {error}"))
}
