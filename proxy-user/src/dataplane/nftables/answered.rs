//! Rules for frontends that a process of this node answers while it is there.
//!
//! In: the family and the [`NodePlan`]. Out: rules that stand before all others of their chains, and chains that tell the
//! clients that are answered from others. What others send goes on to the Service's endpoints.

use super::{
    expr,
    netlink::{ChainSpec, Expr},
    ruleset::{Map, StaticChain, load_frontend, mask_and_network},
};
use crate::{
    model::{Family, Protocol},
    plan::NodePlan,
};

/// The chain that accepts what comes from clients.
const CLIENTS: &str = "answered-clients";
/// The chain that does not track what comes from clients.
const UNTRACKED: &str = "answered-untracked";
/// The chain that also counts what does not come from clients, and remembers from where it comes.
const STRANGERS: &str = "answered-strangers";
/// The chains that tell clients from others, those that lead to others first.
pub(super) const TELLING: [&str; 3] = [STRANGERS, UNTRACKED, CLIENTS];

/// The counter of new flows that are not answered here because of where they come from.
pub(super) const PASSED_ON: &str = "not-a-client";
/// How long an address is remembered that such a flow came from.
const REMEMBERED: u32 = 3600;

/// Ends a chain for what is answered here.
pub(super) fn left_alone(family: Family, node: &NodePlan, coming_in: bool) -> Option<Vec<Expr>> {
    to_clients(family, node, coming_in, CLIENTS)
}

/// The same in the chain that picks backends, where strangers come by once for each flow.
pub(super) fn left_alone_or_noted(family: Family, node: &NodePlan, coming_in: bool) -> Option<Vec<Expr>> {
    to_clients(family, node, coming_in, STRANGERS)
}

/// What the host itself sends is always answered.
fn to_clients(family: Family, node: &NodePlan, coming_in: bool, chain: &str) -> Option<Vec<Expr>> {
    let end = if coming_in && node.name_clients.is_some() { expr::jump(chain) } else { expr::accept() };
    node.answers_names.then(|| [to_answered(family), to_this_host(coming_in), vec![end]].concat())
}

/// Matches packets that will be delivered here. That a process is there to answer, their address says: it is this host's
/// for as long as a device exists that the kernel takes away when the process that answers ends, however it ends. What
/// the host itself sends has its route already, which may be an older one.
fn to_this_host(coming_in: bool) -> Vec<Expr> {
    if coming_in { expr::destination_is_local().to_vec() } else { expr::through_loopback().to_vec() }
}

fn to_answered(family: Family) -> Vec<Expr> {
    [load_frontend(family), vec![expr::in_set(expr::word(0), Map::Answered.name())]].concat()
}

/// The chains that tell clients from others, where anything tells them. Those that others lead to come first.
pub(super) fn telling_chains(family: Family, node: &NodePlan) -> Vec<StaticChain> {
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
        expr::count(PASSED_ON),
        expr::source_address(family, expr::word(0)),
        expr::note(Map::Strangers.name(), expr::word(0), REMEMBERED),
    ];
    let chain = |name, rules| StaticChain { spec: ChainSpec::regular(name), rules };
    vec![
        chain(CLIENTS, from_clients(expr::accept)),
        chain(UNTRACKED, from_clients(expr::untracked)),
        chain(STRANGERS, vec![vec![expr::jump(CLIENTS)], note]),
    ]
}

/// Datagrams that are answered here, and their answers, are not tracked: then each one, whatever its socket did before,
/// goes where it should go now. TCP is, because a connection belongs to the process that accepted it.
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
            expr::in_set(expr::word(0), Map::Answered.name()),
        ],
        udp(),
        expr::source_is_local(true).to_vec(),
        vec![expr::untracked()],
    ]
    .concat();
    if coming_in { vec![to] } else { vec![to, from] }
}
