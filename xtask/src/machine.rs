//! This machine as the tasks need it: the workspace, the cache, programs, and the way to become root.

use std::{
    env,
    ffi::{OsStr, OsString},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

/// Directories of this machine.
#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) workspace: PathBuf,
    /// Where setup keeps what it makes: `$XDG_CACHE_HOME/weir`, else `~/.cache/weir`.
    pub(crate) cache: PathBuf,
    /// Where programs are searched: `PATH`, and the administrator's directories, which a user's `PATH` lacks on Debian.
    pub(crate) path: OsString,
}

impl Machine {
    /// Reads the environment.
    pub(crate) fn discover() -> Result<Self> {
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR"))
            .parent()
            .context("xtask is not inside a workspace")?
            .to_owned();
        let cache = cache_root(env::var_os("XDG_CACHE_HOME"), env::var_os("HOME"))?.join("weir");
        let path = env::var_os("PATH").unwrap_or_default();
        let path = env::join_paths(
            env::split_paths(&path).chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from)),
        )
        .context("PATH")?;
        Ok(Self { workspace, cache, path })
    }

    /// Where `program` is, or `None`.
    pub(crate) fn find(&self, program: &str) -> Option<PathBuf> {
        env::split_paths(&self.path)
            .filter(|directory| directory.is_absolute())
            .map(|directory| directory.join(program))
            .find(|file| is_executable(file))
    }

    /// A command that runs `program` in the workspace.
    pub(crate) fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command.current_dir(&self.workspace).env("PATH", &self.path);
        command
    }

    /// The cargo that runs this task.
    pub(crate) fn cargo(&self) -> Command {
        self.command(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
    }

    /// The words before a command that needs root: none for root, otherwise sudo with this environment and `path`.
    ///
    /// # Errors
    ///
    /// Without root and without sudo; the text names `what` needs it.
    pub(crate) fn as_root(&self, path: &OsStr, what: &str) -> Result<Vec<OsString>> {
        if nix::unistd::geteuid().is_root() {
            return Ok(Vec::new());
        }
        let Some(sudo) = self.find("sudo") else {
            bail!("{what} needs root: run this as root, or install sudo");
        };
        let mut assignment = OsString::from("PATH=");
        assignment.push(path);
        // sudo replaces PATH even with -E; env sets it again.
        Ok(vec![sudo.into(), "-E".into(), "env".into(), assignment])
    }
}

/// `command` with `prefix` before it.
pub(crate) fn prefixed(machine: &Machine, prefix: &[OsString], program: impl AsRef<OsStr>) -> Command {
    match prefix {
        [] => machine.command(program),
        [first, rest @ ..] => {
            let mut command = machine.command(first);
            command.args(rest).arg(program);
            command
        }
    }
}

fn cache_root(xdg: Option<OsString>, home: Option<OsString>) -> Result<PathBuf> {
    // The XDG specification ignores a path that is not absolute.
    xdg.map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .or_else(|| Some(PathBuf::from(home?).join(".cache")))
        .context("neither XDG_CACHE_HOME nor HOME is set, so there is no directory for what setup builds")
}

pub(crate) fn is_executable(file: &Path) -> bool {
    file.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_follows_xdg_then_home() {
        let root = |xdg: Option<&str>, home: Option<&str>| {
            cache_root(xdg.map(OsString::from), home.map(OsString::from)).ok()
        };
        assert_eq!(root(Some("/x"), Some("/h")), Some("/x".into()));
        assert_eq!(root(Some("relative"), Some("/h")), Some("/h/.cache".into()));
        assert_eq!(root(None, Some("/h")), Some("/h/.cache".into()));
        assert_eq!(root(None, None), None);
    }

    #[test]
    fn only_executable_files_are_programs() {
        let directory = tempfile::tempdir().unwrap();
        let machine = Machine {
            workspace: "/".into(),
            cache: "/".into(),
            path: directory.path().as_os_str().to_owned(),
        };
        std::fs::create_dir(directory.path().join("directory")).unwrap();
        std::fs::write(directory.path().join("text"), "").unwrap();
        std::fs::write(directory.path().join("program"), "").unwrap();
        std::fs::set_permissions(directory.path().join("program"), PermissionsExt::from_mode(0o755)).unwrap();
        assert_eq!(machine.find("directory"), None);
        assert_eq!(machine.find("text"), None);
        assert_eq!(machine.find("absent"), None);
        assert_eq!(machine.find("program"), Some(directory.path().join("program")));
    }
}
