//! Packages of a Debian release, downloaded and unpacked without installing them.
//!
//! apt gets a source list, package lists and a status file of its own. So the system's configuration and packages stay as
//! they are, no root is needed, no daemon starts, and packages of one release can be unpacked on another.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use super::system::DEBIAN_KEYRING;
use crate::{architecture::Architecture, machine::Machine, process};

/// The directory below a root with a list of files for each package, `PACKAGE.list` or `PACKAGE:ARCHITECTURE.list`.
pub(crate) const FILE_LISTS: &str = "var/lib/dpkg/info";

/// A suite of the Debian archive, such as `trixie-backports`.
pub(super) struct Suite<'a> {
    machine: &'a Machine,
    name: &'a str,
    /// `None` for this machine's.
    architecture: Option<Architecture>,
    state: tempfile::TempDir,
}

impl<'a> Suite<'a> {
    /// Fetches the suite's package lists.
    pub(super) fn open(machine: &'a Machine, name: &'a str) -> Result<Self> {
        Self::of(machine, name, None)
    }

    /// Fetches the suite's package lists for another architecture.
    pub(super) fn open_for(machine: &'a Machine, name: &'a str, architecture: Architecture) -> Result<Self> {
        Self::of(machine, name, Some(architecture))
    }

    fn of(machine: &'a Machine, name: &'a str, architecture: Option<Architecture>) -> Result<Self> {
        if machine.find("apt-get").is_none() || machine.find("dpkg").is_none() {
            bail!("apt-get and dpkg are missing, which download and unpack packages of Debian {name}");
        }
        if !Path::new(DEBIAN_KEYRING).exists() {
            bail!("{DEBIAN_KEYRING} is missing; install the package debian-archive-keyring");
        }
        let suite = Self { machine, name, architecture, state: tempfile::tempdir()? };
        for directory in ["lists/partial", "cache/archives/partial", "download"] {
            fs::create_dir_all(suite.state.path().join(directory))?;
        }
        fs::write(suite.state.path().join("status"), "")?;
        let line = format!("deb [signed-by={DEBIAN_KEYRING}] {} {name} main\n", mirror(machine)?);
        fs::write(suite.state.path().join("sources.list"), line)?;
        process::read(suite.apt("apt-get").args(["-q", "update"]))?;
        Ok(suite)
    }

    fn apt(&self, program: &str) -> Command {
        let state = self.state.path().display();
        let mut command = self.machine.command(program);
        command.current_dir(self.state.path().join("download"));
        for option in [
            format!("Dir::Etc::SourceList={state}/sources.list"),
            "Dir::Etc::SourceParts=-".to_owned(),
            "Dir::Etc::Preferences=-".to_owned(),
            "Dir::Etc::PreferencesParts=-".to_owned(),
            format!("Dir::State={state}"),
            format!("Dir::State::Lists={state}/lists"),
            format!("Dir::State::Status={state}/status"),
            format!("Dir::Cache={state}/cache"),
            "Debug::NoLocking=1".to_owned(),
            "APT::Sandbox::User=".to_owned(),
            "APT::Install-Recommends=0".to_owned(),
            "Acquire::Languages=none".to_owned(),
        ] {
            command.args(["-o", &option]);
        }
        if let Some(architecture) = self.architecture {
            command.args(["-o", &format!("APT::Architecture={architecture}")]);
            command.args(["-o", &format!("APT::Architectures={architecture}")]);
        }
        command
    }

    /// The newest version of `package` that starts with `prefix`.
    pub(super) fn version(&self, package: &str, prefix: &str) -> Result<String> {
        let madison = process::read(self.apt("apt-cache").args(["madison", package]))?;
        first_version(&madison, prefix).with_context(|| {
            format!("Debian {} has no {package} of version {prefix}*:\n{madison}", self.name)
        })
    }

    /// Unpacks exactly these packages (`name` or `name=version`) into `target`.
    pub(super) fn unpack(&self, packages: &[&str], target: &Path) -> Result<()> {
        process::read(self.apt("apt-get").args(["-q", "download"]).args(packages))?;
        self.unpack_all("download", target)
    }

    /// Unpacks these packages and everything they depend on, the C library included, into `target`.
    pub(super) fn unpack_with_dependencies(&self, packages: &[&str], target: &Path) -> Result<()> {
        process::read(self.apt("apt-get").args(["-q", "-y", "--download-only", "install"]).args(packages))?;
        self.unpack_all("cache/archives", target)
    }

    fn unpack_all(&self, directory: &str, target: &Path) -> Result<()> {
        fs::create_dir_all(target)?;
        for file in files(&self.state.path().join(directory))? {
            if file.extension().is_some_and(|extension| extension == "deb") {
                self.unpack_one(&file, target)?;
            }
        }
        Ok(())
    }

    /// Unpacks `file`, and writes the list of its files where dpkg writes those of installed packages.
    fn unpack_one(&self, file: &Path, target: &Path) -> Result<()> {
        let output = process::read(self.machine.command("dpkg").arg("--vextract").arg(file).arg(target))?;
        let name = file.file_name().and_then(|name| name.to_str()).context("a package has a name")?;
        let lists = target.join(FILE_LISTS);
        fs::create_dir_all(&lists)?;
        let list =
            output.lines().map(|line| line.trim_start_matches('.').to_owned() + "\n").collect::<String>();
        let package = name.split('_').next().unwrap_or(name);
        fs::write(lists.join(format!("{package}.list")), list)?;
        Ok(())
    }
}

fn files(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(directory)?.map(|entry| Ok(entry?.path()));
    entries.collect::<Result<Vec<_>>>()
}

/// The variable that names a Debian mirror where the machine's own packages are not Debian's.
const MIRROR: &str = "WEIR_DEBIAN_MIRROR";

/// The address of Debian's packages: the variable's, else that of this machine's own packages.
fn mirror(machine: &Machine) -> Result<String> {
    if let Some(named) = std::env::var(MIRROR).ok().filter(|named| !named.is_empty()) {
        return Ok(named);
    }
    let format = "$(LABEL) $(REPO_URI)";
    let targets = ["indextargets", "--format", format, "Created-By: Packages"];
    let targets = process::read(machine.command("apt-get").args(targets));
    targets.ok().and_then(|targets| debian_mirror(&targets)).with_context(|| {
        format!("this machine's packages are not Debian's: set {MIRROR} to the address of a Debian mirror")
    })
}

fn debian_mirror(targets: &str) -> Option<String> {
    targets
        .lines()
        .find_map(|line| line.strip_prefix("Debian "))
        .filter(|uri| uri.contains("://"))
        .map(str::to_owned)
}

fn first_version(madison: &str, prefix: &str) -> Option<String> {
    madison
        .lines()
        .filter_map(|line| line.split('|').nth(1))
        .map(str::trim)
        .find(|version| version.starts_with(prefix))
        .map(str::to_owned)
}

/// Has `fill` write a directory, which becomes `target` only when it is complete.
pub(super) fn whole(target: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let parent = target.parent().context("a directory to fill has a parent")?;
    fs::create_dir_all(parent).with_context(|| format!("making {}", parent.display()))?;
    let draft = tempfile::Builder::new().prefix(".new-").tempdir_in(parent)?;
    fill(draft.path())?;
    if target.exists() {
        fs::remove_dir_all(target)?;
    }
    fs::rename(draft.path(), target).with_context(|| format!("moving into {}", target.display()))?;
    // A temporary directory is private, and other users read this one.
    fs::set_permissions(target, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machines_own_debian_mirror_is_used_and_no_other_repository() {
        let targets = "Debian-Security http://mirror/debian-security/\nNode https://node/\nDebian http://mirror/debian/\n";
        assert_eq!(debian_mirror(targets).as_deref(), Some("http://mirror/debian/"));
        assert_eq!(debian_mirror("Ubuntu http://mirror/ubuntu/\n"), None);
    }

    #[test]
    fn a_version_is_picked_by_its_beginning() {
        let madison = " rust-src | 1.96.1+dfsg1-2~bpo13+1 | http://m trixie-backports/main amd64 Packages\n\
                        rust-src | 1.95.0+dfsg1-2~bpo13+1 | http://m trixie-backports/main amd64 Packages\n";
        assert_eq!(first_version(madison, "1.95.0+").as_deref(), Some("1.95.0+dfsg1-2~bpo13+1"));
        assert_eq!(first_version(madison, "1.9.0+"), None);
    }

    #[test]
    fn a_directory_appears_complete_or_not_at_all() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("cache/thing");
        whole(&target, |draft| {
            fs::write(draft.join("half"), "")?;
            bail!("the network went away")
        })
        .unwrap_err();
        assert_eq!(files(&directory.path().join("cache")).unwrap(), Vec::<PathBuf>::new());
        whole(&target, |draft| Ok(fs::write(draft.join("all"), "1")?)).unwrap();
        whole(&target, |draft| Ok(fs::write(draft.join("all"), "2")?)).unwrap();
        assert_eq!(fs::read_to_string(target.join("all")).unwrap(), "2");
        assert_eq!(files(&directory.path().join("cache")).unwrap(), [target]);
    }
}
