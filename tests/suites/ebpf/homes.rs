//! Pods that had bound a Service's address before weir knew the Service.

use std::{
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::unix::fs::symlink,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use aya::maps::{Array, Map, MapData};
use tempfile::TempDir;
use weir::{
    dataplane::Dataplane as _,
    model::{Family, Protocol},
    plan::{Delta, PortDelta, PortPlan},
    stale::sockets::{Sockets, Suspects},
};
use weir_tests::netns::Namespace;

use super::{Fixture, complete, loopback, open_on_host, port, room::numbered, service_ip};

/// The port of Services that come while weir runs; those that are there at its start have 80.
const LATER: u16 = 81;

/// A server at an address.
enum Server {
    Tcp(TcpListener),
    Udp(UdpSocket),
}

impl Server {
    fn bind(protocol: Protocol, at: SocketAddr) -> Result<Self> {
        Ok(match protocol {
            Protocol::Tcp => Self::Tcp(TcpListener::bind(at)?),
            _ => {
                let socket = UdpSocket::bind(at)?;
                socket.set_read_timeout(Some(Duration::from_secs(5)))?;
                Self::Udp(socket)
            }
        })
    }

    fn address(&self) -> Result<SocketAddr> {
        Ok(match self {
            Self::Tcp(listener) => listener.local_addr()?,
            Self::Udp(socket) => socket.local_addr()?,
        })
    }

    /// Fails unless a client in the thread's namespace that asks for the server's address meets it.
    fn is_met(&self) -> Result<()> {
        let at = self.address()?;
        let (met, client) = match self {
            Self::Tcp(listener) => {
                let client = TcpStream::connect(at).with_context(|| format!("connecting to {at}"))?;
                (listener.accept()?.1, client.local_addr()?)
            }
            Self::Udp(socket) => {
                let client = UdpSocket::bind(SocketAddr::new(at.ip(), 0))?;
                client.send_to(b"hello", at)?;
                (socket.recv_from(&mut [0; 8])?.1, client.local_addr()?)
            }
        };
        ensure!(met == client, "{at} met {met}, not {client}");
        Ok(())
    }
}

fn kinds() -> impl Iterator<Item = (Family, Protocol)> {
    Family::ALL.into_iter().flat_map(|family| [(family, Protocol::Tcp), (family, Protocol::Udp)])
}

/// Servers of every kind at the Services' addresses, in the thread's namespace.
fn servers(number: u16) -> Result<Vec<Server>> {
    kinds().map(|(family, it)| Server::bind(it, SocketAddr::new(service_ip(family), number))).collect()
}

#[test]
fn pods_that_had_bound_a_service_address_before_the_service_came_are_at_home_there() -> Result<()> {
    let fixture = Fixture::new()?;
    let home = Namespace::within(&fixture.cgroup, "home")?;
    let names = TempDir::new()?;
    symlink(home.path(), names.path().join(home.label()))?;
    for family in Family::ALL {
        home.ip(&[format!("addr add {} dev lo nodad", service_ip(family))])?;
    }
    let (now, later) = home.run(|| anyhow::Ok((servers(80)?, servers(LATER)?)))?;
    let met = |servers: &[Server]| home.run(|| servers.iter().try_for_each(Server::is_met));
    fixture.inside.run(|| -> Result<()> {
        let mut plane = open_on_host(&fixture.place)?;
        let elsewhere = kinds().map(|(family, it)| Server::bind(it, SocketAddr::new(loopback(family), 0)));
        let elsewhere = elsewhere.collect::<Result<Vec<_>>>()?;
        let ports: Vec<Arc<PortPlan>> = kinds()
            .zip(&elsewhere)
            .map(|((family, protocol), server)| Ok(port(family, protocol, &[server.address()?])))
            .collect::<Result<_>>()?;
        let all = complete(ports.clone());
        plane.reread()?;
        plane.apply(&all)?;
        let open = || Sockets::open(&fixture.place.sockets(), &fixture.place.services(), &[names.path()]);
        let mut sockets = open()?;
        sockets.take_in(Suspects::of(&all));
        sockets.sweep();
        met(&now).context("there at the start")?;

        let new = |port| PortDelta { before: None, after: Some(numbered(port, LATER)) };
        let new = Delta { ports: ports.iter().map(|port| new(port)).collect(), ..Delta::default() };
        plane.apply(&new)?;
        let suspects = Suspects::of(&new);
        ensure!(!suspects.is_empty(), "addresses came");
        sockets.take_in(suspects);
        // Looks are seconds apart.
        while let Some(pause) = sockets.wait() {
            std::thread::sleep(pause);
            sockets.sweep();
        }
        met(&later).context("came later")?;

        let early = || -> Result<u64> {
            let map = MapData::from_pin(fixture.place.sockets().join("early_homes"))?;
            let map: Array<_, u64> = Map::Array(map).try_into()?;
            Ok(map.iter().collect::<Result<Vec<_>, _>>()?.into_iter().sum())
        };
        assert_eq!(early()?, 1, "one namespace");
        drop((now, later));
        // The next agent takes its first look.
        let mut next = open().map_err(|error| anyhow!(error))?;
        next.take_in(Suspects::of(&all));
        next.sweep();
        assert_eq!(early()?, 0, "closed and forgotten");
        plane.remove()?;
        Ok(())
    })
}
