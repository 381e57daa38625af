//! The configuration: a KubeProxyConfiguration file or kube-proxy's flags become one plain [`Config`].
//!
//! In: [`ConfigArgs`] from the command line, the file that `--config` names, and the [`Host`]. Out: a checked
//! [`Config`] with warnings to log once logging is set up, or an [`Error`] that names every wrong field at
//! once.
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
mod go_values;
mod host;
mod resolve;
mod tree;

#[cfg(test)]
mod tests;

pub use dns::{DnsArgs, DnsConfig};
pub use duration::GoDuration;
pub use flags::{ConfigArgs, IgnoredFlags, KernelArgs, LogArgs, ReplacedByFile};
pub use host::Host;

/// The data plane that the user asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ProxyMode {
    /// The socket plane if this kernel can run it, else nftables alone.
    #[default]
    Auto,
    /// The socket plane, or an error if the kernel cannot run it.
    Ebpf,
    /// The nftables plane alone.
    Nftables,
}

/// The source of Kubernetes objects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceConfig {
    /// An API server.
    Kubernetes {
        /// The kubeconfig file. `None` means the service account of the pod that weir runs in.
        kubeconfig: Option<PathBuf>,
        /// API servers that replace the kubeconfig's. Empty keeps the kubeconfig's.
        servers: Vec<String>,
    },
    /// A directory of manifests.
    Manifests {
        /// The directory.
        dir: PathBuf,
        /// Ranges from which Services without a ClusterIP get one.
        service_ranges: Vec<IpNet>,
        /// The file that the allocated addresses are written to.
        status_file: Option<PathBuf>,
    },
}

/// Verbosity and format of the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogConfig {
    /// kube-proxy's `-v`: 4 adds debug messages, 5 and more add traces.
    pub verbosity: u32,
    /// Whether each line is a JSON object instead of text.
    pub json: bool,
}

/// Settings of connection tracking, as kube-proxy applies them. `None` keeps the kernel's value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Conntrack {
    /// Connections to track for each CPU. Without it no limit is set.
    pub max_per_core: Option<u32>,
    /// Minimum of connections to track, independent of the number of CPUs.
    pub min: u32,
    /// How long an idle established TCP connection is kept.
    pub tcp_established_timeout: Option<Duration>,
    /// How long a TCP connection in CLOSE_WAIT is kept.
    pub tcp_close_wait_timeout: Option<Duration>,
    /// Whether TCP packets outside the window are accepted.
    pub tcp_be_liberal: bool,
    /// How long a UDP flow without a reply is kept.
    pub udp_timeout: Option<Duration>,
    /// How long a UDP flow with replies is kept.
    pub udp_stream_timeout: Option<Duration>,
}

/// A limit on the rate of requests to the API server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestLimit {
    /// The number of requests in one window.
    pub requests: u64,
    /// The length of a window.
    pub window: Duration,
}

/// The checked configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Settings of the model and the plan: the node's name (flag, else file, else the host name; trimmed, in
    /// lower case), how local pods are recognized, masquerading, NodePort addresses, families. The default of
    /// the NodePort addresses is that of the imitated kube-proxy mode (R15): `primary` for nftables; every
    /// address for iptables, ipvs and no mode at all, which is what kubeadm installs.
    pub model: Settings,
    /// The source of Kubernetes objects.
    pub source: SourceConfig,
    /// Settings of the DNS server; `None` if weir answers no DNS.
    pub dns: Option<DnsConfig>,
    /// The data plane that the user asked for.
    pub mode: ProxyMode,
    /// Address of `/healthz` and `/livez` (P1, P4); `None` if they are off.
    pub healthz: Option<SocketAddr>,
    /// Address of `/metrics` and `/proxyMode` (P5 to P7); `None` if they are off.
    pub metrics: Option<SocketAddr>,
    /// Whether the agent exits if a port is in use, instead of trying again (P8).
    pub bind_hard_fail: bool,
    /// The delay before a failed update of the kernel is retried in full. Twice this is the health timeout
    /// (P2).
    pub sync_period: Duration,
    /// The least time between two syncs of kube-proxy. Accepted so that files load, and not used, because
    /// applying a change is cheap here.
    pub min_sync_period: Duration,
    /// Settings of connection tracking.
    pub conntrack: Conntrack,
    /// The score for the kernel's OOM killer. `None` means the default, and a failure to set the default is
    /// not logged.
    pub oom_score_adj: Option<i32>,
    /// The limit of requests to the API server, if there is one.
    pub request_limit: Option<RequestLimit>,
    /// Verbosity and format of the log.
    pub log: LogConfig,
    /// Whether weir removes what kube-proxy left once its own state is in force. The value holds networks
    /// of IPVS virtual servers that are kept.
    pub take_over: Option<Vec<IpNet>>,
    /// The configuration file, if there is one.
    pub file: Option<PathBuf>,
    /// The directory of pinned BPF objects, on a bpffs.
    pub bpf_root: PathBuf,
    /// The root of the cgroup v2 tree to which the socket plane attaches.
    pub cgroup_root: PathBuf,
}

/// A configuration with its warnings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// The configuration.
    pub config: Config,
    /// One sentence for each setting that was ignored or that weir reads differently than kube-proxy.
    pub warnings: Vec<String>,
    /// The configuration in kube-proxy's format with all defaults (P7).
    pub document: serde_json::Value,
}

/// A field that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{setting}: {message}")]
pub struct Problem {
    /// The file and the field in it, or the flag.
    pub setting: String,
    /// The problem, with the value that was given.
    pub message: String,
}

/// Why a configuration could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("cannot read the configuration file `{}`", file.display())]
    Read {
        /// The path of the file.
        file: PathBuf,
        /// The error of the read.
        #[source]
        source: std::io::Error,
    },
    /// The file is not YAML or JSON.
    #[error("{}: {message}", file.display())]
    Syntax {
        /// The path of the file.
        file: PathBuf,
        /// The parser's message, with line and column.
        message: String,
    },
    /// Every wrong field that was found.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Invalid(Vec<Problem>),
}

/// Loads the configuration of a command line on a host. With `--config` the file counts, and only the flags
/// that override it; without `--config` the flags count.
///
/// # Errors
///
/// When the file cannot be read, or a field or flag has a value that cannot be used.
pub fn load(args: &ConfigArgs, host: &Host) -> Result<Loaded, Error> {
    let mut warnings = args.ignored.warnings();
    let (configuration, tree, written_in) = match &args.file {
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
            (configuration, tree, resolve::WrittenIn::File(path.clone()))
        }
        None => {
            let configuration = args.replaced.to_configuration();
            let tree = serde_json::to_value(&configuration).unwrap_or_default();
            (configuration, tree, resolve::WrittenIn::Flags)
        }
    };
    let (config, warnings) = resolve::resolve(&configuration, args, &written_in, host, warnings)?;
    let document = document::of(&tree, &configuration, args, &config);
    Ok(Loaded { config, warnings, document })
}
