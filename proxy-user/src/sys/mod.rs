//! System calls and the C library libnftnl: all unsafe code of the agent.
//!
//! In: descriptors and plain values. Out: the kernel's answers. Each block says why it is sound; nothing here knows a Service.

#![expect(unsafe_code, reason = "system calls; each block states why it is sound")]

pub mod bpf;
pub(crate) mod descriptor;
pub(crate) mod libnftnl;
pub(crate) mod netlink;
pub(crate) mod xtables;
