//! What kube-proxy leaves in the kernel when it ends, and how it is taken out once somebody else serves.
//!
//! In: the kernel's state. Out: the same without the tables of kube-proxy's nftables mode, the chains of its iptables
//! mode, in both variants of iptables, and the virtual servers, sets and device of its ipvs mode.
//!
//! What other programs need of it stays: chains that their rules lead to, sets that their rules ask, and chains without
//! which packets to Services would be refused by rules or policies that kube-proxy did not make.
//!
//! New connections are served by whichever table has them first, so there is no moment at which nobody does. For those
//! that are there connection tracking knows where they go, except where IPVS led them.

use std::{
    fmt::{self, Write as _},
    fs::File,
    io,
    time::Duration,
};

use backon::{ConstantBuilder, Retryable as _};
use futures::TryStreamExt as _;
use ipnet::IpNet;
use rtnetlink::packet_route::link::LinkAttribute;

use crate::model::{Family, PerFamily};

mod chains;
mod iptables;
mod ipvs;
mod nftables;
mod start;

pub use chains::Because;
use chains::Theirs;
pub(crate) use start::{start, tell};

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
    #[error("cannot lock {LOCK}, which programs hold while they change legacy iptables")]
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
    #[error("cannot open netlink to look for what kube-proxy left")]
    Socket(#[source] io::Error),
}

/// How much was removed, and what stays.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
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
    /// Chains that stay.
    pub kept_chains: Vec<KeptChain>,
    /// Sets that stay because rules ask them.
    pub kept_sets: Vec<String>,
}

impl Removed {
    /// Whether nothing was removed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        [self.tables, self.chains, self.servers, self.sets, self.devices].iter().all(|count| *count == 0)
    }

    fn count(&mut self, rule_set: &str, theirs: Theirs) {
        self.tables += theirs.tables.len();
        self.chains += theirs.chains.len();
        let kept = theirs.kept.into_iter().map(|((table, chain), because)| KeptChain {
            rule_set: rule_set.to_owned(),
            table,
            chain,
            because,
        });
        self.kept_chains.extend(kept);
    }
}

/// A chain of kube-proxy that stays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeptChain {
    /// The family in nf_tables, or `legacy` and the family.
    pub rule_set: String,
    /// The table.
    pub table: String,
    /// The chain.
    pub chain: String,
    /// Why.
    pub because: Because,
}

impl fmt::Display for KeptChain {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rule_set, table, chain, because } = self;
        write!(formatter, "{chain} in {rule_set} {table}: {because}")
    }
}

/// Several of them in one line.
pub fn listed<'a>(chains: impl IntoIterator<Item = &'a KeptChain>) -> String {
    let mut text = String::new();
    for chain in chains {
        let separator = if text.is_empty() { "" } else { "; " };
        // Writing to a string does not fail.
        let _ = write!(text, "{separator}{chain}");
    }
    text
}

/// Takes out everything of kube-proxy's that no other program needs. Each family's rules in nf_tables go at one instant,
/// and so do those of each legacy table. `excluded` are the networks whose virtual servers kube-proxy left alone, its
/// `ipvs.excludeCIDRs`: where its ipvs mode runs, all others are its own. What cannot be removed keeps nothing else from
/// being removed, and has an error each.
pub async fn remove(excluded: &[IpNet]) -> (Removed, Vec<Error>) {
    remove_of(PerFamily { v4: true, v6: true }, Some(excluded)).await
}

/// The same for the rules of these families only, and for what is of no single family where `excluded` is given.
pub async fn remove_of(families: PerFamily<bool>, excluded: Option<&[IpNet]>) -> (Removed, Vec<Error>) {
    let (mut removed, mut failed) = (Removed::default(), Vec::new());
    let wanted = Family::ALL.into_iter().zip(nftables::FAMILIES).filter(|(family, _)| *families.get(*family));
    for (_, (family, name)) in wanted {
        match nftables::remove(family, name) {
            Ok(theirs) => removed.count(name, theirs),
            Err(error) => failed.push(error),
        }
    }
    remove_legacy_chains(families, &mut removed, &mut failed).await;
    if let Some(excluded) = excluded
        && let Err(error) = remove_ipvs(excluded, &mut removed).await
    {
        failed.push(error);
    }
    (removed, failed)
}

/// Removes what belongs to the ipvs mode, if there is any.
async fn remove_ipvs(excluded: &[IpNet], removed: &mut Removed) -> Result<(), Error> {
    let (connection, handle, _) = rtnetlink::new_connection().map_err(Error::Socket)?;
    let connection = tokio::spawn(connection);
    let done = remove_device(&handle, excluded, removed).await;
    connection.abort();
    done
}

/// Removes the device, after everything that it shows to be kube-proxy's: nothing else says so.
async fn remove_device(
    handle: &rtnetlink::Handle,
    excluded: &[IpNet],
    removed: &mut Removed,
) -> Result<(), Error> {
    let Some(device) = device(handle).await.map_err(Error::Device)? else { return Ok(()) };
    removed.servers = ipvs::remove_servers(excluded).map_err(Error::Servers)?;
    (removed.sets, removed.kept_sets) = ipvs::remove_sets().map_err(Error::Sets)?;
    handle.link().del(device).execute().await.map_err(Error::Device)?;
    removed.devices = 1;
    Ok(())
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

/// Removes the chains from the tables of iptables' legacy variant.
async fn remove_legacy_chains(families: PerFamily<bool>, removed: &mut Removed, failed: &mut Vec<Error>) {
    let families = Family::ALL.into_iter().filter(|family| *families.get(*family));
    let tables = families.map(|family| iptables::tables(family).into_iter().map(move |name| (family, name)));
    let tables: Vec<_> = tables.flatten().collect();
    if tables.is_empty() {
        return;
    }
    let _lock = match lock().await {
        Ok(lock) => lock,
        Err(error) => return failed.push(error),
    };
    for (family, table) in tables {
        match iptables::remove(family, &table) {
            Ok(theirs) => removed.count(&format!("legacy {family}"), theirs),
            Err(source) => failed.push(Error::Legacy { table, family, source }),
        }
    }
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
