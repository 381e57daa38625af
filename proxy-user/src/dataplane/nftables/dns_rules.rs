//! Rules for frontends that a process of this node answers: the cluster's DNS with `--dns`.
//!
//! In: the family and the [`NodePlan`]. Out: rules that are the first of their chains, and chains that distinguish this
//! node's clients from strangers. Queries of strangers go on to the Service's endpoints.

use super::{
    expr,
    matches::{load_frontend, mask_and_network},
    schema::{Map, RuledChain},
};
use crate::sys::libnftnl::Expr;
use crate::{
    model::{Family, Protocol},
    plan::NodePlan,
};

/// The chain that accepts packets of clients.
const CLIENTS: &str = "answered-clients";
/// The chain that does not track packets of clients.
const UNTRACKED: &str = "answered-untracked";
/// The chain that also counts packets of strangers and stores their addresses.
const STRANGERS: &str = "answered-strangers";
/// The chains that distinguish clients from strangers. A chain comes before the chains that it leads to.
pub(super) const CHAINS: [&str; 3] = [STRANGERS, UNTRACKED, CLIENTS];

/// The counter of new flows of strangers.
pub(super) const NOT_A_CLIENT: &str = "not-a-client";
/// For how many seconds the kernel stores a stranger's address.
const STORED: u32 = 3600;

/// Ends a chain for packets that a process of this node answers.
pub(super) fn accept_answered(family: Family, node: &NodePlan, coming_in: bool) -> Option<Vec<Expr>> {
    to_clients(family, node, coming_in, CLIENTS)
}

/// The same in a chain that picks backends, which each flow of a stranger passes once.
pub(super) fn accept_answered_or_note(family: Family, node: &NodePlan, coming_in: bool) -> Option<Vec<Expr>> {
    to_clients(family, node, coming_in, STRANGERS)
}

/// Accepts packets of clients through `chain`, and all packets that this host sends.
fn to_clients(family: Family, node: &NodePlan, coming_in: bool, chain: &str) -> Option<Vec<Expr>> {
    let end = if coming_in && node.name_clients.is_some() { expr::jump(chain) } else { expr::accept() };
    node.answers_names.then(|| [to_answered(family), to_this_host(coming_in), vec![end]].concat())
}

/// Matches packets that the kernel delivers on this node. The address is this host's while the process that answers
/// runs, because the kernel removes the address with the process's device, however the process ends. A packet that this
/// host sends has its route already, which may be an older one.
fn to_this_host(coming_in: bool) -> Vec<Expr> {
    if coming_in { expr::destination_is_local().to_vec() } else { expr::through_loopback().to_vec() }
}

fn to_answered(family: Family) -> Vec<Expr> {
    [load_frontend(family), vec![expr::in_set(expr::word(0), Map::AnsweredHere.name())]].concat()
}

/// The chains that distinguish clients from strangers; none if the node cannot. A chain comes after the chains that it
/// leads to.
pub(super) fn client_chains(family: Family, node: &NodePlan) -> Vec<RuledChain> {
    let Some(clients) = node.name_clients.as_ref().filter(|_| node.answers_names) else { return Vec::new() };
    let from_clients = |then: fn() -> Expr| -> Vec<Vec<Expr>> {
        let networks = clients.of(family).iter().map(|network| {
            let (mask, network) = mask_and_network(*network);
            vec![
                expr::source_address(family, expr::word(0)),
                expr::bitwise(expr::word(0), &mask, &vec![0; mask.len()]),
                expr::compare(expr::word(0), true, &network),
            ]
        });
        let sources = std::iter::once(expr::source_is_local(true).to_vec()).chain(networks);
        sources.map(|source| [source, vec![then()]].concat()).collect()
    };
    let note = vec![
        expr::count(NOT_A_CLIENT),
        expr::source_address(family, expr::word(0)),
        expr::note(Map::Strangers.name(), expr::word(0), STORED),
    ];
    vec![
        RuledChain::regular(CLIENTS, from_clients(expr::accept)),
        RuledChain::regular(UNTRACKED, from_clients(expr::untracked)),
        RuledChain::regular(STRANGERS, vec![vec![expr::jump(CLIENTS)], note]),
    ]
}

/// Does not track datagrams that a process of this node answers, nor the answers, so that the kernel decides anew for
/// each datagram of a socket. TCP is tracked, because a connection belongs to the process that accepted it.
pub(super) fn untracked_rules(family: Family, node: &NodePlan, coming_in: bool) -> Vec<Vec<Expr>> {
    let udp =
        || vec![expr::protocol(expr::word(0)), expr::compare(expr::word(0), true, &[Protocol::Udp.number()])];
    let local = to_this_host(coming_in);
    let end =
        if coming_in && node.name_clients.is_some() { expr::jump(UNTRACKED) } else { expr::untracked() };
    let to = [to_answered(family), udp(), local, vec![end]].concat();
    let next = expr::address_words(family);
    let from = [
        vec![
            expr::source_address(family, expr::word(0)),
            expr::protocol(expr::word(next)),
            expr::source_port(expr::word(next + 1)),
            expr::in_set(expr::word(0), Map::AnsweredHere.name()),
        ],
        udp(),
        expr::source_is_local(true).to_vec(),
        vec![expr::untracked()],
    ]
    .concat();
    if coming_in { vec![to] } else { vec![to, from] }
}
