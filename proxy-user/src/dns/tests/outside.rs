//! Forwarded names: which question the upstream gets, and which records of its answers the client gets.

use std::{
    net::SocketAddr,
    sync::{Arc, RwLock},
    time::Duration,
};

use futures::future::join_all;
use hickory_net::xfer::Protocol;
use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, Query as MessageQuery},
    rr::{
        RData,
        rdata::{CNAME, NULL, SOA},
    },
};
use prometheus_client::metrics::counter::Counter;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, UdpSocket},
    time::timeout,
};

use super::{
    super::{Forwarder, InFlight, Origin, Replier, reply::Reply},
    *,
};
use crate::model::Kind;

const DEADLINE: Duration = Duration::from_secs(20);
const WWW: &str = "www.example.";

/// A responder, and the one server of its upstream.
struct Node {
    replier: Replier,
    forwarder: Forwarder,
    upstream: UdpSocket,
}

impl Node {
    async fn new() -> Self {
        let names = names([Change::Synced(Kind::Service), Change::Synced(Kind::EndpointSlice)]);
        let node = Self {
            replier: Replier::new(Arc::new(RwLock::new(names)), zone()),
            forwarder: Forwarder::new(zone().domain, InFlight::new(100, 100, Counter::default())),
            upstream: UdpSocket::bind("127.0.0.1:0").await.unwrap(),
        };
        node.forwarder.set_servers(Origin::Service, &[node.address()]);
        node
    }

    fn address(&self) -> SocketAddr {
        self.upstream.local_addr().unwrap()
    }

    async fn ask(&self, query: &Message) -> Message {
        let client: SocketAddr = "10.244.0.9:4321".parse().unwrap();
        let reply = match self.replier.reply(&query.to_vec().unwrap(), client, Protocol::Tcp) {
            Reply::Later(pending) => {
                let answer =
                    timeout(DEADLINE, self.forwarder.ask(&pending.question, client.ip())).await.unwrap();
                pending.reply(answer)
            }
            other => panic!("{other:?}"),
        };
        match reply {
            Reply::Now(bytes, _) => Message::from_vec(&bytes).unwrap(),
            other => panic!("{other:?}"),
        }
    }

    /// The next question that the server gets.
    async fn question(&self) -> (Message, SocketAddr) {
        let mut bytes = [0; 1500];
        let (len, from) = timeout(DEADLINE, self.upstream.recv_from(&mut bytes)).await.unwrap().unwrap();
        (Message::from_vec(&bytes[..len]).unwrap(), from)
    }

    /// Sends a query and lets the server answer once. Returns the question that the server got, and the reply.
    async fn ask_through(&self, query: &Message, answer: impl FnOnce(&mut Message)) -> (Message, Message) {
        let answers = async {
            let (asked, from) = self.question().await;
            let mut message = response(&asked);
            answer(&mut message);
            self.upstream.send_to(&message.to_vec().unwrap(), from).await.unwrap();
            asked
        };
        tokio::join!(answers, self.ask(query))
    }

    /// Whether the server has a question that it has not answered yet.
    fn was_asked(&self) -> bool {
        self.upstream.try_recv(&mut [0; 1500]).is_ok()
    }
}

fn response(asked: &Message) -> Message {
    let mut message = asked.clone();
    message.metadata.message_type = MessageType::Response;
    message.metadata.authentic_data = false;
    message
}

fn name(text: &str) -> Name {
    Name::from_ascii(text).unwrap()
}

fn query(text: &str, kind: RecordType) -> Message {
    let mut message = Message::new(7, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(MessageQuery::query(name(text), kind));
    message
}

fn address(text: &str) -> Record {
    Record::from_rdata(name(text), 60, RData::A(std::net::Ipv4Addr::new(192, 0, 2, 1).into()))
}

fn signature(text: &str, covered: RecordType) -> Record {
    let rdata = NULL::with([&u16::from(covered).to_be_bytes()[..], &[8; 40]].concat());
    Record::from_rdata(name(text), 60, RData::Unknown { code: RecordType::RRSIG, rdata })
}

fn soa(zone: &str) -> Record {
    Record::from_rdata(
        name(zone),
        60,
        RData::SOA(SOA::new(name("ns.example."), name("m.example."), 1, 2, 3, 4, 60)),
    )
}

fn alias(from: &str, to: &str) -> Record {
    Record::from_rdata(name(from), 60, RData::CNAME(CNAME(name(to))))
}

#[tokio::test]
async fn bits_of_a_query_reach_the_upstream_and_bits_of_its_response_reach_the_client() {
    let node = Node::new().await;
    let plain = query(WWW, RecordType::A);
    let mut validating = plain.clone();
    validating.metadata.authentic_data = true;
    validating.metadata.checking_disabled = true;
    validating.edns.insert(Edns::new()).set_dnssec_ok(true);

    let (asked, reply) = node
        .ask_through(&validating, |message| {
            message.metadata.authentic_data = true;
            message.insert_answers(vec![address(WWW), signature(WWW, RecordType::A)]);
        })
        .await;
    assert!(
        asked.metadata.authentic_data && asked.metadata.checking_disabled && asked.metadata.recursion_desired
    );
    assert!(asked.edns.unwrap().flags().dnssec_ok);
    let signed = reply.clone();
    assert!(
        reply.metadata.authentic_data && reply.metadata.checking_disabled && !reply.metadata.authoritative
    );
    assert!(reply.edns.unwrap().flags().dnssec_ok);
    assert_eq!(reply.answers, [address(WWW), signature(WWW, RecordType::A)]);

    // Another client sets no bits and gets another answer.
    let (asked, reply) = node.ask_through(&plain, |message| message.insert_answers(vec![address(WWW)])).await;
    assert!(!asked.metadata.authentic_data && !asked.metadata.checking_disabled && asked.edns.is_none());
    assert!(!reply.metadata.authentic_data && reply.edns.is_none());
    assert_eq!(reply.answers, [address(WWW)]);

    for (query, before) in [(validating, signed), (plain, reply)] {
        let again = node.ask(&query).await;
        assert_eq!(again.answers, before.answers);
        assert_eq!(again.metadata, before.metadata);
    }
    assert!(!node.was_asked(), "both answers are cached");
}

#[tokio::test]
async fn a_negative_answer_behind_aliases_has_its_soa_and_denials() {
    let node = Node::new().await;
    let mut question = query(WWW, RecordType::AAAA);
    question.edns.insert(Edns::new()).set_dnssec_ok(true);
    let denial = Record::from_rdata(
        name("cdn.example.net."),
        60,
        RData::Unknown { code: RecordType::NSEC, rdata: NULL::with(vec![0; 9]) },
    );
    let answers = vec![alias(WWW, "cdn.example.net."), signature(WWW, RecordType::CNAME)];
    let authorities = vec![soa("example.net."), signature("example.net.", RecordType::SOA), denial];
    let (_, reply) = node
        .ask_through(&question, |message| {
            message.insert_answers(answers.clone());
            message.insert_authorities(authorities.clone());
        })
        .await;
    assert_eq!(reply.metadata.response_code, ResponseCode::NoError);
    assert_eq!((&reply.answers, &reply.authorities), (&answers, &authorities));
    let again = node.ask(&question).await;
    assert_eq!((&again.answers, &again.authorities), (&answers, &authorities));
    assert!(!node.was_asked(), "the answer is cached");
}

#[tokio::test]
async fn a_dname_comes_with_the_alias_made_of_it() {
    let node = Node::new().await;
    let dname = Record::from_rdata(
        name("example."),
        60,
        RData::Unknown { code: RecordType::DNAME, rdata: NULL::with(vec![3, b'n', b'e', b't', 0]) },
    );
    let answers =
        vec![dname, signature("example.", RecordType::DNAME), alias(WWW, "www.net."), address("www.net.")];
    let (_, reply) =
        node.ask_through(&query(WWW, RecordType::A), |message| message.insert_answers(answers.clone())).await;
    assert_eq!(reply.answers, answers);
}

#[tokio::test]
async fn records_of_the_upstream_about_cluster_names_are_dropped() {
    let node = Node::new().await;
    let own = "web.ns.svc.cluster.local.";
    let (_, reply) = node
        .ask_through(&query(WWW, RecordType::A), |message| {
            message.insert_answers(vec![alias(WWW, own), address(own), address("other.example.")]);
            message.insert_authorities(vec![soa("cluster.local.")]);
        })
        .await;
    assert_eq!((reply.answers, reply.authorities.len()), (vec![alias(WWW, own)], 0));
}

#[tokio::test]
async fn response_codes_of_the_upstream_are_passed_on_and_not_cached() {
    let node = Node::new().await;
    for code in [ResponseCode::NotImp, ResponseCode::Refused, ResponseCode::ServFail, ResponseCode::FormErr] {
        let (_, reply) = node
            .ask_through(&query(WWW, RecordType::A), |message| message.metadata.response_code = code)
            .await;
        assert_eq!(reply.metadata.response_code, code);
    }
}

#[tokio::test]
async fn weir_waits_for_an_upstream_that_takes_three_seconds() {
    let node = Node::new().await;
    let question = query(WWW, RecordType::A);
    let answers = async {
        let (asked, from) = node.question().await;
        // The server's slowness, which this test is about.
        tokio::time::sleep(Duration::from_secs(3)).await;
        let mut message = response(&asked);
        message.add_answer(address(WWW));
        node.upstream.send_to(&message.to_vec().unwrap(), from).await.unwrap();
    };
    let ((), reply) = tokio::join!(answers, node.ask(&question));
    assert_eq!((reply.metadata.response_code, reply.answers), (ResponseCode::NoError, vec![address(WWW)]));
}

#[tokio::test]
async fn the_cache_stays_when_an_endpoint_of_the_service_changes() {
    let node = Node::new().await;
    let question = query(WWW, RecordType::A);
    let answers = |message: &mut Message| message.insert_answers(vec![address(WWW)]);
    node.ask_through(&question, answers).await;
    let other: SocketAddr = "127.0.0.1:9".parse().unwrap();
    for servers in [&[node.address(), other][..], &[other], &[], &[node.address()]] {
        node.forwarder.set_servers(Origin::Service, servers);
        let reply = node.ask(&question).await;
        assert_eq!(reply.answers, [address(WWW)], "upstream: {servers:?}");
    }
    assert!(!node.was_asked());
    // Servers of another origin may know other names.
    node.forwarder.set_servers(Origin::Node, &[node.address()]);
    let (asked, _) = node.ask_through(&question, answers).await;
    assert_eq!(asked.queries, question.queries);
}

#[tokio::test]
async fn after_a_server_that_refuses_the_next_one_is_asked() {
    let node = Node::new().await;
    let gone = UdpSocket::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    node.forwarder.set_servers(Origin::Service, &[gone, node.address()]);
    // Each server is the first in turn.
    for host in ["a.example.", "b.example.", "c.example."] {
        let (_, reply) = node
            .ask_through(&query(host, RecordType::A), |message| message.insert_answers(vec![address(host)]))
            .await;
        assert_eq!(reply.answers, [address(host)]);
    }
}

#[tokio::test]
async fn the_same_question_of_several_clients_is_forwarded_once() {
    let node = Node::new().await;
    let question = query(WWW, RecordType::A);
    let answers = async {
        let (asked, from) = node.question().await;
        assert!(!node.was_asked(), "all clients have asked by now");
        let mut message = response(&asked);
        message.add_answer(address(WWW));
        node.upstream.send_to(&message.to_vec().unwrap(), from).await.unwrap();
    };
    let clients = join_all((0..20).map(|_| node.ask(&question)));
    let (replies, ()) = tokio::join!(clients, answers);
    assert!(replies.iter().all(|reply| reply.answers == [address(WWW)]));
    assert!(!node.was_asked());
}

#[tokio::test]
async fn a_truncated_response_is_asked_for_again_by_tcp() {
    let node = Node::new().await;
    let listener = TcpListener::bind(node.address()).await.unwrap();
    let all: Vec<Record> = (0..600_u16)
        .map(|number| {
            let [high, low] = number.to_be_bytes();
            Record::from_rdata(name(WWW), 60, RData::A(std::net::Ipv4Addr::new(192, 0, high, low).into()))
        })
        .collect();
    let by_tcp = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut bytes = vec![0; stream.read_u16().await.unwrap().into()];
        stream.read_exact(&mut bytes).await.unwrap();
        let mut message = response(&Message::from_vec(&bytes).unwrap());
        message.insert_answers(all.clone());
        let bytes = message.to_vec().unwrap();
        stream.write_u16(bytes.len().try_into().unwrap()).await.unwrap();
        stream.write_all(&bytes).await.unwrap();
    };
    let question = query(WWW, RecordType::A);
    let by_udp = node.ask_through(&question, |message| message.metadata.truncation = true);
    let ((), (_, reply)) = tokio::join!(by_tcp, by_udp);
    assert_eq!(reply.answers, all);
    assert_eq!(node.ask(&question).await.answers.len(), 600, "the answer is cached");
    assert!(!node.was_asked());
}
