//! The kernel programs. For the host this builds an empty program, so that one command builds, lints and
//! tests the whole workspace; `proxy-user/build.rs` builds it for the kernel.
//!
//! ```text
//! connect4/6      ─┐               ┌─▶ frontends ─▶ ports ─▶ records ─▶ (affinities, members) ─▶ slots
//! sendmsg4/6      ─┴─ translate ───┤    before: bypassed, homes, made; after: tallies
//!                                  └─▶ seats, origins (connected sockets), flows, crowds (unconnected sockets)
//! recvmsg4/6      ─┬─ reverse ◀────────┘
//! getpeername4/6  ─┘
//! post_bind4/6    ──▶ frontends, homes, bound
//! sock_create     ──▶ made: a process made this socket, so the kernel will run sock_release for it
//! sock_release    ──▶ removes the socket from seats, origins, accounts, homes; the kernel frees flows, crowds and bound
//!
//! every program reads settings; accounts counts entries that take memory, and troubles counts failures
//! ```

#![cfg_attr(target_arch = "bpf", no_std)]
#![cfg_attr(target_arch = "bpf", no_main)]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

#[cfg(target_arch = "bpf")]
mod programs;

#[cfg(not(target_arch = "bpf"))]
fn main() {}
