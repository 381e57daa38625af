//! `cargo xtask demo`: builds weir and the demo, and runs the demo.
//!
//! In: the demo's options. Out: its output, and with `--record` the README's picture of it.

use std::fs;

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::{SigSet, Signal};

use crate::{
    machine::{Machine, prefixed},
    picture, process,
    setup::{self, Level},
};

/// The picture in the README.
const PICTURE: &str = "docs/demo.svg";
/// The exit code of a demo that Ctrl-C ended.
const INTERRUPTED: i32 = 130;

#[derive(clap::Args)]
pub(crate) struct Options {
    /// --proxy-mode of the agents
    #[arg(long, value_name = "MODE", default_value = "auto", value_parser = ["auto", "ebpf", "nftables"])]
    proxy_mode: String,
    /// Leave the cluster up until Ctrl-C
    #[arg(long)]
    keep: bool,
    /// Write the README's picture of this run to docs/demo.svg
    #[arg(long, conflicts_with = "keep")]
    record: bool,
}

/// Runs the demo.
///
/// # Errors
///
/// When something it needs cannot be installed, nothing can be built, or the demo fails.
pub(crate) fn run(machine: &Machine, options: &Options) -> Result<()> {
    let root = machine.as_root(&machine.path, "making network namespaces for the demo")?;
    setup::run(machine, Level::Demo)?;
    let build = ["build", "--workspace", "--exclude", "xtask", "--bin", "weir", "--bin", "weir-demo"];
    println!("building weir and the demo (several minutes the first time)");
    process::run(machine.cargo().args(build))?;
    let built = machine.target_directory()?.join("debug");
    let mut demo = prefixed(machine, &root, built.join("weir-demo"));
    demo.env("WEIR_BIN", built.join("weir")).arg("--proxy-mode").arg(&options.proxy_mode);
    demo.args(options.keep.then_some("--keep"));
    // Ctrl-C goes to the demo too, which removes what it made; the prompt comes back after that.
    SigSet::from(Signal::SIGINT).thread_block()?;
    if options.record {
        let mut lines = vec!["$ cargo xtask demo".to_owned()];
        let good = process::follow(&mut demo, |line| {
            println!("{line}");
            lines.push(line.to_owned());
        })?;
        ensure!(good, "the demo failed, so {PICTURE} is as it was");
        fs::write(machine.workspace.join(PICTURE), picture::svg("cargo xtask demo", &lines))
            .with_context(|| format!("writing {PICTURE}"))?;
        println!("\nwrote {PICTURE}");
        return Ok(());
    }
    let status = demo.status().with_context(|| format!("starting {}", process::describe(&demo)))?;
    match status.code() {
        Some(0) => Ok(()),
        Some(INTERRUPTED) => bail!("stopped by a signal"),
        _ => bail!("the demo failed: {status}"),
    }
}
