//! Writes steps into the maps, in an order that nobody notices.
//!
//! In: [`Step`]s. Out: maps that say so. A port that cannot be written is left to the packets, which have it as it is to
//! be: what it was may lead to backends that are gone.

use std::{net::IpAddr, time::Instant};

use proxy_ebpf::{Address, Endpoint, FrontendKey, FrontendValue, MemberKey, flag};
use rustc_hash::FxHashSet;

use super::{
    Ebpf,
    element::{self, Set, Site},
    maps::monotonic,
    problem::Problem,
    sizes::Sizes,
    stage::Step,
};
use crate::plan::{ClusterIpDelta, Delta, PortId, PortPlan};

/// What each sticky service port has room for: the clients are the pods of this node, and its host.
const CLIENTS: u32 = 512;
/// What the first sticky service port brings: an eighth of it is room for every client of a pod with many network namespaces.
const LEAST_CLIENTS: u32 = 1 << 14;
/// What all of them together have room for, and twice that with the room to grow: each costs a bucket of 16 bytes. Not
/// every pod speaks to every sticky Service; if they do, those that came first are forgotten before their time.
const MOST_CLIENTS: u32 = 1 << 19;

/// How many clients there is to be room for with so many sticky service ports.
fn room_for_clients(sticky: u32) -> u32 {
    match sticky {
        0 => 0,
        _ => sticky.saturating_mul(CLIENTS).clamp(LEAST_CLIENTS, MOST_CLIENTS),
    }
}

impl Ebpf {
    /// Says of each step what is to be written.
    pub(super) fn arrange(&mut self, steps: &mut [Step], now: Instant) -> Result<(), Problem> {
        let (maps, is_theirs) = (&self.object.maps, self.whole.is_theirs());
        let (there, record) = (|key: &FrontendKey| maps.frontend(key), |number| maps.record(number));
        steps.iter_mut().try_for_each(|step| self.ground.arrange(step, &is_theirs, there, record, now))
    }

    /// Makes the maps large enough. If the kernel has no memory for that, what does not fit fails by itself.
    pub(super) fn make_room(&mut self, steps: &[Step], delta: &Delta) {
        let needed = self.needed(steps, delta);
        let sizes = self.object.sizes.grown_to(&needed);
        if let Err(problem) = self.object.grow(sizes, self.ground.slots.end()) {
            tracing::error!(error = %problem, ?sizes, "cannot make the maps larger; what does not fit is refused");
        }
    }

    fn needed(&self, steps: &[Step], delta: &Delta) -> Sizes {
        let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        let (mut frontends, mut members, mut sticky) = (0, 0, self.used.sticky);
        for step in steps {
            frontends += step.turns.iter().filter(|turn| turn.known.is_none()).count();
            let had = step.had_members();
            members += step.wanted_members().iter().filter(|member| !had.contains(member)).count();
            let is_sticky = |side: &Option<(_, Site)>| side.as_ref().is_some_and(|(_, site)| site.sticky);
            sticky += u32::from(is_sticky(&step.after) && !is_sticky(&step.before));
        }
        // Each ClusterIP, and each address of the node, is an element too.
        let whole = delta.cluster_ips.len() + self.whole.of_node().count();
        Sizes {
            frontends: self.used.frontends.saturating_add(count(frontends + whole)),
            ports: self.ground.numbers.end(),
            records: self.ground.records.end(),
            slots: self.ground.slots.end(),
            members: self.used.members.saturating_add(count(members)),
            affinities: room_for_clients(sticky),
        }
    }

    /// Writes everything there is to write. Returns the ports that failed; they are left to the packets.
    pub(super) fn write(
        &mut self,
        steps: &[Step],
        delta: &Delta,
        now: Instant,
    ) -> Result<Vec<(PortId, String)>, Problem> {
        let joined = monotonic();
        let (mut done, mut left, mut failed) = (Vec::with_capacity(steps.len()), Vec::new(), Vec::new());
        for step in steps {
            match self.publish(step, joined) {
                Ok(()) => done.push(step),
                Err(problem) => {
                    step.sites().for_each(|site| self.object.maps.clear_port(site.port));
                    failed.push((step.id.clone(), problem.to_string()));
                    left.push(step);
                }
            }
        }
        let lacking: FxHashSet<Address> =
            left.iter().flat_map(|step| step.wanted()).map(|key| key.address).collect();
        self.withhold(&lacking)?;
        // A frontend that went to another port must not stay with the old one because an address cannot be written.
        let addresses = self.write_addresses(delta, &lacking);
        for key in released(&done, &left) {
            self.remove_frontend(&key)?;
        }
        for step in left {
            self.remove_members(step.had_members().into_iter().chain(step.wanted_members()))?;
            self.retired(step);
            self.ground.lost(step, now);
        }
        for step in done {
            let wanted = step.wanted_members();
            self.remove_members(step.had_members().into_iter().filter(|member| !wanted.contains(member)))?;
            self.retired(step);
            if let Some((_, site)) = &step.after {
                self.used.sticky += u32::from(site.sticky);
            }
            self.ground.done(step, now);
        }
        addresses.map(|()| failed)
    }

    /// Strays are left to the packets; members, slots and the record; then the port is switched by one store, with all its
    /// frontends; then those that come. A frontend that is to be treated otherwise than those it shares a column with is left to the packets
    /// meanwhile, with its port.
    fn publish(&mut self, step: &Step, joined: u64) -> Result<(), Problem> {
        let Some((plan, site)) = &step.after else { return Ok(()) };
        for key in &step.strays {
            self.leave_to_packets(key, site.port)?;
        }
        self.publish_backends(step, joined, (plan, site))?;
        if step.turns_own() {
            self.object.maps.clear_port(site.port);
        }
        for turn in step.turns.iter().filter(|turn| turn.is_own()) {
            self.write_frontend(turn.key, turn.known, turn.wanted)?;
        }
        if step.record.is_some() || step.turns_own() {
            self.object.maps.set_port(site.port, site.record)?;
        }
        for turn in step.turns.iter().filter(|turn| !turn.is_own()) {
            self.write_frontend(turn.key, turn.known, turn.wanted)?;
        }
        if let Some(found) = &mut self.ground.found {
            for key in step.wanted() {
                found.frontends.remove(&key);
            }
        }
        Ok(())
    }

    fn publish_backends(
        &mut self,
        step: &Step,
        joined: u64,
        (plan, site): (&PortPlan, &Site),
    ) -> Result<(), Problem> {
        if step.is_new {
            self.object.maps.reset_tally(site.port)?;
        }
        let had = step.had_members();
        for member in step.wanted_members().into_iter().filter(|member| !had.contains(member)) {
            if self.ground.found.as_mut().is_some_and(|found| found.members.remove(&member)) {
                continue;
            }
            self.object.maps.set_member(&member, joined)?;
            self.used.members += 1;
        }
        step.fresh.iter().try_for_each(|set| self.write_slots(*set, plan, site.range(*set).first))?;
        match &step.record {
            Some(record) => self.object.maps.set_record(site.record, record),
            None => Ok(()),
        }
    }

    fn write_slots(&mut self, set: Set, plan: &PortPlan, first: u32) -> Result<(), Problem> {
        let backends: Vec<_> = set.of(plan).iter().map(element::endpoint).collect();
        self.object.maps.set_slots(first, &backends)
    }

    fn write_frontend(
        &mut self,
        key: FrontendKey,
        known: Option<FrontendValue>,
        value: FrontendValue,
    ) -> Result<(), Problem> {
        self.object.maps.set_frontend(&key, &value)?;
        self.used.frontends += u32::from(known.is_none());
        Ok(())
    }

    /// A frontend that leads to the number of a port that is not its own, until its own port writes it.
    fn leave_to_packets(&mut self, key: &FrontendKey, number: u32) -> Result<(), Problem> {
        let is_written = self.ground.found.as_ref().is_none_or(|found| !found.frontends.contains_key(key));
        if is_written {
            return Ok(());
        }
        self.object.maps.set_frontend(key, &FrontendValue::new(key, number, 0, true))
    }

    fn remove_frontend(&mut self, key: &FrontendKey) -> Result<(), Problem> {
        if self.object.maps.remove_frontend(key)? {
            self.used.frontends = self.used.frontends.saturating_sub(1);
        }
        Ok(())
    }

    fn retired(&mut self, step: &Step) {
        if let Some((_, site)) = &step.before {
            self.used.sticky = self.used.sticky.saturating_sub(u32::from(site.sticky));
        }
    }

    fn remove_members(&mut self, members: impl IntoIterator<Item = MemberKey>) -> Result<(), Problem> {
        for member in members {
            if self.object.maps.remove_member(&member)? {
                self.used.members = self.used.members.saturating_sub(1);
            }
        }
        Ok(())
    }

    /// Leaves ClusterIPs that are `lacking` frontends to the packets for now, or else sockets would refuse what the packets
    /// serve.
    fn withhold(&mut self, lacking: &FxHashSet<Address>) -> Result<(), Problem> {
        for address in lacking {
            let ip = Endpoint { address: *address, ..Endpoint::default() }.ip();
            let known = self.object.maps.frontend(&FrontendKey::whole(ip));
            if known.is_some_and(|known| known.flags() & flag::CLUSTER_IP != 0) {
                self.leave_out(ip)?;
            }
        }
        Ok(())
    }

    /// ClusterIPs and the node's addresses as a whole: after the frontends of those that come, before those that go.
    fn write_addresses(&mut self, delta: &Delta, lacking: &FxHashSet<Address>) -> Result<(), Problem> {
        if delta.node.is_some() || delta.complete {
            for ip in self.whole.host().to_vec() {
                let known = self.object.maps.frontend(&FrontendKey::whole(ip));
                let in_found = self.ground.found.is_some();
                if !in_found && known.is_some_and(|known| known.flags() & flag::CLUSTER_IP != 0) {
                    self.whole.came_home(ip);
                }
            }
            let entries: Vec<_> = self.whole.of_node().collect();
            for (key, value) in entries {
                self.write_whole(key, value)?;
            }
            for address in self.whole.take_gone() {
                self.remove_frontend(&FrontendKey::whole(address))?;
            }
        }
        for ip in self.whole.take_withheld() {
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

    fn write_cluster_ip(&mut self, ip: IpAddr, lacking: &FxHashSet<Address>) -> Result<(), Problem> {
        match self.whole.of_cluster_ip(ip) {
            Some((key, _)) if lacking.contains(&key.address) => self.leave_out(ip),
            Some((key, value)) => self.write_whole(key, value),
            None => Ok(()),
        }
    }

    /// Has the maps say nothing of a ClusterIP for now, also of one that came to the host meanwhile.
    fn leave_out(&mut self, ip: IpAddr) -> Result<(), Problem> {
        if self.whole.of_cluster_ip(ip).is_none() {
            self.whole.came_home(ip);
        }
        self.remove_cluster_ip(ip)?;
        self.whole.withhold(ip);
        Ok(())
    }

    fn remove_cluster_ip(&mut self, ip: IpAddr) -> Result<(), Problem> {
        self.whole.unhold(&ip);
        let key = FrontendKey::whole(ip);
        match self.whole.of_node_address(&ip) {
            Some((_, value)) => self.write_whole(key, value),
            None => self.remove_frontend(&key),
        }
    }

    fn write_whole(&mut self, key: FrontendKey, value: FrontendValue) -> Result<(), Problem> {
        let found = self.ground.found.as_mut().and_then(|found| found.frontends.remove(&key));
        let known = found.or_else(|| self.object.maps.frontend(&key));
        if known == Some(value) { Ok(()) } else { self.write_frontend(key, known, value) }
    }

    /// Removes what a complete delta did not name.
    pub(super) fn remove_leftovers(&mut self, now: Instant) -> Result<(), Problem> {
        let Some(found) = self.ground.leftovers(now) else { return Ok(()) };
        let (frontends, members) = found.unclaimed();
        frontends.iter().try_for_each(|key| self.remove_frontend(key))?;
        self.remove_members(members)
    }
}

/// The frontends that ports gave up, or could not be given, and that no other port has got.
fn released(done: &[&Step], left: &[&Step]) -> FxHashSet<FrontendKey> {
    let mut released: FxHashSet<FrontendKey> = done.iter().chain(left).flat_map(|step| step.had()).collect();
    released.extend(left.iter().flat_map(|step| step.wanted()));
    if !released.is_empty() {
        for key in done.iter().flat_map(|step| step.wanted()) {
            released.remove(&key);
        }
    }
    released
}
