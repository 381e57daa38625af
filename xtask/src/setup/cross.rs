//! A C compiler, libraries and Rust's standard library, to build weir for another architecture than this machine's.
//!
//! The compiler is installed as a package. The libraries are unpacked into the cache. They are of the Debian release of
//! the Dockerfile, so that the program needs the same C library wherever it is linked.

use std::path::PathBuf;

use anyhow::Result;

use super::{
    archive, compiler,
    level::Level,
    steps::{install, run},
    system,
};
use crate::{architecture::Architecture, machine::Machine};

const RELEASE: &str = "bookworm";

/// The parts that [`cross`] installed.
pub(crate) struct Cross {
    /// The directory that has the libraries, as `/` has those of this machine.
    pub(crate) sysroot: PathBuf,
    /// Whether the standard library has to be built too, because rustup cannot reach its server.
    pub(crate) standard_library: bool,
}

/// Makes this machine ready to build for `architecture`.
///
/// # Errors
///
/// When a part is missing and cannot be installed.
pub(crate) fn cross(machine: &Machine, architecture: Architecture) -> Result<Cross> {
    run(machine, Level::Build)?;
    packages(machine, architecture)?;
    let sysroot = machine.cache.join(format!("sysroot-{RELEASE}-{architecture}"));
    if !sysroot.exists() {
        install(&format!("libraries of Debian {RELEASE} for {architecture}"), || {
            archive::whole(&sysroot, |draft| {
                let suite = archive::Suite::open_for(machine, RELEASE, architecture)?;
                suite.unpack_with_dependencies(&["libc6-dev", "libmnl-dev", "libnftnl-dev"], draft)
            })
        })?;
    }
    let standard_library = !standard_library(machine, architecture.target())?;
    Ok(Cross { sysroot, standard_library })
}

fn packages(machine: &Machine, architecture: Architecture) -> Result<()> {
    let triple = architecture.triple();
    let compiler = format!("gcc-{}", triple.replace('_', "-"));
    let mut names = Vec::new();
    if machine.find(&format!("{triple}-gcc")).is_none() {
        names.push(&*compiler);
    }
    names.extend(system::keyring());
    if names.is_empty() {
        return Ok(());
    }
    install(&names.join(", "), || system::install_named(machine, &names))
}

/// Whether there is a standard library for `target`, after rustup tried to install it.
fn standard_library(machine: &Machine, target: &str) -> Result<bool> {
    if compiler::has_standard_library(machine, target)? {
        return Ok(true);
    }
    let what = format!("Rust's standard library for {target}");
    if let Err(error) = install(&what, || compiler::install_standard_library(machine, target)) {
        println!("{error:#}\nso cargo builds it from its source");
    }
    compiler::has_standard_library(machine, target)
}
