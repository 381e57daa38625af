//! Versions of `nft` that must be able to list weir's tables, whatever version this machine has.
//!
//! The cache has each with the libraries that it was built for, and a script `nft` that runs it by its own dynamic
//! loader.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use super::{archive, level::Level};
use crate::machine::{Machine, is_executable};

/// Directory in the cache, and the Debian release of the program.
const READERS: [(&str, &str); 2] = [("nft-1.0", "bookworm"), ("nft-1.1", "trixie")];

/// The wrapper scripts, oldest nft first.
pub(crate) fn readers(machine: &Machine) -> [PathBuf; 2] {
    READERS.map(|(directory, _)| machine.cache.join(directory).join("nft"))
}

fn lacking(machine: &Machine) -> impl Iterator<Item = (&'static str, &'static str)> {
    let cache = machine.cache.clone();
    READERS.into_iter().filter(move |(directory, _)| !is_executable(&cache.join(directory).join("nft")))
}

pub(super) fn missing(machine: &Machine, _: Level) -> Result<Option<String>> {
    let names =
        lacking(machine).map(|(name, release)| format!("{name} (of Debian {release})")).collect::<Vec<_>>();
    Ok((!names.is_empty()).then(|| names.join(" and ")))
}

pub(super) fn install(machine: &Machine, _: Level) -> Result<()> {
    for (directory, release) in lacking(machine) {
        archive::whole(&machine.cache.join(directory), |draft| {
            let suite = archive::Suite::open(machine, release)?;
            suite.unpack_with_dependencies(&["nftables"], &draft.join("root"))?;
            let script = wrapper(&draft.join("root"))?;
            fs::write(draft.join("nft"), script)?;
            fs::set_permissions(draft.join("nft"), PermissionsExt::from_mode(0o755))?;
            Ok(())
        })?;
    }
    Ok(())
}

/// A script that runs the `nft` below `root`, a subdirectory of the script's directory, by the loader there.
fn wrapper(root: &Path) -> Result<String> {
    // Releases differ in these directories, because Debian merged /lib into /usr/lib in steps.
    let places = ["lib", "lib64", "usr/lib", "usr/lib64"];
    let loader = places
        .iter()
        .find_map(|place| {
            Some(format!("{place}/{}", entry(&root.join(place), |name| name.starts_with("ld-linux"))?))
        })
        .context("the C library's package has no loader")?;
    let libraries = ["lib", "usr/lib"]
        .iter()
        .filter_map(|place| {
            Some(format!("$root/{place}/{}", entry(&root.join(place), |name| name.contains("-linux-gnu"))?))
        })
        .collect::<Vec<_>>();
    Ok(format!(
        "#!/bin/sh\nroot=$(dirname \"$(readlink -f \"$0\")\")/root\n\
         exec \"$root/{loader}\" --library-path \"{}\" \"$root/usr/sbin/nft\" \"$@\"\n",
        libraries.join(":")
    ))
}

fn entry(directory: &Path, wanted: impl Fn(&str) -> bool) -> Option<String> {
    let names = fs::read_dir(directory).ok()?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names.filter(|name| wanted(name)).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wrapper_finds_loader_and_libraries_where_a_release_has_them() {
        for (loader, libraries) in [("lib64", vec!["lib", "usr/lib"]), ("usr/lib64", vec!["usr/lib"])] {
            let root = tempfile::tempdir().unwrap();
            for library in &libraries {
                fs::create_dir_all(root.path().join(library).join("x86_64-linux-gnu")).unwrap();
            }
            fs::create_dir_all(root.path().join(loader)).unwrap();
            fs::write(root.path().join(loader).join("ld-linux-x86-64.so.2"), "").unwrap();
            let script = wrapper(root.path()).unwrap();
            assert!(script.contains(&format!("exec \"$root/{loader}/ld-linux-x86-64.so.2\"")), "{script}");
            let path =
                libraries.iter().map(|l| format!("$root/{l}/x86_64-linux-gnu")).collect::<Vec<_>>().join(":");
            assert!(script.contains(&format!("--library-path \"{path}\"")), "{script}");
        }
        assert!(wrapper(tempfile::tempdir().unwrap().path()).is_err());
    }
}
