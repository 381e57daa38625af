//! What a table holds for the whole node: base chains, this node's addresses, buckets without a chain.
//!
//! In: the [`NodePlan`]. Out: transactions of its own, before any service port's.

use std::io;

use super::{Table, bucket_element, member, rewrite};
use crate::{
    dataplane::nftables::{
        adopt::Found,
        drops::{NO_LOCAL_ENDPOINTS, Reason},
        netlink::{Bytes, Element, Transaction, Value},
        ruleset::{self, Map, Needs, StaticChain, address_bytes},
        socket::Netlink,
        stage::{DROP_BUCKET, PASS_BUCKET},
    },
    model::Family,
    plan::NodePlan,
};

/// Takes chains out; those that lead to others come first.
fn remove_chains(transaction: &mut Transaction<'_>, names: &[&str]) {
    for name in names {
        transaction.flush_chain(name);
    }
    for name in names {
        transaction.delete_chain(name);
    }
}

impl Table {
    /// Makes the static objects and rules right for `node`, and the rules of every chain that depend on it.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub(in crate::dataplane::nftables) fn apply_node(
        &mut self,
        netlink: &mut Netlink,
        node: &NodePlan,
    ) -> io::Result<()> {
        if self.found.as_ref().is_some_and(|found| !found.fits) {
            self.start_over(netlink)?;
        }
        let mut transaction = Transaction::new(&self.raw);
        transaction.add_table();
        for map in Map::ALL {
            if self.found.as_ref().is_some_and(|found| !found.sets.contains(map.name())) {
                transaction.add_set(&map.spec(self.family));
            }
        }
        for counter in Reason::ALL.map(Reason::name) {
            if self.found.as_ref().is_some_and(|found| !found.counters.contains(counter)) {
                transaction.add_counter(counter);
            }
        }
        let chains = ruleset::static_chains(self.family, node, self.needs);
        let left: Vec<&str> = ruleset::optional_chains()
            .filter(|name| self.found.as_ref().is_some_and(|found| found.chains.contains(*name)))
            .filter(|name| chains.iter().all(|chain| chain.spec.name != *name))
            .collect();
        remove_chains(&mut transaction, &left);
        for chain in &chains {
            transaction.add_chain(&chain.spec);
            transaction.flush_chain(&chain.spec.name);
        }
        for chain in &chains {
            for rule in &chain.rules {
                transaction.add_rule(&chain.spec.name, rule);
            }
        }
        for object in self.objects.keys() {
            rewrite(&mut transaction, object, self.family, node);
        }
        netlink.commit(&transaction.finish())?;
        if let Some(found) = &mut self.found {
            found.chains.retain(|name| !left.contains(&name.as_str()));
            found.counters.extend(Reason::ALL.map(|reason| reason.name().to_owned()));
        }
        self.apply_node_ips(netlink, node)?;
        self.apply_verdict_buckets(netlink)
    }

    /// Adds the chains that `needs` asks for and takes out those it does not.
    pub(super) fn follow_needs(&self, transaction: &mut Transaction<'_>, node: &NodePlan, needs: Needs) {
        if needs == self.needs {
            return;
        }
        let chains = |needs| ruleset::static_chains(self.family, node, needs);
        let (before, after) = (chains(self.needs), chains(needs));
        let missing_from = |others: &[StaticChain], chain: &StaticChain| {
            others.iter().all(|other| other.spec.name != chain.spec.name)
        };
        let left = before.iter().filter(|chain| missing_from(&after, chain)).map(|chain| &*chain.spec.name);
        let left: Vec<&str> =
            ruleset::optional_chains().filter(|name| left.clone().any(|left| left == *name)).collect();
        remove_chains(transaction, &left);
        for chain in after.iter().filter(|chain| missing_from(&before, chain)) {
            transaction.add_chain(&chain.spec);
            chain.rules.iter().for_each(|rule| transaction.add_rule(&chain.spec.name, rule));
        }
    }

    /// Takes the whole table away, in one transaction with an empty one in its place.
    fn start_over(&mut self, netlink: &mut Netlink) -> io::Result<()> {
        tracing::warn!(family = %self.family, "the table is from another version of weir; it is built anew");
        let mut transaction = Transaction::new(&self.raw);
        transaction.delete_table();
        transaction.add_table();
        netlink.commit(&transaction.finish())?;
        self.found = Some(Found::nothing(self.family));
        Ok(())
    }

    fn apply_node_ips(&mut self, netlink: &mut Netlink, node: &NodePlan) -> io::Result<()> {
        use crate::plan::NodePortAddresses::{AnyLocal, Only};
        let addresses = match node.node_port_addresses.get(self.family) {
            AnyLocal => &node.host_addresses,
            Only(addresses) => addresses,
        };
        let wanted = addresses.iter().filter(|address| Family::of(**address) == self.family);
        let wanted: Vec<_> = wanted.map(|address| member(Bytes::from_vec(address_bytes(*address)))).collect();
        let present = Found::elements(netlink, &self.raw, Map::NodeIps.name())?;
        self.replace(netlink, Map::NodeIps, &present, &wanted)
    }

    fn apply_verdict_buckets(&mut self, netlink: &mut Netlink) -> io::Result<()> {
        let drop = Value::Goto(NO_LOCAL_ENDPOINTS.to_owned());
        let wanted = [(DROP_BUCKET, drop), (PASS_BUCKET, Value::Accept(true))];
        let wanted = wanted.map(|(bucket, value)| bucket_element(bucket, value));
        let mut present = Found::elements(netlink, &self.raw, Map::Buckets.name())?;
        present.retain(|element| wanted.iter().any(|wanted| wanted.key == element.key));
        self.replace(netlink, Map::Buckets, &present, &wanted)
    }

    /// Makes a small set hold `wanted` where it held `present`.
    fn replace(
        &self,
        netlink: &mut Netlink,
        map: Map,
        present: &[Element],
        wanted: &[Element],
    ) -> io::Result<()> {
        let missing_from = |from: &[Element], what: &[Element]| -> Vec<Element> {
            what.iter().filter(|element| !from.contains(element)).cloned().collect()
        };
        let (gone, come) = (missing_from(wanted, present), missing_from(present, wanted));
        if gone.is_empty() && come.is_empty() {
            return Ok(());
        }
        let mut transaction = Transaction::new(&self.raw);
        transaction.delete_elements(map.name(), &gone);
        transaction.add_elements(map.name(), &come);
        netlink.commit(&transaction.finish())
    }
}
