//! The real programs that the tests run against: etcd, kube-apiserver, kube-proxy, CoreDNS.
//!
//! A directory named by `KUBEBUILDER_ASSETS` comes first, then our cache. What is in neither is built from the Go modules
//! `tests/kubernetes`, `tests/etcd` and `tests/coredns`, and of a later kube-proxy from `tests/kubernetes-next`; they pin the versions. Debian's etcd will not do: kube-apiserver cannot stream
//! lists from it.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use super::{Level, archive};
use crate::{
    machine::{Machine, is_executable},
    process,
};

/// The version `tests/kubernetes/go.mod` pins.
pub(super) const KUBERNETES: &str = "1.36.3";
/// The version `tests/kubernetes-next/go.mod` pins.
const NEXT: &str = "1.37.2";

/// One that is built, and about how long that takes with nothing cached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Program {
    name: &'static str,
    takes: &'static str,
    /// The directory of the module that pins its version.
    module: &'static str,
    /// The version of Kubernetes that it belongs to.
    version: &'static str,
    package: &'static str,
}

pub(super) const ETCD: Program = Program {
    name: "etcd",
    takes: "half a minute",
    module: "tests/etcd",
    version: KUBERNETES,
    package: "go.etcd.io/etcd/server/v3",
};
pub(super) const API_SERVER: Program = Program {
    name: "kube-apiserver",
    takes: "one to two minutes",
    module: "tests/kubernetes",
    version: KUBERNETES,
    package: "k8s.io/kubernetes/cmd/kube-apiserver",
};
pub(super) const KUBE_PROXY: Program = Program {
    name: "kube-proxy",
    takes: "one to three minutes",
    module: "tests/kubernetes",
    version: KUBERNETES,
    package: "k8s.io/kubernetes/cmd/kube-proxy",
};

pub(super) const NEXT_KUBE_PROXY: Program =
    Program { module: "tests/kubernetes-next", version: NEXT, ..KUBE_PROXY };

pub(super) const COREDNS: Program = Program {
    name: "coredns",
    takes: "half a minute",
    module: "tests/coredns",
    version: KUBERNETES,
    package: ".",
};

/// From this version on, Go fetches by itself the toolchain that a module asks for.
const GO_THAT_FETCHES: [u32; 2] = [1, 21];

fn cached(machine: &Machine, version: &str) -> PathBuf {
    machine.cache.join(format!("kubernetes-v{version}"))
}

/// Where each program is, or is to be. The first two belong together: those of `KUBEBUILDER_ASSETS` serve if both are
/// there.
struct Assets {
    /// Of etcd and kube-apiserver.
    server: PathBuf,
    /// Of kube-proxy.
    proxy: PathBuf,
    /// Of CoreDNS, which is always ours: it is made for the tests.
    names: PathBuf,
    /// Of the later kube-proxy, which is always ours.
    next: PathBuf,
}

impl Assets {
    fn find(given: Option<PathBuf>, [cached, next]: [PathBuf; 2]) -> Self {
        let given = given.as_ref().filter(|given| !given.as_os_str().is_empty());
        let holding = |programs: &[&str]| {
            let complete =
                |given: &&PathBuf| programs.iter().all(|program| is_executable(&given.join(program)));
            given.filter(complete).unwrap_or(&cached).clone()
        };
        let (server, proxy) = (holding(&["etcd", "kube-apiserver"]), holding(&["kube-proxy"]));
        Self { server, proxy, names: cached.clone(), next }
    }

    fn of(machine: &Machine) -> Self {
        let cached = [KUBERNETES, NEXT].map(|version| cached(machine, version));
        Self::find(env::var_os("KUBEBUILDER_ASSETS").map(PathBuf::from), cached)
    }

    fn lacks(&self, program: &Program) -> bool {
        let directory = match *program {
            KUBE_PROXY => &self.proxy,
            NEXT_KUBE_PROXY => &self.next,
            COREDNS => &self.names,
            _ => &self.server,
        };
        !is_executable(&directory.join(program.name))
    }
}

/// The directory of etcd and kube-apiserver, then that of kube-proxy, then that of CoreDNS; often the same. The last is that
/// of the later kube-proxy.
pub(crate) fn assets(machine: &Machine) -> [PathBuf; 4] {
    let Assets { server, proxy, names, next } = Assets::of(machine);
    [server, proxy, names, next]
}

/// Copies a program into the cache, where it appears whole.
fn put(from: &Path, to: &Path) -> Result<()> {
    let directory = to.parent().context("a cached program has a directory")?;
    fs::create_dir_all(directory)?;
    let draft = tempfile::Builder::new().prefix(".new-").tempdir_in(directory)?;
    let copy = draft.path().join("program");
    fs::copy(from, &copy).with_context(|| format!("copying {}", from.display()))?;
    fs::rename(copy, to).with_context(|| format!("moving into {}", to.display()))
}

pub(super) fn missing_program(machine: &Machine, program: &Program) -> Result<Option<String>> {
    let lacks = Assets::of(machine).lacks(program);
    let Program { name, version, takes, .. } = program;
    Ok(lacks.then(|| format!("{name} for Kubernetes {version} (built from source, {takes} the first time)")))
}

pub(super) fn build_program(machine: &Machine, program: &Program) -> Result<()> {
    let Program { name, module, package, version, .. } = program;
    build(machine, module, package, &cached(machine, version).join(name), &linker_flags(version))
}

/// Builds the main package `package`, in the version that the module in the directory `module` pins, as `target`.
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

/// The directory of the sources of the module `path`, in the version that the module in the directory `module` pins.
pub(super) fn sources(machine: &Machine, module: &str, path: &str) -> Result<PathBuf> {
    let said = process::read(go_command(machine, module)?.args(["mod", "download", "-json", path]))?;
    let said: serde_json::Value = serde_json::from_str(&said).context("reading what go wrote")?;
    Ok(said["Dir"].as_str().with_context(|| format!("go does not say where {path} is"))?.into())
}

/// Go, in the directory `module`.
fn go_command(machine: &Machine, module: &str) -> Result<Command> {
    let directory = machine.workspace.join(module);
    let wanted = go_directive(&fs::read_to_string(directory.join("go.mod"))?)
        .with_context(|| format!("{module}/go.mod does not say which Go it needs"))?;
    let (go, version) = go(machine).context("there is no Go")?;
    let mut command = machine.command(&go);
    command.current_dir(&directory).env("CGO_ENABLED", "0").env_remove("GOROOT");
    if version < wanted {
        command.env("GOTOOLCHAIN", "auto");
    }
    Ok(command)
}

/// Without debug information, and with the version that a plain build leaves open.
fn linker_flags(version: &str) -> String {
    let minor = version.split('.').nth(1).unwrap_or_default();
    let mut flags = "-s -w".to_owned();
    for package in ["k8s.io/component-base/version", "k8s.io/client-go/pkg/version"] {
        for (variable, value) in [
            ("gitVersion", &*format!("v{version}")),
            ("gitMajor", "1"),
            ("gitMinor", minor),
            ("gitTreeState", "clean"),
        ] {
            flags.push_str(&format!(" -X {package}.{variable}={value}"));
        }
    }
    flags
}

fn cached_go(machine: &Machine) -> PathBuf {
    machine.cache.join("go-1.24")
}

/// A Go that can build, or can fetch one that can, with its version.
fn go(machine: &Machine) -> Option<(PathBuf, [u32; 2])> {
    let places = machine.find("go").into_iter();
    let places =
        places.chain(["/usr/local/go/bin/go".into(), cached_go(machine).join("usr/lib/go-1.24/bin/go")]);
    places.filter(|go| is_executable(go)).find_map(|go| {
        let said =
            process::read(Command::new(&go).args(["env", "GOVERSION"]).env("GOTOOLCHAIN", "local")).ok()?;
        let version = go_version(said.trim_end().strip_prefix("go")?)?;
        (version >= GO_THAT_FETCHES).then_some((go, version))
    })
}

fn go_version(text: &str) -> Option<[u32; 2]> {
    // Release candidates are called 1.27rc1.
    let mut numbers = text.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some([numbers.next()?.ok()?, numbers.next()?.ok()?])
}

fn go_directive(module: &str) -> Option<[u32; 2]> {
    go_version(module.lines().find_map(|line| line.strip_prefix("go "))?.trim())
}

pub(super) fn missing_go(machine: &Machine, level: Level) -> Result<Option<String>> {
    let assets = Assets::of(machine);
    let mut builds =
        [ETCD, API_SERVER, KUBE_PROXY, NEXT_KUBE_PROXY, COREDNS].iter().any(|program| assets.lacks(program));
    builds |= level >= Level::Check && super::chart::lacks_any(machine);
    if !builds || go(machine).is_some() {
        return Ok(None);
    }
    Ok(Some("Go 1.24 (of Debian trixie, to build what tests and checks need of Kubernetes)".to_owned()))
}

pub(super) fn install_go(machine: &Machine, _: Level) -> Result<()> {
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

    #[test]
    fn the_modules_pin_the_versions_that_the_cache_is_named_after() {
        for Program { module, version, .. } in [KUBE_PROXY, NEXT_KUBE_PROXY] {
            let module = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../{module}/go.mod"));
            let module = fs::read_to_string(module).unwrap();
            assert!(module.contains(&format!("k8s.io/kubernetes v{version}\n")), "{module}");
        }
    }

    #[test]
    fn given_programs_serve_when_they_are_complete() {
        let [given, cached] = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let [given, cached] = [given.path().to_owned(), cached.path().to_owned()];
        let next = cached.join("next");
        let find_in = |given| Assets::find(given, [cached.clone(), next.clone()]);
        let find = || find_in(Some(given.clone()));
        let source = cached.join("source");
        fs::create_dir_all(&cached).unwrap();
        fs::write(&source, "").unwrap();
        fs::set_permissions(&source, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();

        put(&source, &given.join("etcd")).unwrap();
        assert_eq!(find().server, cached, "etcd alone is of no use");
        assert!(find().lacks(&API_SERVER) && find().lacks(&KUBE_PROXY));
        put(&source, &given.join("kube-apiserver")).unwrap();
        assert_eq!((find().server, find().proxy), (given.clone(), cached.clone()));
        assert!(!find().lacks(&API_SERVER) && find().lacks(&KUBE_PROXY));
        put(&source, &cached.join("kube-proxy")).unwrap();
        assert!(!find().lacks(&KUBE_PROXY));
        assert_eq!(fs::read_dir(&given).unwrap().count(), 2, "nothing is left of the copying");
        assert!(find().lacks(&NEXT_KUBE_PROXY), "the given programs are of one version");
        put(&source, &next.join("kube-proxy")).unwrap();
        assert!(!find().lacks(&NEXT_KUBE_PROXY));
        assert_eq!(find_in(None).server, cached);
        assert_eq!(find_in(Some("".into())).proxy, cached);
    }
}
