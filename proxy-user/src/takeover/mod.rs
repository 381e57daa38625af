//! Removes what kube-proxy left in the kernel, once weir serves.
//!
//! In: the kernel's state. Out: the kernel without the tables of kube-proxy's nftables mode, the chains of its
//! iptables mode (in both variants of iptables), and the virtual servers, sets and device of its ipvs mode.
//!
//! Objects that other programs need stay: chains that their rules jump to, sets that their rules use, and chains
//! without which rules or policies of other programs would refuse packets to Services.
//!
//! Until the removal both proxies have every Service, so a new connection always finds one of them. Established
//! connections keep their backends by connection tracking, except those of IPVS.

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

pub use chains::KeepReason;
use chains::Removal;
pub(crate) use start::{log_removed, start};

/// The device with every ClusterIP in kube-proxy's ipvs mode, which makes the addresses local to the host.
const DEVICE: &str = "kube-ipvs0";
/// Programs lock this file while they change a legacy table, because they read it, change it and write it back whole.
const LOCK: &str = "/run/xtables.lock";

/// Why a part of kube-proxy could not be removed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Reading or changing the rules of a family failed.
    #[error("cannot {what} of kube-proxy in nf_tables family {family}")]
    RuleSet {
        /// The failed step.
        what: &'static str,
        /// nft's name of the family.
        family: &'static str,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// A table of iptables' legacy variant could not be read or replaced.
    #[error("cannot remove the chains of kube-proxy from the legacy table {table} ({family})")]
    Legacy {
        /// Such as `nat`.
        table: String,
        /// IPv4 or IPv6.
        family: Family,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// Another program holds the lock of the legacy tables for too long.
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

/// Counts of the removed objects, and the objects that stay.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// Tables of the nftables mode.
    pub tables: usize,
    /// Chains in tables of iptables.
    pub chains: usize,
    /// Virtual servers of IPVS.
    pub servers: usize,
    /// Sets of ipset.
    pub sets: usize,
    /// 1 if `kube-ipvs0` was there.
    pub devices: usize,
    /// Chains that stay, with the reason.
    pub kept_chains: Vec<KeptChain>,
    /// Sets that stay because rules use them.
    pub kept_sets: Vec<String>,
}

impl Removed {
    /// Whether nothing was removed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        [self.tables, self.chains, self.servers, self.sets, self.devices].iter().all(|count| *count == 0)
    }

    fn count(&mut self, rule_set: &str, removal: Removal) {
        self.tables += removal.tables.len();
        self.chains += removal.chains.len();
        let kept = removal.kept.into_iter().map(|((table, chain), because)| KeptChain {
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
    /// Such as `filter`.
    pub table: String,
    /// Such as `KUBE-FORWARD`.
    pub chain: String,
    /// Shown to users.
    pub because: KeepReason,
}

impl fmt::Display for KeptChain {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rule_set, table, chain, because } = self;
        write!(formatter, "{chain} in {rule_set} {table}: {because}")
    }
}

/// Several kept chains as one line.
pub fn listed<'a>(chains: impl IntoIterator<Item = &'a KeptChain>) -> String {
    let mut text = String::new();
    for chain in chains {
        let separator = if text.is_empty() { "" } else { "; " };
        // Writing to a string does not fail.
        let _ = write!(text, "{separator}{chain}");
    }
    text
}

/// Removes all of kube-proxy that no other program needs. The rules of each family in nf_tables go in one
/// transaction, and those of each legacy table in one replacement. `excluded` are kube-proxy's `ipvs.excludeCIDRs`:
/// its ipvs mode owns all virtual servers outside these networks. A failure does not stop the other removals, and
/// each failure has an error.
pub async fn remove(excluded: &[IpNet]) -> (Removed, Vec<Error>) {
    remove_of(PerFamily { v4: true, v6: true }, Some(excluded)).await
}

/// Like [`remove`] for the rules of `families` only. With `excluded` it also removes the ipvs mode, which has no
/// family.
pub async fn remove_of(families: PerFamily<bool>, excluded: Option<&[IpNet]>) -> (Removed, Vec<Error>) {
    let (mut removed, mut failed) = (Removed::default(), Vec::new());
    let wanted = Family::ALL.into_iter().zip(nftables::FAMILIES).filter(|(family, _)| *families.get(*family));
    for (_, (family, name)) in wanted {
        match nftables::remove(family, name) {
            Ok(removal) => removed.count(name, removal),
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

/// Removes the ipvs mode, if there is any.
async fn remove_ipvs(excluded: &[IpNet], removed: &mut Removed) -> Result<(), Error> {
    let (connection, handle, _) = rtnetlink::new_connection().map_err(Error::Socket)?;
    let connection = tokio::spawn(connection);
    let done = remove_device(&handle, excluded, removed).await;
    connection.abort();
    done
}

/// Removes the virtual servers, the sets and then the device. The device goes last, because only the device shows
/// that the virtual servers are kube-proxy's.
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

/// The index of the device, if it exists.
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
            Ok(removal) => removed.count(&format!("legacy {family}"), removal),
            Err(source) => failed.push(Error::Legacy { table, family, source }),
        }
    }
}

/// Locks the legacy tables until the file is dropped. `None` if the file can be neither opened nor created; no other
/// program can use it then either.
async fn lock() -> Result<Option<File>, Error> {
    // A lock needs read access only, and weir may have no more.
    let file = File::open(LOCK).or_else(|_| File::options().create_new(true).write(true).open(LOCK));
    let Ok(file) = file else { return Ok(None) };
    let patience = ConstantBuilder::new().with_delay(Duration::from_millis(100)).with_max_times(100);
    let locked = (|| async { file.try_lock() }).retry(patience).await;
    locked.map(|()| Some(file)).map_err(|error| Error::Lock(error.into()))
}
