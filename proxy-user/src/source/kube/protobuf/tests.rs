//! Lists in pieces, and the meaning of messages. The suite `tests/suites/source/services.rs` runs against a real API server.

use std::{
    io::Write as _,
    sync::{Arc, Mutex},
};

use bytes::{BufMut as _, Bytes, BytesMut};
use flate2::{Compression, write::GzEncoder};
use futures::{StreamExt as _, TryStreamExt as _};
use http::{Request, Response, header};
use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
use kube::{
    Client,
    client::Body,
    runtime::watcher::{Config, Event},
};
use prost::Message;
use serde_json::json;
use tokio_util::codec::Decoder as _;

use super::{
    MAGIC, MEDIA_TYPE, Unreadable, events, inflated,
    list::{Part, Parts},
    message, object,
    object::FromProtobuf as _,
};
use crate::{
    model::Kind,
    source::kube::{
        stream_item::{ItemResult, StreamItem},
        versions::Version,
    },
};

/// A list as servers write it, with fields that weir does not read.
#[derive(Clone, PartialEq, Message)]
struct List {
    #[prost(message, required, tag = "1")]
    metadata: message::ListMetadata,
    #[prost(bytes = "bytes", repeated, tag = "2")]
    items: Vec<Bytes>,
    #[prost(string, tag = "9")]
    unknown: String,
}

#[derive(Clone, PartialEq, Message)]
struct Around {
    #[prost(message, required, tag = "1")]
    types: Types,
    #[prost(bytes = "bytes", tag = "2")]
    raw: Bytes,
    #[prost(string, tag = "4")]
    content_type: String,
}

#[derive(Clone, PartialEq, Message)]
struct Types {
    #[prost(string, tag = "1")]
    api_version: String,
    #[prost(string, tag = "2")]
    kind: String,
}

fn around(raw: Vec<u8>) -> Vec<u8> {
    let types = Types { api_version: "v1".to_owned(), kind: "ServiceList".to_owned() };
    let around = Around { types, raw: raw.into(), content_type: "x".to_owned() };
    [MAGIC, &around.encode_to_vec()].concat()
}

fn list(items: &[&'static [u8]]) -> Vec<u8> {
    let metadata = message::ListMetadata { resource_version: "17".into() };
    let items = items.iter().map(|item| Bytes::from_static(item)).collect();
    around(List { metadata, items, unknown: "skipped".to_owned() }.encode_to_vec())
}

/// The parts of a list that arrives in pieces of this size.
fn parts(bytes: &[u8], size: usize) -> Result<Vec<String>, Unreadable> {
    let (mut parts, mut buffer, mut seen) = (Parts::new(), BytesMut::new(), Vec::new());
    let word = |part| match part {
        Part::Version(version) => format!("as of {version}"),
        Part::Item(item) => format!("{} bytes", item.len()),
    };
    for piece in bytes.chunks(size) {
        buffer.extend_from_slice(piece);
        while let Some(part) = parts.decode(&mut buffer)? {
            seen.push(word(part));
        }
    }
    while let Some(part) = parts.decode_eof(&mut buffer)? {
        seen.push(word(part));
    }
    Ok(seen)
}

#[test]
fn a_list_is_read_item_by_item_for_any_split_of_its_bytes() {
    let bytes = list(&[b"", b"one", &[7; 300]]);
    for size in 1..=bytes.len() {
        assert_eq!(parts(&bytes, size).unwrap(), ["as of 17", "0 bytes", "3 bytes", "300 bytes"], "{size}");
    }
    assert_eq!(parts(&list(&[]), 5).unwrap(), ["as of 17"]);
}

#[test]
fn a_truncated_list_is_an_error() {
    // The envelope may end early, because the fields after the list are not read.
    let bytes = list(&[b"one", b"two"]);
    let end = bytes.len() - 3;
    for length in 0..end {
        assert!(parts(&bytes[..length], 4).is_err(), "{length} of {} bytes", bytes.len());
    }
}

#[tokio::test]
async fn a_compressed_list_is_the_same_list_for_any_split_of_its_bytes() {
    let bytes = list(&[b"one", &[7; 70_000], b"two"]);
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(&bytes).unwrap();
    let compressed = encoder.finish().unwrap();
    for size in [1, 7, 100, compressed.len()] {
        let pieces: Vec<_> = compressed.chunks(size).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
        let inflated = inflated(futures::stream::iter(pieces).boxed());
        let pieces: Vec<Bytes> = inflated.try_collect().await.unwrap();
        assert!(pieces.concat() == bytes, "in pieces of {size}");
    }
    let wrong = futures::stream::iter([Ok(Bytes::from_static(b"this is not compressed"))]);
    inflated(wrong.boxed()).try_collect::<Vec<_>>().await.unwrap_err();
}

#[test]
fn malformed_lists_are_refused() {
    assert!(matches!(parts(b"{\"kind\":\"Status\"}", 64), Err(Unreadable::Magic)));
    let number_around = [MAGIC, &[0x08, 0x01]].concat();
    assert!(matches!(parts(&number_around, 64), Err(Unreadable::List)));
    // An item that is longer than its list.
    let too_long = around(vec![0x12, 0x7f, 0x00]);
    assert!(matches!(parts(&too_long, 64), Err(Unreadable::List)));
    // A field with a length beyond any limit.
    let endless = [MAGIC, &[0x0a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01]].concat();
    assert!(matches!(parts(&endless, 64), Err(Unreadable::List)));
    assert!(matches!(object(Bytes::from_static(b"no")), Err(Unreadable::Magic)));
}

/// An API server writes Go's empty values for the fields of the smallest Service.
#[test]
fn empty_is_absent() {
    let message = message::Service::default();
    let service = serde_json::to_value(Service::read(message.encode_to_vec().into()).unwrap()).unwrap();
    let smallest = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {}, "spec": {}, "status": { "loadBalancer": {} },
    });
    assert_eq!(service, smallest);
}

#[test]
fn w8_a_port_without_a_name_differs_from_one_with_an_empty_name() {
    let port = |name: Option<&str>| message::EndpointPort {
        name: name.map(|name| Bytes::copy_from_slice(name.as_bytes())),
        ..Default::default()
    };
    let message = message::EndpointSlice { ports: vec![port(None), port(Some(""))], ..Default::default() };
    let slice = EndpointSlice::read(message.encode_to_vec().into()).unwrap();
    let names: Vec<_> = slice.ports.unwrap().into_iter().map(|port| port.name).collect();
    assert_eq!(names, [None, Some(String::new())]);
}

fn metadata(name: &str, version: u64) -> message::Metadata {
    let version = version.to_string().into();
    let name = Bytes::copy_from_slice(name.as_bytes());
    message::Metadata { name, namespace: "shop".into(), resource_version: version, ..Default::default() }
}

fn good(name: &str, version: u64) -> Vec<u8> {
    message::Service { metadata: metadata(name, version), ..Default::default() }.encode_to_vec()
}

/// An object with a spec that is longer than the object.
fn broken(name: &str, version: u64) -> Vec<u8> {
    let identified = message::Service { metadata: metadata(name, version), ..Default::default() };
    let head = identified.encode_to_vec();
    let spec = head.windows(2).rposition(|field| field == [0x12, 0x00]).unwrap();
    [&head[..spec], &[0x12, 0x7f, 0x01]].concat()
}

/// An event in the stream of a watch.
fn event(kind: &'static str, object: Vec<u8>) -> Vec<u8> {
    let raw = Some(message::Raw { raw: around(object).into() });
    let event = message::WatchEvent { kind: kind.into(), object: raw }.encode_to_vec();
    let mut frame = BytesMut::new();
    frame.put_u32(event.len().try_into().unwrap());
    frame.extend_from_slice(&event);
    frame.to_vec()
}

/// A client of a server that sends these responses one by one, and the requests that the server received.
fn server(responses: Vec<Vec<u8>>) -> (Client, Arc<Mutex<Vec<String>>>) {
    let asked = Arc::new(Mutex::new(Vec::new()));
    let (seen, responses) = (Arc::clone(&asked), Arc::new(Mutex::new(responses.into_iter())));
    let service = tower::service_fn(move |request: Request<Body>| {
        seen.lock().unwrap().push(request.uri().query().unwrap_or_default().to_owned());
        let answer = responses.lock().unwrap().next();
        async move {
            let Some(answer) = answer else { return std::future::pending().await };
            let response = Response::builder().header(header::CONTENT_TYPE, MEDIA_TYPE);
            Ok::<_, tower::BoxError>(response.body(Body::from(answer)).unwrap())
        }
    });
    (Client::new(service, "default"), asked)
}

fn word(item: ItemResult<Service>) -> String {
    let name = |service: Service| service.metadata.name.unwrap_or_default();
    match item.unwrap() {
        StreamItem::Event(Event::Init) => "list".to_owned(),
        StreamItem::Event(Event::InitApply(service)) => format!("has {}", name(service)),
        StreamItem::Event(Event::InitDone) => "whole".to_owned(),
        StreamItem::Event(Event::Apply(service)) => format!("+{}", name(service)),
        StreamItem::Event(Event::Delete(service)) => format!("-{}", name(service)),
        StreamItem::Skipped(skipped) => {
            skipped.name.map_or_else(|| skipped.position.clone(), |name| format!("skipped {name}"))
        }
    }
}

#[tokio::test]
async fn unreadable_objects_are_skipped_by_name_and_delay_nothing() {
    let metadata = message::ListMetadata { resource_version: "17".into() };
    let mut items: Vec<Bytes> = (0..12).map(|at| broken(&format!("bad-{at}"), 3).into()).collect();
    items.insert(0, good("first", 1).into());
    items.insert(7, Bytes::from_static(b"\xff\xff"));
    items.push(good("last", 2).into());
    let list = around(List { metadata, items, unknown: String::new() }.encode_to_vec());
    let watch = [
        event("MODIFIED", broken("first", 18)),
        event("ADDED", good("new", 19)),
        event("SURPRISE", good("new", 20)),
        event("ADDED", b"\xff\xff".to_vec()),
        event("DELETED", broken("last", 21)),
        event("BOOKMARK", broken("", 22)),
        event("ADDED", good("newer", 23)),
    ];
    let (client, asked) = server(vec![list, watch.concat()]);
    let mut events = events::<Service>(client, Config::default(), Version::of(Kind::Service, Arc::default()));
    let mut seen = Vec::new();
    let all = async {
        while seen.last().is_none_or(|word| word != "+newer") {
            seen.push(word(events.next().await.unwrap()));
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(20), all).await.expect("the watch continues");

    let mut wanted = vec!["list".to_owned(), "has first".to_owned()];
    wanted.extend((0..12).map(|at| format!("skipped shop/bad-{at}")));
    wanted.insert(8, "item 7 of the list".to_owned());
    wanted.extend(["has last", "whole", "skipped shop/first", "+new", "skipped shop/new"].map(str::to_owned));
    wanted.extend(["an event ADDED", "-last", "+newer"].map(str::to_owned));
    assert_eq!(seen, wanted);

    // After the watch ends, it resumes after the last event.
    let again = async {
        while asked.lock().unwrap().len() < 3 {
            tokio::task::yield_now().await;
        }
    };
    let again = tokio::time::timeout(std::time::Duration::from_secs(20), again);
    tokio::select! {
        item = events.next() => panic!("the server sent nothing, but the stream yields {:?}", item.map(word)),
        again = again => again.expect("the watch asks again"),
    }
    let asked = asked.lock().unwrap();
    let versions =
        asked.iter().map(|query| query.split('&').find(|part| part.starts_with("resourceVersion=")));
    assert_eq!(versions.collect::<Vec<_>>(), [None, Some("resourceVersion=17"), Some("resourceVersion=23")]);
}

#[test]
fn invalid_utf8_is_replaced_as_in_gos_json() {
    let pair =
        |key: &'static [u8], value: &'static [u8]| message::Pair { key: key.into(), value: value.into() };
    let metadata = message::Metadata {
        labels: vec![pair(b"app", b"\xc3")],
        annotations: vec![pair(b"weir.dev/on-backend-removal", b"reset"), pair(b"note\xff", b"caf\xe9")],
        ..metadata("web", 5)
    };
    let spec = message::ServiceSpec { external_name: Bytes::from_static(b"\xfe"), ..Default::default() };
    let message = message::Service { metadata, spec, ..Default::default() };
    let service = Service::read(message.encode_to_vec().into()).unwrap();
    let annotations = service.metadata.annotations.unwrap();
    assert_eq!(annotations["weir.dev/on-backend-removal"], "reset");
    assert_eq!(annotations["note\u{fffd}"], "caf\u{fffd}");
    assert_eq!(service.metadata.labels.unwrap()["app"], "\u{fffd}");
    assert_eq!(service.spec.unwrap().external_name.as_deref(), Some("\u{fffd}"));
}
