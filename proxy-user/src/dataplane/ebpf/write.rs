//! Writes steps into the maps, in an order that nobody notices.
//!
//! In: [`Step`]s. Out: maps that say so, or as they were for the ports that failed.

use std::{net::IpAddr, time::Instant};

use proxy_ebpf::{Address, Endpoint, FrontendKey, FrontendValue, MemberKey, flag};
use rustc_hash::FxHashSet;

use super::{
    Ebpf,
    element::{self, Set, Site},
    maps::monotonic,
    object::Sizes,
    problem::Problem,
    stage::Step,
};
use crate::plan::{ClusterIpDelta, Delta, PortId, PortPlan};

/// What each sticky service port has room for: the clients are the pods of this node, and its host.
const CLIENTS: u32 = 512;
/// What all of them together have room for, and twice that with the room to grow: each costs a bucket of 16 bytes. Not
/// every pod speaks to every sticky Service; if they do, `weir_program_troubles_total` counts who was not remembered.
const MOST_CLIENTS: u32 = 1 << 19;

/// What a step changed, to go back.
#[derive(Default)]
struct Undo {
    /// Frontends as they were.
    frontends: Vec<(FrontendKey, Option<FrontendValue>)>,
    /// Members that came.
    members: Vec<MemberKey>,
}

impl Ebpf {
    /// Makes the maps large enough. If the kernel has no memory for that, what does not fit fails by itself.
    pub(super) fn make_room(&mut self, steps: &[Step], delta: &Delta) {
        let needed = self.needed(steps, delta);
        let sizes = self.object.sizes.grown_to(&needed);
        if let Err(problem) = self.object.grow(sizes, self.ground.slots.end()) {
            tracing::error!(error = %problem, ?sizes, "cannot make the maps larger; what does not fit is refused");
        }
    }

    fn needed(&self, steps: &[Step], delta: &Delta) -> Sizes {
        let found = self.ground.found.as_ref();
        let is_theirs = |_: &FrontendKey| false;
        let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        let (mut frontends, mut members, mut sticky) = (0, 0, self.used.sticky);
        for step in steps {
            let (had, had_members) = (step.had(&is_theirs).count(), step.had_members());
            let new = |key: &FrontendKey| !found.is_some_and(|found| found.frontends.contains_key(key));
            frontends += match step.before {
                Some(_) => step.wanted(&is_theirs).count().saturating_sub(had),
                None => step.wanted(&is_theirs).filter(|(key, _)| new(key)).count(),
            };
            members += step.wanted_members().iter().filter(|member| !had_members.contains(member)).count();
            let is_sticky = |side: &Option<(_, Site)>| side.as_ref().is_some_and(|(_, site)| site.sticky);
            sticky += u32::from(is_sticky(&step.after) && !is_sticky(&step.before));
        }
        // Each ClusterIP, and each address of the node, is an element too.
        let whole = delta.cluster_ips.len() + self.whole.of_node().count();
        Sizes {
            frontends: self.used.frontends.saturating_add(count(frontends + whole)),
            slots: self.ground.slots.end(),
            members: self.used.members.saturating_add(count(members)),
            affinities: sticky.saturating_mul(CLIENTS).min(MOST_CLIENTS),
            tallies: self.ground.numbers.end(),
        }
    }

    /// Writes everything there is to write. Returns the ports that failed; they are as they were.
    pub(super) fn write(
        &mut self,
        steps: &[Step],
        delta: &Delta,
        now: Instant,
    ) -> Result<Vec<(PortId, String)>, Problem> {
        let is_theirs = self.whole.is_theirs();
        let mut released = FxHashSet::default();
        for step in steps {
            released.extend(step.had(&is_theirs).map(|(key, _)| key));
        }
        let mut moved = FxHashSet::default();
        if !released.is_empty() {
            let taken = steps.iter().flat_map(|step| step.wanted(&is_theirs));
            moved.extend(taken.filter_map(|(key, _)| released.take(&key)));
        }
        let joined = monotonic();
        let (mut failed, mut lacking) = (Vec::new(), FxHashSet::default());
        let mut done = Vec::with_capacity(steps.len());
        for step in steps {
            let Some(problem) = self.publish(step, joined, &is_theirs)? else {
                done.push(step);
                continue;
            };
            self.ground.undo(step, now);
            failed.push((step.id.clone(), problem.to_string()));
            let wanted = || step.wanted(&is_theirs).map(|(key, _)| key);
            // What the port has it keeps; what it should have had from another port nobody has.
            released.extend(wanted().filter(|key| moved.contains(key)));
            let had: FxHashSet<FrontendKey> = step.had(&is_theirs).map(|(key, _)| key).collect();
            released.retain(|key| !had.contains(key));
            lacking.extend(wanted().filter(|key| !had.contains(key)).map(|key| key.address));
            if let (Some(found), Some((_, site))) = (&mut self.ground.found, &step.after) {
                found.spare(wanted(), site.port);
            }
        }
        self.write_addresses(delta, &lacking)?;
        for key in released {
            self.remove_frontend(&key)?;
        }
        for step in done {
            self.retire(step)?;
            self.ground.done(step, now);
        }
        Ok(failed)
    }

    /// Members, slots, then frontends. Returns why it failed; then the port is as it was. After an error it may not be.
    fn publish(
        &mut self,
        step: &Step,
        joined: u64,
        is_theirs: &dyn Fn(&FrontendKey) -> bool,
    ) -> Result<Option<Problem>, Problem> {
        let Some((plan, site)) = &step.after else { return Ok(None) };
        let mut undo = Undo::default();
        let published = self.publish_backends(step, joined, (plan, site), &mut undo);
        match published.and_then(|()| self.write_frontends(step, is_theirs, &mut undo)) {
            Ok(()) => {
                self.used.sticky += u32::from(site.sticky);
                Ok(None)
            }
            Err(problem) => {
                self.take_back(undo)?;
                Ok(Some(problem))
            }
        }
    }

    fn publish_backends(
        &mut self,
        step: &Step,
        joined: u64,
        (plan, site): (&PortPlan, &Site),
        undo: &mut Undo,
    ) -> Result<(), Problem> {
        if step.is_new {
            self.object.maps.reset_tally(site.port)?;
        }
        let had = step.had_members();
        for member in step.wanted_members().into_iter().filter(|member| !had.contains(member)) {
            let found = self.ground.found.as_mut();
            if found.is_some_and(|found| found.members.remove(&member).is_some()) {
                continue;
            }
            self.object.maps.set_member(&member, joined)?;
            self.used.members += 1;
            undo.members.push(member);
        }
        step.fresh.iter().try_for_each(|set| self.write_slots(*set, plan, site.range(*set).first))
    }

    fn write_slots(&mut self, set: Set, plan: &PortPlan, first: u32) -> Result<(), Problem> {
        let backends: Vec<_> = set.of(plan).iter().map(element::endpoint).collect();
        self.object.maps.set_slots(first, &backends)
    }

    fn write_frontends(
        &mut self,
        step: &Step,
        is_theirs: &dyn Fn(&FrontendKey) -> bool,
        undo: &mut Undo,
    ) -> Result<(), Problem> {
        let had: Vec<(FrontendKey, FrontendValue)> = step.had(is_theirs).collect();
        for (key, value) in step.wanted(is_theirs) {
            let found = self.ground.found.as_mut().and_then(|found| found.frontends.remove(&key));
            let known = found
                .or_else(|| had.iter().find(|(old, _)| *old == key).map(|(_, old)| *old))
                // One that another port is about to give up.
                .or_else(|| self.object.maps.frontend(&key));
            if known != Some(value) {
                self.insert_frontend(key, value, known.is_some())?;
                undo.frontends.push((key, known));
            }
        }
        Ok(())
    }

    /// Writes a frontend; `there` if there is one already.
    fn insert_frontend(
        &mut self,
        key: FrontendKey,
        value: FrontendValue,
        there: bool,
    ) -> Result<(), Problem> {
        self.object.maps.set_frontend(&key, &value)?;
        self.used.frontends += u32::from(!there);
        Ok(())
    }

    fn take_back(&mut self, undo: Undo) -> Result<(), Problem> {
        for (key, known) in undo.frontends.into_iter().rev() {
            match known {
                Some(value) => self.insert_frontend(key, value, true)?,
                None => self.remove_frontend(&key)?,
            }
        }
        self.remove_members(undo.members)
    }

    fn remove_frontend(&mut self, key: &FrontendKey) -> Result<(), Problem> {
        if self.object.maps.remove_frontend(key)? {
            self.used.frontends = self.used.frontends.saturating_sub(1);
        }
        Ok(())
    }

    /// Takes away what nobody is led to any more.
    fn retire(&mut self, step: &Step) -> Result<(), Problem> {
        let wanted = step.wanted_members();
        self.remove_members(step.had_members().into_iter().filter(|member| !wanted.contains(member)))?;
        if let Some((_, site)) = &step.before {
            self.used.sticky = self.used.sticky.saturating_sub(u32::from(site.sticky));
        }
        Ok(())
    }

    fn remove_members(&mut self, members: impl IntoIterator<Item = MemberKey>) -> Result<(), Problem> {
        for member in members {
            if self.object.maps.remove_member(&member)? {
                self.used.members = self.used.members.saturating_sub(1);
            }
        }
        Ok(())
    }

    /// ClusterIPs and the node's addresses as a whole: after the frontends of those that come, before those that go.
    /// An address that is `lacking` frontends is left to the packets for now, or else sockets would refuse what the
    /// packets serve.
    fn write_addresses(&mut self, delta: &Delta, lacking: &FxHashSet<Address>) -> Result<(), Problem> {
        if delta.node.is_some() || delta.complete {
            for ip in self.whole.host().to_vec() {
                let known = self.object.maps.frontend(&FrontendKey::whole(ip));
                let in_found = self.ground.found.is_some();
                if !in_found && known.is_some_and(|known| known.flags & flag::CLUSTER_IP != 0) {
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
        for address in lacking {
            let ip = Endpoint { address: *address, ..Endpoint::default() }.ip();
            let known = self.object.maps.frontend(&FrontendKey::whole(ip));
            if known.is_some_and(|known| known.flags & flag::CLUSTER_IP != 0) {
                self.write_cluster_ip(ip, lacking)?;
            }
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
            Some((key, _)) if lacking.contains(&key.address) => {
                self.remove_cluster_ip(ip)?;
                self.whole.withhold(ip);
                Ok(())
            }
            Some((key, value)) => self.write_whole(key, value),
            None => Ok(()),
        }
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
        if known == Some(value) { Ok(()) } else { self.insert_frontend(key, value, known.is_some()) }
    }

    /// Removes what a complete delta did not name.
    pub(super) fn remove_leftovers(&mut self, now: Instant) -> Result<(), Problem> {
        let Some(found) = self.ground.leftovers(now) else { return Ok(()) };
        let (frontends, members) = found.unclaimed();
        frontends.iter().try_for_each(|key| self.remove_frontend(key))?;
        self.remove_members(members)
    }
}
