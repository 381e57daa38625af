//! Reads the counters of the tables, beside the engine.
//!
//! In: the kernel. Out: dropped and refused packets by reason, and the strangers that sent this node queries.

use std::{
    io,
    net::IpAddr,
    sync::{Mutex, PoisonError},
};

use super::{
    dns_rules,
    drop_reasons::DropReason,
    schema::{Map, TABLE, split_address},
    socket::Netlink,
};
use crate::model::Family;
use crate::sys::libnftnl;

/// How many packets one family dropped or refused for one reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dropped {
    /// The family of the table.
    pub family: Family,
    /// The name of the counter, such as `no-endpoints`.
    pub reason: &'static str,
    /// Packets since the table was created, which may be before this process started.
    pub packets: u64,
}

/// Reads the counters on a socket of its own.
pub struct Drops(Mutex<(Netlink, Vec<(Family, nftnl::Table)>)>);

impl Drops {
    pub(super) fn open(families: impl Iterator<Item = Family>) -> io::Result<Self> {
        let tables = families.map(|family| (family, libnftnl::table(TABLE, family)));
        Ok(Self(Mutex::new((Netlink::open()?, tables.collect()))))
    }

    /// Reads the counter of each reason.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn read(&self) -> io::Result<Vec<Dropped>> {
        let mut guard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (netlink, tables) = &mut *guard;
        let mut dropped = Vec::new();
        for (family, table) in tables {
            let family = *family;
            let counters = netlink.counters(table)?;
            dropped.extend(counters.into_iter().filter_map(|(name, packets)| {
                let mut reasons = DropReason::ALL.into_iter().map(DropReason::name);
                let reason = reasons.find(|reason| *reason == name)?;
                Some(Dropped { family, reason, packets })
            }));
        }
        Ok(dropped)
    }

    /// Reads how many flows with queries for names came from strangers, and from where.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn strangers(&self) -> io::Result<Strangers> {
        let mut guard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (netlink, tables) = &mut *guard;
        let mut strangers = Strangers::default();
        for (family, table) in tables {
            let counters = netlink.counters(table)?;
            let flows = counters.iter().filter(|(name, _)| name == dns_rules::NOT_A_CLIENT);
            strangers.flows += flows.map(|(_, packets)| packets).sum::<u64>();
            let elements = netlink.elements(table, Map::Strangers.name())?;
            let address = |key: &[u8]| Some(split_address(*family, key)?.0);
            strangers.addresses.extend(elements.iter().filter_map(|element| address(&element.key)));
        }
        Ok(strangers)
    }
}

/// Flows to the cluster's DNS that go on to its endpoints, because they come from no client of this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Strangers {
    /// The number of flows since the tables were created.
    pub flows: u64,
    /// Some recent sources.
    pub addresses: Vec<IpAddr>,
}
