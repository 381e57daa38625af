//! `cargo xtask bench`: builds weir and the benchmark for release, then hands over to the benchmark.

use std::ffi::{OsStr, OsString};

use anyhow::Result;

use crate::{
    machine::{Machine, prefixed},
    process,
    setup::{self, Level},
    suites::environment,
};

/// Runs the benchmark with `args`.
///
/// # Errors
///
/// When something it needs cannot be installed, nothing can be built, or the benchmark fails.
pub(crate) fn run(machine: &Machine, args: &[OsString]) -> Result<()> {
    machine.as_root(&machine.path, "making network namespaces for the benchmark")?;
    setup::run(machine, Level::Test)?;
    process::run(machine.cargo().args([
        "build",
        "--release",
        "-p",
        "proxy-user",
        "-p",
        "weir-bench",
        "--bins",
    ]))?;
    let built = machine.target_directory()?.join("release");
    let environment = environment(machine, &built)?;
    let path = environment.iter().find(|(name, _)| *name == "PATH").map(|(_, path)| &**path);
    let root = machine.as_root(path.unwrap_or(&machine.path), "measuring")?;
    let mut bench = prefixed(machine, &root, built.join("weir-bench"));
    process::run(bench.envs(environment.iter().map(|(name, value)| (name, OsStr::new(value)))).args(args))
}
