//! What the kernel programs and the agent share.
//!
//! Keys and values of the maps, with their sizes asserted, and the arithmetic that must be the same on both sides.
//! Addresses and ports are held as the big-endian bytes of the wire, so nobody swaps them twice; IPv4 addresses stand in
//! their IPv4-mapped form, so that both families, and IPv6 sockets that speak IPv4, go through the same maps.
//!
//! ```text
//! frontends  address:port/protocol → number of the service port, and which column of its record
//! ports      number → record: one store switches a service port with all its frontends
//! records    number → slots of the backend sets, affinity, and what happens to whom
//! slots      number → backend; every backend set has a range of its own
//! members    backend set and backend → since when; only for sets somebody has to remember backends of
//! affinities client and service port → backend and when it was last chosen
//! tallies    service port → what was done
//! origins    socket → which Service address it asked for and which backend it got (connected sockets)
//! flows      socket → the same for each Service an unconnected socket sent to; crowds: for more than a few
//! made       place of a cookie → the socket that a process made last there
//! accounts   group of processes → how much of what all share it has
//! bypassed   cgroup → not to be touched
//! homes      place of a network namespace → how many sockets in it are bound to a Service's address, which are in bound
//! early_homes the same place → whether the agent found such sockets, bound before weir knew the Service
//! ```

#![no_std]

#[cfg(not(target_arch = "bpf"))]
extern crate std;

pub mod account;
mod layout;
mod select;
#[cfg(not(target_arch = "bpf"))]
pub mod system;

pub use layout::*;
pub use select::select;

/// Version of the layout of the maps of Services: `frontends`, `ports`, `tallies`, `records`, `slots`, `members` and
/// `affinities`. Pinned maps of another version are never read as if they were this one.
pub const SERVICES_VERSION: u32 = 5;

/// Version of the layout of all other maps, which remember sockets and know nothing of Services: an agent whose maps of
/// Services are laid out anew goes on with these. What `accounts` says of `affinities` is counted anew every few seconds.
pub const SOCKETS_VERSION: u32 = 5;
