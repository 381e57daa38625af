//! Questions about one table.
//!
//! In: names of sets, and keys. Out: sets, chains, counters and elements; none where the kernel has no such object.

use std::io;

use nftnl::Table;

use super::socket::Netlink;
use crate::sys::libnftnl::{self, Bytes, Dump, Element, ReadChain, SetSpec, Value};

impl Netlink {
    pub(super) fn sets(&mut self, table: &Table) -> io::Result<Vec<SetSpec>> {
        retried(|| {
            let mut sets = Vec::new();
            let request = |seq| libnftnl::dump_request(table, Dump::Sets, seq);
            self.ask(request, |message| sets.extend(libnftnl::parse_set(table, message)))?;
            Ok(sets)
        })
    }

    /// The chains of all tables of the family.
    pub(super) fn chains(&mut self, table: &Table) -> io::Result<Vec<ReadChain>> {
        retried(|| {
            let mut chains = Vec::new();
            let request = |seq| libnftnl::dump_request(table, Dump::Chains, seq);
            self.ask(request, |message| chains.extend(libnftnl::parse_chain(message)))?;
            Ok(chains)
        })
    }

    /// The name of each counter, and the packets that it counted.
    pub(super) fn counters(&mut self, table: &Table) -> io::Result<Vec<(String, u64)>> {
        retried(|| {
            let mut counters = Vec::new();
            let request = |seq| libnftnl::dump_request(table, Dump::Counters, seq);
            self.ask(request, |message| counters.extend(libnftnl::parse_counter(table, message)))?;
            Ok(counters)
        })
    }

    pub(super) fn elements(&mut self, table: &Table, set: &str) -> io::Result<Vec<Element>> {
        retried(|| {
            let mut elements = Vec::new();
            let request = |seq| libnftnl::dump_request(table, Dump::Elements(set), seq);
            self.ask(request, |message| {
                libnftnl::parse_elements(table, message, |element| elements.push(element));
            })?;
            Ok(elements)
        })
    }

    /// The value under `key` in one set.
    pub(super) fn element(&mut self, table: &Table, set: &str, key: &Bytes) -> io::Result<Option<Value>> {
        retried(|| {
            let mut value = None;
            let request = |seq| libnftnl::get_request(table, set, key, seq);
            self.ask(request, |message| {
                libnftnl::parse_elements(table, message, |element| value = Some(element.value));
            })?;
            Ok(value)
        })
    }
}

/// Asks again while other programs change the rule set.
fn retried<T: Default>(mut ask: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    const TRIES: usize = 20;
    for attempt in 1.. {
        match ask() {
            Err(error) if error.raw_os_error() == Some(libc::EINTR) && attempt < TRIES => {}
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => break,
            result => return result,
        }
    }
    Ok(T::default())
}
