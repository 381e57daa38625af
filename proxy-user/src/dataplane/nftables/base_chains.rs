//! The chains that every node has, and those that exist while the node or some Service needs them. README.md beside
//! this file draws a packet's way through them.
//!
//! In: the family, the [`NodePlan`] and [`Needs`]. Out: chains with their rules.

use nftnl::{ChainType, Hook};

use super::{
    affinity_rules::{self, take_number_out},
    dns_rules::{self, accept_answered, accept_answered_or_note, untracked_rules},
    drop_reasons::{self, DropReason},
    expr,
    matches::{load_frontend, load_node_port, mask_and_network, of_pods, to_node},
    schema::{Map, RuledChain},
    shared_chains::SharedObject,
};
use crate::sys::libnftnl::{ChainSpec, Expr};
use crate::{model::Family, plan::NodePlan};

fn to_bucket(map: Map, buckets: Map) -> Vec<Expr> {
    vec![
        expr::map(expr::word(0), map.name(), expr::word(0)),
        expr::set_priority(expr::word(0)),
        expr::priority(expr::word(0)),
        expr::map(expr::word(0), buckets.name(), expr::VERDICT),
    ]
}

/// The chains that Services need besides those that every node has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Needs {
    /// The chains that check sources (F7).
    pub(super) guards: bool,
}

/// All chains for `node` and `needs`, whichever Services there are.
pub(super) fn base_chains(family: Family, node: &NodePlan, needs: Needs) -> Vec<RuledChain> {
    use Hook::{Forward, In, Out, PostRouting, PreRouting};
    let filter = ChainType::Filter;
    let mut chains = dns_rules::client_chains(family, node);
    chains.extend([
        drop_reasons::no_local_endpoints(),
        drop_reasons::out_of_window(if node.drops_out_of_window {
            of_pods(family, node)
        } else {
            Vec::new()
        }),
        affinity_rules::to_numbered(family),
        base("nat-prerouting", ChainType::Nat, PreRouting, -100, dispatch_rules(family, node, true)),
        base("nat-output", ChainType::Nat, Out, -100, dispatch_rules(family, node, false)),
        base("filter-input", filter, In, 0, input_rules(family, node)),
        base("filter-output", filter, Out, 0, output_rules(family, node)),
        base("filter-forward", filter, Forward, 0, forward_rules(family, node)),
        base("nat-postrouting", ChainType::Nat, PostRouting, 100, masquerade_rules(family, node)),
    ]);
    if needs.guards {
        let [coming_in, going_out] = GUARD;
        chains.push(base(coming_in, filter, PreRouting, -110, vec![guard_rule(family)]));
        chains.push(base(going_out, filter, Out, -110, vec![guard_rule(family)]));
    }
    if node.answers_names {
        let [coming_in, going_out] = ANSWERED;
        chains.push(base(coming_in, filter, PreRouting, -300, untracked_rules(family, node, true)));
        chains.push(base(going_out, filter, Out, -300, untracked_rules(family, node, false)));
    }
    chains
}

fn base(name: &str, kind: ChainType, hook: Hook, priority: i32, rules: Vec<Vec<Expr>>) -> RuledChain {
    let spec = ChainSpec { hook: Some((kind, hook, priority)), ..ChainSpec::regular(name) };
    RuledChain { spec, rules }
}

/// The chains that exist only with `--dns`, because every packet passes a base chain, empty or not.
const ANSWERED: [&str; 2] = ["answered-prerouting", "answered-output"];
/// The chains that exist only while some Service has source ranges.
pub(super) const GUARD: [&str; 2] = ["guard-prerouting", "guard-output"];

/// Every chain that may be missing. A chain comes before the chains that it leads to, as when they are removed.
pub(super) fn optional_chains() -> impl Iterator<Item = &'static str> {
    ANSWERED.into_iter().chain(GUARD).chain(dns_rules::CHAINS)
}

/// The name of every counter of a table.
pub(super) fn counters() -> impl Iterator<Item = &'static str> {
    DropReason::ALL.map(DropReason::name).into_iter().chain([dns_rules::NOT_A_CLIENT])
}

/// Whether [`base_chains`] may have a chain of this name.
pub(super) fn is_base_chain(name: &str) -> bool {
    const ALWAYS: [&str; 9] = [
        drop_reasons::NO_LOCAL_ENDPOINTS,
        drop_reasons::OUT_OF_WINDOW,
        affinity_rules::TO_NUMBERED,
        "nat-prerouting",
        "nat-output",
        "filter-input",
        "filter-output",
        "filter-forward",
        "nat-postrouting",
    ];
    ALWAYS.contains(&name) || optional_chains().any(|optional| optional == name)
}

/// Whether a chain of this name has no hook, because other chains lead to it.
pub(super) fn has_no_hook(name: &str) -> bool {
    [drop_reasons::NO_LOCAL_ENDPOINTS, drop_reasons::OUT_OF_WINDOW, affinity_rules::TO_NUMBERED]
        .contains(&name)
        || dns_rules::CHAINS.contains(&name)
        || SharedObject::parse(name).is_some()
}

/// R1: looks an exact frontend up before a NodePort.
fn dispatch_rules(family: Family, node: &NodePlan, coming_in: bool) -> Vec<Vec<Expr>> {
    let services = [load_frontend(family), to_bucket(Map::Services, Map::Buckets)].concat();
    let node_ports =
        [to_node(family, node), load_node_port(), to_bucket(Map::NodePorts, Map::Buckets)].concat();
    accept_answered_or_note(family, node, coming_in).into_iter().chain([services, node_ports]).collect()
}

/// F7: before translation, so that it applies to every backend.
fn guard_rule(family: Family) -> Vec<Expr> {
    [expr::new_flow().to_vec(), load_frontend(family), to_bucket(Map::SourceRanges, Map::Guards)].concat()
}

/// Accepts packets that begin no flow, so that only first packets reach the rules after this one.
fn only_new_flows() -> Vec<Expr> {
    [expr::no_new_flow().to_vec(), vec![expr::accept()]].concat()
}

/// Accepts flows that have a backend, because none of the refusals is about them and their destination is no Service's
/// any more. This also accepts a flow that another program's rules sent on to a Service's address.
fn translated() -> Vec<Expr> {
    [expr::translated().to_vec(), vec![expr::accept()]].concat()
}

fn refused(family: Family) -> Vec<Expr> {
    let refused = vec![expr::in_set(expr::word(0), Map::Refused.name())];
    [load_frontend(family), refused, DropReason::NoEndpoints.reject(family)].concat()
}

/// F1 for NodePorts and for addresses of this host.
fn input_rules(family: Family, node: &NodePlan) -> Vec<Vec<Expr>> {
    let node_port = [
        load_node_port(),
        vec![expr::in_set(expr::word(0), Map::RefusedNodePorts.name())],
        to_node(family, node),
        DropReason::NoEndpoints.reject(family),
    ];
    let mut rules = vec![only_new_flows(), translated()];
    rules.extend(accept_answered(family, node, true));
    rules.push(refused(family));
    if node.answers_names {
        // F4, because a ClusterIP is an address of this host then, and other processes listen on it.
        rules.push(unknown_port(family));
    }
    rules.push(node_port.concat());
    rules
}

fn unknown_port(family: Family) -> Vec<Expr> {
    let known = vec![
        expr::destination_address(family, expr::word(0)),
        expr::in_set(expr::word(0), Map::ClusterIps.name()),
    ];
    [known, DropReason::UnknownPort.reject(family)].concat()
}

/// Refuses packets that this host sends.
fn output_rules(family: Family, node: &NodePlan) -> Vec<Vec<Expr>> {
    refuse_rules(family, node, vec![only_new_flows()], accept_answered(family, node, false))
}

/// Refuses forwarded packets. Packets of known flows, which are most packets, end at the first rule.
fn forward_rules(family: Family, node: &NodePlan) -> Vec<Vec<Expr>> {
    let known = [expr::known_flow().to_vec(), vec![expr::accept()]].concat();
    let others = [expr::no_new_flow().to_vec(), vec![expr::goto(drop_reasons::OUT_OF_WINDOW)]].concat();
    refuse_rules(family, node, vec![known, others], None)
}

/// F1, F4 and F5, after `rules`, which end packets that begin no flow, and after `exception`.
fn refuse_rules(
    family: Family,
    node: &NodePlan,
    mut rules: Vec<Vec<Expr>>,
    exception: Option<Vec<Expr>>,
) -> Vec<Vec<Expr>> {
    let unallocated = node.service_cidrs.iter().filter(|net| Family::of(net.addr()) == family).map(|net| {
        let (mask, network) = mask_and_network(*net);
        let in_network = vec![
            expr::destination_address(family, expr::word(0)),
            expr::bitwise(expr::word(0), &mask, &vec![0; mask.len()]),
            expr::compare(expr::word(0), true, &network),
        ];
        [in_network, DropReason::UnallocatedAddress.drop()].concat()
    });
    rules.extend([take_number_out(), translated()]);
    rules.extend(exception);
    rules.extend([refused(family), unknown_port(family)].into_iter().chain(unallocated));
    rules
}

/// R8 for marked packets, R9 for packets from a backend to itself.
fn masquerade_rules(family: Family, node: &NodePlan) -> Vec<Vec<Expr>> {
    let bit = node.masquerade_mark.to_ne_bytes();
    let marked = vec![
        expr::mark(expr::word(0)),
        expr::bitwise(expr::word(0), &bit, &[0; 4]),
        expr::compare(expr::word(0), true, &bit),
        expr::mark(expr::word(0)),
        expr::bitwise(expr::word(0), &[255; 4], &bit),
        expr::set_mark(expr::word(0)),
        expr::masquerade(),
    ];
    let words = expr::address_words(family);
    let hairpin = [
        expr::translated().to_vec(),
        vec![
            expr::source_address(family, expr::word(0)),
            expr::destination_address(family, expr::word(words)),
            expr::protocol(expr::word(2 * words)),
            expr::destination_port(expr::word(2 * words + 1)),
            expr::in_set(expr::word(0), Map::Hairpin.name()),
            expr::masquerade(),
        ],
    ];
    vec![marked, hairpin.concat()]
}
