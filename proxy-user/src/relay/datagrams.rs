//! Datagrams: read on a loopback address, and forwarded from a socket of each client.
//!
//! In: a bound socket and the [`Picker`] of its NodePort. Out: each client's datagrams to one backend, and the
//! backend's answers to the client, from the address that the client sent to. As in connection tracking, a client
//! stays with its backend while the backend serves and the flow is not idle for [`REST`].

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

use super::{node_ports::LoopbackPort, picker::Picker};
use crate::connection_limit::{ConnectionLimit, Permit};

/// How long a flow may be idle: the kernel's timeout for answered UDP flows.
const REST: Duration = Duration::from_secs(120);
/// The largest datagram, in bytes.
const LARGEST: usize = 64 << 10;
/// The pause after an error of the socket.
const PAUSE: Duration = Duration::from_millis(100);

/// A bound UDP socket.
#[derive(Debug)]
pub(crate) struct Datagrams(Arc<UdpSocket>);

impl Datagrams {
    /// Binds to `at`. Needs a tokio runtime.
    ///
    /// # Errors
    ///
    /// When another process has the port, or the host does not have the address.
    pub(crate) fn bind(at: SocketAddr) -> io::Result<Self> {
        let socket = std::net::UdpSocket::bind(at)?;
        socket.set_nonblocking(true)?;
        Ok(Self(Arc::new(UdpSocket::from_std(socket)?)))
    }

    #[cfg(test)]
    pub(super) fn address(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }
}

struct Flow {
    backend: SocketAddr,
    upstream: Arc<UdpSocket>,
    /// Notified of each datagram from the client.
    used: Arc<Notify>,
    task: AbortHandle,
}

/// The flows of one NodePort.
struct Flows {
    port: LoopbackPort,
    socket: Arc<UdpSocket>,
    picker: Arc<Picker>,
    limit: ConnectionLimit<LoopbackPort>,
    of: HashMap<SocketAddr, Flow>,
    tasks: JoinSet<SocketAddr>,
}

/// Forwards datagrams until the future is dropped, and all flows with it.
pub(crate) async fn relay_datagrams(
    datagrams: Datagrams,
    port: LoopbackPort,
    picker: Arc<Picker>,
    limit: ConnectionLimit<LoopbackPort>,
) -> Infallible {
    let socket = datagrams.0;
    let mut flows =
        Flows { port, socket: Arc::clone(&socket), picker, limit, of: HashMap::new(), tasks: JoinSet::new() };
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
        if self.of.get(&client).is_some_and(|flow| !self.picker.includes(flow.backend))
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
        flow.used.notify_one();
        // Sent past the runtime, which does not know yet that a new socket is writable. A datagram without room in
        // the send buffer is lost. The kernel returns an error of an earlier datagram once, so the second attempt
        // sends this one.
        let upstream = SockRef::from(&*flow.upstream);
        if upstream.send(datagram).is_err_and(|error| error.kind() != io::ErrorKind::WouldBlock) {
            let _ = upstream.send(datagram);
        }
    }

    /// Starts a flow for a new client.
    fn begin(&mut self, client: SocketAddr) -> io::Result<Flow> {
        let nowhere = || io::Error::from(io::ErrorKind::HostUnreachable);
        let backend = self.picker.pick(Instant::now()).ok_or_else(nowhere)?;
        let any = match backend {
            SocketAddr::V4(_) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
            SocketAddr::V6(_) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
        };
        let upstream = std::net::UdpSocket::bind(any)?;
        upstream.connect(backend)?;
        upstream.set_nonblocking(true)?;
        let upstream = Arc::new(UdpSocket::from_std(upstream)?);
        let used = Arc::new(Notify::new());
        let permit = self.limit.admit_for(self.port);
        let answers =
            answers(Arc::clone(&upstream), Arc::clone(&self.socket), client, Arc::clone(&used), permit);
        let task = self.tasks.spawn(answers);
        Ok(Flow { backend, upstream, used, task })
    }

    /// Removes a flow that ended, unless a new flow has replaced it.
    fn forget(&mut self, client: SocketAddr, id: Id) {
        if self.of.get(&client).is_some_and(|flow| flow.task.id() == id) {
            self.of.remove(&client);
        }
    }
}

/// Forwards a backend's answers until the flow is idle, loses its place or gets an error.
async fn answers(
    upstream: Arc<UdpSocket>,
    socket: Arc<UdpSocket>,
    client: SocketAddr,
    used: Arc<Notify>,
    mut permit: Permit<LoopbackPort>,
) -> SocketAddr {
    loop {
        tokio::select! {
            () = permit.revoked() => return client,
            () = tokio::time::sleep(REST) => return client,
            () = used.notified() => permit.touch(),
            ready = upstream.readable() => {
                let mut datagram = Vec::with_capacity(LARGEST);
                match ready.and_then(|()| upstream.try_recv_buf(&mut datagram)) {
                    Ok(_) => {
                        permit.touch();
                        let _ = SockRef::from(&*socket).send_to(&datagram, &client.into());
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(_) => return client,
                }
            }
        }
    }
}
