//! Messages of nf_tables: built from plain Rust values, and read back into them.
//!
//! In: tables, sets, chains, rules and elements (`objects`). Out: one netlink batch in a buffer (`batch`, of
//! `messages`), requests and parsed answers (`read`).

mod batch;
mod messages;
mod objects;
mod read;

pub(crate) use batch::{Batch, Subject};
pub(crate) use messages::OBJECT_COUNTER;
pub(crate) use objects::{
    Attribute, Bytes, ChainSpec, Element, Expr, Hooked, SetSpec, Value, ValueKind, table,
};
pub(crate) use read::{
    Dump, NEW_GENERATION, ReadChain, dump_request, generation_request, get_request, parse_chain,
    parse_counter, parse_elements, parse_generation, parse_set,
};
