//! The demo's command line; `cargo xtask demo` builds and runs it.

use anyhow::Result;
use clap::Parser;
use weir_tests::{
    demo::{self, Options},
    subject::Plane,
};

/// Shows Services being balanced: two nodes, four pods and a client outside, all of network namespaces.
#[derive(Parser)]
struct Args {
    /// weir's data plane
    #[arg(long, value_enum, default_value_t = Plane::Nftables)]
    proxy_mode: Plane,
    /// Leave everything up afterwards, to play with, until interrupted
    #[arg(long)]
    keep: bool,
}

fn main() -> Result<()> {
    let Args { proxy_mode, keep } = Args::parse();
    demo::run(&Options { plane: proxy_mode, keep })
}
