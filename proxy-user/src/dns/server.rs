//! The sockets: queries by UDP and TCP, each answered as soon as possible.
//!
//! In: bound sockets. Out: replies. Cluster names are answered at once; a question to the upstream waits in a task of
//! its own and delays no other query. The number of connections is limited, per client and in total, and so is their
//! idle time.
//!
//! This file reads the sockets instead of hickory's server, because that server spawns a task for every datagram,
//! without a limit, and writes two log lines for each.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use futures::{StreamExt as _, stream::FuturesUnordered};
use hickory_net::xfer::Protocol;
use hickory_proto::op::ResponseCode;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream, UdpSocket,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    task::JoinSet,
    time::timeout,
};
use tokio_util::codec::{FramedRead, LengthDelimitedCodec};

use super::{
    Counters,
    counters::Outcome,
    forward::Forwarder,
    limits::{Admission, Limits},
    reply::{Pending, Replier, Reply},
};
use crate::connection_limit::{ConnectionLimit, Permit};

/// The largest datagram that weir reads. The kernel cuts off the rest, so a longer query is malformed.
const LARGEST_QUERY: usize = 4096;
/// Datagrams answered before other tasks get their turn.
const IN_A_ROW: usize = 64;
/// How long a connection may be idle, and how long the client may take to read a reply.
const IDLE: Duration = Duration::from_secs(10);
/// How long the client may take to close its side after weir has closed its own.
const ENDING: Duration = Duration::from_secs(2);
/// Questions of one connection that may wait for the upstream. With more, weir stops reading this connection, which
/// delays only its client (RFC 7766, 6.2.1.1). The limit is above the number of questions that one client may have in
/// flight, so slow questions never delay cluster names.
const MOST_WAITING: usize = 128;

/// The state that all sockets share.
#[derive(Debug)]
pub(crate) struct Responder {
    /// Answers the cluster's names.
    pub(crate) replier: Replier,
    /// Answers other names.
    pub(crate) forwarder: Forwarder,
    /// Decides which clients get answers.
    pub(crate) limits: Limits,
    /// Limits the connections at all addresses together.
    pub(crate) limit: ConnectionLimit,
    /// Counts queries by outcome.
    pub(crate) counters: Counters,
}

impl Responder {
    /// Answers the bytes of a query, or returns it to be forwarded.
    fn reply(&self, bytes: &[u8], from: SocketAddr, protocol: Protocol) -> Reply {
        let reply = match self.limits.admit(from.ip()) {
            Admission::Answer => self.replier.reply(bytes, from, protocol),
            Admission::Refuse => {
                self.counters.count(Outcome::Stranger);
                return Replier::refuse(bytes);
            }
            Admission::Drop => {
                self.counters.count(Outcome::Dropped);
                return Reply::Silence;
            }
        };
        match &reply {
            Reply::Now(_, code) => self.counters.count(Outcome::of(*code)),
            Reply::Later(_) => self.counters.count(Outcome::Forwarded),
            Reply::Silence => self.counters.count(Outcome::Ignored),
        }
        reply
    }

    /// Forwards a query and returns the reply.
    async fn ask(&self, pending: Pending, client: IpAddr) -> Option<Vec<u8>> {
        let upstream = self.forwarder.ask(&pending.question, client).await;
        let failed = upstream.as_ref().is_some_and(|answer| answer.code == ResponseCode::ServFail);
        if failed {
            self.counters.count(Outcome::UpstreamFailed);
        }
        match pending.reply(upstream) {
            Reply::Now(bytes, _) => Some(bytes),
            Reply::Later(_) | Reply::Silence => None,
        }
    }
}

/// Answers queries of a UDP socket, for ever.
pub(crate) async fn datagrams(responder: Arc<Responder>, socket: UdpSocket) {
    let socket = Arc::new(socket);
    let mut waiting = JoinSet::new();
    let mut buffer = vec![0; LARGEST_QUERY];
    loop {
        if socket.readable().await.is_err() {
            // The next read returns the error.
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        for _ in 0..IN_A_ROW {
            let (len, from) = match socket.try_recv_from(&mut buffer) {
                Ok(received) => received,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                // An ICMP error about an earlier reply, whose client is gone.
                Err(_) => continue,
            };
            match responder.reply(&buffer[..len], from, Protocol::Udp) {
                Reply::Silence => {}
                // If the send buffer is full, the reply is lost, as it could be in the network.
                Reply::Now(bytes, _) => _ = socket.try_send_to(&bytes, from),
                Reply::Later(pending) => {
                    let (responder, socket) = (Arc::clone(&responder), Arc::clone(&socket));
                    waiting.spawn(async move {
                        if let Some(bytes) = responder.ask(*pending, from.ip()).await {
                            _ = socket.send_to(&bytes, from).await;
                        }
                    });
                }
            }
        }
        while waiting.try_join_next().is_some() {}
        tokio::task::yield_now().await;
    }
}

/// Answers queries on TCP connections, for ever.
pub(crate) async fn connections(responder: Arc<Responder>, listener: TcpListener) {
    let mut open = JoinSet::new();
    loop {
        let (stream, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Usually no descriptor is free until other connections end.
                tracing::debug!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        while open.try_join_next().is_some() {}
        let permit = responder.limit.admit(from.ip());
        let responder = Arc::clone(&responder);
        open.spawn(async move { Connection::new(&responder, stream, from, permit).serve().await });
    }
}

/// A TCP connection of a client.
struct Connection<'a> {
    responder: &'a Responder,
    from: SocketAddr,
    permit: Permit,
    queries: FramedRead<OwnedReadHalf, LengthDelimitedCodec>,
    replies: OwnedWriteHalf,
}

impl<'a> Connection<'a> {
    fn new(responder: &'a Responder, stream: TcpStream, from: SocketAddr, permit: Permit) -> Self {
        let (reading, replies) = stream.into_split();
        let queries = LengthDelimitedCodec::builder().length_field_length(2).new_read(reading);
        Self { responder, from, permit, queries, replies }
    }

    /// Answers until the client closes its side or sends bytes that cannot be answered. Sends each reply as soon as
    /// it is ready (RFC 7766, 6.2.1.1).
    async fn serve(mut self) {
        let mut waiting = FuturesUnordered::new();
        loop {
            let bytes = tokio::select! {
                Some(bytes) = waiting.next() => bytes,
                query = timeout(IDLE, self.queries.next()), if waiting.len() < MOST_WAITING => {
                    let Ok(Some(Ok(query))) = query else { break };
                    self.permit.touch();
                    match self.responder.reply(&query, self.from, Protocol::Tcp) {
                        Reply::Silence => break,
                        Reply::Now(bytes, _) => Some(bytes),
                        Reply::Later(pending) => {
                            waiting.push(self.responder.ask(*pending, self.from.ip()));
                            continue;
                        }
                    }
                }
                () = self.permit.revoked() => return,
            };
            if let Some(bytes) = bytes
                && !self.send(&bytes).await
            {
                return;
            }
        }
        // weir reads no more queries, but the client still waits for these replies.
        while let Some(bytes) = waiting.next().await {
            if let Some(bytes) = bytes
                && !self.send(&bytes).await
            {
                return;
            }
        }
        self.close().await;
    }

    /// Sends a reply; false if the client does not read it in time.
    async fn send(&mut self, bytes: &[u8]) -> bool {
        let Ok(len) = u16::try_from(bytes.len()) else { return false };
        let framed = [&len.to_be_bytes()[..], bytes].concat();
        tokio::select! {
            sent = timeout(IDLE, self.replies.write_all(&framed)) => matches!(sent, Ok(Ok(()))),
            () = self.permit.revoked() => false,
        }
    }

    /// Closes the connection after the last reply. It first reads what the client still sends, because the kernel
    /// resets a connection that is closed with unread data, and the client would lose replies.
    async fn close(mut self) {
        if self.replies.shutdown().await.is_err() {
            return;
        }
        let reading = self.queries.get_mut();
        let mut unread = [0; 1024];
        let client_ends = async { while matches!(reading.read(&mut unread).await, Ok(1..)) {} };
        tokio::select! {
            _ = timeout(ENDING, client_ends) => {}
            () = self.permit.revoked() => {}
        }
    }
}
