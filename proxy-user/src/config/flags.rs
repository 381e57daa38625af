//! The flags of `weir run` and `weir plan`: kube-proxy's and a few of weir's own.
//!
//! In: the arguments of a command line. Out: [`ConfigArgs`], which [`super::load`] turns into a
//! configuration. There are three groups of flags: those that override a configuration file, those that a
//! file replaces, and those that have no effect.

use std::path::PathBuf;

use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches, error::Error as ClapError};
use serde::Serialize;

use super::{
    DnsArgs, GoDuration, Host, LogConfig,
    file::{
        ClientConnection, Configuration, Conntrack, DetectLocalMode, Detectors, Iptables, Ipvs, Mode, Rules,
    },
    go_values::{boolean, integer},
};

/// Every flag that a [`super::Config`] is made of.
#[derive(Args, Clone, Debug)]
pub struct ConfigArgs {
    /// KubeProxyConfiguration file (v1alpha1). The flags under "Ignored with --config" then have no effect
    #[arg(long = "config", value_name = "FILE")]
    pub(super) file: Option<PathBuf>,
    /// Name of this node's Node object [default: the host name]
    #[arg(long, value_name = "NODE", env = "NODE_NAME")]
    pub(super) hostname_override: Option<String>,
    /// Data plane: auto, ebpf or nftables. kube-proxy's iptables and ipvs mean auto
    #[arg(long, value_name = "MODE", value_parser = mode)]
    pub(super) proxy_mode: Option<Mode>,
    /// Read objects from a directory of manifests instead of an API server: manifests:DIR
    #[arg(long, value_name = "manifests:DIR", value_parser = manifests)]
    pub(super) source: Option<PathBuf>,
    /// Ranges from which --source allocates ClusterIPs to Services that have none
    #[arg(long, value_name = "CIDR", value_delimiter = ',')]
    pub(super) service_cidr: Vec<String>,
    /// File to which --source writes the allocated ClusterIPs
    #[arg(long, value_name = "FILE")]
    pub(super) manifest_status: Option<PathBuf>,
    /// API servers to use instead of the kubeconfig's, separated by commas
    #[arg(long, value_name = "URL", value_delimiter = ',')]
    pub(super) master: Vec<String>,
    /// Remove what kube-proxy left in the kernel once weir has programmed everything
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "true", default_missing_value = "true",
          action = ArgAction::Set, value_parser = boolean, value_name = "BOOL")]
    pub(super) take_over: bool,
    /// The place of the pinned objects.
    #[command(flatten)]
    pub kernel: KernelArgs,
    /// Log settings.
    #[command(flatten)]
    pub log: LogArgs,
    /// The DNS server.
    #[command(flatten)]
    pub(super) dns: DnsArgs,
    /// Flags that a file replaces.
    #[command(flatten)]
    pub(super) replaced: ReplacedByFile,
    /// Flags without effect.
    #[command(flatten)]
    pub(super) ignored: IgnoredFlags,
}

/// The place of the socket plane's kernel objects.
#[derive(Args, Clone, Debug)]
pub struct KernelArgs {
    /// Root of the cgroup v2 tree [default: where it is mounted]
    #[arg(long, value_name = "DIR")]
    pub cgroup_root: Option<PathBuf>,
    /// Directory on a bpffs for pinned objects
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf/weir")]
    pub bpf_root: PathBuf,
}

impl KernelArgs {
    /// The root of the cgroup v2 tree: the flag, else the host's mount, else its usual path.
    #[must_use]
    pub fn cgroup_root(&self, host: &Host) -> PathBuf {
        let given = self.cgroup_root.as_ref().or(host.cgroup_root.as_ref());
        given.cloned().unwrap_or_else(|| "/sys/fs/cgroup".into())
    }
}

/// Verbosity and format of the log.
#[derive(Args, Clone, Debug)]
pub struct LogArgs {
    /// Log verbosity: 4 adds debug messages, 5 and more add traces
    #[arg(short = 'v', long = "v", value_name = "N")]
    pub(super) verbosity: Option<u32>,
    /// Log format
    #[arg(long, value_name = "FORMAT", value_parser = ["text", "json"])]
    pub(super) logging_format: Option<String>,
}

impl LogArgs {
    /// The log settings of a command without a configuration file.
    #[must_use]
    pub fn config(&self) -> LogConfig {
        let json = self.logging_format.as_deref() == Some("json");
        LogConfig { verbosity: self.verbosity.unwrap_or_default(), json }
    }
}

/// Flags that a configuration file replaces as a whole, as for kube-proxy.
#[derive(Args, Clone, Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
#[command(next_help_heading = "Ignored with --config")]
pub struct ReplacedByFile {
    /// kubeconfig file [default: the pod's service account]
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<String>,
    /// Networks of the cluster's pods, at most one for each family
    #[arg(long, value_name = "CIDR[,CIDR]")]
    cluster_cidr: Option<String>,
    /// How to recognize traffic of local pods: ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix
    #[arg(long, value_name = "MODE", value_parser = detect_local_mode)]
    #[serde(serialize_with = "is_given")]
    detect_local_mode: Option<DetectLocalMode>,
    /// Bridge interface of the pods, for BridgeInterface
    #[arg(long, value_name = "NAME")]
    pod_bridge_interface: Option<String>,
    /// Prefix of the names of the pods' interfaces, for InterfaceNamePrefix
    #[arg(long, value_name = "PREFIX")]
    pod_interface_name_prefix: Option<String>,
    /// Node addresses at which NodePorts answer: networks, and the names primary, localhost and all
    #[arg(long, value_name = "CIDR,…", value_delimiter = ',')]
    nodeport_addresses: Option<Vec<String>>,
    /// With the socket plane (eBPF): NodePorts also answer processes of this node on 127.0.0.1 and ::1
    /// [default: true]
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL",
          value_parser = boolean)]
    iptables_localhost_nodeports: Option<bool>,
    /// Masquerade all traffic to ClusterIPs
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL",
          value_parser = boolean)]
    masquerade_all: Option<bool>,
    /// Bit of the packet mark that requests masquerading, 0 to 31 [default: 14]
    #[arg(long, value_name = "BIT", allow_hyphen_values = true, value_parser = integer)]
    iptables_masquerade_bit: Option<i32>,
    /// Overrides the node's primary address; weir does not bind to it
    #[arg(long, value_name = "IP")]
    bind_address: Option<String>,
    /// Address of /healthz and /livez; empty turns them off [default: 0.0.0.0:10256]
    #[arg(long, value_name = "IP:PORT")]
    healthz_bind_address: Option<String>,
    /// Address of /metrics and /proxyMode; empty turns them off [default: 127.0.0.1:10249]
    #[arg(long, value_name = "IP:PORT")]
    metrics_bind_address: Option<String>,
    /// Deprecated: port of --healthz-bind-address; 0 turns it off
    #[arg(long, value_name = "PORT")]
    healthz_port: Option<u16>,
    /// Deprecated: port of --metrics-bind-address; 0 turns it off
    #[arg(long, value_name = "PORT")]
    metrics_port: Option<u16>,
    /// Exit if a port is in use, instead of trying again
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL",
          value_parser = boolean)]
    bind_address_hard_fail: Option<bool>,
    /// Delay before weir retries a failed update of the kernel [default: 30s]
    #[arg(long, value_name = "DURATION", allow_hyphen_values = true)]
    #[serde(serialize_with = "is_given")]
    iptables_sync_period: Option<GoDuration>,
    /// Accepted without effect, because weir applies every change at once
    #[arg(long, value_name = "DURATION", allow_hyphen_values = true)]
    #[serde(serialize_with = "is_given")]
    iptables_min_sync_period: Option<GoDuration>,
    /// The same as --iptables-sync-period, for the mode ipvs
    #[arg(long, value_name = "DURATION", allow_hyphen_values = true)]
    #[serde(serialize_with = "is_given")]
    ipvs_sync_period: Option<GoDuration>,
    /// Accepted without effect, as --iptables-min-sync-period
    #[arg(long, value_name = "DURATION", allow_hyphen_values = true)]
    #[serde(serialize_with = "is_given")]
    ipvs_min_sync_period: Option<GoDuration>,
    /// Networks of IPVS virtual servers that weir keeps when it takes over from kube-proxy's ipvs mode
    #[arg(long, value_name = "CIDR,…", value_delimiter = ',')]
    ipvs_exclude_cidrs: Option<Vec<String>>,
    /// Connections to track for each CPU; 0 keeps the kernel's limit [default: 32768]
    #[arg(long, value_name = "N", allow_hyphen_values = true, value_parser = integer)]
    conntrack_max_per_core: Option<i32>,
    /// Minimum of connections to track, independent of the number of CPUs [default: 131072]
    #[arg(long, value_name = "N", allow_hyphen_values = true, value_parser = integer)]
    conntrack_min: Option<i32>,
    /// Conntrack timeout of an idle established TCP connection; 0 keeps the kernel's [default: 24h]
    #[arg(long, value_name = "DURATION", allow_hyphen_values = true)]
    #[serde(serialize_with = "is_given")]
    conntrack_tcp_timeout_established: Option<GoDuration>,
    /// Conntrack timeout of a TCP connection in CLOSE_WAIT; 0 keeps the kernel's [default: 1h]
    #[arg(long, value_name = "DURATION", allow_hyphen_values = true)]
    #[serde(serialize_with = "is_given")]
    conntrack_tcp_timeout_close_wait: Option<GoDuration>,
    /// Let conntrack accept TCP packets outside the window
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL",
          value_parser = boolean)]
    conntrack_tcp_be_liberal: Option<bool>,
    /// Conntrack timeout of a UDP flow without a reply; 0 keeps the kernel's
    #[arg(long, value_name = "DURATION", allow_hyphen_values = true)]
    #[serde(serialize_with = "is_given")]
    conntrack_udp_timeout: Option<GoDuration>,
    /// Conntrack timeout of a UDP flow with replies; 0 keeps the kernel's
    #[arg(long, value_name = "DURATION", allow_hyphen_values = true)]
    #[serde(serialize_with = "is_given")]
    conntrack_udp_timeout_stream: Option<GoDuration>,
    /// Score for the kernel's OOM killer, -1000 (never killed) to 1000 (killed first) [default: -999]
    #[arg(long, value_name = "N", allow_hyphen_values = true, value_parser = integer)]
    oom_score_adj: Option<i32>,
    /// Requests to the API server per second [default: no limit]
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    kube_api_qps: Option<f64>,
    /// Burst of requests, with --kube-api-qps [default: 10]
    #[arg(long, value_name = "N", allow_hyphen_values = true, value_parser = integer)]
    kube_api_burst: Option<i32>,
    /// Feature gates as NAME=BOOL; only AllowServiceExternalIPs and KubeProxyNFTablesLocalhostNodePorts have
    /// an effect
    #[arg(long, value_name = "NAME=BOOL,…", value_delimiter = ',', value_parser = feature_gate)]
    feature_gates: Option<Vec<(String, bool)>>,
}

fn mode(text: &str) -> Result<Mode, super::file::UnknownWord> {
    text.to_owned().try_into()
}

fn detect_local_mode(text: &str) -> Result<DetectLocalMode, super::file::UnknownWord> {
    text.to_owned().try_into()
}

fn manifests(text: &str) -> Result<PathBuf, String> {
    match text.strip_prefix("manifests:") {
        Some(dir) if !dir.is_empty() => Ok(dir.into()),
        _ => Err("the only accepted form is `manifests:DIR`".to_owned()),
    }
}

fn feature_gate(text: &str) -> Result<(String, bool), String> {
    if text.is_empty() {
        return Ok(Default::default());
    }
    let (name, value) = text.split_once('=').ok_or("`=` is missing")?;
    let value = boolean(value.trim())?;
    Ok((name.trim().to_owned(), value))
}

fn is_given<T, S: serde::Serializer>(value: &Option<T>, serializer: S) -> Result<S::Ok, S::Error> {
    match value {
        Some(_) => serializer.serialize_bool(true),
        None => serializer.serialize_none(),
    }
}

impl ReplacedByFile {
    /// The names of the flags that were given.
    pub(super) fn given(&self) -> Vec<String> {
        let Ok(serde_json::Value::Object(flags)) = serde_json::to_value(self) else { return Vec::new() };
        flags.into_iter().filter(|(_, value)| !value.is_null()).map(|(name, _)| format!("--{name}")).collect()
    }

    /// The fields of a file with the same settings.
    pub(super) fn to_configuration(&self) -> Configuration {
        // The flags are named after iptables and apply to the mode nftables too.
        let rules = Rules {
            masquerade_bit: self.iptables_masquerade_bit,
            masquerade_all: self.masquerade_all.unwrap_or_default(),
            sync_period: self.iptables_sync_period.unwrap_or_default(),
            min_sync_period: self.iptables_min_sync_period.unwrap_or_default(),
        };
        let excluded = self.ipvs_exclude_cidrs.iter().flatten().filter(|it| !it.is_empty()).cloned();
        let ipvs = Ipvs {
            exclude_cidrs: excluded.collect(),
            sync_period: self.ipvs_sync_period.unwrap_or_default(),
            min_sync_period: self.ipvs_min_sync_period.unwrap_or_default(),
        };
        let detect_local = Detectors {
            bridge_interface: self.pod_bridge_interface.clone().unwrap_or_default(),
            interface_name_prefix: self.pod_interface_name_prefix.clone().unwrap_or_default(),
        };
        let client_connection = ClientConnection {
            kubeconfig: self.kubeconfig.clone().unwrap_or_default(),
            qps: self.kube_api_qps.unwrap_or_default(),
            burst: self.kube_api_burst.unwrap_or_default(),
        };
        let gates = self.feature_gates.iter().flatten().filter(|(name, _)| !name.is_empty()).cloned();
        let addresses = self.nodeport_addresses.iter().flatten().filter(|it| !it.is_empty()).cloned();
        let off = |address: &Option<String>, port| port == Some(0) || address.as_deref() == Some("");
        Configuration {
            feature_gates: gates.collect(),
            client_connection,
            bind_address: self.bind_address.clone().unwrap_or_default(),
            healthz_off: off(&self.healthz_bind_address, self.healthz_port),
            metrics_off: off(&self.metrics_bind_address, self.metrics_port),
            healthz_bind_address: listen(&self.healthz_bind_address, self.healthz_port, "0.0.0.0"),
            metrics_bind_address: listen(&self.metrics_bind_address, self.metrics_port, "127.0.0.1"),
            bind_address_hard_fail: self.bind_address_hard_fail.unwrap_or_default(),
            ipvs,
            iptables: Iptables::new(self.iptables_localhost_nodeports, &rules),
            nftables: rules,
            detect_local_mode: self.detect_local_mode.unwrap_or_default(),
            detect_local,
            cluster_cidr: self.cluster_cidr.clone().unwrap_or_default(),
            node_port_addresses: addresses.collect(),
            conntrack: self.conntrack(),
            oom_score_adj: self.oom_score_adj,
            ..Configuration::default()
        }
    }

    fn conntrack(&self) -> Conntrack {
        Conntrack {
            max_per_core: self.conntrack_max_per_core,
            min: self.conntrack_min,
            tcp_established_timeout: self.conntrack_tcp_timeout_established,
            tcp_close_wait_timeout: self.conntrack_tcp_timeout_close_wait,
            tcp_be_liberal: self.conntrack_tcp_be_liberal.unwrap_or_default(),
            udp_timeout: self.conntrack_udp_timeout.unwrap_or_default(),
            udp_stream_timeout: self.conntrack_udp_timeout_stream.unwrap_or_default(),
        }
    }
}

/// The address of a server, from its flag and from the deprecated flag for its port.
fn listen(address: &Option<String>, port: Option<u16>, default: &str) -> String {
    match (address, port) {
        (address, None) => address.clone().unwrap_or_default(),
        (None, Some(port)) => format!("{default}:{port}"),
        (Some(address), Some(port)) => match address.parse() {
            Ok(ip) => std::net::SocketAddr::new(ip, port).to_string(),
            Err(_) => address.clone(),
        },
    }
}

/// kube-proxy's boolean flags that have no effect here.
const IGNORED_SWITCHES: [&str; 4] =
    ["ipvs-strict-arp", "log-json-split-stream", "log-text-split-stream", "profiling"];

/// kube-proxy's flags with a value that have no effect here.
const IGNORED_VALUES: [&str; 13] = [
    "boot-id-file",
    "config-sync-period",
    "ipvs-scheduler",
    "ipvs-tcp-timeout",
    "ipvs-tcpfin-timeout",
    "ipvs-udp-timeout",
    "kube-api-content-type",
    "log-flush-frequency",
    "log-json-info-buffer-size",
    "log-text-info-buffer-size",
    "machine-id-file",
    "show-hidden-metrics-for-version",
    "vmodule",
];

/// Flags of kube-proxy that are accepted so that its command lines work, and that have no effect.
#[derive(Clone, Debug, Default)]
pub struct IgnoredFlags(Vec<&'static str>);

impl IgnoredFlags {
    /// One warning that names the flags that were given, or none.
    pub(super) fn warnings(&self) -> Vec<String> {
        let names: Vec<_> = self.0.iter().map(|name| format!("--{name}")).collect();
        if names.is_empty() {
            return Vec::new();
        }
        vec![format!("these flags of kube-proxy have no effect here: {}", names.join(", "))]
    }
}

impl Args for IgnoredFlags {
    fn augment_args(command: Command) -> Command {
        let hidden = |name: &'static str| Arg::new(name).long(name).action(ArgAction::Append).hide(true);
        let switch = |name| hidden(name).num_args(0..=1).require_equals(true).default_missing_value("true");
        let value = |name| hidden(name).num_args(1).allow_hyphen_values(true);
        command.args(IGNORED_SWITCHES.into_iter().map(switch)).args(IGNORED_VALUES.into_iter().map(value))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for IgnoredFlags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, ClapError> {
        let mut flags = Self::default();
        flags.update_from_arg_matches(matches)?;
        Ok(flags)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), ClapError> {
        let known = IGNORED_SWITCHES.into_iter().chain(IGNORED_VALUES);
        self.0 = known.filter(|name| matches.contains_id(name)).collect();
        Ok(())
    }
}
