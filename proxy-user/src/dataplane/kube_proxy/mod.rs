//! What kube-proxy leaves in the kernel when it ends, and how it is taken out once somebody else serves.
//!
//! In: the kernel's state. Out: the same without the tables of kube-proxy's nftables mode, the chains of its iptables
//! mode, in both variants of iptables, and the virtual servers, sets and device of its ipvs mode.
//!
//! New connections are served by whichever table has them first, so there is no moment at which nobody does. For those
//! that are there connection tracking knows where they go, except where IPVS led them.

use std::{fs::File, io, time::Duration};

use backon::{ConstantBuilder, Retryable as _};
use futures::TryStreamExt as _;
use ipnet::IpNet;
use rtnetlink::packet_route::link::LinkAttribute;

use crate::model::Family;

mod chains;
mod ipvs;
mod legacy;
mod ruleset;

use ruleset::RuleSet;

/// On it kube-proxy's ipvs mode puts every ClusterIP, so that the host takes packets to them for its own.
const DEVICE: &str = "kube-ipvs0";
/// Whoever changes legacy tables holds this file locked: they are read, changed and written back whole.
const LOCK: &str = "/run/xtables.lock";

/// Why something of kube-proxy's is still there.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The rule set of a family could not be read, or kube-proxy's part not be removed.
    #[error("cannot {what} of kube-proxy in nf_tables family {family}")]
    RuleSet {
        /// What was being done.
        what: &'static str,
        /// The family, as `nft` calls it.
        family: &'static str,
        /// What the kernel answered.
        #[source]
        source: io::Error,
    },
    /// A table of iptables' legacy variant could not be read or replaced.
    #[error("cannot remove the chains of kube-proxy from the legacy table {table} ({family})")]
    Legacy {
        /// The table.
        table: String,
        /// Of which family.
        family: Family,
        /// What the kernel answered.
        #[source]
        source: io::Error,
    },
    /// Somebody else is at the legacy tables, and does not end.
    #[error("cannot lock {LOCK}, which others hold while they change legacy iptables")]
    Lock(#[source] io::Error),
    /// A virtual server could not be removed.
    #[error("cannot remove the virtual servers of kube-proxy's ipvs mode")]
    Servers(#[source] io::Error),
    /// A set could not be removed.
    #[error("cannot remove the sets of kube-proxy's ipvs mode")]
    Sets(#[source] io::Error),
    /// The device could not be removed.
    #[error("cannot remove the device {DEVICE} of kube-proxy")]
    Device(#[source] rtnetlink::Error),
    /// There is no netlink socket.
    #[error("cannot ask the kernel for what kube-proxy left")]
    Socket(#[source] io::Error),
}

/// How much was removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// Tables of its own.
    pub tables: usize,
    /// Chains in tables of iptables.
    pub chains: usize,
    /// Virtual servers of IPVS.
    pub servers: usize,
    /// Sets of ipset.
    pub sets: usize,
    /// Devices.
    pub devices: usize,
}

impl Removed {
    /// Whether there was nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Takes out everything of kube-proxy's. Each family's rules in nf_tables go at one instant, and so do those of each
/// legacy table. `excluded` are the networks whose virtual servers kube-proxy left alone, its `ipvs.excludeCIDRs`: where
/// its ipvs mode runs, all others are its own.
///
/// # Errors
///
/// When something could not be removed; what was removed before stays removed.
pub async fn remove(excluded: &[IpNet]) -> Result<Removed, Error> {
    let mut removed = Removed::default();
    let mut rules = RuleSet::open().map_err(Error::Socket)?;
    for (family, name) in ruleset::FAMILIES {
        let error = |what| move |source| Error::RuleSet { what, family: name, source };
        let found = rules.read(family).map_err(error("read the rules"))?;
        let theirs = chains::of_kube_proxy(&found);
        rules.remove(family, &theirs).map_err(error("remove the rules"))?;
        removed.tables += theirs.tables.len();
        removed.chains += theirs.chains.len();
    }
    removed.chains += remove_legacy_chains().await?;
    let (connection, handle, _) = rtnetlink::new_connection().map_err(Error::Socket)?;
    let connection = tokio::spawn(connection);
    if let Some(device) = device(&handle).await.map_err(Error::Device)? {
        // Last, because nothing else says that IPVS was kube-proxy's.
        removed.servers = ipvs::remove_servers(excluded).map_err(Error::Servers)?;
        removed.sets = ipvs::remove_sets().map_err(Error::Sets)?;
        handle.link().del(device).execute().await.map_err(Error::Device)?;
        removed.devices = 1;
    }
    connection.abort();
    Ok(removed)
}

/// The number of the device, if there is one.
async fn device(handle: &rtnetlink::Handle) -> Result<Option<u32>, rtnetlink::Error> {
    let named = LinkAttribute::IfName(DEVICE.to_owned());
    let mut links = handle.link().get().execute();
    let mut found = None;
    while let Some(link) = links.try_next().await? {
        if link.attributes.contains(&named) {
            found = Some(link.header.index);
        }
    }
    Ok(found)
}

/// Removes the chains from the tables of iptables' legacy variant, and tells how many those were.
async fn remove_legacy_chains() -> Result<usize, Error> {
    let tables = Family::ALL.map(|family| legacy::tables(family).into_iter().map(move |name| (family, name)));
    let tables: Vec<_> = tables.into_iter().flatten().collect();
    let _lock = if tables.is_empty() { None } else { lock().await? };
    let mut chains = 0;
    for (family, table) in tables {
        let removed = legacy::remove(family, &table);
        chains += removed.map_err(|source| Error::Legacy { table, family, source })?;
    }
    Ok(chains)
}

/// Keeps others from changing legacy tables for as long as the file lives. Where there can be no such file, nobody else
/// uses it.
async fn lock() -> Result<Option<File>, Error> {
    // Reading is enough for a lock, and may be all that is allowed.
    let file = File::open(LOCK).or_else(|_| File::options().create_new(true).write(true).open(LOCK));
    let Ok(file) = file else { return Ok(None) };
    let patience = ConstantBuilder::new().with_delay(Duration::from_millis(100)).with_max_times(100);
    let locked = (|| async { file.try_lock() }).retry(patience).await;
    locked.map(|()| Some(file)).map_err(|error| Error::Lock(error.into()))
}
