//! The kernel stores the Service that a connected socket asked for until the socket is closed.

use std::{
    collections::BTreeSet,
    fs, iter,
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
};

use anyhow::{Context as _, Result, anyhow, bail};
use aya::maps::{Array, HashMap, Map, MapData};
use nix::sys::resource::{Resource, setrlimit};
use proxy_ebpf::{Endpoint, Origin, SEATS, Seat, trouble};
use socket2::SockRef;
use weir::{
    dataplane::{
        Dataplane as _,
        ebpf::{Place, usage},
    },
    model::{Family, Protocol},
};

use super::{Fixture, complete, loopback, open, port, service_ip};

/// Elements of a map are allocated one by one (`linux/bpf.h`).
const BPF_F_NO_PREALLOC: u32 = 1;

#[test]
fn sockets_are_remembered_until_they_are_closed_and_one_too_many_is_left_alone() -> Result<()> {
    let fixture = Fixture::new()?;
    // Room for one socket without a seat, found as another agent would have left it.
    fs::create_dir(fixture.place.sockets())?;
    HashMap::<_, u64, Origin>::create(1, BPF_F_NO_PREALLOC)?.pin(fixture.place.sockets().join("origins"))?;
    fixture.inside.run(|| -> Result<()> {
        let mut plane = open(&fixture.place)?;
        let mut told = Told::open(&fixture.place)?;
        for (family, before) in Family::ALL.into_iter().zip(0..) {
            let listener = TcpListener::bind((loopback(family), 0))?;
            plane.reread()?;
            let server = listener.local_addr()?;
            plane.apply(&complete(vec![port(family, Protocol::Tcp, &[server])]))?;
            let to = SocketAddr::new(service_ip(family), 80);
            let expected = |socket: &TcpStream, origin: &Origin| -> Result<u64> {
                assert_eq!(socket.peer_addr()?, to);
                assert_eq!(origin.service, Endpoint::new(to.ip(), to.port()));
                assert_eq!(origin.backend, Endpoint::new(server.ip(), server.port()));
                assert_eq!(origin.protocol, u32::from(Protocol::Tcp.number()));
                Ok(SockRef::from(socket).cookie()?)
            };

            let first = TcpStream::connect(to)?;
            let (seated, others) = told.read()?;
            let [(cookie, origin)] = seated[..] else { bail!("{seated:?}") };
            assert_eq!((cookie, others), (expected(&first, &origin)?, vec![]));
            drop(first);
            assert_eq!(told.read()?, (vec![], vec![]), "closed and forgotten");

            told.seat_everywhere(1)?;
            let second = TcpStream::connect(to)?;
            let (_, others) = told.read()?;
            let [(cookie, origin)] = others[..] else { bail!("{others:?}") };
            assert_eq!(cookie, expected(&second, &origin)?);
            // Nothing is behind these programs here that would serve its packets.
            assert!(TcpStream::connect(to).is_err());
            assert_eq!(plane.troubles()?[trouble::ORIGINS as usize], before + 1);
            drop(second);
            assert_eq!(told.read()?.1, vec![], "closed and forgotten");
            assert_eq!(TcpStream::connect(to)?.peer_addr()?, to);
            told.seat_everywhere(0)?;
        }
        plane.remove()?;
        Ok(())
    })
}

#[test]
fn more_sockets_than_seats_that_come_at_the_same_time_are_all_remembered_and_all_forgotten() -> Result<()> {
    const THREADS: usize = 4;
    let sockets_each = SEATS as usize / 2;
    setrlimit(Resource::RLIMIT_NOFILE, 4 * u64::from(SEATS), 4 * u64::from(SEATS))?;
    let fixture = Fixture::new()?;
    fixture.inside.run(|| -> Result<()> {
        let mut plane = open(&fixture.place)?;
        let told = Told::open(&fixture.place)?;
        for family in Family::ALL {
            let datagrams = UdpSocket::bind((loopback(family), 0))?;
            plane.reread()?;
            plane.apply(&complete(vec![port(family, Protocol::Udp, &[datagrams.local_addr()?])]))?;
            let to = SocketAddr::new(service_ip(family), 80);
            let connect = || -> Result<Vec<UdpSocket>> {
                iter::repeat_with(|| {
                    let socket = UdpSocket::bind((loopback(family), 0))?;
                    socket.connect(to)?;
                    // Once more: it has its place already.
                    socket.connect(to)?;
                    Ok(socket)
                })
                .take(sockets_each)
                .collect()
            };
            let sockets: Vec<UdpSocket> = thread::scope(|scope| {
                let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(connect)).collect();
                let made = threads
                    .into_iter()
                    .map(|thread| thread.join().map_err(|_| anyhow!("a thread panicked"))?);
                made.collect::<Result<Vec<_>>>().map(|made| made.into_iter().flatten().collect())
            })?;
            for socket in &sockets {
                assert_eq!(socket.peer_addr()?, to);
            }
            let (seated, others) = told.read()?;
            let known: BTreeSet<u64> = seated.iter().chain(&others).map(|(cookie, _)| *cookie).collect();
            let open: BTreeSet<u64> =
                sockets.iter().map(|socket| SockRef::from(socket).cookie()).collect::<Result<_, _>>()?;
            assert_eq!(known, open);
            assert_eq!(seated.len() + others.len(), sockets.len(), "each once");
            assert!(!others.is_empty(), "there are fewer seats than sockets");
            assert_eq!(counted(&fixture.place)?, u32::try_from(others.len())?);
            drop(sockets);
            assert_eq!(told.read()?, (vec![], vec![]));
            assert_eq!(counted(&fixture.place)?, 0);
            assert!(told.seats.iter().all(|seat| seat.is_ok_and(|seat| seat.claims == 0)));
        }
        plane.remove()?;
        Ok(())
    })
}

/// How many sockets without a seat all groups of processes have.
fn counted(place: &Place) -> Result<u32> {
    let all = usage(place)?;
    let origins = all.iter().find(|usage| usage.map == "origins").and_then(|usage| usage.elements);
    Ok(origins.context("`origins` does not tell")?.0)
}

/// The maps of connected sockets.
struct Told {
    seats: Array<MapData, Seat>,
    origins: HashMap<MapData, u64, Origin>,
}

type Known = Vec<(u64, Origin)>;

impl Told {
    fn open(place: &Place) -> Result<Self> {
        let map = |name| MapData::from_pin(place.sockets().join(name));
        Ok(Self {
            seats: Map::Array(map("seats")?).try_into()?,
            origins: Map::HashMap(map("origins")?).try_into()?,
        })
    }

    /// The sockets that have a seat, and those that have none.
    fn read(&self) -> Result<(Known, Known)> {
        let seats = self.seats.iter().collect::<Result<Vec<Seat>, _>>()?;
        let seated =
            seats.iter().filter(|seat| Seat::is_taken(seat.claims)).map(|seat| (seat.cookie, seat.origin()));
        Ok((seated.collect(), self.origins.iter().collect::<Result<_, _>>()?))
    }

    /// Puts as many sockets that never were into every seat.
    fn seat_everywhere(&mut self, claims: u64) -> Result<()> {
        let stranger = Seat { cookie: u64::MAX, claims, ..Seat::default() };
        Ok((0..SEATS).try_for_each(|number| self.seats.set(number, stranger, 0))?)
    }
}
