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
        netlink::{Bytes, Element, Transaction, Value},
        object::Object,
        ruleset::{self, Map, Needs},
        socket::Netlink,
        stage::{FIRST_BUCKET, Stage},
    },
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
        *self = Self::new(self.family);
        self.next_bucket =
            found.buckets.values().max().map_or(FIRST_BUCKET, |most| (most + 1).max(FIRST_BUCKET));
        let any = |names: &[&str]| names.iter().any(|name| found.chains.contains(*name));
        self.needs = Needs { affinity: any(&ruleset::REMEMBER), guards: any(&ruleset::GUARD) };
        self.found = Some(found);
        Ok(())
    }

    /// Whether every set and chain is there that this table has made. Elements are not looked at.
    ///
    /// # Errors
    ///
    /// When the kernel cannot be asked.
    pub(in crate::dataplane::nftables) fn looks_intact(
        &self,
        netlink: &mut Netlink,
        node: Option<&NodePlan>,
    ) -> io::Result<bool> {
        let (sets, chains) = Found::names(netlink, &self.raw)?;
        let fixed = node.map(|node| ruleset::static_chains(self.family, node, self.needs));
        let is_there = |object: &Object| match object {
            Object::Memory { .. } => sets.contains(&object.name()),
            _ => chains.contains(&object.name()),
        };
        Ok(Map::ALL.iter().all(|map| sets.contains(map.name()))
            && fixed.iter().flatten().all(|chain| chains.contains(&chain.spec.name))
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
        let mut leftovers = found.elements;
        for (map, elements) in &mut leftovers {
            if *map == Map::Buckets {
                let known = |name: &str| {
                    name == NO_LOCAL_ENDPOINTS
                        || Object::parse(name).is_some_and(|object| self.objects.contains_key(&object))
                };
                elements.retain(|_, value| matches!(value, Value::Goto(name) if !known(name)));
            }
        }
        for (map, elements) in leftovers.into_iter().filter(|(map, _)| *map != Map::NodeIps) {
            let mut gone = Vec::new();
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
        let needs = self.needs_after(&Stage::default());
        if needs != self.needs {
            let mut transaction = Transaction::new(&self.raw);
            self.follow_needs(&mut transaction, node, needs);
            netlink.commit(&transaction.finish())?;
            self.needs = needs;
        }
        let names = found.chains.iter().chain(&found.sets);
        for object in names.filter_map(|name| Object::parse(name)) {
            if !self.objects.contains_key(&object) {
                self.objects.insert(object.clone(), Live { uses: 0, bucket: 0 });
                self.trash.push(object);
            }
        }
        self.empty_trash(netlink);
        Ok(())
    }
}
