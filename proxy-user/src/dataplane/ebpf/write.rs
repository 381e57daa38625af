//! Writes port updates into the maps, in an order that no client notices.
//!
//! In: [`PortUpdate`]s. Out: written maps. A port that cannot be written is left to nftables, which has its new state: the
//! port's old backends may be gone.

use std::{net::IpAddr, time::Instant};

use proxy_ebpf::{Address, Endpoint, FrontendKey, FrontendValue, MemberKey, flag};
use rustc_hash::FxHashSet;

use super::{
    Ebpf,
    allocate::{FrontendUpdate, PortUpdate, Side},
    element,
    maps::monotonic,
    problem::Problem,
    sizes::Sizes,
};
use crate::plan::{ClusterIpDelta, Delta, PortId};

/// Room in `affinities` for each sticky service port: its clients are the pods of this node, and the host.
const CLIENTS: u32 = 512;
/// Room with the first sticky service port: an eighth of it is enough for a pod with many network namespaces.
const MIN_CLIENTS: u32 = 1 << 14;
/// Room for all sticky service ports together, and twice that after the map has grown: each entry costs a bucket of 16
/// bytes. Not every pod has connections to every sticky Service; if they all do, the oldest clients are evicted early.
const MAX_CLIENTS: u32 = 1 << 19;

fn room_for_clients(sticky_ports: u32) -> u32 {
    match sticky_ports {
        0 => 0,
        _ => sticky_ports.saturating_mul(CLIENTS).clamp(MIN_CLIENTS, MAX_CLIENTS),
    }
}

impl Ebpf {
    /// Adds the values to write to each update.
    pub(super) fn add_values(&mut self, updates: &mut [PortUpdate], now: Instant) -> Result<(), Problem> {
        let (maps, is_for_packets) = (&self.loader.maps, self.addresses.is_for_packets());
        let (frontend, record) = (|key: &FrontendKey| maps.frontend(key), |index| maps.record(index));
        updates.iter_mut().try_for_each(|update| {
            self.allocations.add_values(update, &is_for_packets, frontend, record, now)
        })
    }

    /// Makes the maps large enough. If the kernel has no memory for that, each write that does not fit fails by itself.
    pub(super) fn make_room(&mut self, updates: &[PortUpdate], delta: &Delta) {
        let needed = self.needed(updates, delta);
        let sizes = self.loader.sizes.grown_to(&needed);
        if let Err(problem) = self.loader.grow(sizes, self.allocations.slots.end()) {
            tracing::error!(error = %problem, ?sizes, "cannot make the maps larger; nftables serves the ports that do not fit");
        }
    }

    fn needed(&self, updates: &[PortUpdate], delta: &Delta) -> Sizes {
        let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        let (mut frontends, mut members, mut sticky) = (0, 0, self.used.sticky);
        for update in updates {
            frontends += update.frontends.iter().filter(|frontend| frontend.known.is_none()).count();
            members += update.added_members().count();
            let is_sticky = |side: &Option<Side>| side.as_ref().is_some_and(|side| side.placement.sticky);
            sticky += u32::from(is_sticky(&update.after) && !is_sticky(&update.before));
        }
        // Each ClusterIP, and each address of the node, has an entry in `frontends` too.
        let addresses = delta.cluster_ips.len() + self.addresses.of_node().count();
        Sizes {
            frontends: self.used.frontends.saturating_add(count(frontends + addresses)),
            ports: self.allocations.ports.end(),
            records: self.allocations.records.end(),
            slots: self.allocations.slots.end(),
            members: self.used.members.saturating_add(count(members)),
            affinities: room_for_clients(sticky),
        }
    }

    /// Writes all updates. Returns the ports that failed, which are left to nftables.
    pub(super) fn write(
        &mut self,
        updates: &[PortUpdate],
        delta: &Delta,
        now: Instant,
    ) -> Result<Vec<(PortId, String)>, Problem> {
        let joined = monotonic();
        let (mut written, mut left, mut failed) = (Vec::with_capacity(updates.len()), Vec::new(), Vec::new());
        for update in updates {
            match self.publish(update, joined) {
                Ok(()) => written.push(update),
                Err(problem) => {
                    update.ports().for_each(|port| self.loader.maps.clear_port(port));
                    failed.push((update.id.clone(), problem.to_string()));
                    left.push(update);
                }
            }
        }
        let lacking: FxHashSet<Address> =
            left.iter().flat_map(|update| update.new_frontends()).map(|key| key.address).collect();
        self.withhold(&lacking)?;
        // An address that cannot be written must not keep a frontend that went to another port with the old port.
        let addresses = self.write_addresses(delta, &lacking);
        for key in released(&written, &left) {
            self.remove_frontend(&key)?;
        }
        for update in left {
            self.remove_members(update.all_members())?;
            self.count_old_sticky(update);
            self.allocations.abandon(update, now);
        }
        for update in written {
            self.remove_members(update.removed_members())?;
            self.count_old_sticky(update);
            if let Some(after) = &update.after {
                self.used.sticky += u32::from(after.placement.sticky);
            }
            self.allocations.commit(update, now);
        }
        addresses.map(|()| failed)
    }

    /// Writes one port: foreign frontends are left to nftables; then members, slots and the record; then one store switches
    /// the port with all its frontends; then new frontends are inserted. A frontend that from now on has another outcome
    /// than the others of its column is left to nftables meanwhile, with its port.
    fn publish(&mut self, update: &PortUpdate, joined: u64) -> Result<(), Problem> {
        let Some(after) = &update.after else { return Ok(()) };
        let placement = &after.placement;
        for key in &update.foreign {
            self.leave_to_packets(key, placement.port)?;
        }
        self.write_backends(update, after, joined)?;
        if update.changes_own_frontends() {
            self.loader.maps.clear_port(placement.port);
        }
        for frontend in update.frontends.iter().filter(|frontend| frontend.is_own()) {
            self.write_frontend(frontend)?;
        }
        if update.record.is_some() || update.changes_own_frontends() {
            self.loader.maps.set_port(placement.port, placement.record)?;
        }
        for frontend in update.frontends.iter().filter(|frontend| !frontend.is_own()) {
            self.write_frontend(frontend)?;
        }
        for key in &after.frontends {
            self.claim_frontend(key);
        }
        Ok(())
    }

    fn write_backends(&mut self, update: &PortUpdate, after: &Side, joined: u64) -> Result<(), Problem> {
        let placement = &after.placement;
        if update.is_new {
            self.loader.maps.reset_tally(placement.port)?;
        }
        for member in update.added_members() {
            if !self.claim_member(&member) {
                self.loader.maps.set_member(&member, joined)?;
                self.used.members += 1;
            }
        }
        for set in &update.fresh {
            let backends: Vec<_> = after.plan.backends(*set).iter().map(element::endpoint).collect();
            self.loader.maps.set_slots(placement.range(*set).first, &backends)?;
        }
        match &update.record {
            Some(record) => self.loader.maps.set_record(placement.record, record),
            None => Ok(()),
        }
    }

    fn write_frontend(&mut self, update: &FrontendUpdate) -> Result<(), Problem> {
        self.loader.maps.set_frontend(&update.key, &update.wanted)?;
        self.used.frontends += u32::from(update.known.is_none());
        Ok(())
    }

    /// Leaves a frontend that refers to another port's index to nftables, until its own port writes it.
    fn leave_to_packets(&mut self, key: &FrontendKey, port: u32) -> Result<(), Problem> {
        if !self.is_unclaimed(key) {
            return Ok(());
        }
        self.loader.maps.set_frontend(key, &FrontendValue::new(key, port, 0, true))
    }

    fn remove_frontend(&mut self, key: &FrontendKey) -> Result<(), Problem> {
        if self.loader.maps.remove_frontend(key)? {
            self.used.frontends = self.used.frontends.saturating_sub(1);
        }
        Ok(())
    }

    fn count_old_sticky(&mut self, update: &PortUpdate) {
        let was_sticky = update.before.as_ref().is_some_and(|before| before.placement.sticky);
        self.used.sticky = self.used.sticky.saturating_sub(u32::from(was_sticky));
    }

    fn remove_members(&mut self, members: impl IntoIterator<Item = MemberKey>) -> Result<(), Problem> {
        for member in members {
            if self.loader.maps.remove_member(&member)? {
                self.used.members = self.used.members.saturating_sub(1);
            }
        }
        Ok(())
    }

    /// Leaves ClusterIPs that are `lacking` a frontend to nftables for now, because programs would refuse what nftables
    /// serves.
    fn withhold(&mut self, lacking: &FxHashSet<Address>) -> Result<(), Problem> {
        for address in lacking {
            let ip = Endpoint { address: *address, ..Endpoint::default() }.ip();
            let known = self.loader.maps.frontend(&FrontendKey::address(ip));
            if known.is_some_and(|known| known.flags() & flag::CLUSTER_IP != 0) {
                self.leave_out(ip)?;
            }
        }
        Ok(())
    }

    /// Writes ClusterIPs and the node's addresses: after new frontends, before old ones are removed.
    fn write_addresses(&mut self, delta: &Delta, lacking: &FxHashSet<Address>) -> Result<(), Problem> {
        if delta.node.is_some() || delta.complete {
            self.write_node_addresses()?;
        }
        for ip in self.addresses.take_withheld() {
            self.write_cluster_ip(ip, lacking)?;
        }
        for change in &delta.cluster_ips {
            match *change {
                ClusterIpDelta::Add(ip) => self.write_cluster_ip(ip, lacking)?,
                ClusterIpDelta::Remove(ip) => self.remove_cluster_ip(ip)?,
            }
        }
        Ok(())
    }

    fn write_node_addresses(&mut self) -> Result<(), Problem> {
        if !self.is_adopting() {
            for ip in self.addresses.host().to_vec() {
                let known = self.loader.maps.frontend(&FrontendKey::address(ip));
                if known.is_some_and(|known| known.flags() & flag::CLUSTER_IP != 0) {
                    self.addresses.came_to_host(ip);
                }
            }
        }
        let entries: Vec<_> = self.addresses.of_node().collect();
        for (key, value) in entries {
            self.write_address(key, value)?;
        }
        for address in self.addresses.take_gone() {
            self.remove_frontend(&FrontendKey::address(address))?;
        }
        Ok(())
    }

    fn write_cluster_ip(&mut self, ip: IpAddr, lacking: &FxHashSet<Address>) -> Result<(), Problem> {
        match self.addresses.of_cluster_ip(ip) {
            Some((key, _)) if lacking.contains(&key.address) => self.leave_out(ip),
            Some((key, value)) => self.write_address(key, value),
            None => Ok(()),
        }
    }

    /// Removes a ClusterIP from the maps for now, also one that the host has by now.
    fn leave_out(&mut self, ip: IpAddr) -> Result<(), Problem> {
        if self.addresses.of_cluster_ip(ip).is_none() {
            self.addresses.came_to_host(ip);
        }
        self.remove_cluster_ip(ip)?;
        self.addresses.withhold(ip);
        Ok(())
    }

    fn remove_cluster_ip(&mut self, ip: IpAddr) -> Result<(), Problem> {
        self.addresses.end_withholding(&ip);
        let key = FrontendKey::address(ip);
        match self.addresses.of_node_address(&ip) {
            Some((_, value)) => self.write_address(key, value),
            None => self.remove_frontend(&key),
        }
    }

    fn write_address(&mut self, key: FrontendKey, wanted: FrontendValue) -> Result<(), Problem> {
        let known = self.claim_frontend(&key).or_else(|| self.loader.maps.frontend(&key));
        if known == Some(wanted) {
            return Ok(());
        }
        self.write_frontend(&FrontendUpdate { key, known, wanted })
    }
}

/// Adoption: from a read of the maps until the next complete delta, an earlier agent's entries are in the maps. An entry
/// that the delta needs is claimed and not written again; the rest is removed.
impl Ebpf {
    fn is_adopting(&self) -> bool {
        self.allocations.unclaimed.is_some()
    }

    /// Whether an earlier agent wrote this frontend, and no port has claimed it.
    fn is_unclaimed(&self, key: &FrontendKey) -> bool {
        self.allocations.unclaimed.as_ref().is_some_and(|state| state.frontends.contains_key(key))
    }

    /// Claims a frontend. Returns the value that an earlier agent wrote.
    fn claim_frontend(&mut self, key: &FrontendKey) -> Option<FrontendValue> {
        self.allocations.unclaimed.as_mut()?.frontends.remove(key)
    }

    /// Claims a member. False if it is not in the map.
    fn claim_member(&mut self, member: &MemberKey) -> bool {
        self.allocations.unclaimed.as_mut().is_some_and(|state| state.members.remove(member))
    }

    /// Removes what a complete delta did not claim.
    pub(super) fn remove_unclaimed(&mut self, now: Instant) -> Result<(), Problem> {
        let Some(state) = self.allocations.take_unclaimed(now) else { return Ok(()) };
        state.frontends.keys().try_for_each(|key| self.remove_frontend(key))?;
        self.remove_members(state.members)
    }
}

/// The frontends that ports gave up or failed to get, and that no other port got.
fn released(written: &[&PortUpdate], left: &[&PortUpdate]) -> FxHashSet<FrontendKey> {
    let all = written.iter().chain(left);
    let mut released: FxHashSet<FrontendKey> = all.flat_map(|update| update.old_frontends()).collect();
    released.extend(left.iter().flat_map(|update| update.new_frontends()));
    if !released.is_empty() {
        for key in written.iter().flat_map(|update| update.new_frontends()) {
            released.remove(&key);
        }
    }
    released
}
