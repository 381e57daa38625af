//! Datagrams: read on a loopback address, sent on from a socket for each client.
//!
//! In: a bound socket and the [`Draw`] of its NodePort. Out: each client's datagrams at one backend, and its answers at the
//! client, from the address that was asked. A client stays with its backend while that serves and neither rests for [`REST`],
//! as connection tracking has it.

use std::{
    collections::HashMap,
    convert::Infallible,
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use socket2::SockRef;
use tokio::{
    net::UdpSocket,
    sync::Notify,
    task::{AbortHandle, Id, JoinSet},
};

use super::{draw::Draw, leads::Port};
use crate::places::{Place, Places};

/// How long a flow may rest; the kernel's time for flows that were answered.
const REST: Duration = Duration::from_secs(120);
/// No datagram is larger.
const LARGEST: usize = 64 << 10;
/// The wait after the socket failed.
const PAUSE: Duration = Duration::from_millis(100);

/// A socket that takes datagrams.
#[derive(Debug)]
pub struct Datagrams(Arc<UdpSocket>);

impl Datagrams {
    /// Binds there. Needs a tokio runtime.
    ///
    /// # Errors
    ///
    /// When another process has the port, or there is no such address.
    pub fn bind(at: SocketAddr) -> io::Result<Self> {
        let socket = std::net::UdpSocket::bind(at)?;
        socket.set_nonblocking(true)?;
        Ok(Self(Arc::new(UdpSocket::from_std(socket)?)))
    }

    #[cfg(test)]
    pub(super) fn address(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }
}

/// One client and its backend.
struct Flow {
    backend: SocketAddr,
    upstream: Arc<UdpSocket>,
    /// Told when the client says something.
    said: Arc<Notify>,
    task: AbortHandle,
}

/// The flows of one NodePort.
struct Flows {
    port: Port,
    socket: Arc<UdpSocket>,
    draw: Arc<Draw>,
    places: Places<Port>,
    of: HashMap<SocketAddr, Flow>,
    tasks: JoinSet<SocketAddr>,
}

/// Passes datagrams on until this is dropped, and every flow with it.
pub async fn relay_datagrams(
    datagrams: Datagrams,
    port: Port,
    draw: Arc<Draw>,
    places: Places<Port>,
) -> Infallible {
    let socket = datagrams.0;
    let mut flows =
        Flows { port, socket: Arc::clone(&socket), draw, places, of: HashMap::new(), tasks: JoinSet::new() };
    let mut buffer = vec![0; LARGEST];
    loop {
        tokio::select! {
            Some(ended) = flows.tasks.join_next_with_id() => if let Ok((id, client)) = ended {
                flows.forget(client, id);
            },
            received = socket.recv_from(&mut buffer) => match received {
                Ok((length, client)) => flows.pass_on(client, &buffer[..length]),
                Err(error) => {
                    tracing::debug!(%error, ?port, "cannot read a datagram");
                    tokio::time::sleep(PAUSE).await;
                }
            },
        }
    }
}

impl Flows {
    fn pass_on(&mut self, client: SocketAddr, datagram: &[u8]) {
        if self.of.get(&client).is_some_and(|flow| !self.draw.holds(flow.backend))
            && let Some(flow) = self.of.remove(&client)
        {
            flow.task.abort();
        }
        let flow = match self.of.get(&client) {
            Some(flow) => flow,
            None => match self.begin(client) {
                Ok(flow) => self.of.entry(client).insert_entry(flow).into_mut(),
                Err(error) => return tracing::debug!(%error, %client, "cannot forward a datagram"),
            },
        };
        flow.said.notify_one();
        // The runtime does not know yet that a new socket can be written to, so it is not asked. What finds no room is lost, as
        // datagrams are; the error of an earlier datagram is told once, to whatever is sent next.
        let upstream = SockRef::from(&*flow.upstream);
        if upstream.send(datagram).is_err_and(|error| error.kind() != io::ErrorKind::WouldBlock) {
            let _ = upstream.send(datagram);
        }
    }

    /// A flow of a client that has none.
    fn begin(&mut self, client: SocketAddr) -> io::Result<Flow> {
        let nowhere = || io::Error::from(io::ErrorKind::HostUnreachable);
        let backend = self.draw.pick(Instant::now()).ok_or_else(nowhere)?;
        let any = match backend {
            SocketAddr::V4(_) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
            SocketAddr::V6(_) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
        };
        let upstream = std::net::UdpSocket::bind(any)?;
        upstream.connect(backend)?;
        upstream.set_nonblocking(true)?;
        let upstream = Arc::new(UdpSocket::from_std(upstream)?);
        let said = Arc::new(Notify::new());
        let place = self.places.take_for(self.port);
        let answers =
            answers(Arc::clone(&upstream), Arc::clone(&self.socket), client, Arc::clone(&said), place);
        let task = self.tasks.spawn(answers);
        Ok(Flow { backend, upstream, said, task })
    }

    /// Forgets a flow that ended, and not one that came in its place.
    fn forget(&mut self, client: SocketAddr, id: Id) {
        if self.of.get(&client).is_some_and(|flow| flow.task.id() == id) {
            self.of.remove(&client);
        }
    }
}

/// Passes a backend's answers on until the flow rests, has no place any more or is refused.
async fn answers(
    upstream: Arc<UdpSocket>,
    socket: Arc<UdpSocket>,
    client: SocketAddr,
    said: Arc<Notify>,
    mut place: Place<Port>,
) -> SocketAddr {
    loop {
        tokio::select! {
            () = place.lost() => return client,
            () = tokio::time::sleep(REST) => return client,
            () = said.notified() => place.used(),
            ready = upstream.readable() => {
                let mut datagram = Vec::with_capacity(LARGEST);
                match ready.and_then(|()| upstream.try_recv_buf(&mut datagram)) {
                    Ok(_) => {
                        place.used();
                        let _ = SockRef::from(&*socket).send_to(&datagram, &client.into());
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(_) => return client,
                }
            }
        }
    }
}
