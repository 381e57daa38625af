//! Lists in pieces, and what messages mean. Against a real API server: `tests/source_kube.rs`.

use bytes::{Bytes, BytesMut};
use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
use prost::Message;
use serde_json::json;
use tokio_util::codec::Decoder as _;

use super::{
    MAGIC, Unreadable,
    list::{Part, Parts},
    message, object,
    object::FromProtobuf as _,
};

/// A list as servers write it, with fields that nobody reads.
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
    let metadata = message::ListMetadata { resource_version: "17".to_owned() };
    let items = items.iter().map(|item| Bytes::from_static(item)).collect();
    around(List { metadata, items, unknown: "skipped".to_owned() }.encode_to_vec())
}

/// What a list's bytes amount to when they come in pieces of this size.
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
fn a_list_comes_item_by_item_whatever_pieces_it_comes_in() {
    let bytes = list(&[b"", b"one", &[7; 300]]);
    for size in 1..=bytes.len() {
        assert_eq!(parts(&bytes, size).unwrap(), ["as of 17", "0 bytes", "3 bytes", "300 bytes"], "{size}");
    }
    assert_eq!(parts(&list(&[]), 5).unwrap(), ["as of 17"]);
}

#[test]
fn a_list_that_breaks_off_anywhere_is_none() {
    // What is around the list may end early: nobody reads what comes behind it.
    let bytes = list(&[b"one", b"two"]);
    let end = bytes.len() - 3;
    for length in 0..end {
        assert!(parts(&bytes[..length], 4).is_err(), "{length} of {} bytes", bytes.len());
    }
}

#[test]
fn what_is_no_list_is_refused() {
    assert!(matches!(parts(b"{\"kind\":\"Status\"}", 64), Err(Unreadable::Magic)));
    let number_around = [MAGIC, &[0x08, 0x01]].concat();
    assert!(matches!(parts(&number_around, 64), Err(Unreadable::List)));
    // An item that is longer than the list it is in.
    let too_long = around(vec![0x12, 0x7f, 0x00]);
    assert!(matches!(parts(&too_long, 64), Err(Unreadable::List)));
    // A field that says it is longer than anything can be.
    let endless = [MAGIC, &[0x0a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01]].concat();
    assert!(matches!(parts(&endless, 64), Err(Unreadable::List)));
    assert!(matches!(object(Bytes::from_static(b"no")), Err(Unreadable::Magic)));
}

/// What an API server writes of the smallest Service: Go's empty values, not nothing.
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
fn w8_a_port_without_a_name_is_not_one_with_an_empty_name() {
    let port =
        |name: Option<&str>| message::EndpointPort { name: name.map(str::to_owned), ..Default::default() };
    let message = message::EndpointSlice { ports: vec![port(None), port(Some(""))], ..Default::default() };
    let slice = EndpointSlice::read(message.encode_to_vec().into()).unwrap();
    let names: Vec<_> = slice.ports.unwrap().into_iter().map(|port| port.name).collect();
    assert_eq!(names, [None, Some(String::new())]);
}
