//! The programs that the tests run against: etcd, kube-apiserver, kube-proxy, CoreDNS.
//!
//! The directory in `KUBEBUILDER_ASSETS` comes first, then the cache. A program in neither is built from the Go modules
//! `tests/kubernetes`, `tests/etcd` and `tests/coredns`, and a later kube-proxy from `tests/kubernetes-next`; they pin the
//! versions. Debian's etcd cannot be used, because kube-apiserver cannot stream lists from it.

use std::{env, path::PathBuf};

use anyhow::Result;

use super::go;
use crate::machine::{Machine, is_executable};

/// The version `tests/kubernetes/go.mod` pins.
pub(super) const KUBERNETES: &str = "1.36.3";
/// The version `tests/kubernetes-next/go.mod` pins.
const NEXT: &str = "1.37.2";

/// A program, and how to build it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Program {
    name: &'static str,
    /// How long a build takes with nothing cached.
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

fn cached(machine: &Machine, version: &str) -> PathBuf {
    machine.cache.join(format!("kubernetes-v{version}"))
}

/// The directory of each program, also of one that is not built yet. etcd and kube-apiserver belong together:
/// `KUBEBUILDER_ASSETS` is used for them if it has both.
struct Assets {
    /// Of etcd and kube-apiserver.
    server: PathBuf,
    /// Of kube-proxy.
    proxy: PathBuf,
    /// Of CoreDNS, always in the cache, because it is built for the tests.
    names: PathBuf,
    /// Of the later kube-proxy, always in the cache.
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

/// Whether a program has to be built.
pub(super) fn lacks_any(machine: &Machine) -> bool {
    let assets = Assets::of(machine);
    [ETCD, API_SERVER, KUBE_PROXY, NEXT_KUBE_PROXY, COREDNS].iter().any(|program| assets.lacks(program))
}

/// The directories of etcd and kube-apiserver, of kube-proxy, of CoreDNS, and of the later kube-proxy.
pub(crate) fn assets(machine: &Machine) -> [PathBuf; 4] {
    let Assets { server, proxy, names, next } = Assets::of(machine);
    [server, proxy, names, next]
}

pub(super) fn missing_program(machine: &Machine, program: &Program) -> Result<Option<String>> {
    let lacks = Assets::of(machine).lacks(program);
    let Program { name, version, takes, .. } = program;
    Ok(lacks.then(|| format!("{name} for Kubernetes {version} (built from source, {takes} the first time)")))
}

pub(super) fn build_program(machine: &Machine, program: &Program) -> Result<()> {
    let Program { name, module, package, version, .. } = program;
    go::build(machine, module, package, &cached(machine, version).join(name), &linker_flags(version))
}

/// Flags for no debug information, and for the version, which a plain build lacks.
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

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::{super::go::put, *};

    #[test]
    fn the_modules_pin_the_versions_that_the_cache_is_named_after() {
        for Program { module, version, .. } in [KUBE_PROXY, NEXT_KUBE_PROXY] {
            let module = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../{module}/go.mod"));
            let module = fs::read_to_string(module).unwrap();
            assert!(module.contains(&format!("k8s.io/kubernetes v{version}\n")), "{module}");
        }
    }

    #[test]
    fn given_programs_are_used_when_they_are_complete() {
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
        assert_eq!(find().server, cached, "etcd alone is not used");
        assert!(find().lacks(&API_SERVER) && find().lacks(&KUBE_PROXY));
        put(&source, &given.join("kube-apiserver")).unwrap();
        assert_eq!((find().server, find().proxy), (given.clone(), cached.clone()));
        assert!(!find().lacks(&API_SERVER) && find().lacks(&KUBE_PROXY));
        put(&source, &cached.join("kube-proxy")).unwrap();
        assert!(!find().lacks(&KUBE_PROXY));
        assert_eq!(fs::read_dir(&given).unwrap().count(), 2, "no draft is left");
        assert!(find().lacks(&NEXT_KUBE_PROXY), "the given programs are of one version");
        put(&source, &next.join("kube-proxy")).unwrap();
        assert!(!find().lacks(&NEXT_KUBE_PROXY));
        assert_eq!(find_in(None).server, cached);
        assert_eq!(find_in(Some("".into())).proxy, cached);
    }
}
