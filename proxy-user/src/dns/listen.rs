//! Sockets bound to an address, before and while it is local to this host.
//!
//! In: an address. Out: a bound UDP socket and a TCP listener. weir binds them before it claims the address, so
//! packets to a claimed address always find a socket.

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, UdpSocket};

const PORT: u16 = 53;
/// The receive buffer for datagrams, enough for about ten thousand queries.
const WAITING_BYTES: usize = 4 << 20;
/// Connections that may wait to be accepted.
const WAITING_CONNECTIONS: i32 = 256;

#[derive(Debug)]
pub(crate) struct Sockets {
    /// With a large receive buffer.
    pub(crate) udp: UdpSocket,
    /// Already listening.
    pub(crate) tcp: TcpListener,
}

impl Sockets {
    /// Binds both sockets. Needs a tokio runtime.
    ///
    /// # Errors
    ///
    /// When another process has the port, at this address or at all.
    pub(crate) fn bind(address: IpAddr) -> io::Result<Self> {
        let udp = socket(address, Type::DGRAM, Protocol::UDP)?;
        // The kernel may allow less, which is enough to serve.
        let _ = udp.set_recv_buffer_size(WAITING_BYTES);
        udp.bind(&SocketAddr::new(address, PORT).into())?;
        let tcp = socket(address, Type::STREAM, Protocol::TCP)?;
        tcp.set_reuse_address(true)?;
        tcp.bind(&SocketAddr::new(address, PORT).into())?;
        tcp.listen(WAITING_CONNECTIONS)?;
        Ok(Self { udp: UdpSocket::from_std(udp.into())?, tcp: TcpListener::from_std(tcp.into())? })
    }
}

fn socket(address: IpAddr, kind: Type, protocol: Protocol) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(SocketAddr::new(address, PORT)), kind, Some(protocol))?;
    match address {
        IpAddr::V4(_) => socket.set_freebind_v4(true)?,
        IpAddr::V6(_) => {
            socket.set_only_v6(true)?;
            socket.set_freebind_v6(true)?;
        }
    }
    socket.set_nonblocking(true)?;
    Ok(socket)
}
