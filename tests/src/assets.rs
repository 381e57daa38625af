//! Where the real Kubernetes programs and the weir under test are found.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};

/// The directory of kube-apiserver, etcd and kube-proxy: `KUBEBUILDER_ASSETS`, else
/// `${XDG_CACHE_HOME:-$HOME/.cache}/weir/kubernetes-v1.36.3`, where `cargo xtask setup` puts them.
///
/// # Errors
///
/// When neither variable nor home directory is known.
pub fn directory() -> Result<PathBuf> {
    if let Some(assets) = std::env::var_os("KUBEBUILDER_ASSETS") {
        return Ok(assets.into());
    }
    Ok(cache()?.join("kubernetes-v1.36.3"))
}

/// Where setup keeps what it built.
///
/// # Errors
///
/// When no home directory is known.
pub fn cache() -> Result<PathBuf> {
    let base = match std::env::var_os("XDG_CACHE_HOME") {
        Some(cache) => PathBuf::from(cache),
        None => Path::new(&std::env::var_os("HOME").context("neither XDG_CACHE_HOME nor HOME is set")?)
            .join(".cache"),
    };
    Ok(base.join("weir"))
}

/// The path of one Kubernetes program: in [`directory`], else by `PATH`.
///
/// # Errors
///
/// When it is not there.
pub fn kubernetes(program: &str) -> Result<PathBuf> {
    let directory = directory()?;
    let here = directory.join(program);
    if here.is_file() {
        return Ok(here);
    }
    self::program(program).with_context(|| {
        let directory = directory.display();
        format!("{program} is not in {directory} either; run `cargo xtask setup`, or set KUBEBUILDER_ASSETS")
    })
}

/// A later kube-proxy than [`kubernetes`] has: `WEIR_NEXT_KUBE_PROXY`, else where `cargo xtask setup` puts it.
///
/// # Errors
///
/// When it is not there.
pub fn next_kube_proxy() -> Result<PathBuf> {
    let path = match std::env::var_os("WEIR_NEXT_KUBE_PROXY") {
        Some(path) => path.into(),
        None => cache()?.join("kubernetes-v1.37.2/kube-proxy"),
    };
    ensure!(path.is_file(), "there is no {}; run `cargo xtask setup`", path.display());
    Ok(path)
}

/// The path of a program by `PATH`.
///
/// # Errors
///
/// When it is not there.
pub fn program(name: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found =
        std::env::split_paths(&path).map(|directory| directory.join(name)).find(|path| path.is_file());
    found.with_context(|| format!("{name} is not in PATH"))
}

/// The weir binary under test: `WEIR_BIN`, else the one built beside this test.
///
/// # Errors
///
/// When there is none.
pub fn weir() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("WEIR_BIN") {
        let path = PathBuf::from(path);
        ensure!(path.is_file(), "WEIR_BIN={} is not a file", path.display());
        return Ok(path);
    }
    let here = std::env::current_exe()?;
    for directory in here.ancestors().skip(1).take(3) {
        let path = directory.join("weir");
        if path.is_file() {
            return Ok(path);
        }
    }
    bail!("no weir binary beside {}; run `cargo build -p proxy-user` first, or set WEIR_BIN", here.display())
}
