//! The socket plane: eBPF programs at cgroups translate Services where a socket connects or sends.
//!
//! In: [`Delta`]s. Out: maps that the programs of `proxy-ebpf` read.
//!
//! ```text
//! Delta ─▶ allocate (indices, records, slots) ─▶ write (element: keys and values) ─▶ loader (maps, programs, links)
//!              ▲                                                                         │
//!              └── kernel_state (what an earlier agent wrote) ◀──────────────────────────┘
//! ```
//! The order of writes lets a program that runs at any time see the old backends or the new ones: members, fresh slots and
//! a fresh record; then one store into `ports` switches the service port with all its frontends; then new frontends are
//! inserted; then old frontends and members are deleted. The old slots, the old record, and the index of a deleted port
//! rest before another port gets them.

#![forbid(unsafe_code)]

use std::{net::UdpSocket, sync::Arc, time::Instant};

use proxy_ebpf::{SERVICES_VERSION, Settings};

use super::{Dataplane, Error, Fill, Shortfall, State, is_for_sockets};
use crate::{
    plan::{Delta, NodePlan},
    sys::bpf,
};

mod addresses;
mod allocate;
mod clients;
mod columns;
mod conflicts;
mod counters;
mod dump;
mod element;
mod files;
#[cfg(test)]
mod fixture;
mod generations;
mod kernel_state;
mod leftover;
mod links;
mod loader;
mod maps;
mod place;
mod problem;
mod ranges;
mod repin;
mod sizes;
mod trace_log;
mod usage;
mod write;

pub use clients::forget_clients;
pub use conflicts::{Conflict, check_conflicts};
pub use counters::Counters;
pub use files::Interrupt;
pub use leftover::LeftoverPlane;
pub use links::Links;
pub use maps::Fault;
pub use place::Place;
pub use problem::Problem;
pub use repin::repin;
pub use usage::{Usage, usage};

/// The name of the mode in which this plane serves, as `/proxyMode` answers it.
pub const MODE: &str = "ebpf";

/// The kernel programs and their maps, an ELF object for `aya`, aligned as its reader wants it.
pub static PROGRAMS: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/weir-programs"));

/// The socket plane.
pub struct Ebpf {
    loader: loader::Loader,
    allocations: allocate::Allocations,
    addresses: addresses::AddressEntries,
    node: Option<Arc<NodePlan>>,
    used: Used,
    port_indices: counters::PortIndices,
}

/// The numbers of entries of the hash maps, which the kernel does not report, and of sticky service ports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Used {
    frontends: u32,
    members: u32,
    sticky: u32,
}

impl Ebpf {
    /// Loads the programs, with the pinned maps or with new ones. Attaches nothing before the first complete
    /// delta is in the maps. `set_retval` says whether this kernel has `bpf_set_retval`.
    ///
    /// # Errors
    ///
    /// When the kernel refuses the programs, or when `place` cannot be used.
    pub fn open(place: Place, set_retval: bool) -> Result<Self, Problem> {
        Self::open_with(place, set_retval, files::Files::default())
    }

    /// The same, but calls `interrupt` before each operation on a name in the BPF file system, for tests.
    ///
    /// # Errors
    ///
    /// As in [`Ebpf::open`].
    pub fn open_interrupted(place: Place, set_retval: bool, interrupt: Interrupt) -> Result<Self, Problem> {
        Self::open_with(place, set_retval, files::Files::interrupted_by(interrupt))
    }

    fn open_with(place: Place, set_retval: bool, files: files::Files) -> Result<Self, Problem> {
        let mut loader = loader::Loader::open(place, set_retval, files)?;
        let known = loader.settings()?;
        loader.set_settings(Settings { host: host_namespace(), layout: SERVICES_VERSION, ..known })?;
        let mut plane = Self {
            loader,
            allocations: allocate::Allocations::default(),
            addresses: addresses::AddressEntries::default(),
            node: None,
            used: Used::default(),
            port_indices: counters::PortIndices::default(),
        };
        plane.read()?;
        Ok(plane)
    }

    fn read(&mut self) -> Result<(), Problem> {
        // Entries that running programs may read must rest until these have ended.
        let rested = allocate::wait_for_programs();
        let state = kernel_state::KernelState::read(&self.loader.maps)?;
        let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        self.used =
            Used { frontends: count(state.frontends.len()), members: count(state.members.len()), sticky: 0 };
        self.allocations = allocate::Allocations::of(state, Instant::now(), rested);
        self.addresses = addresses::AddressEntries::default();
        self.port_indices.clear();
        Ok(())
    }

    /// The links of the programs, for the thread that repairs them.
    #[must_use]
    pub fn links(&self) -> Links {
        self.loader.links()
    }

    /// A handle that reads the counters while the plane works.
    #[must_use]
    pub fn counters(&self) -> Counters {
        Counters::new(self.port_indices.clone(), self.loader.place().services().join("tallies"))
    }
}

/// The cookie of the agent's network namespace, which is the host's; 0 if the kernel does not return it,
/// which means the initial namespace.
fn host_namespace() -> u64 {
    let cookie = UdpSocket::bind("127.0.0.1:0").and_then(bpf::namespace_cookie);
    cookie.unwrap_or_else(|error| {
        tracing::debug!(%error, "using the initial network namespace as the host's");
        0
    })
}

impl Dataplane for Ebpf {
    fn apply(&mut self, delta: &Delta) -> Result<(), Error> {
        if let Some(node) = &delta.node {
            self.node = Some(Arc::clone(node));
        }
        let Some(node) = self.node.clone() else {
            return Err(Error::Kernel(
                "the delta contains service ports, but no node plan came before".to_owned(),
            ));
        };
        let now = Instant::now();
        self.addresses.expect(&node, &delta.cluster_ips, delta.complete);
        let allocations = &mut self.allocations;
        let mut updates: Vec<allocate::PortUpdate> = delta
            .ports
            .iter()
            .filter(|port| port.id().is_some_and(|id| is_for_sockets(id.protocol)))
            .filter_map(|port| allocations.allocate(port, now))
            .collect();
        self.add_values(&mut updates, now)?;
        self.make_room(&updates, delta);
        let left = self.write(&updates, delta, now)?;
        for update in &updates {
            let placement = self.allocations.placements.get(&update.id);
            self.port_indices.set(&update.id, placement.map(|placement| placement.port));
        }
        if delta.complete {
            self.remove_unclaimed(now)?;
            if !self.loader.is_attached() {
                self.loader.attach()?;
            }
        }
        self.addresses.check_moved()?;
        Shortfall { left, ..Shortfall::default() }.into_result()
    }

    fn reread(&mut self) -> Result<(), Error> {
        Ok(self.read()?)
    }

    fn step_aside(&mut self) -> Result<(), Error> {
        Ok(self.loader.step_aside()?)
    }

    fn fill(&self) -> Vec<Fill> {
        let sizes = &self.loader.sizes;
        let fill = |map, elements, room| Fill { map, elements, room };
        vec![
            fill("frontends", self.used.frontends, sizes.frontends),
            fill("records", self.allocations.records.end(), sizes.records),
            fill("slots", self.allocations.slots.end(), sizes.slots),
            fill("members", self.used.members, sizes.members),
            fill("tallies", self.allocations.ports.end(), sizes.ports),
        ]
    }

    fn dump(&mut self) -> Result<State, Error> {
        Ok(dump::read(&self.loader.maps)?)
    }

    fn remove(&mut self) -> Result<(), Error> {
        self.loader.clear().map_err(|source| Error::Io {
            context: "removing the kernel programs and maps".to_owned(),
            source,
        })
    }
}

impl Ebpf {
    /// Makes some writes to maps fail, for tests.
    pub fn fail_writes(&mut self, fault: Option<Fault>) {
        self.loader.maps.fail(fault);
    }

    /// The counts of all [`proxy_ebpf::trouble`]s.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn troubles(&self) -> Result<Vec<u64>, Problem> {
        (0..proxy_ebpf::trouble::COUNT).map(|trouble| self.loader.maps.trouble(trouble)).collect()
    }
}
