//! Sources and the linker that build the kernel programs, and cargo-deny for the checks.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use super::{archive, level::Level};
use crate::{machine::Machine, process};

/// The newest version that links with the LLVM inside rustc 1.95 (22); 0.11 needs one installed on the system.
const BPF_LINKER: &str = "0.10.3";
const CARGO_DENY: &str = "0.20.2";

fn rustlib(machine: &Machine) -> Result<PathBuf> {
    let sysroot = process::read(machine.command("rustc").args(["--print", "sysroot"]))?;
    Ok(PathBuf::from(sysroot.trim_end()).join("lib/rustlib"))
}

/// The directory for the sources of the standard library.
fn sources(machine: &Machine) -> Result<PathBuf> {
    Ok(rustlib(machine)?.join("src/rust"))
}

/// Whether the compiler has a standard library for `target`.
pub(super) fn has_standard_library(machine: &Machine, target: &str) -> Result<bool> {
    Ok(rustlib(machine)?.join(target).join("lib").exists())
}

/// Installs a standard library for `target` by rustup.
pub(super) fn install_standard_library(machine: &Machine, target: &str) -> Result<()> {
    process::read(machine.command("rustup").args(["target", "add", target]))?;
    Ok(())
}

fn rustc_version(machine: &Machine) -> Result<String> {
    let version = process::read(machine.command("rustc").arg("--version"))?;
    let release = version.split_whitespace().nth(1);
    Ok(release.with_context(|| format!("`rustc --version` printed `{}`", version.trim_end()))?.to_owned())
}

pub(super) fn missing_rust_src(machine: &Machine, _: Level) -> Result<Option<String>> {
    if sources(machine)?.join("library/core/src/lib.rs").exists() {
        return Ok(None);
    }
    Ok(Some(format!("rust-src {}", rustc_version(machine)?)))
}

/// Installs rustup's component, or Debian's package of the compiler's version where rustup cannot reach its server.
pub(super) fn install_rust_src(machine: &Machine, _: Level) -> Result<()> {
    let Err(rustup) = process::read(machine.command("rustup").args(["component", "add", "rust-src"])) else {
        return Ok(());
    };
    let source = sources(machine)?;
    rust_src_from_debian(machine, &rustc_version(machine)?, &source).with_context(|| {
        format!("rustup cannot install it ({rustup:#}), and Debian's package cannot be used")
    })
}

fn rust_src_from_debian(machine: &Machine, version: &str, target: &Path) -> Result<()> {
    let suite = archive::Suite::open(machine, "trixie-backports")?;
    let package = format!("rust-src={}", suite.version("rust-src", &format!("{version}+"))?);
    let unpacked = tempfile::tempdir()?;
    suite.unpack(&[&package], unpacked.path())?;
    fs::create_dir_all(target)?;
    let library = unpacked.path().join("usr/src").join(format!("rustc-{version}")).join("library");
    // `cp -a` keeps links. [`missing_rust_src`] finds out a copy that was interrupted, because it looks for a file of core.
    process::read(machine.command("cp").arg("-a").arg(library).arg(target))?;
    Ok(())
}

/// Whether `program --version` prints `version`.
fn has_version(mut program: Command, version: &str) -> bool {
    process::read(program.arg("--version"))
        .is_ok_and(|output| output.split_whitespace().any(|word| word == version))
}

fn cargo_install(machine: &Machine, name: &str, version: &str) -> Result<()> {
    // Without --force, cargo refuses to replace another version.
    let mut cargo = machine.cargo();
    process::read(cargo.args(["install", name, "--version", version, "--locked", "--force"]))?;
    Ok(())
}

pub(super) fn missing_bpf_linker(machine: &Machine, _: Level) -> Result<Option<String>> {
    let exists = has_version(machine.command("bpf-linker"), BPF_LINKER);
    Ok((!exists).then(|| format!("bpf-linker {BPF_LINKER} (about a minute)")))
}

pub(super) fn install_bpf_linker(machine: &Machine, _: Level) -> Result<()> {
    cargo_install(machine, "bpf-linker", BPF_LINKER)
}

pub(super) fn missing_cargo_deny(machine: &Machine, _: Level) -> Result<Option<String>> {
    let exists = has_version(machine.command("cargo-deny"), CARGO_DENY);
    Ok((!exists).then(|| format!("cargo-deny {CARGO_DENY} (about four minutes)")))
}

pub(super) fn install_cargo_deny(machine: &Machine, _: Level) -> Result<()> {
    cargo_install(machine, "cargo-deny", CARGO_DENY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_pinned_version_counts() {
        let program = |prints: &str| {
            let mut command = Command::new("sh");
            command.args(["-c", &format!("echo {prints}")]);
            command
        };
        assert!(has_version(program("bpf-linker 0.10.3"), "0.10.3"));
        assert!(!has_version(program("bpf-linker 0.10.30"), "0.10.3"));
        assert!(!has_version(program("bpf-linker 0.9.15"), "0.10.3"));
        assert!(!has_version(Command::new("no-such-program-at-all"), "0.10.3"));
    }
}
