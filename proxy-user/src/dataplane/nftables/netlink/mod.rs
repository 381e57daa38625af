//! Messages of nf_tables: built from plain Rust values, and read back into them.
//!
//! In: tables, sets, chains, rules and elements (`objects`). Out: one netlink batch in a buffer (`batch`, of
//! `messages`), requests and parsed answers (`read`).

#![expect(unsafe_code, reason = "a C library and system calls; every block states why it is sound")]

mod batch;
mod messages;
mod objects;
mod read;

pub(super) use batch::{Batch, Subject};
pub(super) use messages::OBJECT_COUNTER;
pub(super) use objects::{
    Attribute, Bytes, ChainSpec, Element, Expr, Hooked, SetSpec, Value, ValueKind, table,
};
pub(super) use read::{
    Dump, NEW_GENERATION, ReadChain, dump_request, generation_request, get_request, parse_chain,
    parse_counter, parse_elements, parse_generation, parse_set,
};
