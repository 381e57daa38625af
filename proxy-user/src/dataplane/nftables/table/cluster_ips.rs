//! The ClusterIPs of a table, of which unknown ports are refused (F4).
//!
//! In: deltas. Out: elements of the set of ClusterIPs. They are added after the service ports and removed before them.

use rustc_hash::FxHashSet;

use super::{ELEMENTS_A_TRANSACTION, Table};
use crate::{
    dataplane::nftables::{
        schema::{Map, address_bytes},
        socket::{CommitError, Netlink},
    },
    model::Family,
    plan::{ClusterIpDelta, Delta},
    sys::libnftnl::{Batch, Bytes, Element},
};

impl Table {
    /// Removes ClusterIPs. A complete delta names all that stay, so those that the kernel has beside them go, too.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub(in crate::dataplane::nftables) fn remove_cluster_ips(
        &mut self,
        netlink: &mut Netlink,
        delta: &Delta,
    ) -> Result<(), CommitError> {
        let mut gone: Vec<Element> = self.cluster_ips(delta, false).collect();
        if delta.complete {
            let stay: FxHashSet<Bytes> = self.cluster_ips(delta, true).map(|element| element.key).collect();
            let held = self.kernel.elements.entry(Map::ClusterIps).or_default();
            let others = held.extract_if(|key, _| !stay.contains(key));
            gone.extend(others.map(|(key, _)| Element::member(key)));
        }
        self.delete_elements(netlink, Map::ClusterIps, &gone)
    }

    /// Adds the ClusterIPs that the kernel does not have.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub(in crate::dataplane::nftables) fn add_cluster_ips(
        &mut self,
        netlink: &mut Netlink,
        delta: &Delta,
    ) -> Result<(), CommitError> {
        let mut come: Vec<Element> = self.cluster_ips(delta, true).collect();
        come.retain(|element| self.kernel.take(Map::ClusterIps, &element.key).is_none());
        come.chunks(ELEMENTS_A_TRANSACTION).try_for_each(|come| {
            let mut batch = Batch::new(&self.raw);
            batch.add_elements(Map::ClusterIps.name(), come);
            netlink.commit(&batch.finish())
        })
    }

    /// The ClusterIPs of this family that come, or those that go.
    fn cluster_ips(&self, delta: &Delta, come: bool) -> impl Iterator<Item = Element> {
        let family = self.family;
        delta
            .cluster_ips
            .iter()
            .filter_map(move |change| match change {
                ClusterIpDelta::Add(address) if come => Some(*address),
                ClusterIpDelta::Remove(address) if !come => Some(*address),
                _ => None,
            })
            .filter(move |address| Family::of(*address) == family)
            .map(|address| Element::member(Bytes::from_vec(address_bytes(address))))
    }
}
