//! `cargo xtask demo`: builds weir and the demo, then hands over to the demo.

use std::ffi::OsString;

use anyhow::Result;

use crate::{
    machine::{Machine, prefixed},
    process,
    setup::{self, Level},
};

/// Runs the demo with `args`.
///
/// # Errors
///
/// When something it needs cannot be installed, nothing can be built, or the demo fails.
pub(crate) fn run(machine: &Machine, args: &[OsString]) -> Result<()> {
    let root = machine.as_root(&machine.path, "making network namespaces for the demo")?;
    setup::run(machine, Level::Demo)?;
    process::run(machine.cargo().args(["build", "--workspace", "--exclude", "xtask", "--bins"]))?;
    let built = machine.target_directory()?.join("debug");
    process::run(
        prefixed(machine, &root, built.join("weir-demo")).env("WEIR_BIN", built.join("weir")).args(args),
    )
}
