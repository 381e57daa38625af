//! Why packets go nowhere, and how many did.
//!
//! In: nothing. Out: a named counter for each reason, the expressions that end a packet's way, and at each scrape what
//! was counted. The counters stand only in rules that drop or refuse, so that what is served pays nothing for them, and
//! they belong to the table, so that they go on where rules are written anew.

use std::{
    io,
    net::IpAddr,
    sync::{Mutex, PoisonError},
};

use super::{
    adopt::Found,
    answered, expr,
    netlink::{ChainSpec, Expr},
    ruleset::{Map, StaticChain},
    socket::Netlink,
    table::Table,
};
use crate::model::Family;

/// Why a packet goes nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reason {
    /// F1: refused, there is no endpoint anywhere.
    NoEndpoints,
    /// F2, F3: dropped, the policy wants local endpoints and there are none.
    NoLocalEndpoints,
    /// F7: dropped, the Service does not let the source in.
    SourceNotAllowed,
    /// F4: refused, the ClusterIP has no such port.
    UnknownPort,
    /// F5: dropped, the address is no Service's.
    UnallocatedAddress,
    /// Dropped, connection tracking knows no connection that the packet fits, so it would not be translated back.
    OutOfWindow,
}

impl Reason {
    pub(super) const ALL: [Self; 6] = [
        Self::NoEndpoints,
        Self::NoLocalEndpoints,
        Self::SourceNotAllowed,
        Self::UnknownPort,
        Self::UnallocatedAddress,
        Self::OutOfWindow,
    ];

    /// The counter's name, and the metric's label.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::NoEndpoints => "no-endpoints",
            Self::NoLocalEndpoints => "no-local-endpoints",
            Self::SourceNotAllowed => "source-not-allowed",
            Self::UnknownPort => "unknown-port",
            Self::UnallocatedAddress => "unallocated-address",
            Self::OutOfWindow => "out-of-window",
        }
    }

    /// Counts and drops.
    pub(super) fn drop(self) -> Vec<Expr> {
        vec![expr::count(self.name()), expr::drop()]
    }

    /// Counts and refuses.
    pub(super) fn reject(self, family: Family) -> Vec<Expr> {
        vec![expr::count(self.name()), expr::reject(family)]
    }
}

/// The name of every counter of a table.
pub(super) fn counters() -> impl Iterator<Item = &'static str> {
    Reason::ALL.map(Reason::name).into_iter().chain([answered::PASSED_ON])
}

/// The chain that ends what has no local endpoint: where backends are picked, verdicts stand in maps, and those cannot
/// count.
pub(super) const NO_LOCAL_ENDPOINTS: &str = Reason::NoLocalEndpoints.name();

pub(super) fn no_local_endpoints() -> StaticChain {
    let spec = ChainSpec::regular(NO_LOCAL_ENDPOINTS);
    StaticChain { spec, rules: vec![Reason::NoLocalEndpoints.drop()] }
}

/// The chain for what is forwarded and belongs to no flow, known or new.
pub(super) const OUT_OF_WINDOW: &str = Reason::OutOfWindow.name();

/// Drops TCP packets that fit no connection, if pods send or get them. Everything else passes. An answer outside the
/// window is not translated back, so its client would take it for a stranger's and reset the connection.
pub(super) fn out_of_window(packets_of_pods: Vec<Vec<Expr>>) -> StaticChain {
    let dropped = packets_of_pods
        .into_iter()
        .map(|of_pods| [expr::fits_no_connection(), of_pods, Reason::OutOfWindow.drop()].concat());
    let spec = ChainSpec::regular(OUT_OF_WINDOW);
    StaticChain { spec, rules: dropped.chain([vec![expr::accept()]]).collect() }
}

/// What was dropped or refused in one family for one reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dropped {
    /// The family.
    pub family: Family,
    /// Why, in a word or two with hyphens.
    pub reason: &'static str,
    /// Packets since the table was made, which may be longer ago than the start of this process.
    pub packets: u64,
}

/// Reads the counters, beside whoever programs.
pub struct Drops(Mutex<(Netlink, Vec<Table>)>);

impl Drops {
    pub(super) fn open(families: impl Iterator<Item = Family>) -> io::Result<Self> {
        Ok(Self(Mutex::new((Netlink::open()?, families.map(Table::new).collect()))))
    }

    /// Every counter there is.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn read(&self) -> io::Result<Vec<Dropped>> {
        let mut guard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (netlink, tables) = &mut *guard;
        let mut dropped = Vec::new();
        for table in tables {
            let family = table.family;
            let counters = Found::counters(netlink, &table.raw)?;
            dropped.extend(counters.into_iter().filter_map(|(name, packets)| {
                let reason = Reason::ALL.into_iter().map(Reason::name).find(|reason| *reason == name)?;
                Some(Dropped { family, reason, packets })
            }));
        }
        Ok(dropped)
    }

    /// Which queries for names were not answered here, because they come from no client of this node.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn strangers(&self) -> io::Result<Strangers> {
        let mut guard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (netlink, tables) = &mut *guard;
        let mut strangers = Strangers::default();
        for table in tables {
            let counters = Found::counters(netlink, &table.raw)?;
            let flows = counters.iter().filter(|(name, _)| name == answered::PASSED_ON);
            strangers.flows += flows.map(|(_, packets)| packets).sum::<u64>();
            let elements = Found::elements(netlink, &table.raw, Map::Strangers.name())?;
            strangers.addresses.extend(elements.iter().filter_map(|element| address(&element.key)));
        }
        Ok(strangers)
    }
}

/// Flows to the cluster's DNS that go on to its endpoints because of where they come from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Strangers {
    /// How many there were since the tables were made.
    pub flows: u64,
    /// Some addresses that they came from lately.
    pub addresses: Vec<IpAddr>,
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    <[u8; 4]>::try_from(bytes)
        .map(IpAddr::from)
        .or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from))
        .ok()
}
