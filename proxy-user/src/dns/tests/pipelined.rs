//! Several queries on one connection while the first waits for the upstream.

use std::{
    net::SocketAddr,
    num::NonZeroU32,
    sync::{Arc, RwLock},
    time::Duration,
};

use hickory_proto::{
    op::{Message, MessageType, OpCode, Query as MessageQuery},
    rr::{Name, RecordType},
};
use prometheus_client::metrics::counter::Counter;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, UdpSocket},
    time::timeout,
};

use super::{
    super::{Counters, Forwarder, InFlight, Limits, Origin, Replier, Responder, connections},
    *,
};
use crate::{connection_limit::ConnectionLimit, fixture::service, model::Kind};

const DEADLINE: Duration = Duration::from_secs(20);

fn responder(upstream: SocketAddr) -> Arc<Responder> {
    let names = names([
        service("web", json!({ "clusterIP": "10.0.0.1", "ports": [{ "name": "http", "port": 80 }] })),
        Change::Synced(Kind::Service),
        Change::Synced(Kind::EndpointSlice),
    ]);
    let forwarder = Forwarder::new(zone().domain, InFlight::new(100, 100, Counter::default()));
    forwarder.set_servers(Origin::Given, &[upstream]);
    Arc::new(Responder {
        replier: Replier::new(Arc::new(RwLock::new(names)), zone()),
        forwarder,
        limits: Limits::new(NonZeroU32::new(1000).unwrap()),
        limit: ConnectionLimit::new(10, 10, Counter::default()),
        counters: Counters::default(),
    })
}

fn framed(id: u16, name: &str) -> Vec<u8> {
    let mut message = Message::new(id, MessageType::Query, OpCode::Query);
    message.add_query(MessageQuery::query(Name::from_ascii(name).unwrap(), RecordType::A));
    let bytes = message.to_vec().unwrap();
    [&u16::try_from(bytes.len()).unwrap().to_be_bytes()[..], &bytes].concat()
}

async fn read(stream: &mut TcpStream) -> Message {
    let len = timeout(DEADLINE, stream.read_u16()).await.unwrap().unwrap();
    let mut bytes = vec![0; len.into()];
    timeout(DEADLINE, stream.read_exact(&mut bytes)).await.unwrap().unwrap();
    Message::from_vec(&bytes).unwrap()
}

/// Answers the question without records, as a server does if the name has none of the type.
async fn answer(upstream: &UdpSocket) {
    let mut bytes = [0; 512];
    let (len, from) = timeout(DEADLINE, upstream.recv_from(&mut bytes)).await.unwrap().unwrap();
    let mut message = Message::from_vec(&bytes[..len]).unwrap();
    message.metadata.message_type = MessageType::Response;
    upstream.send_to(&message.to_vec().unwrap(), from).await.unwrap();
}

#[tokio::test]
async fn a_query_that_waits_for_the_upstream_delays_no_later_query() {
    let upstream = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let to = listener.local_addr().unwrap();
    let server = tokio::spawn(connections(responder(upstream.local_addr().unwrap()), listener));
    let mut stream = TcpStream::connect(to).await.unwrap();
    let queries = [framed(1, "slow.example."), framed(2, "web.ns.svc.cluster.local.")].concat();
    stream.write_all(&queries).await.unwrap();
    let first = read(&mut stream).await;
    assert_eq!((first.metadata.id, first.answers.len()), (2, 1), "the upstream has not answered");
    stream.shutdown().await.unwrap();
    answer(&upstream).await;
    assert_eq!(
        read(&mut stream).await.metadata.id,
        1,
        "the reply also goes to a client that has closed its side"
    );
    server.abort();
}

fn prefixed(bytes: &[u8]) -> Vec<u8> {
    [&u16::try_from(bytes.len()).unwrap().to_be_bytes()[..], bytes].concat()
}

#[tokio::test]
async fn after_a_malformed_message_all_replies_still_come() {
    let upstream = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let to = listener.local_addr().unwrap();
    let server = tokio::spawn(connections(responder(upstream.local_addr().unwrap()), listener));
    // Half a header; a response; a question that points to itself; and bytes that are too short for an id.
    let mut reply = Message::new(8, MessageType::Response, OpCode::Query).to_vec().unwrap();
    reply.extend([1, 2, 3]);
    let endless = [&[0, 9, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0][..], &[0xc0, 12, 0, 1, 0, 1]].concat();
    for last in [&[][..], &[7]] {
        let mut stream = TcpStream::connect(to).await.unwrap();
        let queries = [
            framed(1, "slow.example."),
            prefixed(&[0, 7, 1]),
            prefixed(&reply),
            prefixed(&endless),
            framed(2, "web.ns.svc.cluster.local."),
            prefixed(last),
            // weir does not read these, because it closes the connection.
            framed(3, "web.ns.svc.cluster.local.").repeat(100),
        ];
        stream.write_all(&queries.concat()).await.unwrap();
        for (id, code) in [
            (7, ResponseCode::FormErr),
            (8, ResponseCode::FormErr),
            (9, ResponseCode::FormErr),
            (2, ResponseCode::NoError),
        ] {
            let reply = read(&mut stream).await;
            assert_eq!((reply.metadata.id, reply.metadata.response_code), (id, code));
        }
        answer(&upstream).await;
        assert_eq!(read(&mut stream).await.metadata.id, 1, "the query came before the malformed messages");
        let end = timeout(DEADLINE, stream.read(&mut [0; 1])).await.unwrap();
        assert_eq!(end.unwrap(), 0, "the connection is not reset");
    }
    server.abort();
}

#[tokio::test]
async fn cluster_names_are_answered_behind_as_many_slow_questions_as_a_client_may_ask() {
    let upstream = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let to = listener.local_addr().unwrap();
    let server = tokio::spawn(connections(responder(upstream.local_addr().unwrap()), listener));
    let mut stream = TcpStream::connect(to).await.unwrap();
    let slow = (0..100).flat_map(|id| framed(id, &format!("slow-{id}.example.")));
    let queries: Vec<u8> = slow.chain(framed(1000, "web.ns.svc.cluster.local.")).collect();
    stream.write_all(&queries).await.unwrap();
    let first = read(&mut stream).await;
    assert_eq!((first.metadata.id, first.answers.len()), (1000, 1), "the upstream has not answered");
    server.abort();
}
