//! `weir-bench`: how fast Services are programmed and reached, weir and kube-proxy side by side.

use clap::Parser as _;

fn main() -> anyhow::Result<()> {
    weir_bench::run(&weir_bench::Options::parse())
}
