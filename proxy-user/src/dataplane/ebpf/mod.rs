//! The eBPF data plane: Services are resolved where a socket connects or sends.
//!
//! In: [`Delta`]s. Out: maps that the programs of `proxy-ebpf` read.
//!
//! ```text
//! Delta ─▶ stage (numbers, slots: who gets what) ─▶ write (element: keys and values) ─▶ object (maps, programs, links)
//!                    ▲ found (what whoever ran before left)                                       │
//!                    └────────────────────────────────────────────────────────────────────────────┘
//! ```
//! A change is published in an order in which a program that looks at any time finds the old backends or the new ones:
//! members, fresh slots, a fresh record; then one store leads the port and all its frontends there; then frontends that
//! come, those that are gone, and members that are gone. The old slots, the old record, and the number of a port that is
//! gone rest before others get them.

#![forbid(unsafe_code)]

use std::{collections::BTreeMap, net::UdpSocket, sync::Arc, time::Instant};

use proxy_ebpf::{SERVICES_VERSION, Settings};

use super::{Dataplane, Error, Fill, Shortfall, State};
use crate::{
    plan::{Delta, NodePlan},
    sys::bpf,
};

mod clients;
mod columns;
mod counted;
mod dump;
mod element;
mod files;
#[cfg(test)]
mod fixture;
mod found;
mod generations;
mod links;
mod maps;
mod named;
mod object;
mod place;
mod problem;
mod retired;
mod rivals;
mod said;
mod sizes;
mod slots;
mod stage;
mod usage;
mod whole;
mod write;

pub use clients::forget_clients;
pub use counted::Counted;
pub use files::Interrupt;
pub use links::Links;
pub use maps::Fault;
pub use named::name_again;
pub use place::Place;
pub use problem::Problem;
pub use retired::Retired;
pub use rivals::{Rivalry, no_rivals};
pub use usage::{Usage, usage};

/// The name of the mode in which this plane serves, as `/proxyMode` answers it.
pub const MODE: &str = "ebpf";

/// The kernel programs and their maps, an ELF object for `aya`, aligned as its reader wants it.
pub static PROGRAMS: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/weir-programs"));

/// Services at the socket.
pub struct Ebpf {
    object: object::Object,
    ground: stage::Ground,
    whole: whole::Whole,
    node: Option<Arc<NodePlan>>,
    used: Used,
    numbered: counted::Numbered,
}

/// How many elements maps hold that do not say it themselves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Used {
    frontends: u32,
    members: u32,
    sticky: u32,
}

impl Ebpf {
    /// Loads the programs with the maps that are there, or with new ones. Nothing is attached before the first complete
    /// delta is in the maps. `set_retval` tells whether this kernel has `bpf_set_retval`.
    ///
    /// # Errors
    ///
    /// When the kernel does not take the programs, or the place is not as it should be.
    pub fn open(place: Place, set_retval: bool) -> Result<Self, Problem> {
        Self::open_with(place, set_retval, files::Files::default())
    }

    /// The same, told of each operation on a name in the BPF file system before it is done, for tests.
    ///
    /// # Errors
    ///
    /// As of [`Ebpf::open`].
    pub fn open_interrupted(place: Place, set_retval: bool, interrupt: Interrupt) -> Result<Self, Problem> {
        Self::open_with(place, set_retval, files::Files::interrupted_by(interrupt))
    }

    fn open_with(place: Place, set_retval: bool, files: files::Files) -> Result<Self, Problem> {
        let mut object = object::Object::open(place, set_retval, files)?;
        let known = object.settings()?;
        object.set_settings(Settings { host: host_namespace(), layout: SERVICES_VERSION, ..known })?;
        let mut plane = Self {
            object,
            ground: stage::Ground::default(),
            whole: whole::Whole::default(),
            node: None,
            used: Used::default(),
            numbered: counted::Numbered::default(),
        };
        plane.read()?;
        Ok(plane)
    }

    fn read(&mut self) -> Result<(), Problem> {
        // What programs that run now are led to rests until they have ended.
        let rested = stage::settle();
        let found = found::Found::read(&self.object.maps)?;
        let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        self.used =
            Used { frontends: count(found.frontends.len()), members: count(found.members.len()), sticky: 0 };
        self.ground = stage::Ground::of(found, Instant::now(), rested);
        self.whole = whole::Whole::default();
        self.numbered.clear();
        Ok(())
    }

    /// The links of the programs, for what keeps them up while this works.
    #[must_use]
    pub fn links(&self) -> Links {
        self.object.links()
    }

    /// A way to read what is counted while this works.
    #[must_use]
    pub fn counted(&self) -> Counted {
        Counted::new(self.numbered.clone(), self.object.place().services().join("tallies"))
    }
}

/// The cookie of the network namespace we run in, which is the host's; 0 where the kernel does not tell, which stands
/// for the initial one.
fn host_namespace() -> u64 {
    let cookie = UdpSocket::bind("127.0.0.1:0").and_then(bpf::namespace_cookie);
    cookie.unwrap_or_else(|error| {
        tracing::debug!(%error, "taking the initial network namespace for the host's");
        0
    })
}

impl Dataplane for Ebpf {
    fn apply(&mut self, delta: &Delta) -> Result<(), Error> {
        if let Some(node) = &delta.node {
            self.node = Some(Arc::clone(node));
        }
        let Some(node) = self.node.clone() else {
            return Err(Error::Kernel("Services were planned before the node".to_owned()));
        };
        let now = Instant::now();
        self.whole.expect(&node, &delta.cluster_ips, delta.complete);
        let ground = &mut self.ground;
        let mut steps: Vec<stage::Step> = delta
            .ports
            .iter()
            .filter(|port| port.id().is_some_and(|id| element::is_for_sockets(id.protocol)))
            .filter_map(|port| ground.step(port, now))
            .collect();
        self.arrange(&mut steps, now)?;
        self.make_room(&steps, delta);
        let left = self.write(&steps, delta, now)?;
        for step in &steps {
            self.numbered.set(&step.id, self.ground.ports.get(&step.id).map(|site| site.port));
        }
        if delta.complete {
            self.remove_leftovers(now)?;
            if !self.object.is_attached() {
                self.object.attach()?;
            }
        }
        self.whole.settled()?;
        Shortfall { left, ..Shortfall::default() }.into_result()
    }

    fn reread(&mut self) -> Result<(), Error> {
        Ok(self.read()?)
    }

    fn step_aside(&mut self) -> Result<(), Error> {
        Ok(self.object.step_aside()?)
    }

    fn fill(&self) -> Vec<Fill> {
        let sizes = &self.object.sizes;
        let fill = |map, elements, room| Fill { map, elements, room };
        vec![
            fill("frontends", self.used.frontends, sizes.frontends),
            fill("records", self.ground.records.end(), sizes.records),
            fill("slots", self.ground.slots.end(), sizes.slots),
            fill("members", self.used.members, sizes.members),
            fill("tallies", self.ground.numbers.end(), sizes.ports),
        ]
    }

    fn dump(&mut self) -> Result<State, Error> {
        Ok(dump::read(&self.object.maps)?)
    }

    fn remove(&mut self) -> Result<(), Error> {
        self.object
            .clear()
            .map_err(|source| Error::Io { context: "removing the programs and maps".to_owned(), source })
    }
}

/// What happened to new flows of each service port since it got its number.
pub type Tallies = BTreeMap<crate::plan::PortId, proxy_ebpf::Tally>;

impl Ebpf {
    /// Lets some writes to maps fail, to see what becomes of the rest.
    pub fn fail_writes(&mut self, fault: Option<Fault>) {
        self.object.maps.fail(fault);
    }

    /// How often each of [`proxy_ebpf::trouble`] happened.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn troubles(&self) -> Result<Vec<u64>, Problem> {
        (0..proxy_ebpf::trouble::COUNT).map(|trouble| self.object.maps.trouble(trouble)).collect()
    }
}
