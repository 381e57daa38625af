//! The nftables data plane: tables `ip weir` and `ip6 weir`, changed element by element over netlink.
//!
//! In: [`Delta`]s. Out: netlink transactions. README.md beside this file draws the chains and says what others may
//! rely on.
//!
//! ```text
//! Delta ─▶ element (PortPlan → elements) ─▶ table (uses, transactions) ─▶ netlink ─▶ socket ─▶ kernel
//!                     ruleset, object (fixed and shared objects) ┘    adopt, dump ◀──────────────┘
//! ```

use std::{collections::HashSet, io};

use super::{Dataplane, Error, Shortfall, Standing, State};
use crate::{
    model::{Family, PerFamily},
    plan::{Delta, Frontend, NodePlan, PortDelta, PortId, PortPlan},
};

mod adopt;
mod answered;
mod choice;
mod drops;
mod dump;
mod element;
mod expr;
mod moved;
mod netlink;
mod object;
mod ruleset;
mod socket;
mod sources;
mod stage;
mod sticky;
mod table;
mod vacated;
mod watch;

use table::Table;

pub use drops::{Dropped, Drops, Strangers};
pub use moved::{Moved, MovedTables};
pub use watch::{News, Seen, Watch};

/// Services in nftables.
pub struct Nftables {
    netlink: socket::Netlink,
    tables: Vec<Table>,
    node: Option<std::sync::Arc<NodePlan>>,
}

impl Nftables {
    /// Opens the data plane for the families given; the kernel is not touched yet.
    ///
    /// # Errors
    ///
    /// When the kernel has no nf_tables, or this process may not use it.
    pub fn open(families: PerFamily<bool>) -> Result<Self, Error> {
        let mut plane = Self::unread(families)?;
        plane.reread()?;
        Ok(plane)
    }

    /// The same, and listens for changes that others make to our tables: from before they are read, so that none is missed.
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

    /// Reads what is counted, on a socket of its own.
    ///
    /// # Errors
    ///
    /// When that socket cannot be opened.
    pub fn drops(&self) -> Result<Drops, Error> {
        let families = self.tables.iter().map(|table| table.family);
        Drops::open(families).map_err(|source| io_error("opening a netlink socket", source))
    }

    /// Removes what an agent left that had sockets moved.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn remove_moved(&mut self) -> Result<(), Error> {
        let families: Vec<Family> = self.tables.iter().map(|table| table.family).collect();
        let removed =
            families.into_iter().try_for_each(|family| moved::replace(&mut self.netlink, family, &[]));
        removed.map_err(|source| io_error("removing the table of moved sockets", source))
    }

    /// Listens for changes that others make to our tables.
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

/// Makes `delta` true in one family, and names the service ports that could not be programmed.
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

/// Builds the table anew while another one, of the same content, serves in its place.
fn rebuild(
    netlink: &mut socket::Netlink,
    table: &mut Table,
    delta: &Delta,
    node: &NodePlan,
) -> Result<Vec<(PortId, String)>, Error> {
    let family = table.family;
    tracing::warn!(%family, "the table is of another shape than this version needs, it is built anew");
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

/// Writes `delta` into one table. A ClusterIP refuses unknown ports (F4), so it comes after the ports it has and goes
/// before them.
fn write(
    netlink: &mut socket::Netlink,
    table: &mut Table,
    delta: &Delta,
    node: &NodePlan,
) -> Result<Vec<(PortId, String)>, Error> {
    let family = table.family;
    if delta.node.is_some() || table.found.is_some() {
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

fn problem(what: &str, table: &Table, error: io::Error) -> Error {
    let context = describe(&format!("{what} of"), table.family);
    match error.raw_os_error() {
        Some(libc::ENOENT) => Error::Kernel(format!("{context}: another program took part of it away")),
        _ => io_error(&context, error),
    }
}

/// What those ports should have been.
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
            let knowledge = if delta.complete { Knowledge::Reread } else { Knowledge::Current };
            if table.knowledge != knowledge {
                continue;
            }
            match apply_family(&mut self.netlink, table, delta, &node) {
                Ok(refused) => {
                    table.knowledge = Knowledge::Current;
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
        // Generations count on around the largest number.
        let is_old = |read: u32| read.wrapping_sub(generation) < u32::MAX / 2;
        table.is_none_or(|table| table.read_at.is_some_and(is_old))
    }

    fn looks_intact(&mut self, family: Family) -> bool {
        let Some(table) = self.tables.iter().find(|table| table.family == family) else { return true };
        table.looks_intact(&mut self.netlink, self.node.as_deref()).unwrap_or_else(|error| {
            tracing::debug!(%error, "cannot look at our table");
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
            let told = |node: &std::sync::Arc<NodePlan>| node.local_traffic.get(table.family).is_some();
            let pods_are_told = self.node.as_ref().is_none_or(told);
            dump::read(&mut self.netlink, table, pods_are_told, &mut state)
                .map_err(|error| io_error("reading our tables", error))?;
        }
        state.cluster_ips.sort_unstable();
        Ok(state)
    }

    fn remove(&mut self) -> Result<(), Error> {
        for table in &mut self.tables {
            let mut tables = vec![&mut *table];
            let mut stand_in = Table::stand_in(tables[0].family);
            if tables[0].has_stand_in {
                tables.push(&mut stand_in);
            }
            for table in tables {
                table.remove(&mut self.netlink).map_err(|error| io_error("removing our tables", error))?;
            }
        }
        self.remove_moved()?;
        self.reread()
    }
}

/// What this plane knows of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Knowledge {
    /// What it held when it was read; a complete delta comes next.
    Reread,
    /// Everything.
    Current,
    /// Nothing, because it could not be written or read.
    Lost,
}

/// Reads a table back.
fn reread(table: &mut Table, netlink: &mut socket::Netlink) -> Result<(), Error> {
    let family = table.family;
    table.knowledge = Knowledge::Lost;
    let fail = |error| io_error(&describe("reading", family), error);
    // Asked before: what is committed while the table is read comes as news.
    let generation = netlink.generation().map_err(fail)?;
    table.reread(netlink).map_err(fail)?;
    table.read_at = Some(generation);
    table.knowledge = Knowledge::Reread;
    Ok(())
}

fn describe(doing: &str, family: Family) -> String {
    format!("{doing} table {} weir", dump::nft_family(family))
}

fn family_of(port: &PortDelta) -> Option<Family> {
    port.after.as_ref().or(port.before.as_ref()).map(|plan| plan.id.family)
}
