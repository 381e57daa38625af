//! Sends the datagrams of connected UDP sockets to their Service again after their backend is gone.
//!
//! In: for each socket its address, the backend that it is connected to, and the Service that it asked for. Out: tables
//! `ip weir-moved` and `ip6 weir-moved`, which exist only while there are such sockets.
//!
//! ```text
//! chain nat-prerouting {
//!     type nat hook prerouting priority -101
//!     ct state new meta l4proto udp ip saddr . udp sport . ip daddr . udp dport @dropped drop
//!     ct state new meta l4proto udp
//!         udp dport set ip saddr . udp sport . ip daddr . udp dport map @ports
//!         ip daddr set ip saddr . udp sport . ip daddr . udp dport map @addresses
//! }
//! ```
//!
//! One priority before the table `weir`, the rule writes the Service's address into the first datagram of a flow, in
//! place of the backend's, and the table `weir` picks a backend as for any other flow. Connection tracking stores the
//! flow with the addresses before both changes. So it translates later datagrams and answers between the socket and the
//! new backend, and the socket receives answers from the address to which it is connected. Only first datagrams of
//! flows reach the rule.

use std::{io, net::SocketAddr};

use nftnl::{ChainType, Hook};

use super::{
    expr,
    schema::{KeyPart, address_bytes, set_spec},
    socket::{CommitError, Netlink},
};
use crate::sys::libnftnl::{self, Batch, ChainSpec, Element, Expr, SetSpec, Value, ValueKind};
use crate::{
    dataplane::Error,
    model::{Family, Protocol},
};

const TABLE: &str = "weir-moved";
const PORTS: &str = "ports";
const ADDRESSES: &str = "addresses";
const DROPPED: &str = "dropped";

/// One before the table `weir` translates.
const PRIORITY: i32 = -101;

/// A connected UDP socket. weir sends its datagrams to its Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moved {
    /// The socket's address and port.
    pub client: SocketAddr,
    /// The backend to which it is connected.
    pub backend: SocketAddr,
    /// The Service for which it asked, of the same family.
    pub service: SocketAddr,
    /// Whether that Service exists now. Otherwise weir drops the datagrams, because the kernel would send all but the
    /// first to the backend.
    pub exists: bool,
}

/// The tables of both families, in the network namespace in which this was opened.
pub struct MovedTables(Netlink);

impl MovedTables {
    /// # Errors
    ///
    /// When the kernel has no nf_tables or this process may not use it.
    pub fn open() -> Result<Self, Error> {
        Netlink::open().map(Self).map_err(|source| io_error("opening a netlink socket", source))
    }

    /// Sends the datagrams of exactly these sockets of one family to their Services. Without sockets there is no table.
    ///
    /// # Errors
    ///
    /// The kernel's. Then nothing has changed.
    pub fn write(&mut self, family: Family, moved: &[Moved]) -> Result<(), Error> {
        let written = replace(&mut self.0, family, moved);
        written
            .map_err(|error| io_error("sending datagrams of moved sockets to their Services", error.into()))
    }
}

fn io_error(context: &str, source: io::Error) -> Error {
    Error::Io { context: context.to_owned(), source }
}

/// Replaces the family's table with one for these sockets, in one batch.
pub(super) fn replace(netlink: &mut Netlink, family: Family, moved: &[Moved]) -> Result<(), CommitError> {
    let table = libnftnl::table(TABLE, family);
    let mut batch = Batch::new(&table);
    // The kernel refuses to delete a missing table.
    batch.add_table();
    batch.delete_table();
    if !moved.is_empty() {
        fill(&mut batch, family, moved);
    }
    netlink.commit(&batch.finish())
}

fn fill(batch: &mut Batch<'_>, family: Family, moved: &[Moved]) {
    batch.add_table();
    batch.add_set(&map_spec(PORTS, family, KeyPart::Port, 2));
    batch.add_set(&map_spec(ADDRESSES, family, KeyPart::Address, expr::address_len(family)));
    batch.add_set(&set_spec(DROPPED, family, &KEY, ValueKind::None));
    for (name, hook) in [("nat-prerouting", Hook::PreRouting), ("nat-output", Hook::Out)] {
        let hook = Some((ChainType::Nat, hook, PRIORITY));
        batch.add_chain(&ChainSpec { hook, ..ChainSpec::regular(name) });
        batch.add_rule(name, &drop_rule(family));
        batch.add_rule(name, &rule(family));
    }
    let elements = |value: fn(SocketAddr) -> Vec<u8>| -> Vec<Element> {
        let translated = moved.iter().filter(|moved| moved.exists);
        translated.map(|moved| element(moved, Value::Data(value(moved.service).into()))).collect()
    };
    let dropped = moved.iter().filter(|moved| !moved.exists);
    let dropped: Vec<Element> = dropped.map(|moved| element(moved, Value::None)).collect();
    batch.add_missing_elements(DROPPED, &dropped);
    batch.add_missing_elements(PORTS, &elements(|service| service.port().to_be_bytes().to_vec()));
    batch.add_missing_elements(ADDRESSES, &elements(|service| address_bytes(service.ip())));
}

/// The socket's address and port, then the backend's.
const KEY: [KeyPart; 4] = [KeyPart::Address, KeyPart::Port, KeyPart::Address, KeyPart::Port];

fn map_spec(name: &str, family: Family, value: KeyPart, len: u32) -> SetSpec {
    let value = ValueKind::Data { nft_type: value.nft_type(family), len };
    set_spec(name, family, &KEY, value)
}

fn element(moved: &Moved, value: Value) -> Element {
    let end =
        |at: SocketAddr| [address_bytes(at.ip()), at.port().to_be_bytes().to_vec(), vec![0; 2]].concat();
    let key = [end(moved.client), end(moved.backend)].concat();
    Element { key: key.into(), key_end: None, value }
}

/// Matches UDP packets and loads the key. All packets here begin a flow. The match on it makes the kernel track flows,
/// without which it runs no chain of type nat.
fn load(family: Family) -> Vec<Expr> {
    let words = expr::address_words(family);
    let load = [
        expr::protocol(expr::word(0)),
        expr::compare(expr::word(0), true, &[Protocol::Udp.number()]),
        expr::source_address(family, expr::word(0)),
        expr::source_port(expr::word(words)),
        expr::destination_address(family, expr::word(words + 1)),
        expr::destination_port(expr::word(2 * words + 1)),
    ];
    [expr::new_flow().to_vec(), load.to_vec()].concat()
}

fn drop_rule(family: Family) -> Vec<Expr> {
    [load(family), vec![expr::in_set(expr::word(0), DROPPED), expr::drop()]].concat()
}

/// Both look-ups come before the changes, because the packet has the key.
fn rule(family: Family) -> Vec<Expr> {
    let words = expr::address_words(family);
    let (port, address) = (expr::word(2 * words + 2), expr::word(2 * words + 3));
    let translate = vec![
        expr::map(expr::word(0), PORTS, port),
        expr::map(expr::word(0), ADDRESSES, address),
        expr::set_destination_port(port),
        expr::set_destination_address(family, address),
    ];
    [load(family), translate].concat()
}
