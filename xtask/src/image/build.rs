//! Builds weir as it is shipped, for this machine's architecture or another one.
//!
//! In: architectures. Out: for each the program and where the libraries are that it was linked with.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Result;

use crate::{
    architecture::Architecture,
    machine::Machine,
    process,
    setup::{self, Cross, Level},
};

/// A built weir.
pub(super) struct Built {
    pub(super) binary: PathBuf,
    /// Where its libraries are, below it as below `/`.
    pub(super) sysroot: PathBuf,
}

impl Built {
    pub(super) fn new(binary: &Path, sysroot: &Path) -> Self {
        Self { binary: binary.to_owned(), sysroot: sysroot.to_owned() }
    }
}

/// Release builds for `architectures`, or for this machine's when none is named.
///
/// # Errors
///
/// When something that building needs cannot be installed, or weir cannot be built.
pub(super) fn release(machine: &Machine, architectures: &[Architecture]) -> Result<Vec<Built>> {
    let own = Architecture::own();
    match architectures {
        [] => Ok(vec![native(machine)?]),
        named => named
            .iter()
            .map(|&one| {
                if own.as_ref().is_ok_and(|own| *own == one) {
                    native(machine)
                } else {
                    foreign(machine, one)
                }
            })
            .collect(),
    }
}

fn cargo(machine: &Machine) -> Command {
    let mut cargo = machine.cargo();
    cargo.args(["build", "--release", "--package", "proxy-user", "--bin", "weir"]);
    cargo
}

fn native(machine: &Machine) -> Result<Built> {
    setup::run(machine, Level::Build)?;
    process::run(&mut cargo(machine))?;
    Ok(Built::new(&machine.target_directory()?.join("release/weir"), Path::new("/")))
}

fn foreign(machine: &Machine, architecture: Architecture) -> Result<Built> {
    let Cross { sysroot, standard_library } = setup::cross(machine, architecture)?;
    let (target, triple) = (architecture.target(), architecture.triple());
    let variable = target.replace('-', "_");
    let linking = format!("CARGO_TARGET_{}", variable.to_uppercase());
    let within = format!("--sysroot={}", sysroot.display());
    let mut cargo = cargo(machine);
    cargo.args(["--target", target]);
    cargo.env(format!("{linking}_LINKER"), format!("{triple}-gcc"));
    cargo.env(format!("{linking}_RUSTFLAGS"), format!("-Clink-arg={within}"));
    cargo.env(format!("CFLAGS_{variable}"), within);
    // The linker finds them below the sysroot; named, they are not looked for among this machine's. Not by the directory
    // they are in: build scripts would be linked with the C library there.
    for library in ["LIBMNL_LIB_DIR", "LIBNFTNL_LIB_DIR"] {
        cargo.env(library, sysroot.join("usr/lib"));
    }
    if standard_library {
        // As for the kernel programs, an unstable feature of cargo is opened to the stable compiler.
        cargo.args(["-Z", "build-std=std,panic_unwind"]).env("RUSTC_BOOTSTRAP", "1");
    }
    process::run(&mut cargo)?;
    Ok(Built::new(&machine.target_directory()?.join(target).join("release/weir"), &sysroot))
}
