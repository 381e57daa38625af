//! Connected UDP sockets whose backend is gone, and whose datagrams go to their Service again.
//!
//! In: for each socket its own address, the backend that it is connected to, and the Service that it asked for. Out: tables
//! `ip weir-moved` and `ip6 weir-moved`, which are there only while there are such sockets.
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
//! One priority before the table `weir` looks, the first datagram of a flow gets the Service's address in place of the backend's. Then
//! that table picks a backend for it as for any other. Connection tracking has the flow by the addresses that it came with, so
//! later datagrams, and answers, are translated between the socket and the new backend, and the socket hears them from the address that it
//! is connected to. Only first datagrams of flows meet the rule.

use std::{io, net::SocketAddr};

use nftnl::{ChainType, Hook, ProtoFamily};

use super::{
    expr,
    netlink::{ChainSpec, Element, Expr, SetSpec, Transaction, Value, ValueKind, c_string},
    ruleset::{Part, address_bytes, set_spec},
    socket::Netlink,
};
use crate::{
    dataplane::Error,
    model::{Family, Protocol},
};

const TABLE: &str = "weir-moved";
const PORTS: &str = "ports";
const ADDRESSES: &str = "addresses";
const DROPPED: &str = "dropped";

/// Just before the table `weir` translates.
const PRIORITY: i32 = -101;

/// A connected UDP socket whose datagrams go to its Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moved {
    /// Its own address and port.
    pub client: SocketAddr,
    /// The backend that it is connected to.
    pub backend: SocketAddr,
    /// The Service that it asked for, of the same family.
    pub service: SocketAddr,
    /// Whether there is that Service now. Without it datagrams are dropped: the kernel would send those behind the first one to the
    /// backend.
    pub exists: bool,
}

/// Both tables, in the network namespace that this was opened in.
pub struct MovedTables(Netlink);

impl MovedTables {
    /// # Errors
    ///
    /// When the kernel has no nf_tables or this process may not use it.
    pub fn open() -> Result<Self, Error> {
        let opened = Netlink::open().map_err(|source| super::io_error("opening a netlink socket", source));
        opened.map(Self)
    }

    /// Has exactly these sockets' datagrams go to their Services, of those of one family. Without any there is no table.
    ///
    /// # Errors
    ///
    /// The kernel's; then everything is as it was.
    pub fn write(&mut self, family: Family, moved: &[Moved]) -> Result<(), Error> {
        let written = replace(&mut self.0, family, moved);
        written
            .map_err(|source| super::io_error("leading datagrams of moved sockets to their Services", source))
    }
}

/// Puts a table with these sockets in place of the one that is there; both at one instant.
pub(super) fn replace(netlink: &mut Netlink, family: Family, moved: &[Moved]) -> io::Result<()> {
    let protocol = match family {
        Family::V4 => ProtoFamily::Ipv4,
        Family::V6 => ProtoFamily::Ipv6,
    };
    let table = nftnl::Table::new(c_string(TABLE), protocol);
    let mut transaction = Transaction::new(&table);
    // The kernel refuses to delete what is not there.
    transaction.add_table();
    transaction.delete_table();
    if !moved.is_empty() {
        fill(&mut transaction, family, moved);
    }
    netlink.commit(&transaction.finish())
}

fn fill(transaction: &mut Transaction<'_>, family: Family, moved: &[Moved]) {
    transaction.add_table();
    transaction.add_set(&map_spec(PORTS, family, Part::Port, 2));
    transaction.add_set(&map_spec(ADDRESSES, family, Part::Address, expr::address_len(family)));
    transaction.add_set(&set_spec(DROPPED, family, &KEY, ValueKind::None));
    for (name, hook) in [("nat-prerouting", Hook::PreRouting), ("nat-output", Hook::Out)] {
        let hook = Some((ChainType::Nat, hook, PRIORITY));
        transaction.add_chain(&ChainSpec { hook, ..ChainSpec::regular(name) });
        transaction.add_rule(name, &drop_rule(family));
        transaction.add_rule(name, &rule(family));
    }
    let elements = |value: fn(SocketAddr) -> Vec<u8>| -> Vec<Element> {
        let led = moved.iter().filter(|moved| moved.exists);
        led.map(|moved| element(moved, Value::Data(value(moved.service).into()))).collect()
    };
    let dropped = moved.iter().filter(|moved| !moved.exists);
    let dropped: Vec<Element> = dropped.map(|moved| element(moved, Value::None)).collect();
    transaction.add_missing_elements(DROPPED, &dropped);
    transaction.add_missing_elements(PORTS, &elements(|service| service.port().to_be_bytes().to_vec()));
    transaction.add_missing_elements(ADDRESSES, &elements(|service| address_bytes(service.ip())));
}

/// Of a socket: its own end, then the backend's.
const KEY: [Part; 4] = [Part::Address, Part::Port, Part::Address, Part::Port];

fn map_spec(name: &str, family: Family, value: Part, len: u32) -> SetSpec {
    let value = ValueKind::Data { nft_type: value.nft_type(family), len };
    set_spec(name, family, &KEY, value)
}

fn element(moved: &Moved, value: Value) -> Element {
    let end =
        |at: SocketAddr| [address_bytes(at.ip()), at.port().to_be_bytes().to_vec(), vec![0; 2]].concat();
    let key = [end(moved.client), end(moved.backend)].concat();
    Element { key: key.into(), key_end: None, value }
}

/// Every packet that comes here begins a flow. The rules ask for that all the same, because then the kernel tracks flows, without
/// which no chain of type nat is asked.
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

/// Both look-ups come before the packet changes, because the key is in it.
fn rule(family: Family) -> Vec<Expr> {
    let words = expr::address_words(family);
    let (port, address) = (expr::word(2 * words + 2), expr::word(2 * words + 3));
    let lead = vec![
        expr::map(expr::word(0), PORTS, port),
        expr::map(expr::word(0), ADDRESSES, address),
        expr::set_destination_port(port),
        expr::set_destination_address(family, address),
    ];
    [load(family), lead].concat()
}
