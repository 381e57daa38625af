//! What kube-proxy leaves in the kernel when it ends, and how it is taken out once somebody else serves.
//!
//! In: the kernel's state. Out: the same without the tables of kube-proxy's nftables mode, the chains of its iptables
//! mode where iptables means nf_tables, and the device of its ipvs mode; what is out of reach is told.
//!
//! Nothing of it is needed for connections that are there: connection tracking knows where they go. New ones are served
//! by whichever table has them first, so there is no moment at which nobody does.

use std::fs;

use futures::TryStreamExt as _;
use rtnetlink::packet_route::link::LinkAttribute;

mod chains;
mod ruleset;

use ruleset::RuleSet;

/// On it kube-proxy's ipvs mode puts every ClusterIP, so that the host takes packets to them for its own.
const DEVICE: &str = "kube-ipvs0";

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
        source: std::io::Error,
    },
    /// The device could not be removed.
    #[error("cannot remove the device {DEVICE} of kube-proxy")]
    Device(#[source] rtnetlink::Error),
    /// There is no netlink socket.
    #[error("cannot ask the kernel for what kube-proxy left")]
    Socket(#[source] std::io::Error),
}

/// How much was removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// Tables of its own.
    pub tables: usize,
    /// Chains in tables of iptables.
    pub chains: usize,
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

/// Takes out everything of kube-proxy's that is within reach. Each family's rules go at one instant.
///
/// # Errors
///
/// When something could not be removed; what was removed before stays removed.
pub async fn remove() -> Result<Removed, Error> {
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
    removed.devices = usize::from(remove_device().await?);
    Ok(removed)
}

/// Removes the device; false when there is none.
async fn remove_device() -> Result<bool, Error> {
    let (connection, handle, _) = rtnetlink::new_connection().map_err(Error::Socket)?;
    let connection = tokio::spawn(connection);
    let mut links = handle.link().get().execute();
    let mut found = None;
    while let Some(link) = links.try_next().await.map_err(Error::Device)? {
        let named = LinkAttribute::IfName(DEVICE.to_owned());
        if link.attributes.contains(&named) {
            found = Some(link.header.index);
        }
    }
    if let Some(index) = found {
        handle.link().del(index).execute().await.map_err(Error::Device)?;
    }
    connection.abort();
    Ok(found.is_some())
}

/// What may be left of kube-proxy and is not taken out here, with what takes it out, in one sentence each.
#[must_use]
pub fn out_of_reach() -> Vec<String> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let mut all = Vec::new();
    let mut tables: Vec<String> = ["/proc/net/ip_tables_names", "/proc/net/ip6_tables_names"]
        .iter()
        .flat_map(|path| read(path).lines().map(str::to_owned).collect::<Vec<_>>())
        .collect();
    tables.sort_unstable();
    tables.dedup();
    if !tables.is_empty() {
        all.push(format!(
            "legacy iptables is in use here (tables {}); if kube-proxy wrote rules there, `kube-proxy --cleanup` of its own image takes them out",
            tables.join(", ")
        ));
    }
    // Three lines of headings.
    if read("/proc/net/ip_vs").lines().count() > 3 {
        all.push(
            "there are IPVS virtual servers; if only kube-proxy made some, `ipvsadm --clear` takes them out"
                .to_owned(),
        );
    }
    all
}
