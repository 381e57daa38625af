//! Connections: accepted on a loopback address, and forwarded to a backend.
//!
//! In: a listener and the [`Picker`] of its NodePort. Out: the same bytes on both sides. Each direction ends
//! separately. An error on one side becomes a reset on the other, as on a direct connection. An idle connection has
//! no buffer; a slow reader costs one of [`CHUNK`].

use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::{
    io::AsyncWriteExt as _,
    net::{
        TcpListener, TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    sync::Notify,
};

use super::{node_ports::LoopbackPort, picker::Picker};
use crate::connection_limit::{ConnectionLimit, Permit};

/// The time limit for connecting to a backend, which is kube-proxy's.
const PATIENCE: Duration = Duration::from_secs(5);
/// The size of one read.
const CHUNK: usize = 16 << 10;
/// Connections that may wait to be accepted.
const WAITING: i32 = 1024;
/// The pause after a failed accept, for example without a free descriptor.
const PAUSE: Duration = Duration::from_millis(100);
/// The precision with which weir knows when a connection was used last.
const BEAT: Duration = Duration::from_secs(1);

/// A listening TCP socket.
#[derive(Debug)]
pub(crate) struct Streams(TcpListener);

impl Streams {
    /// Listens on `at`. Needs a tokio runtime.
    ///
    /// # Errors
    ///
    /// When another process has the port, or the host does not have the address.
    pub(crate) fn bind(at: SocketAddr) -> io::Result<Self> {
        let socket = Socket::new(Domain::for_address(at), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&at.into())?;
        socket.listen(WAITING)?;
        Ok(Self(TcpListener::from_std(socket.into())?))
    }

    #[cfg(test)]
    pub(super) fn address(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }
}

/// Accepts connections until the future is dropped. Accepted connections go on.
pub(crate) async fn relay_streams(
    streams: Streams,
    port: LoopbackPort,
    picker: Arc<Picker>,
    limit: ConnectionLimit<LoopbackPort>,
) -> Infallible {
    loop {
        match streams.0.accept().await {
            Ok((client, _)) => {
                tokio::spawn(connection(client, Arc::clone(&picker), limit.admit_for(port)));
            }
            Err(error) => {
                tracing::debug!(%error, ?port, "cannot accept a connection");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

async fn connection(mut client: TcpStream, picker: Arc<Picker>, mut permit: Permit<LoopbackPort>) {
    let Some(backend) = picker.pick(Instant::now()) else { return reset(&client) };
    let connected = tokio::select! {
        connected = tokio::time::timeout(PATIENCE, TcpStream::connect(backend)) => connected,
        () = permit.revoked() => return reset(&client),
    };
    let mut server = match connected {
        Ok(Ok(server)) => server,
        Ok(Err(error)) => {
            tracing::debug!(%backend, %error, "cannot connect to a backend");
            return reset(&client);
        }
        Err(_) => {
            tracing::debug!(%backend, "connecting to a backend timed out");
            return reset(&client);
        }
    };
    for side in [&client, &server] {
        // Both options only improve the connection, so errors do not matter.
        let _ = side.set_nodelay(true);
        let _ = SockRef::from(side).set_keepalive(true);
    }
    if !exchange(&mut client, &mut server, &mut permit).await {
        reset(&client);
        reset(&server);
    }
}

/// Forwards bytes until both sides have ended or the connection loses its place; `false` if bytes were lost.
async fn exchange(client: &mut TcpStream, server: &mut TcpStream, permit: &mut Permit<LoopbackPort>) -> bool {
    let (from_client, to_client) = client.split();
    let (from_server, to_server) = server.split();
    let used = Notify::new();
    let mut both = pin!(async {
        tokio::try_join!(pump(from_client, to_server, &used), pump(from_server, to_client, &used))
    });
    loop {
        tokio::select! {
            passed = &mut both => return passed.is_ok(),
            () = permit.revoked() => return false,
            () = used.notified() => permit.touch(),
        }
    }
}

/// Forwards one direction, including its end.
async fn pump(from: ReadHalf<'_>, mut to: WriteHalf<'_>, used: &Notify) -> io::Result<()> {
    let mut last = Instant::now();
    loop {
        from.readable().await?;
        let mut chunk = Vec::with_capacity(CHUNK);
        match from.try_read_buf(&mut chunk) {
            Ok(0) => {
                // An error means that the other side is already gone.
                let _ = to.shutdown().await;
                return Ok(());
            }
            Ok(_) => {
                if last.elapsed() >= BEAT {
                    last = Instant::now();
                    used.notify_one();
                }
                to.write_all(&chunk).await?;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

/// Lets the connection end with a reset when it is dropped, so that the peer knows that it failed.
fn reset(stream: &TcpStream) {
    let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
}
