//! The kernel programs. Built for the host too, as an empty program, so that the whole workspace builds, lints and
//! tests with one command; `proxy-user/build.rs` builds it for the kernel.
//!
//! ```text
//! connect4/6      ─┐           ┌─▶ frontends ─▶ ports ─▶ records ─▶ (affinities, members) ─▶ slots
//! sendmsg4/6      ─┴─ resolve ─┘
//!                                  origins (connected sockets), flows (unconnected ones)
//! recvmsg4/6      ─┬─ told ◀────────┘
//! getpeername4/6  ─┘
//! post_bind4/6    ──▶ frontends, homes
//! sock_create     ──▶ made: this one will be released
//! sock_release    ──▶ origins, homes, accounts: forgets the socket
//! ```

#![cfg_attr(target_arch = "bpf", no_std)]
#![cfg_attr(target_arch = "bpf", no_main)]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

#[cfg(target_arch = "bpf")]
mod programs;

#[cfg(not(target_arch = "bpf"))]
fn main() {}
