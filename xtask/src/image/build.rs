//! Builds weir as it is shipped, for this machine's architecture or another one.
//!
//! In: architectures. Out: for each the program, and the directory of the libraries that it is linked with.

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
    /// The directory that has its libraries, as `/` has those of this machine.
    pub(super) sysroot: PathBuf,
}

impl Built {
    pub(super) fn new(binary: &Path, sysroot: &Path) -> Self {
        Self { binary: binary.to_owned(), sysroot: sysroot.to_owned() }
    }
}

/// Release builds for `architectures`; none means this machine's.
///
/// # Errors
///
/// When a package for the build cannot be installed, or weir cannot be built.
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
    // With these variables, build scripts do not search this machine for the libraries. A search directory would make
    // build scripts link with the C library in it.
    for library in ["LIBMNL_LIB_DIR", "LIBNFTNL_LIB_DIR"] {
        cargo.env(library, sysroot.join("usr/lib"));
    }
    if standard_library {
        // RUSTC_BOOTSTRAP lets the stable compiler build the standard library, as for the kernel programs.
        cargo.args(["-Z", "build-std=std,panic_unwind"]).env("RUSTC_BOOTSTRAP", "1");
    }
    process::run(&mut cargo)?;
    Ok(Built::new(&machine.target_directory()?.join(target).join("release/weir"), &sysroot))
}
