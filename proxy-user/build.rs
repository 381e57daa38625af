//! Builds the kernel programs for the BPF target, so that the agent can carry the object inside itself.

use anyhow::Context as _;
use aya_build::{Package, Toolchain};

fn main() -> anyhow::Result<()> {
    // SAFETY: a build script has one thread at this point. Building `core` for the BPF target is an unstable cargo
    // feature; this opens it to the stable compiler, for this one invocation.
    unsafe { std::env::set_var("RUSTC_BOOTSTRAP", "1") };
    // SAFETY: as above. The progress of the inner cargo would come out as warnings of ours; the compiler's
    // warnings about the programs still do.
    unsafe { std::env::set_var("CARGO_TERM_QUIET", "true") };
    // aya-build watches the programs themselves; their dependencies and profile are the workspace's.
    println!("cargo:rerun-if-changed=../Cargo.lock");
    println!("cargo:rerun-if-changed=../Cargo.toml");
    let toolchain = std::env::var("RUSTUP_TOOLCHAIN").unwrap_or_else(|_| "stable".to_owned());
    aya_build::build_ebpf(
        [Package { name: "proxy-ebpf", root_dir: "../proxy-ebpf", ..Default::default() }],
        Toolchain::Custom(&toolchain),
    )
    .context("building the kernel programs; `cargo xtask setup` installs what this needs")
}
