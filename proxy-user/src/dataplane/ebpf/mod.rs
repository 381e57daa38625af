//! The eBPF data plane.
//!
//! In: the object file with the kernel programs, which `build.rs` puts into the agent. Out: programs in the kernel.

#![forbid(unsafe_code)]

mod bypass;

pub use bypass::{Bypass, Census as BypassCensus, Error as BypassError};

/// The kernel programs and their maps, an ELF object for `aya`, aligned as its reader wants it.
pub static PROGRAMS: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/weir-programs"));
