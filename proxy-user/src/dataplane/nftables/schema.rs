//! The layout of a table: its maps and sets, and the keys and values of their elements.
//!
//! In: a family; frontends, backends and slots. Out: specifications, keys and values as the kernel holds them. Every
//! part of a key fills whole words of 4 bytes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use nftnl::nftnl_sys::libc;

use super::{expr, userdata};
use crate::sys::libnftnl::{Bytes, ChainSpec, Element, Expr, SetSpec, Value, ValueKind};
use crate::{
    model::{Family, Protocol},
    plan::{Backend, BackendSet, Destination, Frontend},
};

/// The table's name in both families.
pub(super) const TABLE: &str = "weir";
/// The name of the table that serves while weir builds [`TABLE`] anew.
pub(super) const STAND_IN: &str = "weir-next";

/// A map or set that always exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Map {
    /// Frontend → bucket.
    Services,
    /// NodePort → bucket.
    NodePorts,
    /// Bucket → chain that picks a backend.
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
    /// The addresses of this node that serve NodePorts.
    NodeIps,
    /// Packets from a backend that is or may be on this node to itself (R9).
    Hairpin,
    /// Frontend with source ranges → bucket (F7).
    SourceRanges,
    /// Bucket → chain that checks the source (F7).
    Guards,
    /// Number → backend of a sticky port. Removing the element makes clients forget the backend (A5).
    Numbered,
    /// IPv6 networks with recent new clients of sticky ports, and the rate of these.
    Newcomers,
    /// Its one element holds the highest number that a backend may have had.
    LastNumber,
    /// Frontends that a process of this node answers while their address is this host's own.
    AnsweredHere,
    /// Sources of recent flows to such frontends that are no clients of this node.
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
        Self::SourceRanges,
        Self::Guards,
        Self::Numbered,
        Self::Newcomers,
        Self::LastNumber,
        Self::AnsweredHere,
        Self::Strangers,
    ];

    /// The maps from buckets to chains.
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
            Self::SourceRanges => "source-ranges",
            Self::Guards => "guards",
            Self::Numbered => "numbered",
            Self::Newcomers => "newcomers",
            Self::LastNumber => "last-number",
            Self::AnsweredHere => "answered-here",
            Self::Strangers => "strangers",
        }
    }

    /// Whether the map has an element for each endpoint of each frontend.
    pub(super) const fn holds_slots(self) -> bool {
        matches!(self, Self::Backends | Self::NodePortBackends)
    }

    /// Whether weir dumps the map at a start. Of maps with an element for each endpoint it reads single elements only.
    pub(super) const fn is_read_whole(self) -> bool {
        !self.holds_slots() && !matches!(self, Self::Numbered | Self::Newcomers | Self::Strangers)
    }

    /// The map with the slots of these frontends.
    pub(super) const fn slots(self) -> Option<Self> {
        match self {
            Self::Services => Some(Self::Backends),
            Self::NodePorts => Some(Self::NodePortBackends),
            _ => None,
        }
    }

    /// The length of the frontend at the start of a key, in bytes; `None` if keys have no frontend.
    pub(super) const fn frontend_len(self, family: Family) -> Option<usize> {
        const SERVICE: usize = 8;
        match self {
            Self::Services | Self::Refused | Self::SourceRanges | Self::Hairpin | Self::AnsweredHere => {
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
            | Self::LastNumber
            | Self::Strangers => None,
        }
    }

    pub(super) fn spec(self, family: Family) -> SetSpec {
        let (key, value): (&[KeyPart], ValueKind) = match self {
            Self::Services | Self::SourceRanges => (&FRONTEND, BUCKET),
            Self::NodePorts => (&NODE_PORT, BUCKET),
            Self::Buckets | Self::Guards => (&[KeyPart::Bucket], ValueKind::Verdict),
            Self::Backends => {
                (&[KeyPart::Address, KeyPart::Protocol, KeyPart::Port, KeyPart::Slot], endpoint(family))
            }
            Self::NodePortBackends => (&[KeyPart::Protocol, KeyPart::Port, KeyPart::Slot], endpoint(family)),
            Self::Refused | Self::AnsweredHere => (&FRONTEND, ValueKind::None),
            Self::RefusedNodePorts => (&NODE_PORT, ValueKind::None),
            Self::ClusterIps | Self::NodeIps | Self::Newcomers | Self::Strangers => {
                (&[KeyPart::Address], ValueKind::None)
            }
            Self::Hairpin => {
                (&[KeyPart::Address, KeyPart::Address, KeyPart::Protocol, KeyPart::Port], ValueKind::None)
            }
            Self::Numbered => (&[KeyPart::Bucket], endpoint(family)),
            Self::LastNumber => (&[KeyPart::Bucket], BUCKET),
        };
        let mut spec = set_spec(self.name(), family, key, value);
        match self {
            Self::Backends | Self::NodePortBackends => {
                spec.userdata = userdata::slots(family, self == Self::Backends);
            }
            Self::Buckets | Self::Guards | Self::Numbered => {
                spec.userdata = userdata::host_order(true, false)
            }
            Self::LastNumber => spec.userdata = userdata::host_order(true, true),
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

/// One part of a concatenated key, which takes a multiple of 4 bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum KeyPart {
    Address,
    Protocol,
    Port,
    Slot,
    Bucket,
}

const FRONTEND: [KeyPart; 3] = [KeyPart::Address, KeyPart::Protocol, KeyPart::Port];
const NODE_PORT: [KeyPart; 2] = [KeyPart::Protocol, KeyPart::Port];

impl KeyPart {
    const fn len(self, family: Family) -> u32 {
        match self {
            Self::Address => expr::address_len(family),
            Self::Protocol | Self::Port | Self::Slot | Self::Bucket => 4,
        }
    }

    /// The type's number in `nft` (`enum datatypes` of its source), by which `nft list` prints values.
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

/// `classid`, the type of bucket numbers, because a rule may write no other type of 4 bytes into a packet field that
/// nothing else reads on the way. See README.md, "Why the priority field".
const BUCKET_TYPE: u32 = 23;
const BUCKET: ValueKind = ValueKind::Data { nft_type: BUCKET_TYPE, len: 4 };

const fn endpoint(family: Family) -> ValueKind {
    let nft_type = KeyPart::Address.nft_type(family) << 6 | KeyPart::Port.nft_type(family);
    ValueKind::Data { nft_type, len: expr::address_len(family) + 4 }
}

/// A set or map without flags, limit and user data.
pub(super) fn set_spec(name: &str, family: Family, key: &[KeyPart], value: ValueKind) -> SetSpec {
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

/// The most clients that the kernel remembers for one service port. It serves more, without remembering them.
const MOST_REMEMBERED: u32 = 1 << 20;

/// The most networks with a limit for new clients. The kernel remembers clients of further networks without a limit.
const MOST_NEWCOMERS: u32 = 1 << 16;

/// The most addresses of strangers. A few are enough for an administrator to identify them.
const MOST_STRANGERS: u32 = 64;

/// The map client → number of one sticky port.
pub(super) fn clients_spec(name: &str, comment: Option<&str>, family: Family) -> SetSpec {
    let mut spec = set_spec(name, family, &[KeyPart::Address], BUCKET);
    spec.userdata =
        [userdata::host_order(false, true), comment.map(userdata::comment_of_set).unwrap_or_default()]
            .concat();
    spec.flags = libc::NFT_SET_TIMEOUT as u32 | libc::NFT_SET_EVAL as u32;
    spec.size = MOST_REMEMBERED;
    spec
}

/// The map slot → number of one sticky port.
pub(super) fn slots_spec(name: &str, comment: Option<&str>, family: Family) -> SetSpec {
    let mut spec = set_spec(name, family, &[KeyPart::Slot], BUCKET);
    spec.userdata = [userdata::numbers(), comment.map(userdata::comment_of_set).unwrap_or_default()].concat();
    spec
}

/// The set with the ranges of one list.
pub(super) fn sources_spec(name: &str, family: Family) -> SetSpec {
    const NFT_SET_CONCAT: u32 = 0x80;
    let key = [KeyPart::Address, KeyPart::Port];
    let mut spec = set_spec(name, family, &key, ValueKind::None);
    spec.flags = libc::NFT_SET_INTERVAL as u32 | NFT_SET_CONCAT;
    spec.parts = key.iter().map(|part| part.len(family) as u8).collect();
    spec
}

fn push_word(key: &mut Bytes, bytes: &[u8]) {
    key.extend_from_slice(bytes);
    while !key.len().is_multiple_of(4) {
        key.push(0);
    }
}

fn push_service(key: &mut Bytes, protocol: Protocol, port: u16) {
    push_word(key, &[protocol.number()]);
    push_word(key, &port.to_be_bytes());
}

/// The key of a frontend. A NodePort's has no address.
pub(super) fn frontend_key(frontend: &Frontend) -> Bytes {
    let mut key = Bytes::new();
    if let Destination::Address(address) = frontend.destination {
        push_word(&mut key, &address_bytes(address));
    }
    push_service(&mut key, frontend.protocol, frontend.port);
    key
}

/// The frontend of a key, a NodePort if the key is too short for an address.
pub(super) fn frontend_of(family: Family, key: &[u8]) -> Option<Frontend> {
    let (destination, rest) = if key.len() > 8 {
        let (address, rest) = split_address(family, key)?;
        (Destination::Address(address), rest)
    } else {
        (Destination::NodePort(family), key)
    };
    let [protocol, _, _, _, high, low, ..] = *rest else { return None };
    Some(Frontend {
        destination,
        protocol: Protocol::from_number(protocol)?,
        port: u16::from_be_bytes([high, low]),
    })
}

/// Splits the bytes after the address at their start.
pub(super) fn split_address(family: Family, bytes: &[u8]) -> Option<(IpAddr, &[u8])> {
    match family {
        Family::V4 => {
            let (address, rest) = bytes.split_first_chunk::<4>()?;
            Some((Ipv4Addr::from(*address).into(), rest))
        }
        Family::V6 => {
            let (address, rest) = bytes.split_first_chunk::<16>()?;
            Some((Ipv6Addr::from(*address).into(), rest))
        }
    }
}

pub(super) fn backend_value(backend: &Backend) -> Bytes {
    let mut value = Bytes::new();
    push_word(&mut value, &address_bytes(backend.address));
    push_word(&mut value, &backend.port.to_be_bytes());
    value
}

/// Address and port in a backend's value.
pub(super) fn backend_of(family: Family, value: &[u8]) -> Option<(IpAddr, u16)> {
    let (address, rest) = split_address(family, value)?;
    let [high, low, ..] = *rest else { return None };
    Some((address, u16::from_be_bytes([high, low])))
}

/// The key of packets from a backend to itself (R9).
pub(super) fn hairpin_key(address: IpAddr, protocol: Protocol, port: u16) -> Bytes {
    let mut key = Bytes::new();
    push_word(&mut key, &address_bytes(address));
    push_word(&mut key, &address_bytes(address));
    push_service(&mut key, protocol, port);
    key
}

pub(super) fn slot_key(frontend: &[u8], slot: u32) -> Bytes {
    let mut key = Bytes::from_slice(frontend);
    push_word(&mut key, &slot.to_ne_bytes());
    key
}

/// The first slot of a set, because both sets of a frontend are in one map.
pub(super) const fn first_slot(set: BackendSet) -> u32 {
    match set {
        BackendSet::Cluster => 0,
        BackendSet::Local => 1 << 24,
    }
}

/// Numbers below are buckets with a verdict in place of a chain.
pub(super) const FIRST_BUCKET: u32 = 16;
/// Not 1, which older versions mapped to a plain drop: such a version must find its number free when it runs again.
pub(super) const DROP_BUCKET: u32 = 3;
pub(super) const PASS_BUCKET: u32 = 2;

pub(super) fn bucket_value(bucket: u32) -> Value {
    Value::Data(Bytes::from_slice(&bucket.to_ne_bytes()))
}

/// An element with a bucket, a slot of a sticky port, or a backend's number as key.
pub(super) fn bucket_element(bucket: u32, value: Value) -> Element {
    Element { key: Bytes::from_slice(&bucket.to_ne_bytes()), key_end: None, value }
}

pub(super) fn address_bytes(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// A chain with its rules.
#[derive(PartialEq, Eq)]
pub(super) struct RuledChain {
    pub(super) spec: ChainSpec,
    pub(super) rules: Vec<Vec<Expr>>,
}

impl RuledChain {
    pub(super) fn regular(name: &str, rules: Vec<Vec<Expr>>) -> Self {
        Self { spec: ChainSpec::regular(name), rules }
    }
}
