//! The subjects of the comparison, and how each is started.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    process::Command,
    str::FromStr,
};

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::{
    cluster::{CLUSTER_CIDRS, NODE},
    metered::Metered,
    text::kept,
};
use weir_tests::{assets, netns::Namespace, subject::Plane};

/// A service proxy in one of its modes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subject {
    /// This project's agent, Services at the socket (and nftables behind that).
    WeirEbpf,
    /// This project's agent with nftables alone.
    WeirNftables,
    KubeProxyNftables,
    /// kube-proxy with whatever `iptables` is in `PATH`.
    KubeProxyIptables,
    /// kube-proxy with IPVS, where the kernel has it.
    KubeProxyIpvs,
    /// Another build of the agent: the path of its binary. Subjects are copied everywhere, so that text is kept for good.
    OtherWeir(Plane, &'static str),
    /// Another kube-proxy with nftables, as of a later Kubernetes: the path of its binary.
    OtherKubeProxy(&'static str),
}

/// The subjects that may be another build, as the command line has them.
const OTHERS: &str = "weir-ebpf@PATH, weir-nftables@PATH and kube-proxy-nftables@PATH";

/// Where the socket programs go.
#[derive(Clone, Debug)]
pub(super) struct Roots {
    /// weir's `--cgroup-root`.
    pub(super) cgroup: PathBuf,
    /// weir's `--bpf-root`.
    pub(super) bpf: PathBuf,
}

impl Subject {
    /// The subjects that need no path.
    pub(super) const ALL: [Self; 5] = [
        Self::WeirEbpf,
        Self::WeirNftables,
        Self::KubeProxyNftables,
        Self::KubeProxyIptables,
        Self::KubeProxyIpvs,
    ];

    /// Those that are measured where none is named: all of these, and the later kube-proxy where there is one.
    pub(super) fn every() -> Vec<Self> {
        let mut every = Self::ALL.to_vec();
        if let Ok(next) = assets::next_kube_proxy() {
            every.push(Self::OtherKubeProxy(kept(next.display().to_string())));
        }
        every
    }

    /// The name on the command line, without the path of another build.
    fn id(self) -> &'static str {
        match self {
            Self::WeirEbpf | Self::OtherWeir(Plane::Ebpf, _) => "weir-ebpf",
            Self::WeirNftables | Self::OtherWeir(Plane::Nftables, _) => "weir-nftables",
            Self::KubeProxyNftables | Self::OtherKubeProxy(_) => "kube-proxy-nftables",
            Self::KubeProxyIptables => "kube-proxy-iptables",
            Self::KubeProxyIpvs => "kube-proxy-ipvs",
        }
    }

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::WeirEbpf => "weir eBPF",
            Self::WeirNftables => "weir nftables",
            Self::KubeProxyNftables => "kube-proxy nftables",
            Self::KubeProxyIptables => "kube-proxy iptables",
            Self::KubeProxyIpvs => "kube-proxy ipvs",
            Self::OtherWeir(Plane::Ebpf, path) => kept(format!("weir eBPF @ {path}")),
            Self::OtherWeir(Plane::Nftables, path) => kept(format!("weir nftables @ {path}")),
            Self::OtherKubeProxy(path) => kept(format!("kube-proxy nftables @ {path}")),
        }
    }

    /// The data plane of this project's agent, if it is that.
    #[must_use]
    pub fn plane(self) -> Option<Plane> {
        match self {
            Self::WeirEbpf => Some(Plane::Ebpf),
            Self::WeirNftables => Some(Plane::Nftables),
            Self::OtherWeir(plane, _) => Some(plane),
            Self::KubeProxyNftables
            | Self::KubeProxyIptables
            | Self::KubeProxyIpvs
            | Self::OtherKubeProxy(_) => None,
        }
    }

    /// Whether it is this project's.
    #[must_use]
    pub fn is_weir(self) -> bool {
        self.plane().is_some()
    }

    /// Why it cannot be measured on this machine, if the kernel lacks what it needs.
    #[must_use]
    pub(super) fn lacks(self) -> Option<&'static str> {
        if self != Self::KubeProxyIpvs {
            return None;
        }
        // It may be a module that is not loaded yet; where loading fails, the file is not there either.
        let _ = Command::new("modprobe").arg("ip_vs").output();
        (!Path::new("/proc/net/ip_vs").exists()).then_some("this kernel has no ip_vs")
    }

    fn program(self) -> Result<PathBuf> {
        match self {
            Self::WeirEbpf | Self::WeirNftables => assets::weir(),
            Self::OtherWeir(_, path) | Self::OtherKubeProxy(path) => {
                ensure!(Path::new(path).is_file(), "--subject {self}: {path} is not a file");
                // Agents are started elsewhere.
                Ok(fs::canonicalize(path)?)
            }
            _ => assets::kubernetes("kube-proxy"),
        }
    }

    /// kube-proxy's `mode`; weir takes its own from a flag.
    fn mode(self) -> &'static str {
        match self {
            Self::KubeProxyIptables => "iptables",
            Self::KubeProxyIpvs => "ipvs",
            _ => "nftables",
        }
    }

    /// Its version, and that of the tool it programs the kernel with.
    pub(super) fn version(self) -> Result<String> {
        let own = version(&self.program()?)?;
        let tool = match self {
            Self::KubeProxyNftables | Self::OtherKubeProxy(_) => "nft",
            Self::KubeProxyIptables => "iptables",
            Self::KubeProxyIpvs => "ipset",
            _ => return Ok(own),
        };
        Ok(format!("{own}, {}", version(Path::new(tool))?))
    }

    /// Starts it in a node's namespace. All get the same KubeProxyConfiguration, but for the mode.
    pub(super) fn start(
        self,
        kubeconfig: &Path,
        node: &Namespace,
        roots: &Roots,
        directory: &Path,
    ) -> Result<Metered> {
        let config = directory.join("config.yaml");
        fs::write(&config, configuration(self.mode(), kubeconfig))?;
        let mut arguments =
            vec![format!("--config={}", config.display()), format!("--hostname-override={NODE}")];
        if self.is_weir() {
            arguments.insert(0, "run".to_owned());
        }
        match self.plane() {
            Some(Plane::Ebpf) => arguments.extend([
                "--proxy-mode=ebpf".to_owned(),
                format!("--cgroup-root={}", roots.cgroup.display()),
                format!("--bpf-root={}", roots.bpf.display()),
            ]),
            Some(Plane::Nftables) => arguments.push("--proxy-mode=nftables".to_owned()),
            None => {}
        }
        Metered::start(node, &self.program()?, &arguments, directory)
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.id())?;
        match self {
            Self::OtherWeir(_, path) | Self::OtherKubeProxy(path) => write!(f, "@{path}"),
            _ => Ok(()),
        }
    }
}

impl FromStr for Subject {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (id, path) = text.split_once('@').map_or((text, None), |(id, path)| (id, Some(path)));
        let subject = Self::ALL.into_iter().find(|subject| subject.id() == id);
        let path = path.map(|path| Some(path).filter(|path| !path.is_empty()));
        match (subject.map(|subject| (subject, subject.plane())), path) {
            (Some((subject, _)), None) => Ok(subject),
            (Some((_, Some(plane))), Some(Some(path))) => Ok(Self::OtherWeir(plane, kept(path.to_owned()))),
            (Some((Self::KubeProxyNftables, _)), Some(Some(path))) => {
                Ok(Self::OtherKubeProxy(kept(path.to_owned())))
            }
            (Some(_), Some(_)) => bail!("`{text}` is no subject: only {OTHERS} name a binary"),
            (None, _) => {
                let known = Self::ALL.map(Self::id).join(", ");
                bail!("`{text}` is no subject; there are {known}, {OTHERS}")
            }
        }
    }
}

impl Serialize for Subject {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Subject {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// The first line of a program's version.
pub(super) fn version(program: &Path) -> Result<String> {
    let output = Command::new(program).arg("--version").output();
    let output = output.with_context(|| format!("running {}", program.display()))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(text.lines().next().unwrap_or_default().trim().to_owned())
}

/// kube-proxy's defaults, less the sysctls that a network namespace does not let it write.
fn configuration(mode: &str, kubeconfig: &Path) -> String {
    serde_json::json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": mode,
        "clusterCIDR": CLUSTER_CIDRS,
        "clientConnection": { "kubeconfig": kubeconfig },
        "conntrack": {
            "maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s",
        },
    })
    .to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_build_has_its_own_name_in_tables_and_samples() {
        let [own, other]: [Subject; 2] =
            ["weir-ebpf", "weir-ebpf@/tmp/before/weir"].map(|text| text.parse().unwrap());
        assert_eq!((own, other.plane()), (Subject::WeirEbpf, Some(Plane::Ebpf)));
        assert_eq!((own.name(), other.name()), ("weir eBPF", "weir eBPF @ /tmp/before/weir"));
        let later: Subject = "kube-proxy-nftables@/tmp/later/kube-proxy".parse().unwrap();
        assert_eq!((later.is_weir(), later.mode()), (false, "nftables"));
        assert_eq!(later.name(), "kube-proxy nftables @ /tmp/later/kube-proxy");
        for subject in Subject::ALL.into_iter().chain([other, later]) {
            let text = serde_json::to_string(&subject).unwrap();
            assert_eq!(serde_json::from_str::<Subject>(&text).unwrap(), subject, "{text}");
        }
    }

    #[test]
    fn only_weir_and_kube_proxys_nftables_mode_have_other_builds() {
        for text in [
            "kube-proxy-iptables@/bin/kube-proxy",
            "kube-proxy-nftables@",
            "weir-ebpf@",
            "weir-iptables@/bin/weir",
            "",
        ] {
            let error = text.parse::<Subject>().unwrap_err().to_string();
            assert!(error.contains("weir-nftables@PATH"), "{error}");
        }
        let error = "weir-ebpf@/no/such/weir".parse::<Subject>().unwrap().version().unwrap_err().to_string();
        assert!(error.contains("/no/such/weir is not a file"), "{error}");
    }
}
