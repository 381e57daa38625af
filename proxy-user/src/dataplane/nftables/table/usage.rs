//! How many uses each shared object has, and the removal of those without a use.
//!
//! In: transactions that are in force. Out: transactions that remove objects.

use std::collections::BTreeSet;

use super::{Table, Usage};
use crate::{
    dataplane::nftables::{
        schema::{FIRST_BUCKET, Map, bucket_element},
        shared_chains::SharedObject,
        socket::{CommitError, Netlink},
        transaction::{NewObject, PortChanges},
    },
    sys::libnftnl::{Batch, Value},
};

/// The most reusable chains that stay though no service port uses them, because a Service that is scaled up and down
/// has the same numbers of endpoints again.
const MOST_IDLE: usize = 16;

impl Table {
    /// Counts the uses that `changes` add and remove, and the objects that were made for them.
    pub(super) fn count_uses(&mut self, changes: &PortChanges<'_>, objects: Vec<NewObject>) {
        let mut new = Vec::new();
        for NewObject { object, bucket, .. } in objects {
            self.next_bucket = self.next_bucket.max(bucket + 1);
            let before = self.objects.get(&object).copied();
            let forks = before.map_or(0, |usage| usage.forks);
            self.objects.insert(object.clone(), Usage { uses: 0, forks, bucket });
            if before.is_none() {
                new.push(object);
            }
        }
        new.iter().for_each(|object| self.count_fork(object, 1));
        for (object, change) in &changes.uses {
            let Some(usage) = self.objects.get_mut(object) else { continue };
            usage.uses = usage.uses.saturating_add_signed(*change);
            if usage.is_unused() {
                self.set_aside(object);
            }
        }
        self.guarded = self.guarded.saturating_add_signed(changes.guarded);
        for (key, change) in &changes.local_backends {
            let uses = i64::from(self.local_backends.get(key).copied().unwrap_or_default()) + change;
            if let Ok(uses @ 1..) = u32::try_from(uses) {
                self.local_backends.insert(key.clone(), uses);
                self.vacated.keep(Map::Hairpin, key);
            } else if self.local_backends.remove(key).is_some() {
                self.vacated.add(Map::Hairpin, key.clone());
            }
        }
    }

    /// Counts a fork at the chains that it leads to.
    fn count_fork(&mut self, fork: &SharedObject, change: i32) {
        for part in fork.parts() {
            let Some(usage) = self.objects.get_mut(part) else { continue };
            usage.forks = usage.forks.saturating_add_signed(change);
            if usage.is_unused() {
                self.set_aside(part);
            }
        }
    }

    /// Keeps a reusable chain for a while, and marks all other objects for removal.
    fn set_aside(&mut self, object: &SharedObject) {
        if !object.is_reusable() {
            self.unused.push(object.clone());
            return;
        }
        self.idle.retain(|idle| idle != object);
        self.idle.push_back(object.clone());
        let too_many = self.idle.len().saturating_sub(MOST_IDLE);
        self.unused.extend(self.idle.drain(..too_many));
    }

    /// Removes unused objects. Kernels before 6.2 count a chain as used for a while after the last element that led to
    /// it is gone, so weir tries again after the next change.
    pub(super) fn remove_unused(&mut self, netlink: &mut Netlink) {
        let mut unused: BTreeSet<SharedObject> = std::mem::take(&mut self.unused).into_iter().collect();
        let mut left = Vec::new();
        // In the reverse order of creation: a chain goes before the maps and chains that it names, which may become
        // unused by that.
        while let Some(object) = unused.pop_last() {
            if !self.objects.get(&object).is_some_and(Usage::is_unused) {
                continue;
            }
            match self.delete_object(netlink, &object) {
                Ok(()) => {
                    self.kernel.forget(&object.name());
                    self.objects.remove(&object);
                    self.count_fork(&object, -1);
                    unused.extend(self.unused.drain(..));
                }
                Err(error) => {
                    tracing::debug!(object = object.name(), %error, "still in use, removing it later");
                    left.push(object);
                }
            }
        }
        self.failed_removals += u64::from(!left.is_empty());
        self.unused = left;
    }

    fn delete_object(&self, netlink: &mut Netlink, object: &SharedObject) -> Result<(), CommitError> {
        let name = object.name();
        let mut batch = Batch::new(&self.raw);
        if object.is_set() {
            batch.delete_set(&name);
        } else {
            if let (Some(buckets), Some(Usage { bucket: bucket @ FIRST_BUCKET.., .. })) =
                (object.bucket_map(), self.objects.get(object))
            {
                batch.delete_elements(buckets.name(), &[bucket_element(*bucket, Value::None)]);
            }
            batch.flush_chain(&name);
            batch.delete_chain(&name);
        }
        netlink.commit(&batch.finish())
    }
}
