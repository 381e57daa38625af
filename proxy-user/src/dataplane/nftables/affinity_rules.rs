//! Rules that keep a client with its backend (A1 to A5).
//!
//! In: a sticky port, its number of slots and its timeout. Out: the rules of its two chains, and the chain that all
//! sticky ports share. The kernel remembers a backend by a number that no other backend ever had. The packet's priority
//! carries the number from one look-up to the next, because `nft` prints and reads back no other way to store the
//! result of a look-up.

use super::{
    expr,
    matches::clear_priority,
    schema::{Map, RuledChain},
    shared_chains::SharedObject,
    sticky::Sticky,
};
use crate::sys::libnftnl::Expr;
use crate::{
    model::{Family, Protocol},
    plan::BackendSet,
};

/// The bit that numbers have and buckets have not, so that no rule takes one for the other.
pub(super) const NUMBER: u32 = 1 << 31;

/// The chain that translates to the backend of a packet's number, and returns if no backend has that number any more.
pub(super) const TO_NUMBERED: &str = "to-numbered";

/// Matches each protocol, because `nft` reads a translation to a port back only after such a match.
pub(super) fn to_numbered(family: Family) -> RuledChain {
    let rules = Protocol::ALL.map(|protocol| {
        vec![
            expr::protocol(expr::word(0)),
            expr::compare(expr::word(0), true, &[protocol.number()]),
            expr::priority(expr::word(0)),
            expr::map(expr::word(0), Map::Numbered.name(), expr::word(0)),
            expr::dnat(family),
        ]
    });
    RuledChain::regular(TO_NUMBERED, rules.to_vec())
}

fn has_number() -> Vec<Expr> {
    vec![
        expr::priority(expr::word(0)),
        expr::bitwise(expr::word(0), &NUMBER.to_ne_bytes(), &[0; 4]),
        expr::compare(expr::word(0), true, &NUMBER.to_ne_bytes()),
    ]
}

/// Takes the number out of a packet before it leaves, because queueing disciplines read the priority.
pub(super) fn take_number_out() -> Vec<Expr> {
    [expr::translated().to_vec(), has_number(), clear_priority()].concat()
}

/// Loads the client's address, and the number into the words after it.
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

/// The rules that look a client's number up. If its backend left, the second rule deletes the element, because an
/// update would not change the number. weir writes these rules once, because the kernel walks a map when a rule first
/// uses it, and this map may have all clients.
pub(super) fn choice(family: Family, sticky: &Sticky, set: BackendSet, seconds: u32) -> Vec<Vec<Expr>> {
    let clients = SharedObject::Clients { sticky: sticky.clone(), set }.name();
    let draw = SharedObject::Draw { sticky: sticky.clone(), set }.name();
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

/// A3: each new flow restarts the timeout.
fn remember(family: Family, clients: &str, seconds: u32) -> Vec<Expr> {
    let number = expr::word(expr::address_words(family));
    [client_and_number(family), vec![expr::remember(clients, expr::word(0), number, seconds)]].concat()
}

/// The rules that draw one of `count` slots. They look up slots only, of which there are few.
pub(super) fn draw(
    family: Family,
    sticky: &Sticky,
    set: BackendSet,
    count: u32,
    seconds: u32,
) -> Vec<Vec<Expr>> {
    if count == 0 {
        return Vec::new();
    }
    let clients = SharedObject::Clients { sticky: sticky.clone(), set }.name();
    let slots = SharedObject::Slots { sticky: sticky.clone(), set }.name();
    let mut rules = vec![
        draw_one(&slots, count),
        serve_unremembered(family),
        // A6: if the map is full, the next rule serves the client. If another program removed the slots, the packet has
        // no number, and must not be remembered, because an update would not change the element later.
        [has_number(), remember(family, &clients, seconds)].concat(),
        vec![expr::jump(TO_NUMBERED)],
        // The backend left between two look-ups. The first slot exists as long as any slot.
        draw_one(&slots, 1),
        vec![expr::goto(TO_NUMBERED)],
    ];
    rules.retain(|rule| !rule.is_empty());
    rules
}

/// Serves new clients of an IPv6 network beyond a limit without remembering them, because one site has 2^80 addresses
/// and could fill the map alone, so that other clients would not be remembered. No client has that many IPv4 addresses.
fn serve_unremembered(family: Family) -> Vec<Expr> {
    const SITE: [u8; 16] = [255, 255, 255, 255, 255, 255, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    const BURST: u32 = 4096;
    const RATE: u64 = 16;
    // The whole burst is available again after that time.
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
