//! Sends one question to the upstream's servers.
//!
//! In: a question with the bits that a client set in its query, and servers. Out: the whole response of one server.
//! Each question has a socket of its own, because an attacker then has to guess its port.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use futures::{StreamExt as _, stream::FuturesUnordered};
use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, Query, ResponseCode},
    rr::{Name, RecordType},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpStream, UdpSocket},
};

use super::encode::MOST_UDP;

/// The time limit for an answer. The resolvers of libc and of most runtimes give up after 5 s (`timeout` in
/// resolv.conf). A client that gets SERVFAIL earlier asks its next server; an answer after 5 s would be lost.
const PATIENCE: Duration = Duration::from_millis(4500);
/// After this time weir asks another server too. The first server may still answer, because it may wait for a slow
/// server itself.
const NEXT: Duration = Duration::from_millis(1500);
/// The least number of attempts before weir gives up.
const ATTEMPTS: usize = 3;
/// How long weir tries a late server after the others.
const REST: Duration = Duration::from_secs(10);

/// A question about a name outside the cluster. Questions that differ in any field may have different answers.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct UpstreamQuestion {
    /// In the client's case of letters.
    pub(crate) name: Name,
    pub(crate) kind: RecordType,
    /// RD: whether the server should resolve the name recursively.
    pub(crate) recursion: bool,
    /// AD: whether the client wants to know if the server validated the answer.
    pub(crate) authentic: bool,
    /// CD: whether the client validates the answer itself.
    pub(crate) unchecked: bool,
    /// Whether the query has EDNS, without which there are neither DO nor long answers by UDP.
    pub(crate) edns: bool,
    /// DO: whether the client wants signatures.
    pub(crate) dnssec: bool,
}

impl UpstreamQuestion {
    fn message(&self) -> Message {
        let mut message = Message::new(fastrand::u16(..), MessageType::Query, OpCode::Query);
        message.metadata.recursion_desired = self.recursion;
        message.metadata.authentic_data = self.authentic;
        message.metadata.checking_disabled = self.unchecked;
        message.add_query(Query::query(self.name.clone(), self.kind));
        if self.edns {
            message.edns.insert(Edns::new()).set_max_payload(MOST_UDP).set_dnssec_ok(self.dnssec);
        }
        message
    }
}

#[derive(Debug)]
pub(super) struct Server {
    pub(super) address: SocketAddr,
    late: Mutex<Option<Instant>>,
}

impl Server {
    pub(super) fn new(address: SocketAddr) -> Self {
        Self { address, late: Mutex::default() }
    }

    fn was_late(&self) -> bool {
        let late = *self.late.lock().unwrap_or_else(PoisonError::into_inner);
        late.is_some_and(|late| late.elapsed() < REST)
    }

    fn note(&self, late: bool) {
        *self.late.lock().unwrap_or_else(PoisonError::into_inner) = late.then(Instant::now);
    }
}

/// The first response of any server; `None` if no server answered in time.
pub(super) async fn exchange(servers: &[Arc<Server>], question: &UpstreamQuestion) -> Option<Message> {
    tokio::time::timeout(PATIENCE, ask_in_turn(&in_order(servers), question)).await.ok().flatten()
}

/// The servers in rotating order, late ones last.
fn in_order(servers: &[Arc<Server>]) -> Vec<Arc<Server>> {
    static TURN: AtomicUsize = AtomicUsize::new(0);
    let mut servers = servers.to_vec();
    let first = TURN.fetch_add(1, Ordering::Relaxed) % servers.len().max(1);
    servers.rotate_left(first);
    servers.sort_by_key(|server| server.was_late());
    servers
}

async fn ask_in_turn(servers: &[Arc<Server>], question: &UpstreamQuestion) -> Option<Message> {
    let mut attempts = FuturesUnordered::new();
    let mut turns = servers.iter().cycle().take(servers.len().max(ATTEMPTS));
    let mut asked_last = turns.next()?;
    attempts.push(attempt(asked_last, question));
    let mut next = tokio::time::interval_at(tokio::time::Instant::now() + NEXT, NEXT);
    loop {
        tokio::select! {
            _ = next.tick() => {
                asked_last.note(true);
                let Some(server) = turns.next() else { continue };
                asked_last = server;
                attempts.push(attempt(server, question));
            }
            Some((server, response)) = attempts.next() => match response {
                Ok(message) => {
                    server.note(false);
                    return Some(message);
                }
                Err(error) => {
                    tracing::debug!(server = %server.address, name = %question.name, %error, "an upstream server did not answer");
                    server.note(true);
                    match turns.next() {
                        Some(server) => {
                            asked_last = server;
                            attempts.push(attempt(server, question));
                            next.reset();
                        }
                        None if attempts.is_empty() => return None,
                        None => {}
                    }
                }
            },
        }
    }
}

async fn attempt<'a>(
    server: &'a Arc<Server>,
    question: &UpstreamQuestion,
) -> (&'a Arc<Server>, io::Result<Message>) {
    (server, ask(server.address, question).await)
}

/// Asks one server by UDP, and again by TCP if the response is truncated.
async fn ask(server: SocketAddr, question: &UpstreamQuestion) -> io::Result<Message> {
    let query = question.message();
    let bytes = query.to_vec().map_err(io::Error::other)?;
    let response = by_udp(server, &query, &bytes).await?;
    if response.metadata.truncation { by_tcp(server, &query, &bytes).await } else { Ok(response) }
}

async fn by_udp(server: SocketAddr, query: &Message, bytes: &[u8]) -> io::Result<Message> {
    let any: IpAddr = match server {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(server).await?;
    socket.send(bytes).await?;
    let mut buffer = vec![0; usize::from(u16::MAX)];
    loop {
        let len = socket.recv(&mut buffer).await?;
        // A datagram that does not answer this question may be forged, so weir waits for the real answer.
        if let Ok(response) = Message::from_vec(&buffer[..len])
            && answers(&response, query)
        {
            return Ok(response);
        }
    }
}

async fn by_tcp(server: SocketAddr, query: &Message, bytes: &[u8]) -> io::Result<Message> {
    let mut stream = TcpStream::connect(server).await?;
    let len = u16::try_from(bytes.len()).map_err(io::Error::other)?;
    stream.write_all(&[&len.to_be_bytes()[..], bytes].concat()).await?;
    let mut response = vec![0; stream.read_u16().await?.into()];
    stream.read_exact(&mut response).await?;
    let response = Message::from_vec(&response).map_err(io::Error::other)?;
    if answers(&response, query) { Ok(response) } else { Err(io::ErrorKind::InvalidData.into()) }
}

/// Whether a message answers the query. A server that cannot parse a query may leave the question out.
fn answers(response: &Message, query: &Message) -> bool {
    let refuses = response.queries.is_empty() && response.metadata.response_code != ResponseCode::NoError;
    response.metadata.id == query.metadata.id
        && response.metadata.message_type == MessageType::Response
        && (response.queries == query.queries || refuses)
}
