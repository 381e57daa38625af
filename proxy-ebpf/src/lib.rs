//! Shared by the kernel programs and the agent.
//!
//! Keys and values of the maps, with their sizes asserted, and the arithmetic that must be the same on both
//! sides. Addresses and ports are the big-endian bytes of the wire, so each is converted once. IPv4 addresses
//! have their IPv4-mapped form, so that both families, and IPv6 sockets that speak IPv4, use the same maps.
//!
//! Maps of Services. The agent writes them, except where it says "programs".
//!
//! ```text
//! frontends    address:port/protocol → service port, and a column of its record
//! ports        service port → record: one store switches a service port with all its frontends
//! records      record → slots of the backend sets, affinity, and the outcome for each class of clients
//! slots        slot → backend; every backend set has a range of its own
//! members      backend set and backend → since when; for sets of UDP and sticky ports
//! affinities   client and service port → backend, and when it was last chosen; programs
//! tallies      service port → flows translated and refused; programs
//! ```
//!
//! Maps of sockets and of everything else that does not depend on Services. The programs write them, except where it says
//! "agent".
//!
//! ```text
//! seats        index of a socket's cookie → the Service that a connected socket asked for, and its backend
//! origins      socket → the same, for connected sockets whose entry in seats is occupied
//! flows        socket → the same for each Service that an unconnected socket sends to, at most 4
//! crowds       socket → 64 more of these
//! made         index of a cookie → the last socket with this index that a process made
//! accounts     group of processes → how much it has of the room that all groups share
//! bound        socket → whether homes counts it
//! homes        index of a network namespace → how many of its sockets are bound to a Service's address
//! early_homes  the same index → whether such sockets were bound before weir knew the Service; agent
//! bypassed     cgroup → its sockets are left alone; agent
//! settings     PLANE → host namespace, layout, cgroup; PODS → number of bypassed cgroups; agent
//! troubles     kind of failure → how often a program met it
//! ```

#![no_std]

#[cfg(test)]
extern crate std;

pub mod account;
mod layout;
#[cfg(not(target_arch = "bpf"))]
mod pod;
mod select;

pub use layout::*;
pub use select::select;

/// Version of the layout of the maps of Services: `frontends`, `ports`, `tallies`, `records`, `slots`,
/// `members` and `affinities`. weir never reads pinned maps of another version.
pub const SERVICES_VERSION: u32 = 5;

/// Version of the layout of all other maps. They store sockets and no Services, so an agent with another
/// [`SERVICES_VERSION`] continues with them. The agent counts the entries of `affinities` in `accounts` anew
/// every few seconds.
pub const SOCKETS_VERSION: u32 = 5;
