//! What a table makes of what the kernel held before: taken over, replaced, or removed.
//!
//! In: [`Found`], and what has been asked for since. Out: what is to be replaced, and transactions that remove what is
//! left over.

use std::io;

use super::{FxHashSet, Live, Slots, Table, chunks};
use crate::{
    dataplane::nftables::{
        adopt::Found,
        drops::NO_LOCAL_ENDPOINTS,
        element::frontend_of,
        netlink::{Bytes, ChainSpec, Element, Transaction, Value},
        object::Object,
        ruleset::{self, Map},
        socket::Netlink,
        stage::Stage,
    },
    model::Protocol,
    plan::{NodePlan, PortPlan},
};

impl Table {
    /// Forgets everything in favour of what the kernel holds.
    ///
    /// # Errors
    ///
    /// When the table cannot be read.
    pub(in crate::dataplane::nftables) fn reread(&mut self, netlink: &mut Netlink) -> io::Result<()> {
        let mut found = Found::read(netlink, &self.raw, self.family)?;
        // Which slots nothing leads to any more only we know.
        for map in Map::ALL.into_iter().filter(|map| map.holds_slots()) {
            let vacated =
                self.vacated.elements(map).into_iter().map(|element| (element.key, element.key_end));
            let left = self.found.as_mut().and_then(|found| found.elements.remove(&map));
            let slots = vacated.chain(left.into_iter().flatten().map(|(key, _)| key));
            found.elements.entry(map).or_default().extend(slots.map(|key| (key, Value::None)));
        }
        self.begin_anew(found);
        Ok(())
    }

    /// Whether every set and chain is there that this table has made, as it was made. Elements are not looked at.
    ///
    /// # Errors
    ///
    /// When the kernel cannot be asked.
    pub(in crate::dataplane::nftables) fn looks_intact(
        &self,
        netlink: &mut Netlink,
        node: Option<&NodePlan>,
    ) -> io::Result<bool> {
        let found = Found::outlines(netlink, &self.raw, self.family)?;
        let fixed = node.map(|node| ruleset::static_chains(self.family, node, self.needs));
        let is_there = |object: &Object| {
            let names = if object.map(self.family).is_some() { &found.sets } else { &found.chains };
            names.contains(&object.name())
        };
        let is_hooked = |spec: &ChainSpec| found.chains.contains(&spec.name) && found.is_hooked_as(spec);
        Ok(found.fits
            && Map::ALL.iter().all(|map| found.sets.contains(map.name()))
            && fixed.iter().flatten().all(|chain| is_hooked(&chain.spec))
            && self.objects.keys().all(is_there))
    }

    /// The slots that `stage` fills and where the kernel holds something else that nobody here knows of: endpoints
    /// changed while no agent ran, or it was killed before it deleted what it had vacated.
    pub(super) fn others(&self, netlink: &mut Netlink, stage: &Stage<'_>) -> io::Result<Slots> {
        let gone = stage.gone.iter().flat_map(|(map, gone)| gone.iter().map(|element| (*map, &element.key)));
        let gone: FxHashSet<(Map, &Bytes)> = gone.collect();
        let mut others = Slots::default();
        for (map, elements) in stage.come.iter().filter(|(map, _)| map.holds_slots()) {
            for (Element { key, value, .. }, _) in elements {
                if self.is_vacated(stage, *map, key) || gone.contains(&(*map, key)) {
                    continue;
                }
                let held = Found::element(netlink, &self.raw, map.name(), key)?;
                if held.is_some_and(|held| held != *value) {
                    others.insert((*map, key.clone()));
                }
            }
        }
        Ok(others)
    }

    /// Removes what was found in the kernel and was not asked for, once everything has been asked for. What the service
    /// ports have that the kernel `refused` to change stays until it takes a change of them.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub(in crate::dataplane::nftables) fn remove_leftovers(
        &mut self,
        netlink: &mut Netlink,
        node: &NodePlan,
        refused: &[&PortPlan],
    ) -> io::Result<()> {
        let Some(mut found) = self.found.take() else { return Ok(()) };
        self.kept = found.keep(refused);
        found.leave_slots_of_the_rest();
        let numbers = self.numbers_left_over(netlink, &found)?;
        let mut leftovers = std::mem::take(&mut found.elements);
        for (map, elements) in &mut leftovers {
            if Map::BUCKETS.contains(map) {
                let known = |name: &str| {
                    name == NO_LOCAL_ENDPOINTS
                        || Object::parse(name).is_some_and(|object| self.objects.contains_key(&object))
                };
                elements.retain(|_, value| matches!(value, Value::Goto(name) if !known(name)));
            }
        }
        for (map, elements) in
            leftovers.into_iter().filter(|(map, _)| !matches!(map, Map::NodeIps | Map::NumbersGiven))
        {
            let mut gone = Vec::new();
            if map.slots().is_some() {
                let frontends = elements.keys().filter_map(|(key, _)| frontend_of(self.family, key));
                self.left_over.extend(frontends.filter(|frontend| frontend.protocol == Protocol::Udp));
            }
            for ((key, key_end), _) in elements {
                // A slot is only known to be reached; somebody may have taken it away.
                if !map.holds_slots() || Found::element(netlink, &self.raw, map.name(), &key)?.is_some() {
                    gone.push(Element { key, key_end, value: Value::None });
                }
            }
            for (gone, _) in chunks(&gone, &[]) {
                let mut transaction = Transaction::new(&self.raw);
                transaction.delete_elements(map.name(), gone);
                netlink.commit(&transaction.finish())?;
            }
        }
        // Rules of others may lead to chains that are to go.
        self.remove_unknown(netlink, &found);
        for (gone, _) in chunks(&numbers, &[]) {
            let mut transaction = Transaction::new(&self.raw);
            transaction.delete_elements(Map::Numbered.name(), gone);
            netlink.commit(&transaction.finish())?;
        }
        let needs = self.needs_after(&Stage::default());
        if needs != self.needs {
            let mut transaction = Transaction::new(&self.raw);
            self.follow_needs(&mut transaction, node, needs);
            netlink.commit(&transaction.finish())?;
            self.needs = needs;
        }
        let chains = found.chains.iter().filter_map(|name| Object::parse(name));
        let sets = found.sets.iter().filter(|name| ruleset::set_of(name, self.family).is_some());
        for object in chains.chain(sets.filter_map(|name| Object::parse(name))) {
            if !self.objects.contains_key(&object) {
                self.objects.insert(object.clone(), Live { uses: 0, held: 0, bucket: 0 });
                self.trash.push(object);
            }
        }
        self.empty_trash(netlink);
        Ok(())
    }

    /// Removes chains and sets that no Service or node of this version has: another version left them, or another program
    /// put them there. What cannot be removed stays, and is in nothing's way.
    fn remove_unknown(&self, netlink: &mut Netlink, found: &Found) {
        let is_ours = |name: &str| ruleset::is_static(name) || Object::parse(name).is_some();
        let chains: Vec<String> = found.chains.iter().filter(|name| !is_ours(name)).cloned().collect();
        let is_ours = |name: &str| ruleset::set_of(name, self.family).is_some();
        let sets: Vec<String> = found.sets.iter().filter(|name| !is_ours(name)).cloned().collect();
        if chains.is_empty() && sets.is_empty() {
            return;
        }
        tracing::warn!(family = %self.family, ?chains, ?sets, "the table has what weir does not know, removing it");
        let remove = |netlink: &mut Netlink, chains: &[String], sets: &[String]| {
            let mut transaction = Transaction::new(&self.raw);
            chains.iter().for_each(|chain| transaction.flush_chain(chain));
            chains.iter().for_each(|chain| transaction.delete_chain(chain));
            sets.iter().for_each(|set| transaction.delete_set(set));
            netlink.commit(&transaction.finish())
        };
        if remove(netlink, &chains, &sets).is_ok() {
            return;
        }
        let alone = std::slice::from_ref;
        let each = chains.iter().map(|chain| (alone(chain), &[][..]));
        for (chains, sets) in each.chain(sets.iter().map(|set| (&[][..], alone(set)))) {
            if let Err(error) = remove(netlink, chains, sets) {
                tracing::warn!(family = %self.family, ?chains, ?sets, %error, "cannot be removed and stays");
            }
        }
    }
}
