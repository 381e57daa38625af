//! Data that `nft` stores with sets and chains and that the kernel does not read: comments, and the form in which `nft`
//! prints and reads back a map with a key that has a part without a named type.
//!
//! In: a family, or a comment. Out: bytes as libnftnl and libnftables encode them.

use crate::model::Family;

fn field(kind: u8, data: &[u8]) -> Vec<u8> {
    let mut field = vec![kind, data.len() as u8];
    field.extend_from_slice(data);
    field
}

fn number(kind: u8, value: u32) -> Vec<u8> {
    field(kind, &value.to_ne_bytes())
}

fn comment(kind: u8, text: &str) -> Vec<u8> {
    field(kind, &[text.as_bytes(), &[0]].concat())
}

pub(super) fn comment_of_chain(text: &str) -> Vec<u8> {
    comment(0, text)
}

pub(super) fn comment_of_set(text: &str) -> Vec<u8> {
    comment(7, text)
}

/// An expression: its kind, then its parts.
fn expression(kind: u32, parts: &[Vec<u8>]) -> Vec<u8> {
    [number(0, kind), field(1, &parts.concat())].concat()
}

fn concatenation(parts: &[Vec<u8>]) -> Vec<u8> {
    const CONCAT: u32 = 13;
    let parts: Vec<_> = parts.iter().enumerate().map(|(index, part)| field(index as u8, part)).collect();
    expression(CONCAT, &parts)
}

fn payload(header: u32, member: u32) -> Vec<u8> {
    const PAYLOAD: u32 = 7;
    expression(PAYLOAD, &[number(0, header), number(1, member)])
}

/// Whether keys and values are numbers in the host's byte order.
pub(super) fn host_order(key: bool, value: bool) -> Vec<u8> {
    [number(0, key.into()), number(1, value.into()), number(6, 0)].concat()
}

const META: u32 = 9;

/// `numgen random mod 2`; `nft` needs the type of the expression only, so the modulus does not matter.
fn slot() -> Vec<u8> {
    const NUMGEN: u32 = 23;
    expression(NUMGEN, &[number(0, 1), number(1, 2), number(2, 0)])
}

/// `typeof numgen random mod 2 : meta priority`.
pub(super) fn numbers() -> Vec<u8> {
    const META_PRIORITY: u32 = 2;
    let priority = expression(META, &[number(0, META_PRIORITY)]);
    [number(0, 1), number(1, 1), field(3, &slot()), field(4, &priority), number(6, 0)].concat()
}

/// `typeof [ip daddr .] meta l4proto . th dport . numgen random mod 2 : ip daddr . th dport`.
pub(super) fn slots(family: Family, with_address: bool) -> Vec<u8> {
    const META_L4PROTO: u32 = 16;
    let address = match family {
        Family::V4 => payload(12, 12),
        Family::V6 => payload(13, 9),
    };
    let port = payload(11, 2);
    let protocol = expression(META, &[number(0, META_L4PROTO)]);
    let key = [vec![protocol, port.clone(), slot()]].concat();
    let key = if with_address { [vec![address.clone()], key].concat() } else { key };
    [
        number(0, 0),
        number(1, 0),
        field(3, &concatenation(&key)),
        field(4, &concatenation(&[address, port])),
        number(6, 0),
    ]
    .concat()
}
