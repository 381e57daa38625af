//! Queries as bytes: well-formed, truncated and malicious ones.

use std::{
    net::SocketAddr,
    sync::{Arc, RwLock},
};

use hickory_net::xfer::Protocol;
use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, Query as MessageQuery},
    rr::{DNSClass, RData},
};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::{
    super::{Replier, reply::Reply},
    *,
};
use crate::{
    fixture::{service, slice},
    model::Kind,
};

fn replier() -> Replier {
    let endpoints: Vec<Value> =
        (0..200).map(|last| json!({ "addresses": [format!("10.1.0.{last}")] })).collect();
    let names = names([
        service("web", json!({ "clusterIP": "10.0.0.1", "ports": [{ "name": "http", "port": 80 }] })),
        service("db", json!({ "clusterIP": "None", "ports": [{ "name": "sql", "port": 1 }] })),
        service("out", json!({ "type": "ExternalName", "externalName": "www.example.com" })),
        slice("db", "db", json!([{ "name": "sql", "port": 1 }]), Value::Array(endpoints)),
        Change::Synced(Kind::Service),
        Change::Synced(Kind::EndpointSlice),
    ]);
    Replier::new(Arc::new(RwLock::new(names)), zone())
}

fn from() -> SocketAddr {
    "10.244.0.9:4321".parse().unwrap()
}

fn query(name: &str, kind: &str) -> Message {
    of_kind(name, kind.parse().unwrap())
}

fn of_kind(name: &str, kind: RecordType) -> Message {
    let mut message = Message::new(7, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(MessageQuery::query(Name::from_ascii(name).unwrap(), kind));
    message
}

fn by(protocol: Protocol, message: &Message) -> Option<Message> {
    match replier().reply(&message.to_vec().unwrap(), from(), protocol) {
        Reply::Now(bytes, code) => {
            let reply = Message::from_vec(&bytes).unwrap();
            assert_eq!(reply.metadata.response_code.low(), code.low());
            Some(reply)
        }
        Reply::Silence => None,
        Reply::Later(pending) => panic!("{} is forwarded", pending.question.name),
    }
}

fn code(message: &Message) -> ResponseCode {
    by(Protocol::Udp, message).unwrap().metadata.response_code
}

#[test]
fn a_reply_has_the_question_in_its_own_case_and_an_answer() {
    let reply = by(Protocol::Udp, &query("wEB.ns.svc.cluster.LOCAL.", "A")).unwrap();
    assert_eq!((reply.metadata.id, reply.metadata.message_type), (7, MessageType::Response));
    assert!(
        reply.metadata.authoritative
            && reply.metadata.recursion_desired
            && reply.metadata.recursion_available
    );
    assert_eq!(reply.queries[0].name().to_string(), "wEB.ns.svc.cluster.LOCAL.");
    assert_eq!(reply.answers[0].to_string(), "wEB.ns.svc.cluster.LOCAL. 5 IN A 10.0.0.1");
    assert_eq!(reply.edns, None);
}

#[test]
fn a_query_with_edns_gets_edns_back() {
    let mut message = query("web.ns.svc.cluster.local.", "A");
    message.set_edns(Edns::new());
    assert_eq!(by(Protocol::Udp, &message).unwrap().edns.unwrap().max_payload(), 1232);
    message.edns.as_mut().unwrap().set_version(1);
    let reply = by(Protocol::Udp, &message).unwrap();
    // The code 16 is BADVERS and BADSIG, and the parser calls it BADSIG.
    assert_eq!((u16::from(reply.metadata.response_code), reply.answers.len()), (16, 0));
}

#[test]
fn a_reply_without_room_for_all_answers_is_truncated() {
    let mut message = query("db.ns.svc.cluster.local.", "A");
    for (payload, least, most) in
        [(None, 20, 512), (Some(100), 20, 512), (Some(900), 40, 900), (Some(4096), 60, 1232)]
    {
        if let Some(payload) = payload {
            message.edns.insert(Edns::new()).set_max_payload(payload);
        }
        let Reply::Now(bytes, _) = replier().reply(&message.to_vec().unwrap(), from(), Protocol::Udp) else {
            panic!()
        };
        let reply = Message::from_vec(&bytes).unwrap();
        assert!(reply.metadata.truncation && bytes.len() <= most, "{payload:?}: {} bytes", bytes.len());
        assert!(reply.answers.len() >= least, "{payload:?}: {}", reply.answers.len());
        assert_eq!(reply.edns.is_some(), payload.is_some());
    }
    let whole = by(Protocol::Tcp, &message).unwrap();
    assert_eq!((whole.answers.len(), whole.metadata.truncation), (200, false));
}

#[test]
fn additional_records_are_left_out_first() {
    // Eight SRV records have room, but not the addresses of their targets.
    let names = names([
        service("db", json!({ "clusterIP": "None", "ports": [{ "name": "sql", "port": 1 }] })),
        slice(
            "db",
            "db",
            json!([{ "name": "sql", "port": 1 }]),
            Value::Array((0..8).map(|last| json!({ "addresses": [format!("10.1.0.{last}")] })).collect()),
        ),
        Change::Synced(Kind::Service),
        Change::Synced(Kind::EndpointSlice),
    ]);
    let replier = Replier::new(Arc::new(RwLock::new(names)), zone());
    let message = query("_sql._tcp.db.ns.svc.cluster.local.", "SRV").to_vec().unwrap();
    let Reply::Now(bytes, _) = replier.reply(&message, from(), Protocol::Udp) else { panic!() };
    let reply = Message::from_vec(&bytes).unwrap();
    assert_eq!(
        (reply.answers.len(), reply.additionals.len(), reply.metadata.truncation),
        (8, 0, false),
        "{} bytes",
        bytes.len()
    );
}

#[test]
fn zone_transfers_are_refused() {
    for kind in [RecordType::AXFR, RecordType::IXFR] {
        for protocol in [Protocol::Udp, Protocol::Tcp] {
            let reply = by(protocol, &of_kind("cluster.local.", kind)).unwrap();
            assert_eq!(
                (reply.metadata.response_code, reply.answers.len()),
                (ResponseCode::Refused, 0),
                "{kind}"
            );
        }
    }
    assert_eq!(code(&query("example.com.", "ANY")), ResponseCode::NotImp);
}

#[test]
fn other_classes_operations_and_numbers_of_questions_get_their_code() {
    for class in [DNSClass::CH, DNSClass::HS, DNSClass::ANY, DNSClass::NONE] {
        let mut message = query("web.ns.svc.cluster.local.", "A");
        message.queries[0].set_query_class(class);
        assert_eq!(code(&message), ResponseCode::Refused, "{class}");
    }
    for operation in [OpCode::Status, OpCode::Notify, OpCode::Update] {
        let mut message = query("web.ns.svc.cluster.local.", "A");
        message.metadata.op_code = operation;
        assert_eq!(code(&message), ResponseCode::NotImp, "{operation:?}");
    }
    let mut twice = query("web.ns.svc.cluster.local.", "A");
    twice.queries.push(twice.queries[0].clone());
    assert_eq!(code(&twice), ResponseCode::FormErr);
    assert_eq!(code(&Message::new(1, MessageType::Query, OpCode::Query)), ResponseCode::FormErr);
    assert_eq!(code(&of_kind("web.ns.svc.cluster.local.", RecordType::OPT)), ResponseCode::FormErr);
}

#[test]
fn responses_get_no_reply() {
    let mut message = query("web.ns.svc.cluster.local.", "A");
    message.metadata.message_type = MessageType::Response;
    assert_eq!(by(Protocol::Udp, &message), None);
}

/// A header with these counts, and bytes after it.
fn raw(counts: [u16; 4], rest: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0, 7, 1, 0];
    counts.iter().for_each(|count| bytes.extend(count.to_be_bytes()));
    bytes.extend(rest);
    bytes
}

#[test]
fn harmful_bytes_get_a_code_or_nothing() {
    let question = [&[0xc0, 12][..], &[0, 1, 0, 1]].concat();
    let long = [&[63][..], &[b'a'; 63]].concat().repeat(5);
    let cases: [(&str, Vec<u8>, Option<ResponseCode>); 8] = [
        ("nothing", Vec::new(), None),
        ("half a header", raw([1, 0, 0, 0], &[])[..11].to_vec(), None),
        ("a name that points to itself", raw([1, 0, 0, 0], &question), Some(ResponseCode::FormErr)),
        (
            "names that point to each other",
            raw([1, 0, 0, 0], &[0xc0, 14, 0xc0, 12, 0, 1, 0, 1]),
            Some(ResponseCode::FormErr),
        ),
        (
            "a name that points ahead",
            raw([1, 0, 0, 0], &[0xc0, 200, 0, 1, 0, 1]),
            Some(ResponseCode::FormErr),
        ),
        ("a name that does not end", raw([1, 0, 0, 0], &long), Some(ResponseCode::FormErr)),
        (
            "more questions than there are bytes",
            raw([65535, 0, 0, 0], &[0, 0, 1, 0, 1]),
            Some(ResponseCode::FormErr),
        ),
        (
            "more records than there are bytes",
            raw([1, 65535, 65535, 65535], &[0, 0, 1, 0, 1]),
            Some(ResponseCode::FormErr),
        ),
    ];
    for (what, bytes, wanted) in cases {
        match (replier().reply(&bytes, from(), Protocol::Udp), wanted) {
            (Reply::Now(_, code), Some(wanted)) => assert_eq!(code, wanted, "{what}"),
            (Reply::Silence, None) => {}
            (other, wanted) => panic!("{what}: {other:?} instead of {wanted:?}"),
        }
    }
}

#[test]
fn the_upstreams_answer_comes_after_the_alias_that_led_to_it() {
    let message = query("out.ns.svc.cluster.local.", "A").to_vec().unwrap();
    let pending = || match replier().reply(&message, from(), Protocol::Udp) {
        Reply::Later(pending) => pending,
        other => panic!("{other:?}"),
    };
    let address = Record::from_rdata(
        Name::from_ascii("www.example.com.").unwrap(),
        60,
        RData::A(std::net::Ipv4Addr::new(192, 0, 2, 1).into()),
    );
    let answer =
        Answer { answers: vec![address], authentic: true, ..Answer::without_records(ResponseCode::NoError) };
    let reply = |upstream| match pending().reply(upstream) {
        Reply::Now(bytes, _) => Message::from_vec(&bytes).unwrap(),
        other => panic!("{other:?}"),
    };
    assert_eq!(pending().question.name.to_string(), "www.example.com.");
    let lines: Vec<String> = reply(Some(answer)).answers.iter().map(ToString::to_string).collect();
    assert_eq!(
        lines,
        ["out.ns.svc.cluster.local. 5 IN CNAME www.example.com.", "www.example.com. 60 IN A 192.0.2.1",]
    );
    let alone = reply(None);
    assert_eq!((alone.metadata.response_code, alone.answers.len()), (ResponseCode::NoError, 1));
}

/// While an agent starts, before all lists of the API server are complete.
#[test]
fn before_all_lists_are_complete_unknown_names_are_not_denied() {
    let names = Arc::new(RwLock::new(names([Change::Synced(Kind::Service)])));
    let replier = Replier::new(Arc::clone(&names), zone());
    let code = |name| match replier.reply(&query(name, "A").to_vec().unwrap(), from(), Protocol::Udp) {
        Reply::Now(_, code) => Some(code),
        Reply::Later(_) => None,
        Reply::Silence => panic!("{name} has no answer"),
    };
    assert_eq!(code("web.ns.svc.cluster.local."), Some(ResponseCode::ServFail));
    assert_eq!(code("www.example.com."), None, "it is forwarded");
    names.write().unwrap().apply(&Change::Synced(Kind::EndpointSlice));
    assert_eq!(code("web.ns.svc.cluster.local."), Some(ResponseCode::NXDomain));
}

/// A query with some bytes changed.
fn mutated() -> impl Strategy<Value = Vec<u8>> {
    let names = prop_oneof![
        Just("web.ns.svc.cluster.local.".to_owned()),
        Just("_sql._tcp.db.ns.svc.cluster.local.".to_owned()),
        Just("10-1-2-3.ns.pod.cluster.local.".to_owned()),
        Just("1.0.1.10.in-addr.arpa.".to_owned()),
        "([a-zA-Z0-9_-]{1,20}\\.){0,6}cluster\\.local\\.",
        "([a-z0-9]\\.){30,34}ip6\\.arpa\\.",
    ];
    let whole = (names, any::<u16>(), any::<bool>()).prop_filter_map("no name", |(name, kind, edns)| {
        let mut message = Message::new(7, MessageType::Query, OpCode::Query);
        message.add_query(MessageQuery::query(Name::from_ascii(name).ok()?, RecordType::from(kind % 300)));
        if edns {
            message.set_edns(Edns::new());
        }
        message.to_vec().ok()
    });
    let hits = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6);
    (whole, hits, any::<prop::sample::Index>(), any::<bool>()).prop_map(|(mut bytes, hits, end, cut)| {
        hits.into_iter().for_each(|(place, byte)| *place.get_mut(&mut bytes) = byte);
        if cut {
            bytes.truncate(end.index(bytes.len()));
        }
        bytes
    })
}

/// Checks that a reply can be parsed, has the query's id, and fits into its protocol's limit.
fn check(replier: &Replier, bytes: &[u8]) {
    for (protocol, most) in [(Protocol::Udp, 1232), (Protocol::Tcp, 65535)] {
        if let Reply::Now(reply, _) = replier.reply(bytes, from(), protocol) {
            let message = Message::from_vec(&reply).expect("what is sent can be read");
            assert_eq!(message.metadata.id.to_be_bytes(), bytes[..2]);
            assert_eq!(message.metadata.message_type, MessageType::Response);
            assert!(reply.len() <= most);
        }
    }
}

proptest! {
    #[test]
    fn random_bytes_do_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        check(&replier(), &bytes);
    }

    #[test]
    fn mutated_queries_do_no_harm(all in prop::collection::vec(mutated(), 1..20)) {
        let replier = replier();
        all.iter().for_each(|bytes| check(&replier, bytes));
    }
}
