//! Go, and programs built with it from the modules below `tests`, which pin their versions.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use super::{archive, level::Level};
use crate::{
    machine::{Machine, is_executable},
    process,
};

/// The first version of Go that fetches the toolchain that a module requires.
const GO_THAT_FETCHES: [u32; 2] = [1, 21];

/// Builds the main package `package` as `target`, in the version that the module in the directory `module` pins.
pub(super) fn build(
    machine: &Machine,
    module: &str,
    package: &str,
    target: &Path,
    flags: &str,
) -> Result<()> {
    let draft = tempfile::tempdir()?;
    let program = draft.path().join("program");
    let mut command = go_command(machine, module)?;
    command.args(["build", "-trimpath", "-ldflags", flags, "-o"]).arg(&program);
    process::read(command.arg(package))?;
    put(&program, target)
}

/// The directory with the sources of the module `path`, in the version that the module in the directory `module` pins.
pub(super) fn sources(machine: &Machine, module: &str, path: &str) -> Result<PathBuf> {
    let output = process::read(go_command(machine, module)?.args(["mod", "download", "-json", path]))?;
    let output: serde_json::Value = serde_json::from_str(&output).context("reading the output of go")?;
    Ok(output["Dir"].as_str().with_context(|| format!("go printed no directory of {path}"))?.into())
}

/// A command that runs Go in the directory `module`.
fn go_command(machine: &Machine, module: &str) -> Result<Command> {
    let directory = machine.workspace.join(module);
    let wanted = go_directive(&fs::read_to_string(directory.join("go.mod"))?)
        .with_context(|| format!("{module}/go.mod has no line with the version of Go"))?;
    let (go, version) = go(machine).context("Go is not installed")?;
    let mut command = machine.command(&go);
    command.current_dir(&directory).env("CGO_ENABLED", "0").env_remove("GOROOT");
    if version < wanted {
        command.env("GOTOOLCHAIN", "auto");
    }
    Ok(command)
}

/// Copies a program into the cache; a rename puts it there complete.
pub(super) fn put(from: &Path, to: &Path) -> Result<()> {
    let directory = to.parent().context("a cached program has a directory")?;
    fs::create_dir_all(directory)?;
    let draft = tempfile::Builder::new().prefix(".new-").tempdir_in(directory)?;
    let copy = draft.path().join("program");
    fs::copy(from, &copy).with_context(|| format!("copying {}", from.display()))?;
    fs::rename(copy, to).with_context(|| format!("moving into {}", to.display()))
}

fn cached_go(machine: &Machine) -> PathBuf {
    machine.cache.join("go-1.24")
}

/// A Go that can build the modules, or can fetch one that can, with its version.
fn go(machine: &Machine) -> Option<(PathBuf, [u32; 2])> {
    let places = machine.find("go").into_iter();
    let places =
        places.chain(["/usr/local/go/bin/go".into(), cached_go(machine).join("usr/lib/go-1.24/bin/go")]);
    places.filter(|go| is_executable(go)).find_map(|go| {
        let output =
            process::read(Command::new(&go).args(["env", "GOVERSION"]).env("GOTOOLCHAIN", "local")).ok()?;
        let version = go_version(output.trim_end().strip_prefix("go")?)?;
        (version >= GO_THAT_FETCHES).then_some((go, version))
    })
}

fn go_version(text: &str) -> Option<[u32; 2]> {
    // A release candidate has a version such as 1.27rc1.
    let mut numbers = text.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some([numbers.next()?.ok()?, numbers.next()?.ok()?])
}

fn go_directive(module: &str) -> Option<[u32; 2]> {
    go_version(module.lines().find_map(|line| line.strip_prefix("go "))?.trim())
}

/// The missing part, where this machine has no Go that can build.
pub(super) fn missing(machine: &Machine) -> Option<String> {
    let missing = "Go 1.24 (of Debian trixie, to build what tests and checks need of Kubernetes)";
    go(machine).is_none().then(|| missing.to_owned())
}

pub(super) fn install(machine: &Machine, _: Level) -> Result<()> {
    archive::whole(&cached_go(machine), |draft| {
        archive::Suite::open(machine, "trixie")?.unpack(&["golang-1.24-go", "golang-1.24-src"], draft)
    })
    .context("install Go 1.21 or newer from https://go.dev/dl/, or as your distribution has it")?;
    if go(machine).is_none() {
        bail!("the Go unpacked in {} does not run", cached_go(machine).display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn go_versions_are_read_and_compared_as_numbers() {
        assert_eq!(go_version("1.26.8"), Some([1, 26]));
        assert_eq!(go_version("1.27rc1"), Some([1, 27]));
        assert_eq!(go_version("devel"), None);
        assert!(go_version("1.9.7").unwrap() < GO_THAT_FETCHES);
        assert_eq!(go_directive("module m\n\ngo 1.26.0\n\nrequire x v1.0.0\n"), Some([1, 26]));
        assert_eq!(go_directive("module m\n"), None);
    }
}
