//! The objects every node has: maps, sets, base chains and their rules.
//!
//! In: the family and the [`NodePlan`]. Out: specifications and rules. Nothing here depends on a Service; README.md
//! beside this file draws how packets meet these chains.

use std::net::IpAddr;

use ipnet::IpNet;
use nftnl::{ChainType, Hook, nftnl_sys::libc};

use super::{
    answered::{self, left_alone, left_alone_or_noted, untracked_rules},
    choice,
    drops::{self, Reason},
    expr,
    netlink::{ChainSpec, Expr, SetSpec, ValueKind},
    object::Object,
};
use crate::{
    model::Family,
    plan::{LocalTraffic, NodePlan, NodePortAddresses},
};

/// The table's name, in family `ip` and in family `ip6`.
pub(super) const TABLE: &str = "weir";
/// The name of the table that serves while the other one is built anew.
pub(super) const STAND_IN: &str = "weir-next";

/// A map or set that always exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Map {
    /// Frontend → bucket.
    Services,
    /// NodePort → bucket.
    NodePorts,
    /// Bucket → the chain that picks a backend.
    Buckets,
    /// Frontend and slot → backend.
    Backends,
    /// NodePort and slot → backend.
    NodePortBackends,
    /// Frontends that are refused (F1).
    Refused,
    /// NodePorts that are refused (F1).
    RefusedNodePorts,
    /// Every ClusterIP (F4).
    ClusterIps,
    /// This node's addresses that serve NodePorts.
    NodeIps,
    /// Backends that are or may be on this node, as seen from themselves (R9).
    Hairpin,
    /// Frontend that lets only some sources in → bucket (F7).
    Guarded,
    /// Bucket → the chain that lets them in.
    Guards,
    /// Number → the backend that a sticky port knows by it. It goes with the backend, and so does every memory of it (A5).
    Numbered,
    /// IPv6 networks of which clients came that were not remembered yet, with how often they did.
    Newcomers,
    /// The one element says up to which number they may have been given to backends.
    NumbersGiven,
    /// Frontends left alone while their address is this host's own: a process here answers.
    Answered,
    /// Where flows came from lately that are not answered here for that reason.
    Strangers,
}

impl Map {
    pub(super) const ALL: [Self; 17] = [
        Self::Services,
        Self::NodePorts,
        Self::Buckets,
        Self::Backends,
        Self::NodePortBackends,
        Self::Refused,
        Self::RefusedNodePorts,
        Self::ClusterIps,
        Self::NodeIps,
        Self::Hairpin,
        Self::Guarded,
        Self::Guards,
        Self::Numbered,
        Self::Newcomers,
        Self::NumbersGiven,
        Self::Answered,
        Self::Strangers,
    ];

    /// Those that lead from buckets to chains.
    pub(super) const BUCKETS: [Self; 2] = [Self::Buckets, Self::Guards];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Services => "services",
            Self::NodePorts => "node-ports",
            Self::Buckets => "buckets",
            Self::Backends => "backends",
            Self::NodePortBackends => "node-port-backends",
            Self::Refused => "refused",
            Self::RefusedNodePorts => "refused-node-ports",
            Self::ClusterIps => "cluster-ips",
            Self::NodeIps => "node-ips",
            Self::Hairpin => "hairpin",
            Self::Guarded => "source-ranges",
            Self::Guards => "guards",
            Self::Numbered => "numbered",
            Self::Newcomers => "newcomers",
            Self::NumbersGiven => "last-number",
            Self::Answered => "answered-here",
            Self::Strangers => "strangers",
        }
    }

    /// Whether it holds an element for each endpoint of each frontend.
    pub(super) const fn holds_slots(self) -> bool {
        matches!(self, Self::Backends | Self::NodePortBackends)
    }

    /// Whether adoption reads it whole. Of what has an element for each endpoint only single elements are asked for.
    pub(super) const fn is_adopted_whole(self) -> bool {
        !self.holds_slots() && !matches!(self, Self::Numbered | Self::Newcomers | Self::Strangers)
    }

    /// Where the slots of these frontends are.
    pub(super) const fn slots(self) -> Option<Self> {
        match self {
            Self::Services => Some(Self::Backends),
            Self::NodePorts => Some(Self::NodePortBackends),
            _ => None,
        }
    }

    /// How many bytes at the start of a key tell which frontend it is about; `None` where nothing is about a frontend.
    pub(super) const fn frontend_len(self, family: Family) -> Option<usize> {
        const SERVICE: usize = 8;
        match self {
            Self::Services | Self::Refused | Self::Guarded | Self::Hairpin | Self::Answered => {
                Some(expr::address_len(family) as usize + SERVICE)
            }
            Self::NodePorts | Self::RefusedNodePorts => Some(SERVICE),
            Self::Buckets
            | Self::Guards
            | Self::Backends
            | Self::NodePortBackends
            | Self::ClusterIps
            | Self::NodeIps
            | Self::Numbered
            | Self::Newcomers
            | Self::NumbersGiven
            | Self::Strangers => None,
        }
    }

    pub(super) fn spec(self, family: Family) -> SetSpec {
        let (key, value): (&[Part], ValueKind) = match self {
            Self::Services | Self::Guarded => (&FRONTEND, BUCKET),
            Self::NodePorts => (&NODE_PORT, BUCKET),
            Self::Buckets | Self::Guards => (&[Part::Bucket], ValueKind::Verdict),
            Self::Backends => (&[Part::Address, Part::Protocol, Part::Port, Part::Slot], endpoint(family)),
            Self::NodePortBackends => (&[Part::Protocol, Part::Port, Part::Slot], endpoint(family)),
            Self::Refused | Self::Answered => (&FRONTEND, ValueKind::None),
            Self::RefusedNodePorts => (&NODE_PORT, ValueKind::None),
            Self::ClusterIps | Self::NodeIps | Self::Newcomers | Self::Strangers => {
                (&[Part::Address], ValueKind::None)
            }
            Self::Hairpin => (&[Part::Address, Part::Address, Part::Protocol, Part::Port], ValueKind::None),
            Self::Numbered => (&[Part::Bucket], endpoint(family)),
            Self::NumbersGiven => (&[Part::Bucket], BUCKET),
        };
        let mut spec = set_spec(self.name(), family, key, value);
        match self {
            Self::Backends | Self::NodePortBackends => {
                spec.userdata = userdata::slots(family, self == Self::Backends);
            }
            Self::Buckets | Self::Guards | Self::Numbered => {
                spec.userdata = userdata::host_order(true, false)
            }
            Self::NumbersGiven => spec.userdata = userdata::host_order(true, true),
            Self::Newcomers => {
                spec.flags = libc::NFT_SET_TIMEOUT as u32 | libc::NFT_SET_EVAL as u32;
                spec.size = MOST_NEWCOMERS;
            }
            Self::Strangers => {
                spec.flags = libc::NFT_SET_TIMEOUT as u32 | libc::NFT_SET_EVAL as u32;
                spec.size = MOST_STRANGERS;
            }
            _ if value == BUCKET => spec.userdata = userdata::host_order(false, true),
            _ => {}
        }
        spec
    }
}

/// One part of a concatenated key. Each takes a multiple of 4 bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Address,
    Protocol,
    Port,
    Slot,
    Bucket,
}

const FRONTEND: [Part; 3] = [Part::Address, Part::Protocol, Part::Port];
const NODE_PORT: [Part; 2] = [Part::Protocol, Part::Port];

impl Part {
    const fn len(self, family: Family) -> u32 {
        match self {
            Self::Address => expr::address_len(family),
            Self::Protocol | Self::Port | Self::Slot | Self::Bucket => 4,
        }
    }

    /// nft's number for the type (`enum datatypes` of its source): what `nft list` goes by.
    pub(super) const fn nft_type(self, family: Family) -> u32 {
        match (self, family) {
            (Self::Slot, _) => 4,
            (Self::Address, Family::V4) => 7,
            (Self::Address, Family::V6) => 8,
            (Self::Protocol, _) => 12,
            (Self::Port, _) => 13,
            (Self::Bucket, _) => BUCKET_TYPE,
        }
    }
}

/// A bucket number is held as a `classid`: the one type of 4 bytes whose values a rule may put into a packet field
/// that nothing else reads on the way. See README.md, "Why the priority field".
const BUCKET_TYPE: u32 = 23;
const BUCKET: ValueKind = ValueKind::Data { nft_type: BUCKET_TYPE, len: 4 };

const fn endpoint(family: Family) -> ValueKind {
    let nft_type = Part::Address.nft_type(family) << 6 | Part::Port.nft_type(family);
    ValueKind::Data { nft_type, len: expr::address_len(family) + 4 }
}

/// A set or map without anything special.
pub(super) fn set_spec(name: &str, family: Family, key: &[Part], value: ValueKind) -> SetSpec {
    SetSpec {
        name: name.to_owned(),
        key_type: key.iter().fold(0, |kind, part| kind << 6 | part.nft_type(family)),
        key_len: key.iter().map(|part| part.len(family)).sum(),
        value,
        flags: 0,
        size: 0,
        parts: Vec::new(),
        userdata: Vec::new(),
    }
}

/// Clients remembered for one service port, at most. Beyond it new clients are served but not remembered.
const MOST_REMEMBERED: u32 = 1 << 20;

/// Networks that are told apart when their clients come, at most. Those beyond it may all be remembered.
const MOST_NEWCOMERS: u32 = 1 << 16;

/// Addresses of strangers that are remembered, at most: a few are enough to find out what they are.
const MOST_STRANGERS: u32 = 64;

/// The map of one service port's remembered clients: client → number.
pub(super) fn clients_spec(name: &str, comment: Option<&str>, family: Family) -> SetSpec {
    let mut spec = set_spec(name, family, &[Part::Address], BUCKET);
    spec.userdata =
        [userdata::host_order(false, true), comment.map(userdata::comment_of_set).unwrap_or_default()]
            .concat();
    spec.flags = libc::NFT_SET_TIMEOUT as u32 | libc::NFT_SET_EVAL as u32;
    spec.size = MOST_REMEMBERED;
    spec
}

/// The map of one service port's slots: slot → number.
pub(super) fn slots_spec(name: &str, comment: Option<&str>, family: Family) -> SetSpec {
    let mut spec = set_spec(name, family, &[Part::Slot], BUCKET);
    spec.userdata = [userdata::numbers(), comment.map(userdata::comment_of_set).unwrap_or_default()].concat();
    spec
}

/// The set of the sources in one list of ranges.
pub(super) fn sources_spec(name: &str, family: Family) -> SetSpec {
    const NFT_SET_CONCAT: u32 = 0x80;
    let key = [Part::Address, Part::Port];
    let mut spec = set_spec(name, family, &key, ValueKind::None);
    spec.flags = libc::NFT_SET_INTERVAL as u32 | NFT_SET_CONCAT;
    spec.parts = key.iter().map(|part| part.len(family) as u8).collect();
    spec
}

/// What `nft` keeps about objects for itself: what it needs to print and read back a map whose key has a part without a
/// named type, and comments.
pub(super) mod userdata {
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

    pub(in super::super) fn comment_of_chain(text: &str) -> Vec<u8> {
        comment(0, text)
    }

    pub(super) fn comment_of_set(text: &str) -> Vec<u8> {
        comment(7, text)
    }

    /// An expression: its kind, then what it is made of.
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

    /// Which random number is drawn does not matter.
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
}

/// A chain that always exists, with its rules.
#[derive(PartialEq, Eq)]
pub(super) struct StaticChain {
    pub(super) spec: ChainSpec,
    pub(super) rules: Vec<Vec<Expr>>,
}

/// Loads `daddr . l4proto . dport` from the first word on.
pub(super) fn load_frontend(family: Family) -> Vec<Expr> {
    let next = expr::address_words(family);
    vec![
        expr::destination_address(family, expr::word(0)),
        expr::protocol(expr::word(next)),
        expr::destination_port(expr::word(next + 1)),
    ]
}

/// Loads `l4proto . dport` from the first word on.
pub(super) fn load_node_port() -> Vec<Expr> {
    vec![expr::protocol(expr::word(0)), expr::destination_port(expr::word(1))]
}

/// Matches packets that are not from a local pod; empty when nothing tells pods apart.
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

pub(super) fn address_bytes(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

pub(super) fn mask_and_network(net: IpNet) -> (Vec<u8>, Vec<u8>) {
    (address_bytes(net.netmask()), address_bytes(net.network()))
}

/// Matches packets to an address that serves NodePorts (R13).
fn to_node(family: Family, node: &NodePlan) -> Vec<Expr> {
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

fn to_bucket(map: Map, buckets: Map) -> Vec<Expr> {
    vec![
        expr::map(expr::word(0), map.name(), expr::word(0)),
        expr::set_priority(expr::word(0)),
        expr::priority(expr::word(0)),
        expr::map(expr::word(0), buckets.name(), expr::VERDICT),
    ]
}

/// What some Service needs besides what every node has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Needs {
    /// Sources are let in or not (F7).
    pub(super) guards: bool,
}

/// Every chain that is there whatever Services there are, or because of `needs`.
pub(super) fn static_chains(family: Family, node: &NodePlan, needs: Needs) -> Vec<StaticChain> {
    use Hook::{Forward, In, Out, PostRouting, PreRouting};
    let filter = ChainType::Filter;
    let mut chains = answered::telling_chains(family, node);
    chains.extend([
        drops::no_local_endpoints(),
        drops::out_of_window(if node.drops_out_of_window { of_pods(family, node) } else { Vec::new() }),
        choice::to_numbered(family),
        base("nat-prerouting", ChainType::Nat, PreRouting, -100, dispatch_rules(family, node, true)),
        base("nat-output", ChainType::Nat, Out, -100, dispatch_rules(family, node, false)),
        base("filter-input", filter, In, 0, input_rules(family, node)),
        base("filter-output", filter, Out, 0, refused_on_the_way_out(family, node)),
        base("filter-forward", filter, Forward, 0, refused_on_the_way_through(family, node)),
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

fn base(name: &str, kind: ChainType, hook: Hook, priority: i32, rules: Vec<Vec<Expr>>) -> StaticChain {
    let spec = ChainSpec { hook: Some((kind, hook, priority)), ..ChainSpec::regular(name) };
    StaticChain { spec, rules }
}

/// The chains that are there only where names are answered. Every packet would pass them, empty or not, as it would
/// those below.
const ANSWERED: [&str; 2] = ["answered-prerouting", "answered-output"];
/// The chains that are there only while some Service lets only some sources in.
pub(super) const GUARD: [&str; 2] = ["guard-prerouting", "guard-output"];

/// Every chain that may be there or not. Those that lead to others come first, as they have to when they go.
pub(super) fn optional_chains() -> impl Iterator<Item = &'static str> {
    ANSWERED.into_iter().chain(GUARD).chain(answered::TELLING)
}

/// Every name that a chain may have which is there whatever Services there are, or because of some.
pub(super) fn is_static(name: &str) -> bool {
    const ALWAYS: [&str; 9] = [
        drops::NO_LOCAL_ENDPOINTS,
        drops::OUT_OF_WINDOW,
        choice::TO_NUMBERED,
        "nat-prerouting",
        "nat-output",
        "filter-input",
        "filter-output",
        "filter-forward",
        "nat-postrouting",
    ];
    ALWAYS.contains(&name) || optional_chains().any(|optional| optional == name)
}

/// Whether a chain of this name is one that others lead to, and no base chain.
pub(super) fn is_led_to(name: &str) -> bool {
    [drops::NO_LOCAL_ENDPOINTS, drops::OUT_OF_WINDOW, choice::TO_NUMBERED].contains(&name)
        || answered::TELLING.contains(&name)
        || Object::parse(name).is_some()
}

/// The set or map of this name, if it is one of ours.
pub(super) fn set_of(name: &str, family: Family) -> Option<SetSpec> {
    let map = Map::ALL.into_iter().find(|map| map.name() == name);
    map.map(|map| map.spec(family)).or_else(|| Object::parse(name)?.map(family))
}

/// Matches what comes from neither a pod nor this host.
pub(super) fn from_outside(family: Family, node: &NodePlan) -> Vec<Expr> {
    [not_from_pod(family, node), expr::source_is_local(false).to_vec()].concat()
}

/// R1: an exact frontend before a NodePort.
fn dispatch_rules(family: Family, node: &NodePlan, coming_in: bool) -> Vec<Vec<Expr>> {
    let services = [load_frontend(family), to_bucket(Map::Services, Map::Buckets)].concat();
    let node_ports =
        [to_node(family, node), load_node_port(), to_bucket(Map::NodePorts, Map::Buckets)].concat();
    left_alone_or_noted(family, node, coming_in).into_iter().chain([services, node_ports]).collect()
}

/// F7: before translation, so that it holds whatever would happen next.
fn guard_rule(family: Family) -> Vec<Expr> {
    [expr::new_flow().to_vec(), load_frontend(family), to_bucket(Map::Guarded, Map::Guards)].concat()
}

/// Lets in only some sources.
pub(super) fn guard_rules(family: Family, sources: &str) -> Vec<Vec<Expr>> {
    let source = vec![
        expr::source_address(family, expr::word(0)),
        expr::destination_port(expr::word(expr::address_words(family))),
        expr::not_in_set(expr::word(0), sources),
    ];
    let forget = vec![expr::constant(expr::word(0), &[0; 4]), expr::set_priority(expr::word(0))];
    vec![forget, [source, Reason::SourceNotAllowed.drop()].concat()]
}

/// Lets everything pass that is no flow's first packet, so that only those meet the rules behind.
fn only_new_flows() -> Vec<Expr> {
    [expr::no_new_flow().to_vec(), vec![expr::accept()]].concat()
}

/// Lets a flow pass that has a backend: it is neither refused nor unknown, and its destination is no Service's any more. A
/// destination that another program's rules made a Service's is not refused either.
fn translated() -> Vec<Expr> {
    [expr::translated().to_vec(), vec![expr::accept()]].concat()
}

fn refused(family: Family) -> Vec<Expr> {
    let refused = vec![expr::in_set(expr::word(0), Map::Refused.name())];
    [load_frontend(family), refused, Reason::NoEndpoints.reject(family)].concat()
}

/// F1 for NodePorts and for addresses that are this host's own.
fn input_rules(family: Family, node: &NodePlan) -> Vec<Vec<Expr>> {
    let node_port = [
        load_node_port(),
        vec![expr::in_set(expr::word(0), Map::RefusedNodePorts.name())],
        to_node(family, node),
        Reason::NoEndpoints.reject(family),
    ];
    let mut rules = vec![only_new_flows(), translated()];
    rules.extend(left_alone(family, node, true));
    rules.push(refused(family));
    if node.answers_names {
        // F4 where a ClusterIP is this host's own: whatever else listens here is not what was asked for.
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
    [known, Reason::UnknownPort.reject(family)].concat()
}

/// What this host sends and nothing serves.
fn refused_on_the_way_out(family: Family, node: &NodePlan) -> Vec<Vec<Expr>> {
    refuse_rules(family, node, vec![only_new_flows()], left_alone(family, node, false))
}

/// What is forwarded and nothing serves. Packets of known flows, of which there are most, end at the first rule.
fn refused_on_the_way_through(family: Family, node: &NodePlan) -> Vec<Vec<Expr>> {
    let known = [expr::known_flow().to_vec(), vec![expr::accept()]].concat();
    let others = [expr::no_new_flow().to_vec(), vec![expr::goto(drops::OUT_OF_WINDOW)]].concat();
    refuse_rules(family, node, vec![known, others], None)
}

/// Matches what pods send or get; everything where nothing tells pods apart.
fn of_pods(family: Family, node: &NodePlan) -> Vec<Vec<Expr>> {
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

/// The name of an interface as the kernel keeps it.
fn padded(name: &str) -> [u8; 16] {
    let mut padded = [0; 16];
    let len = name.len().min(15);
    padded[..len].copy_from_slice(&name.as_bytes()[..len]);
    padded
}

/// F1, F4, F5, behind what ends what is no new flow, and what is an exception.
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
        [in_network, Reason::UnallocatedAddress.drop()].concat()
    });
    rules.extend([choice::number_is_left_behind(), translated()]);
    rules.extend(exception);
    rules.extend([refused(family), unknown_port(family)].into_iter().chain(unallocated));
    rules
}

/// Sets one bit of the packet mark.
pub(super) fn mark(bit: u32) -> Vec<Expr> {
    vec![
        expr::mark(expr::word(0)),
        expr::bitwise(expr::word(0), &(!bit).to_ne_bytes(), &bit.to_ne_bytes()),
        expr::set_mark(expr::word(0)),
    ]
}

/// R8, R9.
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
