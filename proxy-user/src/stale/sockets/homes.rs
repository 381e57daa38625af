//! Pods that had bound a Service's address before weir knew the Service, or ran.
//!
//! In: the waiting sockets of every network namespace, the frontends in the kernel. Out: `early_homes`, the places of the
//! namespaces that have such a socket. The kernel programs see every later bind themselves, so one look after frontends
//! came is enough.
//!
//! A place stays until the next look, also when the sockets are closed: a connect from there costs a search for a socket.

use std::{
    collections::BTreeSet,
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use crate::sys::bpf;
use aya::maps::{Array, HashMap, IterableMap as _, Map, MapData, MapError};
use proxy_ebpf::{FrontendKey, FrontendValue, place_of_home};
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

/// Between two looks, in nanoseconds: pods come and Services come, and each look goes through all pods.
const PAUSE: u64 = 10_000_000_000;

/// Looks for them.
pub(super) struct Homes {
    /// Where `early_homes` is pinned.
    sockets: PathBuf,
    /// Where `frontends` is pinned: another map when it has grown.
    services: PathBuf,
    /// Whether frontends have come since the last look.
    came: bool,
    /// When the next look may be.
    next: u64,
}

impl Homes {
    pub(super) fn new(sockets: &Path, services: &Path) -> Self {
        Self { sockets: sockets.to_owned(), services: services.to_owned(), came: false, next: 0 }
    }

    /// Frontends may have come.
    pub(super) fn take_in(&mut self, came: bool) {
        self.came |= came;
    }

    /// When the next look is to be; nothing while no frontend came.
    pub(super) fn next(&self) -> Option<u64> {
        self.came.then_some(self.next)
    }

    /// Goes through all network namespaces.
    pub(super) fn look(&mut self, namespaces: &Namespaces, now: u64) -> Result<Failures, Error> {
        (self.came, self.next) = (false, now.saturating_add(PAUSE));
        let frontends = Frontends::open(&self.services)?;
        let own = cookie().map_err(failed("asking for the cookie of a network namespace"))?;
        let mut places = BTreeSet::new();
        let visited = namespaces.each(|| {
            let namespace = cookie()?;
            // The programs lead the host's processes wherever they are bound.
            if namespace != own && is_home(&frontends)? {
                places.insert(place_of_home(namespace));
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

/// What Services have.
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

/// Whether a socket of the thread's network namespace waits for clients at a Service's address.
fn is_home(frontends: &Frontends) -> io::Result<bool> {
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

/// Of the thread's network namespace.
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
