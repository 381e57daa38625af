//! Programs and libraries that every distribution has, by the names of their Debian and Ubuntu packages.
//!
//! Setup looks for the program or library, not for the package, so a machine of another distribution is ready when it has
//! them.

use std::{collections::BTreeSet, path::Path};

use anyhow::{Result, bail};

use super::level::Level;
use crate::{
    machine::{Machine, prefixed},
    process,
};

enum Probe {
    Program(&'static str),
    Library(&'static str),
    File(&'static str),
}

struct Package {
    name: &'static str,
    level: Level,
    probe: Probe,
}

const fn package(name: &'static str, level: Level, probe: Probe) -> Package {
    Package { name, level, probe }
}

/// The keys for all packages that are downloaded from Debian, also on Ubuntu.
pub(super) const DEBIAN_KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

const PACKAGES: &[Package] = &[
    package("build-essential", Level::Build, Probe::Program("cc")),
    package("pkg-config", Level::Build, Probe::Program("pkg-config")),
    package("libnftnl-dev", Level::Build, Probe::Library("libnftnl >= 1.2.0")),
    package("libmnl-dev", Level::Build, Probe::Library("libmnl")),
    package("iproute2", Level::Demo, Probe::Program("ip")),
    package("procps", Level::Demo, Probe::Program("sysctl")),
    // kube-proxy, which the tests compare weir with, runs these.
    package("iptables", Level::Test, Probe::Program("iptables-nft")),
    package("nftables", Level::Test, Probe::Program("nft")),
    package("conntrack", Level::Test, Probe::Program("conntrack")),
    // A load of the benchmark.
    package("iperf3", Level::Test, Probe::Program("iperf3")),
    package("debian-archive-keyring", Level::Test, Probe::File(DEBIAN_KEYRING)),
];

/// The package of [`DEBIAN_KEYRING`], where the file is missing.
pub(super) fn keyring() -> Option<&'static str> {
    (!Path::new(DEBIAN_KEYRING).exists()).then_some("debian-archive-keyring")
}

fn is_there(machine: &Machine, probe: &Probe) -> bool {
    match *probe {
        Probe::Program(name) => machine.find(name).is_some(),
        Probe::Library(requirement) => {
            process::read(machine.command("pkg-config").args(["--exists", requirement])).is_ok()
        }
        Probe::File(path) => Path::new(path).exists(),
    }
}

/// The packages of `level` for which `is_there` is false.
fn lacking(level: Level, is_there: impl Fn(&Probe) -> bool) -> BTreeSet<&'static str> {
    PACKAGES
        .iter()
        .filter(|package| package.level <= level && !is_there(&package.probe))
        .map(|package| package.name)
        .collect()
}

pub(super) fn missing(machine: &Machine, level: Level) -> Result<Option<String>> {
    let names = lacking(level, |probe| is_there(machine, probe));
    Ok((!names.is_empty()).then(|| names.into_iter().collect::<Vec<_>>().join(", ")))
}

pub(super) fn install(machine: &Machine, level: Level) -> Result<()> {
    let names = lacking(level, |probe| is_there(machine, probe));
    install_named(machine, &names.into_iter().collect::<Vec<_>>())
}

pub(super) fn install_named(machine: &Machine, names: &[&str]) -> Result<()> {
    let by_hand = names.join(" ");
    if machine.find("apt-get").is_none() {
        bail!("install your distribution's packages for Debian's {by_hand}, then run this again");
    }
    let Ok(root) = machine.as_root(&machine.path, "installing packages") else {
        bail!("this needs root or sudo; as root, run: apt-get install {by_hand}");
    };
    let apt = |arguments: &[&str]| {
        let mut command = prefixed(machine, &root, "apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive").args(["-q", "-y"]).args(arguments);
        command
    };
    let arguments = [&["install", "--no-install-recommends"], names].concat();
    // A container has no package lists, and old lists name versions that are gone. Fetching them takes time, so that is
    // done only after a failure.
    if process::read(&mut apt(&arguments)).is_err() {
        process::read(&mut apt(&["update"]))?;
        process::read(&mut apt(&arguments))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_needs_its_own_packages_and_those_before_it() {
        let all = |level| lacking(level, |_| false);
        assert!(all(Level::Build).contains("libnftnl-dev") && !all(Level::Build).contains("iproute2"));
        assert!(all(Level::Demo).is_superset(&all(Level::Build)) && all(Level::Demo).contains("iproute2"));
        assert!(all(Level::Test).is_superset(&all(Level::Demo)) && all(Level::Test).contains("conntrack"));
    }

    #[test]
    fn packages_whose_programs_exist_are_not_needed() {
        let names = lacking(Level::Test, |probe| !matches!(probe, Probe::Library("libmnl")));
        assert_eq!(names.into_iter().collect::<Vec<_>>(), ["libmnl-dev"]);
        assert_eq!(lacking(Level::Check, |_| true).len(), 0);
    }
}
