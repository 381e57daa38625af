//! Rules that keep a client with its backend (A1 to A5).
//!
//! In: a sticky port's maps, how many slots it has, for how long it remembers. Out: the rules of its choice, and the rules
//! that all choices share. A backend is remembered by a number that no other backend ever had. The packet carries the
//! number in its priority from one look-up to the next, because `nft` prints and reads back no other way to store what a
//! look-up found.

use super::{
    expr,
    netlink::{ChainSpec, Expr},
    object::{Object, Scope},
    ruleset::{Map, StaticChain},
    sticky::Sticky,
};
use crate::model::{Family, Protocol};

/// Numbers have this bit, and buckets have not: so the one is never taken for the other.
pub(super) const NUMBER: u32 = 1 << 31;

/// The chain that translates to the backend of a packet's number, and does nothing where no backend has it any more.
pub(super) const TO_NUMBERED: &str = "to-numbered";

/// `nft` reads a translation to a port back only behind a match on the protocol.
pub(super) fn to_numbered(family: Family) -> StaticChain {
    let rules = Protocol::ALL.map(|protocol| {
        vec![
            expr::protocol(expr::word(0)),
            expr::compare(expr::word(0), true, &[protocol.number()]),
            expr::priority(expr::word(0)),
            expr::map(expr::word(0), Map::Numbered.name(), expr::word(0)),
            expr::dnat(family),
        ]
    });
    StaticChain { spec: ChainSpec::regular(TO_NUMBERED), rules: rules.to_vec() }
}

fn has_number() -> Vec<Expr> {
    vec![
        expr::priority(expr::word(0)),
        expr::bitwise(expr::word(0), &NUMBER.to_ne_bytes(), &[0; 4]),
        expr::compare(expr::word(0), true, &NUMBER.to_ne_bytes()),
    ]
}

/// Takes the number out of a packet before it leaves: queueing goes by the priority.
pub(super) fn number_is_left_behind() -> Vec<Expr> {
    let forget = vec![expr::constant(expr::word(0), &[0; 4]), expr::set_priority(expr::word(0))];
    [expr::translated().to_vec(), has_number(), forget].concat()
}

/// Loads the client, and behind it the number.
fn client_and_number(family: Family) -> Vec<Expr> {
    vec![expr::source_address(family, expr::word(0)), expr::priority(expr::word(expr::address_words(family)))]
}

fn draw_one(slots: &str, count: u32) -> Vec<Expr> {
    vec![
        expr::random(count, 0, expr::word(0)),
        expr::map(expr::word(0), slots, expr::word(0)),
        expr::set_priority(expr::word(0)),
    ]
}

/// The rules that believe what a client remembers. What is remembered of a backend that left is not believed, because its
/// number leads nowhere, and is deleted, because an update leaves the number of an element as it is. They are written
/// once: when a rule first looks into a map, the kernel walks the map, and this one may hold all clients.
pub(super) fn choice(family: Family, sticky: &Sticky, scope: Scope, seconds: u32) -> Vec<Vec<Expr>> {
    let clients = Object::Clients { sticky: sticky.clone(), scope }.name();
    let draw = Object::Draw { sticky: sticky.clone(), scope }.name();
    let number = expr::word(expr::address_words(family));
    let known = vec![
        expr::source_address(family, expr::word(0)),
        expr::map(expr::word(0), &clients, expr::word(0)),
        expr::set_priority(expr::word(0)),
    ];
    let forget = vec![expr::forget(&clients, expr::word(0), number)];
    vec![
        [known, remember(family, &clients, seconds), vec![expr::jump(TO_NUMBERED)]].concat(),
        [has_number(), client_and_number(family), forget].concat(),
        vec![expr::goto(&draw)],
    ]
}

/// A3: each new flow winds the clock again.
fn remember(family: Family, clients: &str, seconds: u32) -> Vec<Expr> {
    let number = expr::word(expr::address_words(family));
    [client_and_number(family), vec![expr::remember(clients, expr::word(0), number, seconds)]].concat()
}

/// The rules that draw one of `count` slots. They look into the slots only, of which there are few.
pub(super) fn draw(
    family: Family,
    sticky: &Sticky,
    scope: Scope,
    count: u32,
    seconds: u32,
) -> Vec<Vec<Expr>> {
    if count == 0 {
        return Vec::new();
    }
    let clients = Object::Clients { sticky: sticky.clone(), scope }.name();
    let slots = Object::Slots { sticky: sticky.clone(), scope }.name();
    let mut rules = vec![
        draw_one(&slots, count),
        not_remembered(family),
        // A6: where there is no room left, the client is served all the same. Where another program took the slots away,
        // nothing was drawn: that is not to be remembered, because an update leaves what an element says as it is.
        [has_number(), remember(family, &clients, seconds)].concat(),
        vec![expr::jump(TO_NUMBERED)],
        // The backend left between two look-ups. The first slot is there as long as any is.
        draw_one(&slots, 1),
        vec![expr::goto(TO_NUMBERED)],
    ];
    rules.retain(|rule| !rule.is_empty());
    rules
}

/// New clients of one IPv6 network that are remembered at once, and later in each second. What one site has are 2^80
/// addresses, and with a memory that one of them could fill other clients would not be remembered. No client has that
/// many IPv4 addresses.
fn not_remembered(family: Family) -> Vec<Expr> {
    const SITE: [u8; 16] = [255, 255, 255, 255, 255, 255, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    const BURST: u32 = 4096;
    const RATE: u64 = 16;
    // All that may be remembered at once has come back by then.
    const SECONDS: u32 = 300;
    if family == Family::V4 {
        return Vec::new();
    }
    vec![
        expr::source_address(family, expr::word(0)),
        expr::bitwise(expr::word(0), &SITE, &[0; 16]),
        expr::too_often(Map::Newcomers.name(), expr::word(0), SECONDS, RATE, BURST),
        expr::jump(TO_NUMBERED),
    ]
}
