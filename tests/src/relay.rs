//! A relay of TCP in front of servers, as a load balancer is one, which can fall silent.
//!
//! In: connections. Out: their data, passed on to the server that is the target when they come. A relay that
//! falls silent goes on to take in, and to acknowledge, data on the connections that it has then.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
};

use anyhow::Result;

/// The most bytes of one read.
const CHUNK: usize = 64 << 10;

/// A running relay. Dropping it ends its connections.
#[derive(Debug)]
pub struct Relay {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
}

#[derive(Debug)]
struct State {
    to: SocketAddr,
    over: bool,
    connections: Vec<Connection>,
}

#[derive(Debug)]
struct Connection {
    ends: [TcpStream; 2],
    peer: SocketAddr,
    silent: Arc<AtomicBool>,
}

impl Relay {
    /// Starts one at this address, which leads connections to `to`, in the caller's network namespace.
    ///
    /// # Errors
    ///
    /// When it cannot listen.
    pub fn start(at: IpAddr, to: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind((at, 0))?;
        let address = listener.local_addr()?;
        let state = Arc::new(Mutex::new(State { to, over: false, connections: Vec::new() }));
        let relay = Self { address, state: Arc::clone(&state) };
        thread::Builder::new().name("relay".to_owned()).spawn(move || {
            for client in listener.incoming() {
                if locked(&state).over {
                    return;
                }
                // A connection that fails ends, as it does without a relay.
                let _ = client.and_then(|client| accept(client, &state));
            }
        })?;
        Ok(relay)
    }

    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Leads connections that come from now on to another server.
    pub fn lead_to(&self, to: SocketAddr) {
        locked(&self.state).to = to;
    }

    /// Passes on nothing more of the connections that there are, and ends none.
    pub fn fall_silent(&self) {
        for connection in &locked(&self.state).connections {
            connection.silent.store(true, Relaxed);
        }
    }

    /// Ends the connections that there are.
    pub fn cut(&self) {
        for Connection { ends, .. } in locked(&self.state).connections.drain(..) {
            for end in ends {
                // It may have ended by itself.
                let _ = end.shutdown(Shutdown::Both);
            }
        }
    }

    /// From where the connections come that there have been since the last cut.
    #[must_use]
    pub fn peers(&self) -> Vec<SocketAddr> {
        locked(&self.state).connections.iter().map(|connection| connection.peer).collect()
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        locked(&self.state).over = true;
        self.cut();
        // Wakes the thread that listens.
        let _ = TcpStream::connect(self.address);
    }
}

fn locked(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn accept(client: TcpStream, state: &Mutex<State>) -> std::io::Result<()> {
    // Without the lock, because a server may take long to accept.
    let to = locked(state).to;
    let server = TcpStream::connect(to)?;
    let silent = Arc::new(AtomicBool::new(false));
    for (from, to) in [(&client, &server), (&server, &client)] {
        let (from, to, silent) = (from.try_clone()?, to.try_clone()?, Arc::clone(&silent));
        thread::Builder::new().name("relay".to_owned()).spawn(move || pass_on(from, to, &silent))?;
    }
    let peer = client.peer_addr()?;
    locked(state).connections.push(Connection { ends: [client, server], peer, silent });
    Ok(())
}

/// Passes on until one end closes; then it closes the other too, unless it is silent.
fn pass_on(mut from: TcpStream, mut to: TcpStream, silent: &AtomicBool) {
    let mut bytes = vec![0; CHUNK];
    while let Ok(length @ 1..) = from.read(&mut bytes) {
        if !silent.load(Relaxed) && to.write_all(&bytes[..length]).is_err() {
            break;
        }
    }
    if !silent.load(Relaxed) {
        let _ = to.shutdown(Shutdown::Both);
    }
}
