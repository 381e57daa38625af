//! What the kernel programs and the agent share.
//!
//! Keys and values of the maps, with their sizes asserted, and the arithmetic that must be the same on both sides.
//! Addresses and ports are held as the big-endian bytes of the wire, so nobody swaps them twice; IPv4 addresses stand in
//! their IPv4-mapped form, so that both families, and IPv6 sockets that speak IPv4, go through the same maps.
//!
//! Maps of Services, which the agent writes:
//!
//! ```text
//! frontends    address:port/protocol → number of the service port, and which column of its record
//! ports        number → record: one store switches a service port with all its frontends
//! records      number → slots of the backend sets, affinity, and the outcome for each class of clients
//! slots        number → backend; every backend set has a range of its own
//! members      backend set and backend → since when; for sets of UDP and sticky ports
//! affinities   client and service port → backend, and when it was last chosen; the programs write it
//! tallies      number → connections led and refused; the programs write it
//! ```
//!
//! Maps of sockets and of everything else, which know nothing of Services:
//!
//! ```text
//! seats        place of a socket's cookie → the Service address that a connected socket asked for, and its backend
//! origins      socket → the same, for connected sockets whose place in seats is taken
//! flows        socket → the same for each Service that an unconnected socket sends to, at most 4
//! crowds       socket → 64 more of these
//! made         place of a cookie → the socket that a process made last there
//! accounts     group of processes → how much it has of the room that all groups share
//! bound        socket → that homes counts it
//! homes        place of a network namespace → how many of its sockets are bound to a Service's address
//! early_homes  the same place → whether such sockets were bound before weir knew the Service; the agent writes it
//! bypassed     cgroup → its sockets are left alone; the agent writes it
//! settings     PLANE → host namespace, layout, cgroup; PODS → how many cgroups are bypassed; the agent writes it
//! troubles     kind → how often a program could not do something
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

/// Version of the layout of the maps of Services: `frontends`, `ports`, `tallies`, `records`, `slots`, `members` and
/// `affinities`. Pinned maps of another version are never read as if they were this one.
pub const SERVICES_VERSION: u32 = 5;

/// Version of the layout of all other maps, which remember sockets and know nothing of Services: an agent whose maps of
/// Services are laid out anew goes on with these. What `accounts` says of `affinities` is counted anew every few seconds.
pub const SOCKETS_VERSION: u32 = 5;
