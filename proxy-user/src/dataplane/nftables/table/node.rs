//! What a table holds for the whole node: base chains, this node's addresses, buckets without a chain.
//!
//! In: the [`NodePlan`]. Out: transactions of its own, before any service port's.

use std::io;

use super::{
    Table,
    affinity::{given, given_by},
    bucket_element, member, rewrite,
};
use crate::{
    dataplane::nftables::{
        adopt::Found,
        drops::{self, NO_LOCAL_ENDPOINTS},
        netlink::{Bytes, Element, Transaction, Value},
        object::Object,
        ruleset::{self, Map, Needs, StaticChain, address_bytes},
        socket::Netlink,
        stage::{DROP_BUCKET, PASS_BUCKET},
    },
    model::{Family, PerFamily},
    plan::{NodePlan, NodePortAddresses},
};

/// So often the kernel may refuse what every node has before it is given up to change what is there.
const MOST_NODE_REFUSALS: u32 = 2;

/// Whether the kernel may have refused something because of what is there in its place.
fn cannot_be_changed(error: &io::Error) -> bool {
    use libc::{EBUSY, EEXIST, EINVAL, EOPNOTSUPP};
    matches!(error.raw_os_error(), Some(EOPNOTSUPP | EEXIST | EINVAL | EBUSY))
}

/// Takes chains out; those that lead to others come first.
fn remove_chains(transaction: &mut Transaction<'_>, names: &[&str]) {
    for name in names {
        transaction.flush_chain(name);
    }
    for name in names {
        transaction.delete_chain(name);
    }
}

/// Makes chains where they are not there, puts rules in place of those that they have, and takes out chains that rules may
/// have led to before; those that lead to others come first.
fn write_chains(transaction: &mut Transaction<'_>, chains: &[&StaticChain], left: &[&str]) {
    for chain in chains {
        transaction.add_chain(&chain.spec);
        transaction.flush_chain(&chain.spec.name);
    }
    for chain in chains {
        for rule in &chain.rules {
            transaction.add_rule(&chain.spec.name, rule);
        }
    }
    remove_chains(transaction, left);
}

/// The part of a plan that rules may depend on: addresses stand in sets.
fn rules_of(node: &NodePlan) -> NodePlan {
    use crate::plan::NodePortAddresses::{AnyLocal, Only};
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
    /// Makes the static objects and rules right for `node`, and the rules of every chain that depend on it. What was
    /// written before and is to stay as it is costs nothing.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub(in crate::dataplane::nftables) fn apply_node(
        &mut self,
        netlink: &mut Netlink,
        node: &NodePlan,
    ) -> io::Result<()> {
        let result = self.write_node(netlink, node);
        match &result {
            Ok(()) => self.node_refusals = 0,
            Err(error) if cannot_be_changed(error) => {
                self.node_refusals = self.node_refusals.saturating_add(1)
            }
            Err(_) => {}
        }
        result
    }

    /// Whether what is there cannot be changed into what should be there: its shape is another one, or the kernel has said
    /// so more than once.
    pub(in crate::dataplane::nftables) fn is_beyond_repair(&self) -> bool {
        self.found.as_ref().is_some_and(|found| !found.fits) || self.node_refusals >= MOST_NODE_REFUSALS
    }

    fn write_node(&mut self, netlink: &mut Netlink, node: &NodePlan) -> io::Result<()> {
        if self.found.is_some() {
            self.wake(netlink)?;
        }
        let rules = rules_of(node);
        if self.found.is_some() {
            self.write_all(netlink, node)?;
            self.apply_verdict_buckets(netlink)?;
            self.node_ips = Found::elements(netlink, &self.raw, Map::NodeIps.name())?;
        } else if self.written_for.as_ref() != Some(&rules) {
            self.trash.extend(self.idle.drain(..));
            self.empty_trash(netlink);
            self.rewrite_what_differs(netlink, node)?;
        }
        self.written_for = Some(rules);
        self.apply_node_ips(netlink, node)
    }

    /// Makes what is missing, and writes every chain.
    fn write_all(&mut self, netlink: &mut Netlink, node: &NodePlan) -> io::Result<()> {
        let mut transaction = Transaction::new(&self.raw);
        for map in Map::ALL {
            if self.found.as_ref().is_some_and(|found| !found.sets.contains(map.name())) {
                transaction.add_set(&map.spec(self.family));
            }
        }
        if self.found.as_ref().is_some_and(|found| given_by(found).is_none()) {
            transaction.add_elements(Map::NumbersGiven.name(), &[given(0)]);
        }
        for counter in drops::counters() {
            if self.found.as_ref().is_some_and(|found| !found.counters.contains(counter)) {
                transaction.add_counter(counter);
            }
        }
        let chains = ruleset::static_chains(self.family, node, self.needs);
        let left: Vec<&str> = ruleset::optional_chains()
            .filter(|name| self.found.as_ref().is_some_and(|found| found.chains.contains(*name)))
            .filter(|name| chains.iter().all(|chain| chain.spec.name != *name))
            .collect();
        // A base chain cannot be moved; in one transaction with its successor it can go.
        let moved = chains.iter().filter(|chain| {
            let moved =
                |found: &Found| found.chains.contains(&chain.spec.name) && !found.is_hooked_as(&chain.spec);
            self.found.as_ref().is_some_and(moved)
        });
        let moved: Vec<&str> = moved.map(|chain| &*chain.spec.name).collect();
        remove_chains(&mut transaction, &moved);
        write_chains(&mut transaction, &chains.iter().collect::<Vec<_>>(), &left);
        for object in self.objects.keys() {
            rewrite(&mut transaction, object, self.family, node);
        }
        netlink.commit(&transaction.finish())?;
        if let Some(found) = &mut self.found {
            found.chains.retain(|name| !left.contains(&name.as_str()) && !moved.contains(&name.as_str()));
            found.counters.extend(drops::counters().map(str::to_owned));
            let Element { key, value, .. } = given(0);
            found.elements.entry(Map::NumbersGiven).or_default().entry((key, None)).or_insert(value);
        }
        Ok(())
    }

    /// Writes the chains that say something else for `node` than they said before.
    fn rewrite_what_differs(&self, netlink: &mut Netlink, node: &NodePlan) -> io::Result<()> {
        let before = self.written_for.as_ref();
        let family = self.family;
        let chains = ruleset::static_chains(family, node, self.needs);
        let old = before.map(|before| ruleset::static_chains(family, before, self.needs)).unwrap_or_default();
        let left = ruleset::optional_chains().filter(|name| {
            let has = |chains: &[StaticChain]| chains.iter().any(|chain| chain.spec.name == *name);
            has(&old) && !has(&chains)
        });
        let mut transaction = Transaction::new(&self.raw);
        write_chains(
            &mut transaction,
            &chains.iter().filter(|chain| !old.contains(chain)).collect::<Vec<_>>(),
            &left.collect::<Vec<_>>(),
        );
        let differs = |object: &&Object| {
            before.is_none_or(|before| object.rules(family, before) != object.rules(family, node))
        };
        for object in self.objects.keys().filter(differs) {
            rewrite(&mut transaction, object, family, node);
        }
        netlink.commit(&transaction.finish())
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

    /// Makes the table where there is none, and one that is switched off work again. The kernel takes that only without
    /// changes of chains.
    fn wake(&self, netlink: &mut Netlink) -> io::Result<()> {
        let mut transaction = Transaction::new(&self.raw);
        transaction.add_table();
        netlink.commit(&transaction.finish())
    }

    /// Takes the whole table away, in one transaction with an empty one in its place.
    pub(in crate::dataplane::nftables) fn start_over(&mut self, netlink: &mut Netlink) -> io::Result<()> {
        let mut transaction = Transaction::new(&self.raw);
        transaction.add_table();
        transaction.delete_table();
        transaction.add_table();
        netlink.commit(&transaction.finish())?;
        self.begin_anew(Found::nothing(self.family));
        self.node_refusals = 0;
        Ok(())
    }

    /// Takes the whole table away. None is as good.
    pub(in crate::dataplane::nftables) fn remove(&mut self, netlink: &mut Netlink) -> io::Result<()> {
        let mut transaction = Transaction::new(&self.raw);
        transaction.add_table();
        transaction.delete_table();
        netlink.commit(&transaction.finish())
    }

    /// The kernel's set of this node's addresses, the one thing here that depends on them.
    fn apply_node_ips(&mut self, netlink: &mut Netlink, node: &NodePlan) -> io::Result<()> {
        let addresses = match node.node_port_addresses.get(self.family) {
            NodePortAddresses::AnyLocal => &node.host_addresses[..],
            NodePortAddresses::Only(addresses) => addresses,
        };
        let wanted = addresses.iter().filter(|address| Family::of(**address) == self.family);
        let wanted: Vec<_> = wanted.map(|address| member(Bytes::from_vec(address_bytes(*address)))).collect();
        self.replace(netlink, Map::NodeIps, &self.node_ips, &wanted)?;
        self.node_ips = wanted;
        Ok(())
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
