//! Rules for frontends that a process of this node answers while it is there.
//!
//! In: the family and the [`NodePlan`]. Out: rules that stand before all others of their chains.

use super::{
    expr,
    netlink::Expr,
    ruleset::{Map, load_frontend},
};
use crate::{
    model::{Family, Protocol},
    plan::NodePlan,
};

/// Ends a chain for what is answered here.
pub(super) fn left_alone(family: Family, node: &NodePlan, coming_in: bool) -> Option<Vec<Expr>> {
    let rule = || [to_answered(family), to_this_host(coming_in), vec![expr::accept()]].concat();
    node.answers_names.then(rule)
}

/// Matches packets that will be delivered here. That somebody is there to answer, their address says: it is this host's
/// for as long as a device exists that the kernel takes away when the process that answers ends, however it ends. What
/// the host itself sends has its route already, which may be an older one.
fn to_this_host(coming_in: bool) -> Vec<Expr> {
    if coming_in { expr::destination_is_local().to_vec() } else { expr::through_loopback().to_vec() }
}

fn to_answered(family: Family) -> Vec<Expr> {
    [load_frontend(family), vec![expr::in_set(expr::word(0), Map::Answered.name())]].concat()
}

/// Datagrams that are answered here, and their answers, are not tracked: then each one, whatever its socket did before,
/// goes where it should go now. TCP is, because a connection belongs to who accepted it.
pub(super) fn untracked_rules(family: Family, coming_in: bool) -> Vec<Vec<Expr>> {
    let udp =
        || vec![expr::protocol(expr::word(0)), expr::compare(expr::word(0), true, &[Protocol::Udp.number()])];
    let local = to_this_host(coming_in);
    let to = [to_answered(family), udp(), local, vec![expr::untracked()]].concat();
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
