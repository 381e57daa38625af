//! Servers that answer every line or datagram with their own name and the client's address.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, mpsc},
    thread::JoinHandle,
};

use anyhow::{Context as _, Result};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream, UdpSocket},
    sync::oneshot,
};

use super::{Answer, Transport, client::bound, sctp};
use crate::netns::Namespace;

/// The ports every server listens on, by TCP, UDP and SCTP.
pub const SERVER_PORTS: [u16; 4] = [8080, 8081, 8082, 9999];

/// A server on all of [`SERVER_PORTS`], until dropped.
#[derive(Debug)]
pub struct Server {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Starts serving in a namespace as `name`, on these addresses; it listens once this returns. On an unspecified
    /// address it answers datagrams from whichever address the way back begins with.
    ///
    /// # Errors
    ///
    /// When a port cannot be listened on.
    pub fn start(namespace: &Namespace, name: &str, addresses: [IpAddr; 2]) -> Result<Self> {
        let (stop, stopped) = oneshot::channel();
        let (ready, listening) = mpsc::channel();
        let name: Arc<str> = name.into();
        let thread = namespace.thread(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let serving = runtime.and_then(|runtime| {
                let _inside = runtime.enter();
                listen(&name, addresses)?;
                Ok(runtime)
            });
            match serving {
                Ok(runtime) => {
                    let _ = ready.send(Ok(()));
                    let _ = runtime.block_on(stopped);
                }
                Err(error) => drop(ready.send(Err(error))),
            }
        })?;
        listening.recv()?.with_context(|| format!("cannot serve in {}", namespace.label()))?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Starts one task for each transport, address and port.
fn listen(name: &Arc<str>, addresses: [IpAddr; 2]) -> io::Result<()> {
    for address in addresses {
        for port in SERVER_PORTS {
            let at = SocketAddr::new(address, port);
            let name: Arc<str> = format!("{name}:{port}").into();
            let datagrams = UdpSocket::from_std(bound(Transport::Udp, at)?.into())?;
            tokio::spawn(answer_datagrams(datagrams, Arc::clone(&name)));
            let streams = bound(Transport::Tcp, at)?;
            streams.listen(1024)?;
            tokio::spawn(accept(TcpListener::from_std(streams.into())?, name));
        }
        // To tokio one socket that keeps the bounds of messages is like another.
        let raw = UdpSocket::from_std(bound(Transport::Sctp, SocketAddr::new(address, 0))?.into())?;
        tokio::spawn(answer_inits(raw, Arc::clone(name)));
    }
    Ok(())
}

fn answer(name: &Arc<str>, client: SocketAddr) -> Vec<u8> {
    let answer = Answer { backend: name.to_string(), client };
    let mut line = serde_json::to_vec(&answer).unwrap_or_default();
    line.push(b'\n');
    line
}

async fn answer_datagrams(socket: UdpSocket, name: Arc<str>) {
    let mut question = [0; 64];
    loop {
        // An error here is an earlier answer that could not be delivered: the client has gone.
        if let Ok((length, client)) = socket.recv_from(&mut question).await {
            // An answer that went astray: two servers would answer each other for ever.
            if question[..length].starts_with(b"{") {
                continue;
            }
            let _ = socket.send_to(&answer(&name, client), client).await;
        }
    }
}

async fn answer_inits(socket: UdpSocket, name: Arc<str>) {
    let mut bytes = [0; 512];
    loop {
        let Ok((length, mut client)) = socket.recv_from(&mut bytes).await else { continue };
        let Some(question) = sctp::Packet::decode(&bytes[..length], client.is_ipv4()) else { continue };
        if question.asks() && SERVER_PORTS.contains(&question.destination) {
            let name = format!("{name}:{}", question.destination).into();
            let reply = question.reply(answer(&name, SocketAddr::new(client.ip(), question.source)));
            client.set_port(0);
            let _ = socket.send_to(&reply.encode(), client).await;
        }
    }
}

async fn accept(listener: TcpListener, name: Arc<str>) {
    loop {
        if let Ok((stream, client)) = listener.accept().await {
            tokio::spawn(answer_lines(stream, client, Arc::clone(&name)));
        }
    }
}

async fn answer_lines(stream: TcpStream, client: SocketAddr, name: Arc<str>) {
    let (read, mut write) = stream.into_split();
    let mut lines = BufReader::new(read).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        let answer = answer(&name, client);
        // For people with a browser or curl.
        if line.starts_with("GET ") {
            let head =
                format!("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", answer.len());
            let _ = write.write_all(&[head.as_bytes(), &answer].concat()).await;
            return;
        }
        if write.write_all(&answer).await.is_err() {
            return;
        }
    }
}
