//! Turns the fields as written into a checked [`Config`].
//!
//! In: a [`Configuration`] from a file or from flags, the flags that override it, the host. Out: a
//! [`Config`], or every [`Problem`] found, each under the name that the user wrote: a field of the file or a
//! flag.
//!
//! `mode` decides which kube-proxy mode is imitated. The block of that mode supplies sync periods and
//! masquerade settings: nftables has its own block; no mode, iptables and ipvs use the iptables block, and
//! ipvs has its own periods. The default of `nodePortAddresses` is that mode's too (R15). weir's own modes
//! `auto` and `ebpf` imitate kube-proxy without a mode. With a file, the file's `mode` is imitated even if
//! `--proxy-mode` chooses the data plane.

use std::{
    fmt::Display,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use ipnet::IpNet;

use super::{
    Config, ConfigArgs, Conntrack, DetectLocal, Error, GoDuration, Host, LogConfig, NodePortSetting, Problem,
    ProxyMode, RequestLimit, Settings, SourceConfig,
    addresses::{LOCALHOST_GATE, address_of, loopback_node_ports, networks_of_word, socket_address_of},
    file::{self, Configuration, DetectLocalMode, Mode, Rules},
};

const HEALTHZ_PORT: u16 = 10256;
const METRICS_PORT: u16 = 10249;
const EXTERNAL_IPS_GATE: &str = "AllowServiceExternalIPs";

/// The place where a [`Configuration`] was written.
pub(super) enum WrittenIn {
    File(PathBuf),
    Flags,
}

impl WrittenIn {
    /// The name of a field, as written there.
    fn name_of(&self, field: &str) -> String {
        match self {
            Self::File(file) => format!("{}: {field}", file.display()),
            Self::Flags => flag_of(field).to_owned(),
        }
    }
}

fn flag_of(field: &str) -> &str {
    match field.split('[').next().unwrap_or(field) {
        "bindAddress" => "--bind-address",
        "clusterCIDR" => "--cluster-cidr",
        "detectLocal.bridgeInterface" => "--pod-bridge-interface",
        "detectLocal.interfaceNamePrefix" => "--pod-interface-name-prefix",
        "healthzBindAddress" => "--healthz-bind-address",
        "iptables.masqueradeBit" | "nftables.masqueradeBit" => "--iptables-masquerade-bit",
        "iptables.minSyncPeriod" | "nftables.minSyncPeriod" => "--iptables-min-sync-period",
        "iptables.syncPeriod" | "nftables.syncPeriod" => "--iptables-sync-period",
        "ipvs.excludeCIDRs" => "--ipvs-exclude-cidrs",
        "ipvs.minSyncPeriod" => "--ipvs-min-sync-period",
        "ipvs.syncPeriod" => "--ipvs-sync-period",
        "conntrack.maxPerCore" => "--conntrack-max-per-core",
        "conntrack.min" => "--conntrack-min",
        "conntrack.tcpEstablishedTimeout" => "--conntrack-tcp-timeout-established",
        "conntrack.tcpCloseWaitTimeout" => "--conntrack-tcp-timeout-close-wait",
        "conntrack.udpTimeout" => "--conntrack-udp-timeout",
        "conntrack.udpStreamTimeout" => "--conntrack-udp-timeout-stream",
        "oomScoreAdj" => "--oom-score-adj",
        "clientConnection.qps" => "--kube-api-qps",
        "clientConnection.burst" => "--kube-api-burst",
        "logging.format" => "--logging-format",
        "logging.verbosity" => "--v",
        "metricsBindAddress" => "--metrics-bind-address",
        "mode" => "--proxy-mode",
        "nodePortAddresses" => "--nodeport-addresses",
        _ => field,
    }
}

/// Checks all fields and builds the configuration.
pub(super) fn resolve(
    configuration: &Configuration,
    args: &ConfigArgs,
    written_in: &WrittenIn,
    host: &Host,
    warnings: Vec<String>,
) -> Result<(Config, Vec<String>), Error> {
    let mut check = Check { written_in, problems: Vec::new(), warnings };
    let imitated = match written_in {
        WrittenIn::File(_) => configuration.mode,
        WrittenIn::Flags => args.proxy_mode.unwrap_or_default(),
    };
    let rules = check.rules(configuration, imitated);
    let bind_address = check.bind_address(&configuration.bind_address);
    let [healthz, metrics] = check.servers(configuration, bind_address);
    let node_port_addresses = check.node_ports(&configuration.node_port_addresses, imitated);
    let excluded = check.excluded(configuration, imitated);
    let dns = args.dns.resolve(&mut check.problems);
    let model = Settings {
        node_name: check.node_name(args, configuration, host),
        detect_local: check.detect_local(configuration),
        masquerade_all: rules.masquerade_all,
        masquerade_bit: rules.masquerade_bit,
        loopback_node_ports: loopback_node_ports(configuration, imitated, &node_port_addresses),
        node_port_addresses,
        external_ips: check.external_ips(configuration),
        tcp_be_liberal: configuration.conntrack.tcp_be_liberal,
        bind_address: bind_address.filter(|address| !address.is_unspecified()),
        families: host.families,
        dns_service: dns.as_ref().map(|dns| dns.service.clone()),
        dns_clients: dns.as_ref().map(|dns| dns.clients.clone()).unwrap_or_default(),
    };
    let config = Config {
        model,
        source: check.source(args, configuration),
        dns,
        mode: check.mode(args, configuration),
        healthz,
        metrics,
        bind_hard_fail: configuration.bind_address_hard_fail,
        sync_period: rules.sync_period,
        min_sync_period: rules.min_sync_period,
        conntrack: check.conntrack(&configuration.conntrack),
        oom_score_adj: check.oom_score_adj(configuration.oom_score_adj),
        request_limit: check.request_limit(configuration),
        log: check.log(args, configuration),
        take_over: args.take_over.then_some(excluded),
        file: args.file.clone(),
        bpf_root: args.kernel.bpf_root.clone(),
        cgroup_root: args.kernel.cgroup_root(host),
    };
    if check.problems.is_empty() { Ok((config, check.warnings)) } else { Err(Error::Invalid(check.problems)) }
}

/// The settings in the block of the imitated mode.
struct ModeBlock {
    masquerade_all: bool,
    masquerade_bit: u8,
    sync_period: Duration,
    min_sync_period: Duration,
}

/// Collects problems, so that the user sees all of them at once. After a problem a check returns an arbitrary
/// value, which is never used, because no configuration is built then.
struct Check<'a> {
    written_in: &'a WrittenIn,
    problems: Vec<Problem>,
    warnings: Vec<String>,
}

impl Check<'_> {
    fn reject(&mut self, field: &str, message: impl Display) {
        self.problems.push(Problem { setting: self.written_in.name_of(field), message: message.to_string() });
    }

    fn node_name(&mut self, args: &ConfigArgs, configuration: &Configuration, host: &Host) -> String {
        let flag = args.hostname_override.as_deref().unwrap_or_default();
        let file = configuration.hostname_override.as_str();
        let (setting, given) = match (flag, file) {
            ("", "") => ("the host's name".to_owned(), host.name.as_str()),
            ("", file) => (self.written_in.name_of("hostnameOverride"), file),
            (flag, _) => ("--hostname-override".to_owned(), flag),
        };
        let name = given.trim().to_lowercase();
        if name.is_empty() {
            self.problems.push(Problem { setting, message: "a node's name cannot be empty".to_owned() });
        }
        name
    }

    fn source(&mut self, args: &ConfigArgs, configuration: &Configuration) -> SourceConfig {
        let service_ranges = self.networks("--service-cidr", &args.service_cidr);
        if let Some(dir) = &args.source {
            return SourceConfig::Manifests {
                dir: dir.clone(),
                service_ranges,
                status_file: args.manifest_status.clone(),
            };
        }
        if !service_ranges.is_empty() || args.manifest_status.is_some() {
            self.warnings
                .push("--service-cidr and --manifest-status have no effect without --source".to_owned());
        }
        let kubeconfig = &configuration.client_connection.kubeconfig;
        SourceConfig::Kubernetes {
            kubeconfig: (!kubeconfig.is_empty()).then(|| kubeconfig.into()),
            servers: args.master.iter().map(|it| it.trim().to_owned()).filter(|it| !it.is_empty()).collect(),
        }
    }

    fn networks(&mut self, setting: &str, given: &[String]) -> Vec<IpNet> {
        let mut networks = Vec::new();
        for text in given.iter().map(|text| text.trim()).filter(|text| !text.is_empty()) {
            match text.parse::<IpNet>() {
                Ok(network) => networks.push(network.trunc()),
                Err(_) => {
                    let message = format!("`{text}` is not a network such as 10.0.0.0/16 or fd00::/64");
                    self.problems.push(Problem { setting: setting.to_owned(), message });
                }
            }
        }
        networks
    }

    fn mode(&mut self, args: &ConfigArgs, configuration: &Configuration) -> ProxyMode {
        let (setting, given) = match (args.proxy_mode, self.written_in) {
            (Some(mode), _) => ("--proxy-mode".to_owned(), mode),
            (None, WrittenIn::File(_)) => (self.written_in.name_of("mode"), configuration.mode),
            (None, WrittenIn::Flags) => return ProxyMode::Auto,
        };
        let kube_proxy_mode = match given {
            Mode::Auto => return ProxyMode::Auto,
            Mode::Ebpf => return ProxyMode::Ebpf,
            Mode::Nftables => return ProxyMode::Nftables,
            Mode::Unset => "no mode",
            Mode::Iptables => "iptables",
            Mode::Ipvs => "ipvs",
        };
        self.warnings.push(format!(
            "{setting}: {kube_proxy_mode} means auto here; without eBPF, NodePorts answer on 127.0.0.1 only if nodePortAddresses contains localhost"
        ));
        ProxyMode::Auto
    }

    fn rules(&mut self, configuration: &Configuration, imitated: Mode) -> ModeBlock {
        let (name, block) = match imitated {
            Mode::Nftables => ("nftables", configuration.nftables.clone()),
            Mode::Unset | Mode::Auto | Mode::Ebpf | Mode::Iptables | Mode::Ipvs => {
                ("iptables", configuration.iptables.rules())
            }
        };
        let Rules { masquerade_bit, masquerade_all, sync_period, min_sync_period } = block;
        let (periods, sync, min, least) = match imitated {
            Mode::Ipvs => ("ipvs", configuration.ipvs.sync_period, configuration.ipvs.min_sync_period, 0),
            _ => (name, sync_period, min_sync_period, 1),
        };
        let (sync_period, min_sync_period) = self.periods(periods, sync, min, Duration::from_secs(least));
        // kube-proxy checks the iptables block in every mode.
        if name != "iptables" {
            self.bit("iptables", configuration.iptables.masquerade_bit);
        }
        let masquerade_bit = self.bit(name, masquerade_bit);
        ModeBlock { masquerade_all, masquerade_bit, sync_period, min_sync_period }
    }

    fn bit(&mut self, block: &str, given: Option<i32>) -> u8 {
        let bit = given.unwrap_or(14);
        u8::try_from(bit).ok().filter(|bit| *bit < 32).unwrap_or_else(|| {
            self.reject(&format!("{block}.masqueradeBit"), format_args!("{bit} is not a bit from 0 to 31"));
            0
        })
    }

    fn periods(
        &mut self,
        block: &str,
        sync: GoDuration,
        min: GoDuration,
        least: Duration,
    ) -> (Duration, Duration) {
        let or = |given: GoDuration, default| if given.is_zero() { GoDuration::from(default) } else { given };
        let (sync, min) = (or(sync, Duration::from_secs(30)), or(min, least));
        let periods = (sync.positive(), min.positive());
        if periods.0.is_none() {
            self.reject(&format!("{block}.syncPeriod"), format_args!("{sync} is not more than 0"));
        }
        if periods.1.is_none() {
            self.reject(&format!("{block}.minSyncPeriod"), format_args!("{min} is less than 0"));
        }
        let (Some(sync_period), Some(min_sync_period)) = periods else { return Default::default() };
        if sync_period < min_sync_period {
            let message = format_args!("{sync} is less than minSyncPeriod, which is {min}");
            self.reject(&format!("{block}.syncPeriod"), message);
        }
        (sync_period, min_sync_period)
    }

    fn detect_local(&mut self, configuration: &Configuration) -> DetectLocal {
        match configuration.detect_local_mode {
            DetectLocalMode::NodeCidr => DetectLocal::NodeCidr,
            DetectLocalMode::ClusterCidr => {
                DetectLocal::ClusterCidr(self.cluster_cidrs(&configuration.cluster_cidr))
            }
            DetectLocalMode::BridgeInterface => DetectLocal::Bridge(
                self.interface("detectLocal.bridgeInterface", &configuration.detect_local.bridge_interface),
            ),
            DetectLocalMode::InterfaceNamePrefix => DetectLocal::InterfacePrefix(self.interface(
                "detectLocal.interfaceNamePrefix",
                &configuration.detect_local.interface_name_prefix,
            )),
        }
    }

    fn interface(&mut self, field: &str, name: &str) -> String {
        if name.is_empty() {
            self.reject(field, "the chosen detectLocalMode needs a name here");
        }
        name.to_owned()
    }

    /// The networks of `ipvs.excludeCIDRs`. In other modes than ipvs a wrong one is only a warning, because
    /// kube-proxy reads the field in that mode only.
    fn excluded(&mut self, configuration: &Configuration, imitated: Mode) -> Vec<IpNet> {
        let setting = self.written_in.name_of("ipvs.excludeCIDRs");
        let before = self.problems.len();
        let networks = self.networks(&setting, &configuration.ipvs.exclude_cidrs);
        if imitated != Mode::Ipvs {
            let ignored = self.problems.drain(before..).map(|problem| format!("{problem}; it is ignored"));
            self.warnings.extend(ignored);
        }
        networks
    }

    fn cluster_cidrs(&mut self, given: &str) -> Vec<IpNet> {
        let setting = self.written_in.name_of("clusterCIDR");
        let parts: Vec<String> = given.split(',').map(str::to_owned).collect();
        let networks = self.networks(&setting, &parts);
        let v4 = networks.iter().filter(|network| matches!(network, IpNet::V4(_))).count();
        if v4 > 1 || networks.len() - v4 > 1 {
            self.reject("clusterCIDR", format_args!("`{given}` has more than one network of a family"));
        }
        networks
    }

    fn node_ports(&mut self, given: &[String], imitated: Mode) -> NodePortSetting {
        if given.is_empty() {
            return match imitated {
                Mode::Nftables => NodePortSetting::PRIMARY,
                Mode::Unset | Mode::Auto | Mode::Ebpf | Mode::Iptables | Mode::Ipvs => NodePortSetting::ALL,
            };
        }
        let mut setting = NodePortSetting::of(Vec::new());
        for (index, text) in given.iter().enumerate() {
            let field = format!("nodePortAddresses[{index}]");
            let earlier = &given[..index];
            match (text.as_str(), networks_of_word(text)) {
                ("primary", _) | (_, Some(_)) if earlier.contains(text) => {
                    self.reject(&field, format_args!("`{text}` is given twice"));
                }
                ("primary", _) => setting.primary = true,
                (_, Some(networks)) => setting.networks.extend(networks),
                (_, None) => match text.parse::<IpNet>() {
                    Ok(network) => setting.networks.push(network.trunc()),
                    Err(_) => {
                        let names = "primary, localhost and all";
                        let message = format_args!(
                            "`{text}` is neither a network such as 192.0.2.0/24 nor one of the names {names}"
                        );
                        self.reject(&field, message);
                    }
                },
            }
        }
        setting
    }

    fn external_ips(&mut self, configuration: &Configuration) -> bool {
        let others: Vec<_> = (configuration.feature_gates.keys())
            .filter(|name| ![EXTERNAL_IPS_GATE, LOCALHOST_GATE].contains(&name.as_str()))
            .map(String::as_str)
            .collect();
        if !others.is_empty() {
            self.warnings.push(format!("these feature gates have no effect here: {}", others.join(", ")));
        }
        configuration.feature_gates.get(EXTERNAL_IPS_GATE).copied().unwrap_or(true)
    }

    fn bind_address(&mut self, given: &str) -> Option<IpAddr> {
        if given.is_empty() {
            return None;
        }
        let address = address_of(given);
        if address.is_none() {
            self.reject("bindAddress", format_args!("`{given}` is not an IP address"));
        }
        address
    }

    /// The addresses of the health and the metrics server. Their defaults have the family of `bind_address`.
    fn servers(
        &mut self,
        configuration: &Configuration,
        bind_address: Option<IpAddr>,
    ) -> [Option<SocketAddr>; 2] {
        let (any, loopback) = match bind_address {
            Some(IpAddr::V6(_)) => ("::", "::1"),
            Some(IpAddr::V4(_)) | None => ("0.0.0.0", "127.0.0.1"),
        };
        let healthz = (!configuration.healthz_off).then(|| {
            self.listen("healthzBindAddress", &configuration.healthz_bind_address, any, HEALTHZ_PORT)
        });
        let metrics = (!configuration.metrics_off).then(|| {
            self.listen("metricsBindAddress", &configuration.metrics_bind_address, loopback, METRICS_PORT)
        });
        [healthz.flatten(), metrics.flatten()]
    }

    fn listen(&mut self, field: &str, given: &str, default: &str, port: u16) -> Option<SocketAddr> {
        let given = if given.is_empty() { default } else { given };
        let address = match address_of(given) {
            Some(ip) => Some(SocketAddr::new(ip, port)),
            None => socket_address_of(given).filter(|address| address.port() != 0),
        };
        if address.is_none() {
            self.reject(field, format_args!("`{given}` is not an IP address with a port from 1 to 65535"));
        }
        address
    }

    /// The settings of connection tracking. 0 keeps the kernel's value; a missing field has kube-proxy's
    /// default.
    fn conntrack(&mut self, given: &file::Conntrack) -> Conntrack {
        let mut limit = |field: &str, given: Option<i32>, default: u32| {
            let Some(given) = given else { return default };
            u32::try_from(given).unwrap_or_else(|_| {
                self.reject(&format!("conntrack.{field}"), format_args!("{given} is less than 0"));
                default
            })
        };
        let max_per_core = Some(limit("maxPerCore", given.max_per_core, 32 << 10)).filter(|it| *it > 0);
        let min = limit("min", given.min, 128 << 10);
        let mut timeout = |field: &str, given: Option<GoDuration>, default: u64| {
            let given = given.unwrap_or_else(|| Duration::from_secs(default).into());
            let kept = given.positive();
            if kept.is_none() {
                self.reject(&format!("conntrack.{field}"), format_args!("{given} is less than 0"));
            }
            // The kernel's unit is whole seconds.
            kept.filter(|timeout| timeout.as_secs() > 0)
        };
        let tcp_established_timeout =
            timeout("tcpEstablishedTimeout", given.tcp_established_timeout, 24 * 3600);
        let tcp_close_wait_timeout = timeout("tcpCloseWaitTimeout", given.tcp_close_wait_timeout, 3600);
        let udp_timeout = timeout("udpTimeout", Some(given.udp_timeout), 0);
        let udp_stream_timeout = timeout("udpStreamTimeout", Some(given.udp_stream_timeout), 0);
        Conntrack {
            max_per_core,
            min,
            tcp_established_timeout,
            tcp_close_wait_timeout,
            tcp_be_liberal: given.tcp_be_liberal,
            udp_timeout,
            udp_stream_timeout,
        }
    }

    fn oom_score_adj(&mut self, given: Option<i32>) -> Option<i32> {
        if let Some(score) = given.filter(|score| !(-1000..=1000).contains(score)) {
            self.reject("oomScoreAdj", format_args!("{score} is not from -1000 to 1000"));
        }
        given
    }

    fn request_limit(&mut self, configuration: &Configuration) -> Option<RequestLimit> {
        let file::ClientConnection { qps, burst, .. } = configuration.client_connection;
        let burst = match burst {
            0 => 10,
            burst => u64::try_from(burst).unwrap_or_else(|_| {
                self.reject("clientConnection.burst", format_args!("{burst} is less than 0"));
                1
            }),
        };
        // Less than one request an hour is a mistake, and no agent could work with it.
        if qps > 0.0 && qps < 1.0 / 3600.0 {
            self.reject("clientConnection.qps", format_args!("{qps} is less than one request an hour"));
            return None;
        }
        let window = (qps > 0.0).then(|| Duration::try_from_secs_f64(burst as f64 / qps).ok()).flatten();
        window.map(|window| RequestLimit { requests: burst, window })
    }

    fn log(&mut self, args: &ConfigArgs, configuration: &Configuration) -> LogConfig {
        let format = args.log.logging_format.as_deref().unwrap_or(&configuration.logging.format);
        if !matches!(format, "" | "text" | "json") {
            self.reject("logging.format", format_args!("`{format}` is neither text nor json"));
        }
        let verbosity = args.log.verbosity.unwrap_or(configuration.logging.verbosity);
        if i32::try_from(verbosity).is_err() {
            self.reject("logging.verbosity", format_args!("{verbosity} is more than {}", i32::MAX));
        }
        LogConfig { verbosity, json: format == "json" }
    }
}
