//! The kernel programs. Built for the host too, as an empty program, so that the whole workspace builds, lints and
//! tests with one command; `proxy-user/build.rs` builds it for the kernel.
//!
//! ```text
//! connect4/6      ─┐           ┌─▶ frontends ─▶ ports ─▶ records ─▶ (affinities, members) ─▶ slots
//! sendmsg4/6      ─┴─ resolve ─┤    before: bypassed, homes, made; after: tallies
//!                              └─▶ seats, origins (connected sockets), flows, crowds (unconnected ones)
//! recvmsg4/6      ─┬─ told ◀───────┘
//! getpeername4/6  ─┘
//! post_bind4/6    ──▶ frontends, homes, bound
//! sock_create     ──▶ made: a process made this socket, so the kernel will run sock_release for it
//! sock_release    ──▶ forgets the socket in seats, origins, accounts, homes; flows, crowds and bound go with the socket
//!
//! settings holds what the programs have to know of the node; accounts counts what takes memory, and troubles what failed
//! ```

#![cfg_attr(target_arch = "bpf", no_std)]
#![cfg_attr(target_arch = "bpf", no_main)]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

#[cfg(target_arch = "bpf")]
mod programs;

#[cfg(not(target_arch = "bpf"))]
fn main() {}
