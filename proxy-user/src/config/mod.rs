//! What the agent is told to do: a KubeProxyConfiguration file or kube-proxy's flags, in one plain [`Config`].
//!
//! In: [`ConfigArgs`] from the command line, the file that `--config` names, and the [`Host`]. Out: a checked
//! [`Config`] with the warnings to log once logging is set up, or an [`Error`] that names every wrong field at once.
//!
//! ```text
//! ConfigArgs ──with --config──▶ file ─────┐
//!            └─otherwise──────▶ flags ────┴─▶ Configuration ──resolve──▶ Config
//! ```

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use ipnet::IpNet;

pub use crate::model::{DetectLocal, LoopbackNodePorts, NodePortSetting, Settings};

mod addresses;
mod dns;
mod document;
mod duration;
mod file;
mod flags;
mod host;
mod resolve;
mod tree;

#[cfg(test)]
mod tests;

pub use dns::{DnsArgs, DnsConfig};
pub use duration::GoDuration;
pub use flags::{ConfigArgs, IgnoredFlags, KernelArgs, LogArgs, ReplacedByFile};
pub use host::Host;

/// Which data plane is asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ProxyMode {
    /// The best one that this kernel has.
    #[default]
    Auto,
    /// eBPF or nothing.
    Ebpf,
    /// nftables or nothing.
    Nftables,
}

/// Where Kubernetes objects come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceConfig {
    /// An API server.
    Kubernetes {
        /// The kubeconfig file; `None` means the service account of the pod this runs in.
        kubeconfig: Option<PathBuf>,
        /// Addresses of API servers that replace the kubeconfig's; empty keeps that one.
        servers: Vec<String>,
    },
    /// A directory of manifests.
    Manifests {
        /// The directory.
        dir: PathBuf,
        /// Where Services without a ClusterIP get theirs from.
        service_ranges: Vec<IpNet>,
        /// Where the allocated addresses are written to.
        status_file: Option<PathBuf>,
    },
}

/// How much is logged, and in what form.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogConfig {
    /// kube-proxy's `-v`: 4 adds debug messages, 5 and more add traces.
    pub verbosity: u32,
    /// One JSON object a line instead of text.
    pub json: bool,
}

/// What is set of connection tracking, as kube-proxy sets it; `None` leaves the kernel's value alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Conntrack {
    /// Connections to track for each CPU. Without it there is no limit to set.
    pub max_per_core: Option<u32>,
    /// Connections to track at least, whatever the number of CPUs.
    pub min: u32,
    /// How long an idle established TCP connection is kept.
    pub tcp_established_timeout: Option<Duration>,
    /// How long a TCP connection in CLOSE_WAIT is kept.
    pub tcp_close_wait_timeout: Option<Duration>,
    /// Whether TCP packets outside the window are let through.
    pub tcp_be_liberal: bool,
    /// How long a UDP flow without an answer is kept.
    pub udp_timeout: Option<Duration>,
    /// How long a UDP flow with answers is kept.
    pub udp_stream_timeout: Option<Duration>,
}

/// How often the API server is asked at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestLimit {
    /// So many requests,
    pub requests: u64,
    /// in each stretch of time as long as this.
    pub window: Duration,
}

/// Everything the agent is told, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// What the model and the plan need: the node's name (flag, else file, else the host's name; trimmed, in lower
    /// case), how pods are told, masquerading, NodePort addresses, families. Unset, NodePort addresses are what the
    /// imitated kube-proxy mode has (R15): `primary` for nftables, every address for iptables, ipvs and no mode at all,
    /// which is what kubeadm installs.
    pub model: Settings,
    /// Where objects come from.
    pub source: SourceConfig,
    /// How names are answered on this node; `None` not at all.
    pub dns: Option<DnsConfig>,
    /// The data plane asked for.
    pub mode: ProxyMode,
    /// Where `/healthz` and `/livez` are served (P1, P4); `None` nowhere.
    pub healthz: Option<SocketAddr>,
    /// Where `/metrics` and `/proxyMode` are served (P5 to P7); `None` nowhere.
    pub metrics: Option<SocketAddr>,
    /// Whether a failure to listen ends the agent instead of being retried (P8).
    pub bind_hard_fail: bool,
    /// The delay before a failed programming is tried again in full. Twice this is the health timeout (P2).
    pub sync_period: Duration,
    /// The least time between two kube-proxy syncs. Accepted so that files load; applying a change costs so little
    /// here that nothing waits for it.
    pub min_sync_period: Duration,
    /// Connection tracking settings.
    pub conntrack: Conntrack,
    /// How ready the kernel is to kill the agent when memory runs out; `None` is the default, whose failure is no news.
    pub oom_score_adj: Option<i32>,
    /// The limit of requests to the API server, if there is one.
    pub request_limit: Option<RequestLimit>,
    /// Logging.
    pub log: LogConfig,
    /// Whether what kube-proxy left is removed once ours is in force, except virtual servers of IPVS in these networks.
    pub take_over: Option<Vec<IpNet>>,
    /// The configuration file, if this comes from one.
    pub file: Option<PathBuf>,
    /// The directory of our pinned BPF objects, on a bpffs.
    pub bpf_root: PathBuf,
    /// The root of the cgroup v2 tree, whose sockets the eBPF plane serves.
    pub cgroup_root: PathBuf,
}

/// A configuration, and what its author should hear about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// The configuration.
    pub config: Config,
    /// One sentence for each thing that was ignored or read differently than kube-proxy would.
    pub warnings: Vec<String>,
    /// The whole of it in kube-proxy's format, defaults filled in (P7).
    pub document: serde_json::Value,
}

/// One field that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{place}: {complaint}")]
pub struct Problem {
    /// The file and the field in it, or the flag.
    pub place: String,
    /// What is wrong with it, with the value given.
    pub complaint: String,
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("cannot read the configuration file `{}`", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file is not YAML or JSON.
    #[error("{}: {message}", file.display())]
    Syntax {
        /// The file.
        file: PathBuf,
        /// What the parser says, with line and column.
        message: String,
    },
    /// Fields are wrong; every one that was found is here.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Invalid(Vec<Problem>),
}

/// The configuration of a command line on a host. With `--config` the file counts, and of the flags only those that
/// win over it; without, the flags do.
///
/// # Errors
///
/// When the file cannot be read, or a field or flag has a value that cannot be used.
pub fn load(args: &ConfigArgs, host: &Host) -> Result<Loaded, Error> {
    let mut warnings = args.ignored.warnings();
    let (configuration, tree, origin) = match &args.file {
        Some(path) => {
            let replaced = args.replaced.given();
            if !replaced.is_empty() {
                warnings.push(format!(
                    "`--config` is given, so these flags are ignored: {}",
                    replaced.join(", ")
                ));
            }
            let text =
                std::fs::read_to_string(path).map_err(|source| Error::Read { file: path.clone(), source })?;
            let (configuration, tree) = file::parse(path, &text, &mut warnings)?;
            (configuration, tree, resolve::Origin::File(path.clone()))
        }
        None => {
            let configuration = args.replaced.to_configuration();
            let tree = serde_json::to_value(&configuration).unwrap_or_default();
            (configuration, tree, resolve::Origin::Flags)
        }
    };
    let (config, warnings) = resolve::resolve(&configuration, args, &origin, host, warnings)?;
    let document = resolve::document(&tree, &configuration, args, &config);
    Ok(Loaded { config, warnings, document })
}
