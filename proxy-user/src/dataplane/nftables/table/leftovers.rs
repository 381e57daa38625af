//! The end of a complete delta: removes what the kernel has beyond it.
//!
//! In: the rest of the table's [`KernelState`]. Out: transactions that remove it.

use super::{Table, Usage};
use crate::{
    dataplane::nftables::{
        base_chains,
        drop_reasons::NO_LOCAL_ENDPOINTS,
        kernel_state::{Elements, KernelState},
        schema::{Map, frontend_of},
        shared_chains::{self, SharedObject},
        socket::{CommitError, Netlink},
        transaction::PortChanges,
    },
    model::Protocol,
    plan::{NodePlan, PortPlan},
    sys::libnftnl::{Batch, Element, Value},
};

impl Table {
    /// Removes what the kernel has beyond a complete delta. The elements of service ports that the kernel `refused` to
    /// change stay until it takes a change of them.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub(in crate::dataplane::nftables) fn remove_leftovers(
        &mut self,
        netlink: &mut Netlink,
        node: &NodePlan,
        refused: &[&PortPlan],
    ) -> Result<(), CommitError> {
        let kept = self.kernel.split_off(refused);
        let mut leftovers = std::mem::replace(&mut self.kernel, kept);
        leftovers.leave_slots_of_the_rest();
        let numbers = self.numbers_left_over(netlink, &leftovers)?;
        self.keep_used_buckets(&mut leftovers);
        for (map, elements) in std::mem::take(&mut leftovers.elements) {
            if !matches!(map, Map::NodeIps | Map::LastNumber) {
                self.remove_elements(netlink, map, elements)?;
            }
        }
        // Rules of other programs may lead to chains that weir removes.
        self.remove_unknown(netlink, &leftovers);
        self.delete_elements(netlink, Map::Numbered, &numbers)?;
        let needs = self.needs_after(&PortChanges::default());
        if needs != self.needs {
            let mut batch = Batch::new(&self.raw);
            self.follow_needs(&mut batch, node, needs);
            netlink.commit(&batch.finish())?;
            self.needs = needs;
        }
        self.mark_unused(&leftovers);
        self.remove_unused(netlink);
        Ok(())
    }

    /// Takes buckets that lead to used chains out of the leftovers.
    fn keep_used_buckets(&self, leftovers: &mut KernelState) {
        let is_used = |name: &str| {
            name == NO_LOCAL_ENDPOINTS
                || SharedObject::parse(name).is_some_and(|object| self.objects.contains_key(&object))
        };
        for map in Map::BUCKETS {
            if let Some(elements) = leftovers.elements.get_mut(&map) {
                elements.retain(|_, value| matches!(value, Value::Goto(name) if !is_used(name)));
            }
        }
    }

    fn remove_elements(
        &mut self,
        netlink: &mut Netlink,
        map: Map,
        elements: Elements,
    ) -> Result<(), CommitError> {
        if map.slots().is_some() {
            let frontends = elements.keys().filter_map(|key| frontend_of(self.family, key));
            self.left_over.extend(frontends.filter(|frontend| frontend.protocol == Protocol::Udp));
        }
        let mut gone = Vec::new();
        for key in elements.into_keys() {
            // weir did not read slots, and another program may have removed one.
            if !map.holds_slots() || netlink.element(&self.raw, map.name(), &key)?.is_some() {
                gone.push(Element::member(key));
            }
        }
        self.delete_elements(netlink, map, &gone)
    }

    /// Marks shared objects without a use for removal, also those that only an earlier agent used.
    fn mark_unused(&mut self, leftovers: &KernelState) {
        let chains = leftovers.chains.iter().filter_map(|name| SharedObject::parse(name));
        let sets = leftovers.sets.iter().filter(|name| shared_chains::set_of(name, self.family).is_some());
        let objects: Vec<_> = chains.chain(sets.filter_map(|name| SharedObject::parse(name))).collect();
        for object in objects {
            if !self.objects.contains_key(&object) {
                self.objects.insert(object.clone(), Usage { uses: 0, forks: 0, bucket: 0 });
                self.unused.push(object);
            }
        }
    }

    /// Removes chains and sets that this version never writes, but another version or program did. One that cannot be
    /// removed stays, and does no harm.
    fn remove_unknown(&self, netlink: &mut Netlink, leftovers: &KernelState) {
        let is_ours = |name: &str| base_chains::is_base_chain(name) || SharedObject::parse(name).is_some();
        let chains: Vec<String> = leftovers.chains.iter().filter(|name| !is_ours(name)).cloned().collect();
        let is_ours = |name: &str| shared_chains::set_of(name, self.family).is_some();
        let sets: Vec<String> = leftovers.sets.iter().filter(|name| !is_ours(name)).cloned().collect();
        if chains.is_empty() && sets.is_empty() {
            return;
        }
        tracing::warn!(family = %self.family, ?chains, ?sets, "removing chains and sets that weir did not write");
        let remove = |netlink: &mut Netlink, chains: &[String], sets: &[String]| {
            let mut batch = Batch::new(&self.raw);
            chains.iter().for_each(|chain| batch.flush_chain(chain));
            chains.iter().for_each(|chain| batch.delete_chain(chain));
            sets.iter().for_each(|set| batch.delete_set(set));
            netlink.commit(&batch.finish())
        };
        if remove(netlink, &chains, &sets).is_ok() {
            return;
        }
        let alone = std::slice::from_ref;
        let each = chains.iter().map(|chain| (alone(chain), &[][..]));
        for (chains, sets) in each.chain(sets.iter().map(|set| (&[][..], alone(set)))) {
            if let Err(error) = remove(netlink, chains, sets) {
                tracing::warn!(family = %self.family, ?chains, ?sets, %error, "cannot remove a chain or set");
            }
        }
    }
}
