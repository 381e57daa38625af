//! Connections: accepted on a loopback address, and made to a backend.
//!
//! In: a listener and the [`Draw`] of its NodePort. Out: the same bytes on both sides, the end of each direction passed on
//! by itself. What ends in an error on one side ends in a reset on the other, as it would without anything in between.
//! A connection has no buffer while nothing comes, and one of [`CHUNK`] while its reader is slow.

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

use super::{draw::Draw, leads::Port};
use crate::places::{Place, Places};

/// How long a backend has to take a connection; kube-proxy's time.
const PATIENCE: Duration = Duration::from_secs(5);
/// What is read at once.
const CHUNK: usize = 16 << 10;
/// Connections that may wait to be accepted.
const WAITING: i32 = 1024;
/// The wait after a connection could not be accepted, as without a free file.
const PAUSE: Duration = Duration::from_millis(100);
/// How exactly is known when a connection was used last.
const BEAT: Duration = Duration::from_secs(1);

/// A socket that takes connections.
#[derive(Debug)]
pub struct Streams(TcpListener);

impl Streams {
    /// Listens there. Needs a tokio runtime.
    ///
    /// # Errors
    ///
    /// When another process has the port, or there is no such address.
    pub fn bind(at: SocketAddr) -> io::Result<Self> {
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

/// Takes connections until this is dropped; those that were taken go on.
pub async fn relay_streams(
    streams: Streams,
    port: Port,
    draw: Arc<Draw>,
    places: Places<Port>,
) -> Infallible {
    loop {
        match streams.0.accept().await {
            Ok((client, _)) => {
                tokio::spawn(connection(client, Arc::clone(&draw), places.take_for(port)));
            }
            Err(error) => {
                tracing::debug!(%error, ?port, "cannot accept a connection");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

async fn connection(mut client: TcpStream, draw: Arc<Draw>, mut place: Place<Port>) {
    let Some(backend) = draw.pick(Instant::now()) else { return reset(&client) };
    let connected = tokio::select! {
        connected = tokio::time::timeout(PATIENCE, TcpStream::connect(backend)) => connected,
        () = place.lost() => return reset(&client),
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
        // Without these it works too, only worse.
        let _ = side.set_nodelay(true);
        let _ = SockRef::from(side).set_keepalive(true);
    }
    if !exchange(&mut client, &mut server, &mut place).await {
        reset(&client);
        reset(&server);
    }
}

/// Passes bytes on until both sides have said all, or one has no place any more; `false` if anything was lost.
async fn exchange(client: &mut TcpStream, server: &mut TcpStream, place: &mut Place<Port>) -> bool {
    let (from_client, to_client) = client.split();
    let (from_server, to_server) = server.split();
    let used = Notify::new();
    let mut both = pin!(async {
        tokio::try_join!(pump(from_client, to_server, &used), pump(from_server, to_client, &used))
    });
    loop {
        tokio::select! {
            passed = &mut both => return passed.is_ok(),
            () = place.lost() => return false,
            () = used.notified() => place.used(),
        }
    }
}

/// Passes one direction on, its end too.
async fn pump(from: ReadHalf<'_>, mut to: WriteHalf<'_>, used: &Notify) -> io::Result<()> {
    let mut last = Instant::now();
    loop {
        from.readable().await?;
        let mut chunk = Vec::with_capacity(CHUNK);
        match from.try_read_buf(&mut chunk) {
            Ok(0) => {
                // The other side may be gone, to which this is no news.
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

/// Has the connection end in a reset once it is dropped, not as if everything had been said.
fn reset(stream: &TcpStream) {
    let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
}
