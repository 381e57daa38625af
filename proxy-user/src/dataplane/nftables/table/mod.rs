//! One family's table: turns deltas into transactions.
//!
//! In: service ports before and after. Out: batches to the kernel. The table keeps only what no plan has: which shared
//! objects exist, how many uses each has, which bucket leads where, and what the kernel has that weir did not write.
//!
//! ```text
//! apply (ports) ─┬─ usage (shared objects)          node (base chains, this node's addresses)
//!                ├─ affinity (numbers of backends)  cluster_ips
//!                └─ refusals (bad service ports)    leftovers (at the end of a complete delta)
//! ```

use std::{collections::VecDeque, io};

use rustc_hash::{FxHashMap, FxHashSet};

use super::{
    backend_numbers::BackendNumbers,
    base_chains::{self, Needs},
    deferred_deletes::DeferredDeletes,
    kernel_state::KernelState,
    schema::{FIRST_BUCKET, Map, STAND_IN, TABLE},
    shared_chains::SharedObject,
    socket::{CommitError, Netlink},
    transaction::ElementKey,
};
use crate::sys::libnftnl::{self, Batch, Bytes, ChainSpec, Element};
use crate::{
    model::Family,
    plan::{Frontend, NodePlan},
};

mod affinity;
mod apply;
mod cluster_ips;
mod leftovers;
mod node;
mod refusals;
mod usage;

/// Slots by map and key.
type Slots = FxHashSet<ElementKey>;

/// The most elements in one transaction, because the kernel holds the lock of all nf_tables in the namespace while it
/// works on one, and other programs that change rules wait.
const ELEMENTS_A_TRANSACTION: usize = 8192;

/// A shared object in the kernel.
#[derive(Clone, Copy, Debug)]
struct Usage {
    /// How many frontends and service ports use it.
    uses: u64,
    /// How many forks lead to it, used or not.
    forks: u32,
    /// The bucket that leads to it; 0 if none does.
    bucket: u32,
}

impl Usage {
    const fn is_unused(&self) -> bool {
        self.uses == 0 && self.forks == 0
    }
}

/// The last read or write of a table, which decides which deltas weir can apply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Knowledge {
    /// The content was read back, so a complete delta comes next.
    Read,
    /// weir wrote the content, so changes come next.
    Written,
    /// Reading or writing failed, so it must be read back first.
    Lost,
}

pub(super) struct Table {
    pub(super) family: Family,
    pub(super) raw: nftnl::Table,
    objects: FxHashMap<SharedObject, Usage>,
    /// How many service ports each local backend serves.
    local_backends: FxHashMap<Bytes, u32>,
    next_bucket: u32,
    needs: Needs,
    /// How many frontends have source ranges.
    guarded: u64,
    /// Elements to delete with the next change.
    vacated: DeferredDeletes,
    /// Reusable chains that no service port uses now, the longest unused first.
    idle: VecDeque<SharedObject>,
    /// Objects to remove.
    unused: Vec<SharedObject>,
    /// UDP frontends that the kernel had and a complete delta did not name.
    pub(super) left_over: Vec<Frontend>,
    /// The number of times that the kernel refused to remove unused objects.
    pub(super) failed_removals: u64,
    numbers: BackendNumbers,
    /// The node for which the chains were written; `None` before the first write.
    written_for: Option<NodePlan>,
    /// The elements of the set of this node's addresses.
    node_ips: Vec<Element>,
    /// Kernel objects that this agent has not written: everything until a complete delta is through, then
    /// only objects of service ports that the kernel refused to change.
    kernel: KernelState,
    pub(super) knowledge: Knowledge,
    /// The generation of the rule set when the table was last read.
    pub(super) read_at: Option<u32>,
    /// Consecutive refusals of the base chains.
    node_refusals: u32,
    /// Whether the table exists that served while this one was built anew.
    pub(super) has_stand_in: bool,
}

impl Table {
    pub(super) fn new(family: Family) -> Self {
        Self::named(TABLE, family)
    }

    /// The table that serves while the other one is built anew.
    pub(super) fn stand_in(family: Family) -> Self {
        Self::named(STAND_IN, family)
    }

    fn named(name: &str, family: Family) -> Self {
        Self {
            family,
            raw: libnftnl::table(name, family),
            objects: FxHashMap::default(),
            local_backends: FxHashMap::default(),
            next_bucket: FIRST_BUCKET,
            needs: Needs::default(),
            guarded: 0,
            vacated: DeferredDeletes::default(),
            idle: VecDeque::new(),
            unused: Vec::new(),
            left_over: Vec::new(),
            failed_removals: 0,
            numbers: BackendNumbers::default(),
            written_for: None,
            node_ips: Vec::new(),
            kernel: KernelState::empty(family),
            knowledge: Knowledge::Lost,
            read_at: None,
            node_refusals: 0,
            has_stand_in: false,
        }
    }

    /// Replaces everything that is known of the table.
    fn begin_anew(&mut self, kernel: KernelState) {
        let name = self.raw.get_name().to_string_lossy();
        let next_bucket = kernel.highest_bucket().map_or(FIRST_BUCKET, |most| (most + 1).max(FIRST_BUCKET));
        *self = Self {
            next_bucket,
            needs: Needs { guards: kernel.needs_guards() },
            numbers: BackendNumbers::after(kernel.last_number().unwrap_or(0)),
            node_refusals: self.node_refusals,
            knowledge: self.knowledge,
            read_at: self.read_at,
            has_stand_in: kernel.has_stand_in,
            kernel,
            ..Self::named(&name, self.family)
        };
    }

    /// Reads the table back, and forgets what was known of it.
    ///
    /// # Errors
    ///
    /// When the table cannot be read.
    pub(super) fn reread(&mut self, netlink: &mut Netlink) -> io::Result<()> {
        let mut kernel = KernelState::read(netlink, &self.raw, self.family)?;
        // No frontend in the kernel leads to these slots any more, so only this agent can delete them.
        for map in Map::ALL.into_iter().filter(|map| map.holds_slots()) {
            let vacated = self.vacated.elements(map).into_iter().map(|element| element.key);
            let left = self.kernel.elements.remove(&map).into_iter().flatten().map(|(key, _)| key);
            kernel.add_slots(map, vacated.chain(left));
        }
        self.begin_anew(kernel);
        Ok(())
    }

    /// Whether the kernel has every set and chain that this table has written, unchanged. Elements are not compared.
    ///
    /// # Errors
    ///
    /// When the kernel does not answer.
    pub(super) fn looks_intact(&self, netlink: &mut Netlink, node: Option<&NodePlan>) -> io::Result<bool> {
        let kernel = KernelState::read_names(netlink, &self.raw, self.family)?;
        let chains = node.map(|node| base_chains::base_chains(self.family, node, self.needs));
        let exists = |object: &SharedObject| {
            let names = if object.is_set() { &kernel.sets } else { &kernel.chains };
            names.contains(&object.name())
        };
        let is_hooked = |spec: &ChainSpec| kernel.chains.contains(&spec.name) && kernel.is_hooked_as(spec);
        Ok(kernel.fits
            && Map::ALL.iter().all(|map| kernel.sets.contains(map.name()))
            && chains.iter().flatten().all(|chain| is_hooked(&chain.spec))
            && self.objects.keys().all(exists))
    }

    /// Deletes elements by key, in as many transactions as they need.
    fn delete_elements(
        &self,
        netlink: &mut Netlink,
        map: Map,
        elements: &[Element],
    ) -> Result<(), CommitError> {
        elements.chunks(ELEMENTS_A_TRANSACTION).try_for_each(|gone| {
            let mut batch = Batch::new(&self.raw);
            batch.delete_elements(map.name(), gone);
            netlink.commit(&batch.finish())
        })
    }
}

/// Replaces the rules of a chain, if they depend on the node.
fn rewrite(batch: &mut Batch<'_>, object: &SharedObject, family: Family, node: &NodePlan) {
    let rules = object.rules(family, node);
    if !rules.is_empty() {
        batch.replace_rules(&object.name(), &rules);
    }
}
