//! The sockets: queries by UDP and TCP, each answered as soon as it can be.
//!
//! In: bound sockets. Out: replies. Local names are answered in place; what has to be asked upstream waits in a task of
//! its own, so that it holds up no other query. Connections are bounded in number, for each client and in all, and in how
//! long they may say nothing.
//!
//! The sockets are read here and not by hickory's own server, because that makes a task of every datagram, without a
//! bound, and writes two lines of log for each.

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
use crate::places::{Place, Places};

/// The largest query that is read; more is cut off, and then no query any more.
const LARGEST_QUERY: usize = 4096;
/// Datagrams answered before other tasks get their turn.
const IN_A_ROW: usize = 64;
/// How long a connection may say nothing, and how long the client may take to read a reply.
const IDLE: Duration = Duration::from_secs(10);
/// How long the client may take to end a connection that weir ends.
const ENDING: Duration = Duration::from_secs(2);
/// Questions that may wait for the upstream on one connection before no more queries are read, which holds up this client
/// alone (RFC 7766, 6.2.1.1). It is more than a client may have under way, so names of the cluster are answered behind as
/// many slow ones as there can be.
const MOST_WAITING: usize = 128;

/// Everything a query needs.
#[derive(Debug)]
pub struct Responder {
    /// What is known.
    pub replier: Replier,
    /// Who knows the rest.
    pub forwarder: Forwarder,
    /// Who is answered.
    pub limits: Limits,
    /// Room for connections, at all addresses together.
    pub places: Places,
    /// What was answered.
    pub counters: Counters,
}

impl Responder {
    /// What to do about the bytes of a query.
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

    /// The reply to a query that waits for the upstream.
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

/// Answers what comes by a UDP socket, for ever.
pub async fn datagrams(responder: Arc<Responder>, socket: UdpSocket) {
    let socket = Arc::new(socket);
    let mut waiting = JoinSet::new();
    let mut buffer = vec![0; LARGEST_QUERY];
    loop {
        if socket.readable().await.is_err() {
            // The socket says why when it is read.
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        for _ in 0..IN_A_ROW {
            let (len, from) = match socket.try_recv_from(&mut buffer) {
                Ok(received) => received,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                // Somebody to whom we replied has gone: nothing is lost.
                Err(_) => continue,
            };
            match responder.reply(&buffer[..len], from, Protocol::Udp) {
                Reply::Silence => {}
                // A full buffer loses datagrams as the network does.
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

/// Answers what comes by TCP, for ever.
pub async fn connections(responder: Arc<Responder>, listener: TcpListener) {
    let mut open = JoinSet::new();
    loop {
        let (stream, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors: the connections there are have to end first.
                tracing::debug!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        while open.try_join_next().is_some() {}
        let place = responder.places.take(from.ip());
        let responder = Arc::clone(&responder);
        open.spawn(async move { Connection::new(&responder, stream, from, place).serve().await });
    }
}

/// A connection, and what of it is read and written.
struct Connection<'a> {
    responder: &'a Responder,
    from: SocketAddr,
    place: Place,
    queries: FramedRead<OwnedReadHalf, LengthDelimitedCodec>,
    replies: OwnedWriteHalf,
}

impl<'a> Connection<'a> {
    fn new(responder: &'a Responder, stream: TcpStream, from: SocketAddr, place: Place) -> Self {
        let (reading, replies) = stream.into_split();
        let queries = LengthDelimitedCodec::builder().length_field_length(2).new_read(reading);
        Self { responder, from, place, queries, replies }
    }

    /// Answers until the client says no more, or what cannot be answered. Each reply goes as soon as it is ready (RFC 7766,
    /// 6.2.1.1).
    async fn serve(mut self) {
        let mut waiting = FuturesUnordered::new();
        loop {
            let bytes = tokio::select! {
                Some(bytes) = waiting.next() => bytes,
                query = timeout(IDLE, self.queries.next()), if waiting.len() < MOST_WAITING => {
                    let Ok(Some(Ok(query))) = query else { break };
                    self.place.used();
                    match self.responder.reply(&query, self.from, Protocol::Tcp) {
                        Reply::Silence => break,
                        Reply::Now(bytes, _) => Some(bytes),
                        Reply::Later(pending) => {
                            waiting.push(self.responder.ask(*pending, self.from.ip()));
                            continue;
                        }
                    }
                }
                () = self.place.lost() => return,
            };
            if let Some(bytes) = bytes
                && !self.send(&bytes).await
            {
                return;
            }
        }
        // No more queries are read, and the client still waits for these.
        while let Some(bytes) = waiting.next().await {
            if let Some(bytes) = bytes
                && !self.send(&bytes).await
            {
                return;
            }
        }
        self.close().await;
    }

    /// Sends a reply; false when the client does not take it.
    async fn send(&mut self, bytes: &[u8]) -> bool {
        let Ok(len) = u16::try_from(bytes.len()) else { return false };
        let framed = [&len.to_be_bytes()[..], bytes].concat();
        tokio::select! {
            sent = timeout(IDLE, self.replies.write_all(&framed)) => matches!(sent, Ok(Ok(()))),
            () = self.place.lost() => false,
        }
    }

    /// Ends the connection behind the last reply. The kernel resets one that is closed while there is something unread,
    /// and the client then loses replies that it has not read.
    async fn close(mut self) {
        if self.replies.shutdown().await.is_err() {
            return;
        }
        let reading = self.queries.get_mut();
        let mut unread = [0; 1024];
        let client_ends = async { while matches!(reading.read(&mut unread).await, Ok(1..)) {} };
        tokio::select! {
            _ = timeout(ENDING, client_ends) => {}
            () = self.place.lost() => {}
        }
    }
}
