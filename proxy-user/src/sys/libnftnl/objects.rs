//! Tables, sets, chains, rules and elements as plain Rust values. Nothing here calls the kernel or a C library.

use std::ffi::{CStr, CString};

use nftnl::{ChainType, Hook, ProtoFamily, Table};
use smallvec::SmallVec;

use crate::model::Family;

/// Bytes of a key or value; the longest is an IPv6 key with a source range.
pub(crate) type Bytes = SmallVec<[u8; 40]>;

/// A value of one attribute of an expression.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Attribute {
    U32(u32),
    U64(u64),
    U8(u8),
    Bytes(Bytes),
    Name(CString),
    /// An expression that the kernel copies into each element of a set.
    Expr(Box<Expr>),
}

/// One expression of a rule: libnftnl's name for its kind, and its attributes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Expr {
    pub(crate) kind: &'static CStr,
    pub(crate) attributes: Vec<(u32, Attribute)>,
}

/// The type of a map's values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ValueKind {
    /// None, in a set.
    None,
    /// nft's number for the type, and the length in bytes.
    Data {
        nft_type: u32,
        len: u32,
    },
    Verdict,
}

impl SetSpec {
    /// Whether rules and elements that were made for `other` work with this set.
    pub(crate) fn is_like(&self, other: &Self) -> bool {
        let shape = |spec: &Self| (spec.key_type, spec.key_len, spec.value, spec.flags, spec.size);
        shape(self) == shape(other) && (other.parts.is_empty() || self.parts == other.parts)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SetSpec {
    pub(crate) name: String,
    /// nft's number for the key's type, so that `nft list` prints it.
    pub(crate) key_type: u32,
    pub(crate) key_len: u32,
    pub(crate) value: ValueKind,
    /// `NFT_SET_*`.
    pub(crate) flags: u32,
    /// The most elements; 0 for no limit.
    pub(crate) size: u32,
    /// Lengths of the key's parts, for sets with ranges; empty otherwise.
    pub(crate) parts: Vec<u8>,
    /// Data that only `nft` reads.
    pub(crate) userdata: Vec<u8>,
}

/// Type, hook and priority of a base chain in the kernel.
pub(crate) type Hooked = (String, u32, i32);

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ChainSpec {
    pub(crate) name: String,
    /// Type, hook and priority of a base chain.
    pub(crate) hook: Option<(ChainType, Hook, i32)>,
    /// Data that only `nft` reads.
    pub(crate) userdata: Vec<u8>,
}

impl ChainSpec {
    pub(crate) fn regular(name: &str) -> Self {
        Self { name: name.to_owned(), hook: None, userdata: Vec::new() }
    }

    /// Type, hook and priority in the form in which the kernel reports them.
    pub(crate) fn hooked(&self) -> Option<Hooked> {
        let (kind, hook, priority) = self.hook?;
        let kind = match kind {
            ChainType::Filter => "filter",
            ChainType::Route => "route",
            ChainType::Nat => "nat",
        };
        Some((kind.to_owned(), hook as u32, priority))
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Value {
    None,
    Data(Bytes),
    /// `goto` this chain.
    Goto(String),
    /// `accept` (true) or `drop` (false).
    Accept(bool),
}

/// One element of a set or map.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Element {
    pub(crate) key: Bytes,
    /// The last key of the range, in sets with ranges.
    pub(crate) key_end: Option<Bytes>,
    pub(crate) value: Value,
}

impl Element {
    /// An element without a value: of a set, or one to delete by its key.
    pub(crate) const fn member(key: Bytes) -> Self {
        Self { key, key_end: None, value: Value::None }
    }
}

/// A table of this name in a family.
pub(crate) fn table(name: &str, family: Family) -> Table {
    let protocol = match family {
        Family::V4 => ProtoFamily::Ipv4,
        Family::V6 => ProtoFamily::Ipv6,
    };
    Table::new(c_string(name), protocol)
}

/// Names come from fixed tables and from Kubernetes names, which have no NUL. A name with a NUL is cut there, and the
/// kernel refuses it as unknown.
pub(crate) fn c_string(name: &str) -> CString {
    CString::new(name.split('\0').next().unwrap_or_default()).unwrap_or_default()
}
