//! Expressions that match packets by their source, their destination or the node's settings.
//!
//! In: the family and the [`NodePlan`]. Out: expressions, which a rule begins with.

use ipnet::IpNet;

use super::{
    expr,
    schema::{Map, address_bytes},
};
use crate::sys::libnftnl::Expr;
use crate::{
    model::Family,
    plan::{LocalTraffic, NodePlan, NodePortAddresses},
};

/// Loads `daddr . l4proto . dport` into registers, from the first word on.
pub(super) fn load_frontend(family: Family) -> Vec<Expr> {
    let next = expr::address_words(family);
    vec![
        expr::destination_address(family, expr::word(0)),
        expr::protocol(expr::word(next)),
        expr::destination_port(expr::word(next + 1)),
    ]
}

/// Loads `l4proto . dport` into registers, from the first word on.
pub(super) fn load_node_port() -> Vec<Expr> {
    vec![expr::protocol(expr::word(0)), expr::destination_port(expr::word(1))]
}

/// Matches packets that are not from a local pod; empty if the node has no way to detect pods.
pub(super) fn not_from_pod(family: Family, node: &NodePlan) -> Vec<Expr> {
    match node.local_traffic.get(family) {
        None => Vec::new(),
        Some(LocalTraffic::Source(net)) => {
            let (mask, network) = mask_and_network(*net);
            vec![
                expr::source_address(family, expr::word(0)),
                expr::bitwise(expr::word(0), &mask, &vec![0; mask.len()]),
                expr::compare(expr::word(0), false, &network),
            ]
        }
        Some(LocalTraffic::Interface(name)) => {
            vec![expr::input_interface(expr::word(0)), expr::compare(expr::word(0), false, &padded(name))]
        }
        Some(LocalTraffic::InterfacePrefix(prefix)) => {
            let len = prefix.len().min(15);
            vec![
                expr::input_interface(expr::word(0)),
                expr::compare(expr::word(0), false, &prefix.as_bytes()[..len]),
            ]
        }
    }
}

/// Matches packets that neither a local pod nor this host sent.
pub(super) fn from_outside(family: Family, node: &NodePlan) -> Vec<Expr> {
    [not_from_pod(family, node), expr::source_is_local(false).to_vec()].concat()
}

/// Matches packets from and to local pods, with one list of expressions each; every packet if the node has no way to
/// detect pods.
pub(super) fn of_pods(family: Family, node: &NodePlan) -> Vec<Vec<Expr>> {
    let by_name = |name: &[u8]| {
        [expr::input_interface(expr::word(0)), expr::output_interface(expr::word(0))]
            .map(|load| vec![load, expr::compare(expr::word(0), true, name)])
    };
    match node.local_traffic.get(family) {
        None => vec![Vec::new()],
        Some(LocalTraffic::Source(net)) => {
            let (mask, network) = mask_and_network(*net);
            [expr::source_address(family, expr::word(0)), expr::destination_address(family, expr::word(0))]
                .map(|load| {
                    let masked = expr::bitwise(expr::word(0), &mask, &vec![0; mask.len()]);
                    vec![load, masked, expr::compare(expr::word(0), true, &network)]
                })
                .to_vec()
        }
        Some(LocalTraffic::Interface(name)) => by_name(&padded(name)).to_vec(),
        Some(LocalTraffic::InterfacePrefix(prefix)) => {
            by_name(&prefix.as_bytes()[..prefix.len().min(15)]).to_vec()
        }
    }
}

/// An interface name with the kernel's padding.
fn padded(name: &str) -> [u8; 16] {
    let mut padded = [0; 16];
    let len = name.len().min(15);
    padded[..len].copy_from_slice(&name.as_bytes()[..len]);
    padded
}

/// Matches packets to an address that serves NodePorts (R13).
pub(super) fn to_node(family: Family, node: &NodePlan) -> Vec<Expr> {
    match node.node_port_addresses.get(family) {
        NodePortAddresses::Only(_) => vec![
            expr::destination_address(family, expr::word(0)),
            expr::in_set(expr::word(0), Map::NodeIps.name()),
        ],
        NodePortAddresses::AnyLocal => {
            let loopback = match family {
                Family::V4 => vec![
                    expr::destination_address(family, expr::word(0)),
                    expr::bitwise(expr::word(0), &[255, 0, 0, 0], &[0; 4]),
                    expr::compare(expr::word(0), false, &[127, 0, 0, 0]),
                ],
                Family::V6 => vec![
                    expr::destination_address(family, expr::word(0)),
                    expr::compare(expr::word(0), false, &std::net::Ipv6Addr::LOCALHOST.octets()),
                ],
            };
            [expr::destination_is_local().to_vec(), loopback].concat()
        }
    }
}

pub(super) fn mask_and_network(net: IpNet) -> (Vec<u8>, Vec<u8>) {
    (address_bytes(net.netmask()), address_bytes(net.network()))
}

/// Sets one bit of the packet mark.
pub(super) fn mark(bit: u32) -> Vec<Expr> {
    vec![
        expr::mark(expr::word(0)),
        expr::bitwise(expr::word(0), &(!bit).to_ne_bytes(), &bit.to_ne_bytes()),
        expr::set_mark(expr::word(0)),
    ]
}

/// Sets the packet's priority back to 0, which rules used to carry a number.
pub(super) fn clear_priority() -> Vec<Expr> {
    vec![expr::constant(expr::word(0), &[0; 4]), expr::set_priority(expr::word(0))]
}
