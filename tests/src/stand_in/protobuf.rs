//! Kubernetes' protobuf encoding, as far as a list of objects with names takes it.
//!
//! In: names and versions. Out: bytes. Written by hand from the numbers in Kubernetes' `generated.proto` files, so that
//! weir's own messages are not what they are tested with.

use std::collections::BTreeMap;

/// The media type in requests to API servers.
pub(super) const MEDIA_TYPE: &str = "application/vnd.kubernetes.protobuf";

fn varint(mut number: u64, out: &mut Vec<u8>) {
    while number >= 0x80 {
        out.push(u8::try_from((number & 0x7f) | 0x80).unwrap_or_default());
        number >>= 7;
    }
    out.push(u8::try_from(number).unwrap_or_default());
}

/// A field that has a length.
fn field(number: u64, contents: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    varint(number << 3 | 2, &mut out);
    varint(contents.len() as u64, &mut out);
    out.extend_from_slice(contents);
    out
}

/// A field that is a number.
fn number(field: u64, number: u64) -> Vec<u8> {
    let mut out = Vec::new();
    varint(field << 3, &mut out);
    varint(number, &mut out);
    out
}

/// Adds the envelope of every answer.
fn around(contents: &[u8]) -> Vec<u8> {
    [b"k8s\0".to_vec(), field(2, contents)].concat()
}

/// An object of any kind with no more than metadata.
pub(super) fn object(name: &str, version: u64) -> Vec<u8> {
    let metadata = [field(1, name.as_bytes()), field(6, version.to_string().as_bytes())];
    field(1, &metadata.concat())
}

pub(super) fn status(code: u16, reason: &str) -> Vec<u8> {
    [field(2, b"Failure"), field(3, b"no"), field(4, reason.as_bytes()), number(6, code.into())].concat()
}

pub(super) fn list(objects: &BTreeMap<u64, String>, version: u64) -> Vec<u8> {
    let metadata = field(1, &field(2, version.to_string().as_bytes()));
    let items = objects.iter().flat_map(|(version, name)| field(2, &object(name, *version)));
    around(&metadata.into_iter().chain(items).collect::<Vec<_>>())
}

/// An event, in its frame.
pub(super) fn event(kind: &str, object: &[u8]) -> Vec<u8> {
    let event = [field(1, kind.as_bytes()), field(2, &field(1, &around(object)))].concat();
    let length = u32::try_from(event.len()).unwrap_or_default();
    [&length.to_be_bytes()[..], &event].concat()
}
