//! The part of a table that does not depend on Services: base chains, this node's addresses, buckets without a chain.
//!
//! In: the [`NodePlan`]. Out: transactions of its own, before those of service ports.

use super::{Table, rewrite};
use crate::{
    dataplane::nftables::{
        backend_numbers::last_number,
        base_chains::{self, Needs},
        drop_reasons::NO_LOCAL_ENDPOINTS,
        kernel_state::KernelState,
        schema::{DROP_BUCKET, Map, PASS_BUCKET, RuledChain, address_bytes, bucket_element},
        shared_chains::SharedObject,
        socket::{CommitError, Netlink},
    },
    model::{Family, PerFamily},
    plan::{NodePlan, NodePortAddresses},
    sys::libnftnl::{Batch, Bytes, Element, Value},
};

/// The most consecutive refusals of the base chains before weir builds the table anew.
const MOST_NODE_REFUSALS: u32 = 2;

/// Removes chains. A chain comes before the chains that it leads to.
fn remove_chains(batch: &mut Batch<'_>, names: &[&str]) {
    for name in names {
        batch.flush_chain(name);
    }
    for name in names {
        batch.delete_chain(name);
    }
}

/// Creates missing chains, replaces the rules of all, and removes the chains `left`, to which the replaced
/// rules may have jumped. A chain comes before the chains that it leads to.
fn write_chains(batch: &mut Batch<'_>, chains: &[&RuledChain], left: &[&str]) {
    for chain in chains {
        batch.add_chain(&chain.spec);
        batch.flush_chain(&chain.spec.name);
    }
    for chain in chains {
        for rule in &chain.rules {
            batch.add_rule(&chain.spec.name, rule);
        }
    }
    remove_chains(batch, left);
}

/// The part of a plan on which rules depend: addresses are elements of sets.
fn rules_of(node: &NodePlan) -> NodePlan {
    use NodePortAddresses::{AnyLocal, Only};
    let without = |addresses: &NodePortAddresses| match addresses {
        AnyLocal => AnyLocal,
        Only(_) => Only(Vec::new()),
    };
    let NodePlan { node_port_addresses: serving, .. } = node;
    NodePlan {
        node_port_addresses: PerFamily { v4: without(&serving.v4), v6: without(&serving.v6) },
        host_addresses: Vec::new(),
        loopback_node_ports: PerFamily::default(),
        ..node.clone()
    }
}

impl Table {
    /// Writes the base chains, and the rules of all chains that depend on the node. After the first time only what
    /// differs.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub(in crate::dataplane::nftables) fn apply_node(
        &mut self,
        netlink: &mut Netlink,
        node: &NodePlan,
    ) -> Result<(), CommitError> {
        let result = self.write_node(netlink, node);
        match &result {
            Ok(()) => self.node_refusals = 0,
            Err(error) if error.is_about_shape() => {
                self.node_refusals = self.node_refusals.saturating_add(1);
            }
            Err(_) => {}
        }
        result
    }

    /// Whether weir must build the table anew: it has another shape, or the kernel refused the base chains repeatedly.
    pub(in crate::dataplane::nftables) fn is_beyond_repair(&self) -> bool {
        !self.kernel.fits || self.node_refusals >= MOST_NODE_REFUSALS
    }

    fn write_node(&mut self, netlink: &mut Netlink, node: &NodePlan) -> Result<(), CommitError> {
        let rules = rules_of(node);
        if self.written_for.is_none() {
            self.wake(netlink)?;
            self.write_all(netlink, node)?;
            self.apply_verdict_buckets(netlink)?;
            self.node_ips = netlink.elements(&self.raw, Map::NodeIps.name())?;
        } else if self.written_for.as_ref() != Some(&rules) {
            self.unused.extend(self.idle.drain(..));
            self.remove_unused(netlink);
            self.rewrite_differing(netlink, node)?;
        }
        self.written_for = Some(rules);
        self.apply_node_ips(netlink, node)
    }

    /// Adds the maps and counters that the kernel does not have, and writes every base chain.
    fn write_all(&self, netlink: &mut Netlink, node: &NodePlan) -> Result<(), CommitError> {
        let mut batch = Batch::new(&self.raw);
        for map in Map::ALL.into_iter().filter(|map| !self.kernel.sets.contains(map.name())) {
            batch.add_set(&map.spec(self.family));
        }
        if self.kernel.last_number().is_none() {
            batch.add_elements(Map::LastNumber.name(), &[last_number(0)]);
        }
        for counter in base_chains::counters().filter(|name| !self.kernel.counters.contains(*name)) {
            batch.add_counter(counter);
        }
        let chains = base_chains::base_chains(self.family, node, self.needs);
        let exists = |name: &str| self.kernel.chains.contains(name);
        let left: Vec<&str> = base_chains::optional_chains()
            .filter(|name| exists(name) && chains.iter().all(|chain| chain.spec.name != *name))
            .collect();
        // A base chain cannot be moved, but it can be deleted in one transaction with its successor.
        let moved = chains.iter().map(|chain| &chain.spec);
        let moved = moved.filter(|spec| exists(&spec.name) && !self.kernel.is_hooked_as(spec));
        let moved: Vec<&str> = moved.map(|spec| &*spec.name).collect();
        remove_chains(&mut batch, &moved);
        write_chains(&mut batch, &chains.iter().collect::<Vec<_>>(), &left);
        for object in self.objects.keys() {
            rewrite(&mut batch, object, self.family, node);
        }
        netlink.commit(&batch.finish())
    }

    /// Writes the chains that have other rules for `node` than for the node before.
    fn rewrite_differing(&self, netlink: &mut Netlink, node: &NodePlan) -> Result<(), CommitError> {
        let before = self.written_for.as_ref();
        let family = self.family;
        let chains = base_chains::base_chains(family, node, self.needs);
        let old =
            before.map(|before| base_chains::base_chains(family, before, self.needs)).unwrap_or_default();
        let left = base_chains::optional_chains().filter(|name| {
            let has = |chains: &[RuledChain]| chains.iter().any(|chain| chain.spec.name == *name);
            has(&old) && !has(&chains)
        });
        let mut batch = Batch::new(&self.raw);
        write_chains(
            &mut batch,
            &chains.iter().filter(|chain| !old.contains(chain)).collect::<Vec<_>>(),
            &left.collect::<Vec<_>>(),
        );
        let differs = |object: &&SharedObject| {
            before.is_none_or(|before| object.rules(family, before) != object.rules(family, node))
        };
        for object in self.objects.keys().filter(differs) {
            rewrite(&mut batch, object, family, node);
        }
        netlink.commit(&batch.finish())
    }

    /// Adds the chains that `needs` asks for, and removes those that only the needs before asked for.
    pub(super) fn follow_needs(&self, batch: &mut Batch<'_>, node: &NodePlan, needs: Needs) {
        if needs == self.needs {
            return;
        }
        let chains = |needs| base_chains::base_chains(self.family, node, needs);
        let (before, after) = (chains(self.needs), chains(needs));
        let missing_from = |others: &[RuledChain], chain: &RuledChain| {
            others.iter().all(|other| other.spec.name != chain.spec.name)
        };
        let left = before.iter().filter(|chain| missing_from(&after, chain)).map(|chain| &*chain.spec.name);
        let left: Vec<&str> =
            base_chains::optional_chains().filter(|name| left.clone().any(|left| left == *name)).collect();
        remove_chains(batch, &left);
        for chain in after.iter().filter(|chain| missing_from(&before, chain)) {
            batch.add_chain(&chain.spec);
            chain.rules.iter().for_each(|rule| batch.add_rule(&chain.spec.name, rule));
        }
    }

    /// Creates a missing table, and wakes a dormant one, which the kernel does only in a batch without changes of
    /// chains.
    fn wake(&self, netlink: &mut Netlink) -> Result<(), CommitError> {
        let mut batch = Batch::new(&self.raw);
        batch.add_table();
        netlink.commit(&batch.finish())
    }

    /// Replaces the whole table with an empty one, in one transaction.
    pub(in crate::dataplane::nftables) fn start_over(
        &mut self,
        netlink: &mut Netlink,
    ) -> Result<(), CommitError> {
        let mut batch = Batch::new(&self.raw);
        batch.add_table();
        batch.delete_table();
        batch.add_table();
        netlink.commit(&batch.finish())?;
        self.begin_anew(KernelState::empty(self.family));
        self.node_refusals = 0;
        Ok(())
    }

    /// Removes the whole table, if it exists.
    pub(in crate::dataplane::nftables) fn remove(&self, netlink: &mut Netlink) -> Result<(), CommitError> {
        let mut batch = Batch::new(&self.raw);
        batch.add_table();
        batch.delete_table();
        netlink.commit(&batch.finish())
    }

    /// Writes this node's addresses into their set. Nothing else here depends on them.
    fn apply_node_ips(&mut self, netlink: &mut Netlink, node: &NodePlan) -> Result<(), CommitError> {
        let addresses = match node.node_port_addresses.get(self.family) {
            NodePortAddresses::AnyLocal => &node.host_addresses[..],
            NodePortAddresses::Only(addresses) => addresses,
        };
        let wanted = addresses.iter().filter(|address| Family::of(**address) == self.family);
        let wanted = wanted.map(|address| Element::member(Bytes::from_vec(address_bytes(*address))));
        let wanted: Vec<_> = wanted.collect();
        self.replace(netlink, Map::NodeIps, &self.node_ips, &wanted)?;
        self.node_ips = wanted;
        Ok(())
    }

    fn apply_verdict_buckets(&self, netlink: &mut Netlink) -> Result<(), CommitError> {
        let drop = Value::Goto(NO_LOCAL_ENDPOINTS.to_owned());
        let wanted = [(DROP_BUCKET, drop), (PASS_BUCKET, Value::Accept(true))];
        let wanted = wanted.map(|(bucket, value)| bucket_element(bucket, value));
        let mut present = netlink.elements(&self.raw, Map::Buckets.name())?;
        present.retain(|element| wanted.iter().any(|wanted| wanted.key == element.key));
        self.replace(netlink, Map::Buckets, &present, &wanted)
    }

    /// Replaces the elements `present` of a small set with `wanted`.
    fn replace(
        &self,
        netlink: &mut Netlink,
        map: Map,
        present: &[Element],
        wanted: &[Element],
    ) -> Result<(), CommitError> {
        let missing = |from: &[Element], of: &[Element]| -> Vec<Element> {
            of.iter().filter(|element| !from.contains(element)).cloned().collect()
        };
        let (gone, come) = (missing(wanted, present), missing(present, wanted));
        if gone.is_empty() && come.is_empty() {
            return Ok(());
        }
        let mut batch = Batch::new(&self.raw);
        batch.delete_elements(map.name(), &gone);
        batch.add_elements(map.name(), &come);
        netlink.commit(&batch.finish())
    }
}
