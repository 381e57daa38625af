//! The nftables plane: tables `ip weir` and `ip6 weir`, which weir changes element by element over netlink.
//!
//! In: [`Delta`]s. Out: netlink transactions. README.md beside this file draws the chains and lists the names on which
//! other programs may rely.
//!
//! ```text
//! Delta ─▶ elements (of a PortPlan) ─▶ transaction ─▶ kernel_state (less what exists) ─▶ libnftnl ─▶ socket ─▶ kernel
//!             schema, shared_chains ─▶ table ◀─ base_chains           kernel_state, dump ◀─ queries ◀──────┘
//! ```

use std::{collections::HashSet, io};

use super::{Dataplane, Error, Shortfall, Standing, State};
use crate::{
    model::{Family, PerFamily},
    plan::{Delta, Frontend, NodePlan, PortDelta, PortId, PortPlan},
};

mod affinity_rules;
mod backend_numbers;
mod base_chains;
mod counters;
mod deferred_deletes;
mod dns_rules;
mod drop_reasons;
mod dump;
mod elements;
mod expr;
mod kernel_state;
mod matches;
mod moved;
mod queries;
mod schema;
mod shared_chains;
mod socket;
mod sources;
mod sticky;
mod table;
mod transaction;
mod userdata;
mod watch;

use socket::CommitError;
use table::{Knowledge, Table};

pub use counters::{Dropped, Drops, Strangers};
pub use moved::{Moved, MovedTables};
pub use watch::{News, Seen, Watch};

/// The nftables plane of the network namespace in which it was opened.
pub struct Nftables {
    netlink: socket::Netlink,
    tables: Vec<Table>,
    node: Option<std::sync::Arc<NodePlan>>,
}

impl Nftables {
    /// Opens the plane for these families, and reads their tables. Nothing in the kernel changes yet.
    ///
    /// # Errors
    ///
    /// When the kernel has no nf_tables, or this process may not use it.
    pub fn open(families: PerFamily<bool>) -> Result<Self, Error> {
        let mut plane = Self::unread(families)?;
        plane.reread()?;
        Ok(plane)
    }

    /// The same, and listens for changes of other programs to weir's tables, from before it reads them, so that none is
    /// missed.
    ///
    /// # Errors
    ///
    /// Also when the kernel refuses the subscription.
    pub fn open_watched(families: PerFamily<bool>) -> Result<(Self, Watch), Error> {
        let mut plane = Self::unread(families)?;
        let watch = plane.watch()?;
        plane.reread()?;
        Ok((plane, watch))
    }

    fn unread(families: PerFamily<bool>) -> Result<Self, Error> {
        let netlink =
            socket::Netlink::open().map_err(|source| io_error("opening a netlink socket", source))?;
        let families = Family::ALL.into_iter().filter(|family| *families.get(*family));
        Ok(Self { netlink, tables: families.map(Table::new).collect(), node: None })
    }

    /// Opens a socket that reads the counters.
    ///
    /// # Errors
    ///
    /// When that socket cannot be opened.
    pub fn drops(&self) -> Result<Drops, Error> {
        let families = self.tables.iter().map(|table| table.family);
        Drops::open(families).map_err(|source| io_error("opening a netlink socket", source))
    }

    /// Removes the tables of moved sockets, which an earlier agent may have left.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn remove_moved(&mut self) -> Result<(), Error> {
        let families: Vec<Family> = self.tables.iter().map(|table| table.family).collect();
        let removed =
            families.into_iter().try_for_each(|family| moved::replace(&mut self.netlink, family, &[]));
        removed.map_err(|error| io_error("removing the table of moved sockets", error.into()))
    }

    /// Listens for changes of other programs to weir's tables.
    ///
    /// # Errors
    ///
    /// When the kernel refuses the subscription.
    pub fn watch(&self) -> Result<Watch, Error> {
        Watch::open(self.netlink.port()).map_err(|source| io_error("listening for rule set changes", source))
    }
}

fn io_error(context: &str, source: io::Error) -> Error {
    Error::Io { context: context.to_owned(), source }
}

/// Applies `delta` to one family, and names the service ports that the kernel refuses.
fn apply_family(
    netlink: &mut socket::Netlink,
    table: &mut Table,
    delta: &Delta,
    node: &NodePlan,
) -> Result<Vec<(PortId, String)>, Error> {
    if table.is_beyond_repair() {
        return rebuild(netlink, table, delta, node);
    }
    let refused = write(netlink, table, delta, node)?;
    if delta.complete && std::mem::take(&mut table.has_stand_in) {
        let removed = Table::stand_in(table.family).remove(netlink);
        removed.map_err(|error| problem("removing the stand-in", table, error))?;
    }
    Ok(refused)
}

/// Builds the table anew while a second one with the same content serves.
fn rebuild(
    netlink: &mut socket::Netlink,
    table: &mut Table,
    delta: &Delta,
    node: &NodePlan,
) -> Result<Vec<(PortId, String)>, Error> {
    let family = table.family;
    tracing::warn!(%family, "the table has another shape than this version needs, building it anew");
    let mut stand_in = Table::stand_in(family);
    stand_in.reread(netlink).map_err(|error| problem("reading the stand-in", table, error))?;
    if stand_in.is_beyond_repair() {
        stand_in.start_over(netlink).map_err(|error| problem("emptying the stand-in", table, error))?;
    }
    write(netlink, &mut stand_in, delta, node)?;
    table.start_over(netlink).map_err(|error| problem("replacing", table, error))?;
    let refused = write(netlink, table, delta, node)?;
    stand_in.remove(netlink).map_err(|error| problem("removing the stand-in", table, error))?;
    Ok(refused)
}

/// Writes `delta` into one table. A ClusterIP refuses unknown ports (F4), so weir adds it after its ports and removes
/// it before them.
fn write(
    netlink: &mut socket::Netlink,
    table: &mut Table,
    delta: &Delta,
    node: &NodePlan,
) -> Result<Vec<(PortId, String)>, Error> {
    let family = table.family;
    if delta.node.is_some() || delta.complete {
        table.apply_node(netlink, node).map_err(|error| problem("writing the chains", table, error))?;
    }
    table.remove_cluster_ips(netlink, delta).map_err(|error| problem("removing ClusterIPs", table, error))?;
    let ports: Vec<&PortDelta> = delta.ports.iter().filter(|port| family_of(port) == Some(family)).collect();
    let refused = table
        .apply_ports(netlink, &ports, node)
        .map_err(|error| problem("writing the elements", table, error))?;
    table.add_cluster_ips(netlink, delta).map_err(|error| problem("writing the ClusterIPs", table, error))?;
    if delta.complete {
        table
            .remove_leftovers(netlink, node, &plans_of(&refused, &ports))
            .map_err(|error| problem("removing leftovers", table, error))?;
    }
    Ok(refused)
}

fn problem(what: &str, table: &Table, error: impl Into<CommitError>) -> Error {
    let context = describe(&format!("{what} of"), table.family);
    match error.into() {
        CommitError::Missing(_) => Error::Kernel(format!("{context}: another program removed part of it")),
        error => io_error(&context, error.into()),
    }
}

/// The plans of the refused ports.
fn plans_of<'a>(refused: &[(PortId, String)], ports: &[&'a PortDelta]) -> Vec<&'a PortPlan> {
    let refused: HashSet<&PortId> = refused.iter().map(|(id, _)| id).collect();
    let plans = ports.iter().filter_map(|port| port.after.as_deref());
    plans.filter(|plan| refused.contains(&plan.id)).collect()
}

impl Dataplane for Nftables {
    fn apply(&mut self, delta: &Delta) -> Result<(), Error> {
        if let Some(node) = &delta.node {
            self.node = Some(std::sync::Arc::clone(node));
        }
        let Some(node) = self.node.clone() else {
            return Err(Error::Kernel("Services were planned before the node".to_owned()));
        };
        let mut short = Shortfall::default();
        for table in &mut self.tables {
            let knowledge = if delta.complete { Knowledge::Read } else { Knowledge::Written };
            if table.knowledge != knowledge {
                continue;
            }
            match apply_family(&mut self.netlink, table, delta, &node) {
                Ok(refused) => {
                    table.knowledge = Knowledge::Written;
                    short.refused.extend(refused);
                }
                Err(error) => {
                    table.knowledge = Knowledge::Lost;
                    short.failed.push((table.family, error));
                }
            }
        }
        short.into_result()
    }

    fn reread(&mut self) -> Result<(), Error> {
        self.tables.iter_mut().try_for_each(|table| reread(table, &mut self.netlink))
    }

    fn reread_family(&mut self, family: Family) -> Result<(), Error> {
        let mut tables = self.tables.iter_mut().filter(|table| table.family == family);
        tables.try_for_each(|table| reread(table, &mut self.netlink))
    }

    fn has_read(&self, family: Family, generation: u32) -> bool {
        let table = self.tables.iter().find(|table| table.family == family);
        // The kernel continues at 0 after the largest generation.
        let is_old = |read: u32| read.wrapping_sub(generation) < u32::MAX / 2;
        table.is_none_or(|table| table.read_at.is_some_and(is_old))
    }

    fn looks_intact(&mut self, family: Family) -> bool {
        let Some(table) = self.tables.iter().find(|table| table.family == family) else { return true };
        table.looks_intact(&mut self.netlink, self.node.as_deref()).unwrap_or_else(|error| {
            tracing::debug!(%error, "cannot read the names of weir's sets and chains");
            false
        })
    }

    fn take_left_over(&mut self) -> Vec<Frontend> {
        self.tables.iter_mut().flat_map(|table| std::mem::take(&mut table.left_over)).collect()
    }

    fn standing(&self) -> Vec<Standing> {
        let mut failed_removals = PerFamily::default();
        for table in &self.tables {
            *failed_removals.get_mut(table.family) = table.failed_removals;
        }
        vec![Standing { plane: "nftables", active: true, failures: 0, failed_removals }]
    }

    fn dump(&mut self) -> Result<State, Error> {
        let mut state = State::default();
        for table in &self.tables {
            let detects = |node: &std::sync::Arc<NodePlan>| node.local_traffic.get(table.family).is_some();
            let detects_pods = self.node.as_ref().is_none_or(detects);
            dump::read(&mut self.netlink, table, detects_pods, &mut state)
                .map_err(|error| io_error("reading weir's tables", error))?;
        }
        state.cluster_ips.sort_unstable();
        Ok(state)
    }

    fn remove(&mut self) -> Result<(), Error> {
        for table in &self.tables {
            let stand_in = table.has_stand_in.then(|| Table::stand_in(table.family));
            for table in std::iter::once(table).chain(&stand_in) {
                let removed = table.remove(&mut self.netlink);
                removed.map_err(|error| io_error("removing weir's tables", error.into()))?;
            }
        }
        self.remove_moved()?;
        self.reread()
    }
}

/// Reads a table back, so that a complete delta can follow.
fn reread(table: &mut Table, netlink: &mut socket::Netlink) -> Result<(), Error> {
    let family = table.family;
    table.knowledge = Knowledge::Lost;
    let fail = |error| io_error(&describe("reading", family), error);
    // Read first, because a commit while weir reads the table must count as newer.
    let generation = netlink.generation().map_err(fail)?;
    table.reread(netlink).map_err(fail)?;
    table.read_at = Some(generation);
    table.knowledge = Knowledge::Read;
    Ok(())
}

fn describe(doing: &str, family: Family) -> String {
    let family = match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    };
    format!("{doing} table {family} weir")
}

fn family_of(port: &PortDelta) -> Option<Family> {
    port.after.as_ref().or(port.before.as_ref()).map(|plan| plan.id.family)
}
