//! Replies with more records than a message has room for.

use std::{
    net::SocketAddr,
    sync::{Arc, RwLock},
};

use hickory_net::xfer::Protocol;
use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, Query as MessageQuery},
    rr::{RData, rdata::CNAME},
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

const WHOLE: &str = "db.ns.svc.cluster.local.";
const PORT: &str = "_sql._tcp.db.ns.svc.cluster.local.";
const ALIAS: &str = "alias.ns.svc.cluster.local.";

/// Names of a headless Service with this number of endpoints, and of an alias of it.
fn replier(endpoints: u16) -> Replier {
    let addresses: Vec<Value> = (0..endpoints)
        .map(|number| json!({ "addresses": [format!("10.1.{}.{}", number >> 8, number & 255)] }))
        .collect();
    let ports = json!([{ "name": "sql", "port": 1 }]);
    // A slice has at most 1000 endpoints.
    let slices: Vec<Change> = addresses
        .chunks(1000)
        .enumerate()
        .map(|(number, part)| {
            slice(&format!("db-{number}"), "db", ports.clone(), Value::Array(part.to_vec()))
        })
        .collect();
    let names = names(
        [
            service("db", json!({ "clusterIP": "None", "ports": [{ "name": "sql", "port": 1 }] })),
            service("alias", json!({ "type": "ExternalName", "externalName": WHOLE })),
            Change::Synced(Kind::Service),
            Change::Synced(Kind::EndpointSlice),
        ]
        .into_iter()
        .chain(slices),
    );
    Replier::new(Arc::new(RwLock::new(names)), zone())
}

fn ask(replier: &Replier, name: &str, kind: RecordType, protocol: Protocol, payload: Option<u16>) -> Vec<u8> {
    let mut message = Message::new(7, MessageType::Query, OpCode::Query);
    message.add_query(MessageQuery::query(Name::from_ascii(name).unwrap(), kind));
    if let Some(payload) = payload {
        message.edns.insert(Edns::new()).set_max_payload(payload);
    }
    let from: SocketAddr = "10.244.0.9:4321".parse().unwrap();
    match replier.reply(&message.to_vec().unwrap(), from, protocol) {
        Reply::Now(bytes, _) => bytes,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_large_headless_service_has_as_many_addresses_by_tcp_as_a_message_holds() {
    for (endpoints, wanted) in [(4000, 4000..=4000), (5000, 4090..=4093)] {
        for name in [WHOLE, ALIAS] {
            let bytes = ask(&replier(endpoints), name, RecordType::A, Protocol::Tcp, Some(1232));
            let reply = Message::from_vec(&bytes).unwrap();
            let addresses = reply.answers.iter().filter(|record| matches!(record.data, RData::A(_))).count();
            assert!(wanted.contains(&addresses), "{name} of {endpoints} endpoints: {addresses} addresses");
            assert_eq!(reply.metadata.truncation, endpoints == 5000);
            assert!(
                reply.edns.is_some()
                    && reply.answers.iter().all(|record| record.name.to_string() == WHOLE
                        || record.data == RData::CNAME(CNAME(Name::from_ascii(WHOLE).unwrap())))
            );
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_reply_is_complete_or_truncated(
        endpoints in prop_oneof![0..40_u16, 0..6000_u16],
        name in prop::sample::select(vec![WHOLE, PORT, ALIAS]),
        kind in prop::sample::select(vec![RecordType::A, RecordType::AAAA, RecordType::SRV]),
        protocol in prop::sample::select(vec![Protocol::Udp, Protocol::Tcp]),
        payload in prop::option::of(0..5000_u16),
    ) {
        let bytes = ask(&replier(endpoints), name, kind, protocol, payload);
        let most = match (protocol, payload) {
            (Protocol::Tcp, _) => 65_535,
            (_, None) => 512,
            (_, Some(payload)) => payload.clamp(512, 1232),
        };
        prop_assert!(bytes.len() <= usize::from(most), "{} bytes", bytes.len());
        let reply = Message::from_vec(&bytes).expect("the reply can be parsed");
        let of_kind = reply.answers.iter().filter(|record| record.record_type() == kind).count();
        let all = if kind == RecordType::AAAA { 0 } else { usize::from(endpoints) };
        prop_assert_eq!(reply.metadata.truncation, of_kind < all);
        // Another record would not have fitted.
        prop_assert!(of_kind == all || bytes.len() + 255 > usize::from(most), "{} bytes", bytes.len());
        prop_assert_eq!(reply.edns.is_some(), payload.is_some());
    }
}
