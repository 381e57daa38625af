//! Files and flags in, configuration, complaints and warnings out (section 5; R15; P2's period).

use std::{io::Write as _, time::Duration};

use clap::Parser;
use ipnet::IpNet;
use tempfile::NamedTempFile;

use super::{
    Conntrack, DetectLocal, Error, Host, Loaded, LogConfig, LoopbackNodePorts, NodePortSetting, ProxyMode,
    RequestLimit, SourceConfig, flags::ConfigArgs, load,
};
use crate::model::PerFamily;

#[derive(Parser)]
#[command(args_override_self = true)]
struct Line {
    #[command(flatten)]
    args: ConfigArgs,
}

fn host() -> Host {
    let families = PerFamily { v4: true, v6: true };
    Host { name: "Host-Name\n".to_owned(), families, cgroup_root: Some("/mounted/here".into()) }
}

/// Loads flags, one a word.
pub(super) fn flags(line: &str) -> Result<Loaded, Error> {
    let words = ["weir"].into_iter().chain(line.split_ascii_whitespace());
    load(&Line::try_parse_from(words).unwrap().args, &host())
}

/// Loads a file with these fields, beside these flags. The file goes by the name `FILE` in what comes back.
pub(super) fn file_with(fields: &str, line: &str) -> Result<Loaded, String> {
    let mut file = NamedTempFile::new().unwrap();
    let head = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";
    write!(file, "{head}{fields}").unwrap();
    let path = file.path().to_str().unwrap().to_owned();
    let mut loaded = flags(&format!("--config {path} {line}"))
        .map_err(|error| error.to_string().replace(&path, "FILE"))?;
    loaded.warnings.iter_mut().for_each(|warning| *warning = warning.replace(&path, "FILE"));
    Ok(loaded)
}

pub(super) fn file(fields: &str) -> Loaded {
    file_with(fields, "").unwrap()
}

fn complaint(fields: &str) -> String {
    file_with(fields, "").unwrap_err()
}

/// What kubeadm 1.36 installs: mostly nulls and zeros.
const KUBEADM: &str = r#"
bindAddress: 0.0.0.0
bindAddressHardFail: false
clientConnection: {acceptContentTypes: "", burst: 0, contentType: "", kubeconfig: /var/lib/kube-proxy/kubeconfig.conf, qps: 0}
clusterCIDR: 10.244.0.0/16,fd00:10:244::/56
configSyncPeriod: 0s
conntrack: {maxPerCore: null, min: null, tcpBeLiberal: false, tcpCloseWaitTimeout: null, tcpEstablishedTimeout: null, udpStreamTimeout: 0s, udpTimeout: 0s}
detectLocal: {bridgeInterface: "", interfaceNamePrefix: ""}
detectLocalMode: ""
enableProfiling: false
healthzBindAddress: ""
hostnameOverride: ""
iptables: {localhostNodePorts: null, masqueradeAll: false, masqueradeBit: null, minSyncPeriod: 0s, syncPeriod: 0s}
ipvs: {excludeCIDRs: null, minSyncPeriod: 0s, scheduler: "", strictARP: false, syncPeriod: 0s, tcpFinTimeout: 0s, tcpTimeout: 0s, udpTimeout: 0s}
logging: {flushFrequency: 0, options: {json: {infoBufferSize: "0"}, text: {infoBufferSize: "0"}}, verbosity: 0}
metricsBindAddress: ""
mode: ""
nftables: {masqueradeAll: false, masqueradeBit: null, minSyncPeriod: 0s, syncPeriod: 0s}
nodePortAddresses: null
oomScoreAdj: null
portRange: ""
showHiddenMetricsForVersion: ""
winkernel: {enableDSR: false, forwardHealthCheckVip: false, networkName: "", rootHnsEndpointName: "", sourceVip: ""}
"#;

#[test]
fn kubeadms_file_loads_as_kube_proxy_reads_it() {
    let Loaded { config, warnings, document: _ } = file_with(KUBEADM, "--hostname-override=Node-1").unwrap();
    assert_eq!(config.model.node_name, "node-1");
    assert_eq!(
        config.source,
        SourceConfig::Kubernetes {
            kubeconfig: Some("/var/lib/kube-proxy/kubeconfig.conf".into()),
            servers: vec![]
        }
    );
    assert_eq!(config.mode, ProxyMode::Auto);
    let pods = ["10.244.0.0/16", "fd00:10:244::/56"].map(|it| it.parse().unwrap()).to_vec();
    assert_eq!(config.model.detect_local, DetectLocal::ClusterCidr(pods));
    assert_eq!((config.model.masquerade_all, config.model.masquerade_bit), (false, 14));
    assert_eq!(config.model.node_port_addresses, NodePortSetting::ALL, "R15");
    assert!(config.model.external_ips, "R10");
    assert_eq!(config.model.bind_address, None);
    assert_eq!(config.healthz.unwrap().to_string(), "0.0.0.0:10256");
    assert_eq!(config.metrics.unwrap().to_string(), "127.0.0.1:10249");
    assert_eq!(
        (config.sync_period, config.min_sync_period),
        (Duration::from_secs(30), Duration::from_secs(1))
    );
    let conntrack = Conntrack {
        max_per_core: Some(32 << 10),
        min: 128 << 10,
        tcp_established_timeout: Some(Duration::from_secs(24 * 3600)),
        tcp_close_wait_timeout: Some(Duration::from_secs(3600)),
        ..Conntrack::default()
    };
    assert_eq!(config.conntrack, conntrack, "kube-proxy's defaults");
    assert_eq!((config.oom_score_adj, config.request_limit), (None, None));
    assert_eq!(config.log, LogConfig::default());
    insta::assert_snapshot!(warnings.join("\n"), @r"
        FILE: mode: no mode means auto here; without eBPF, NodePorts answer on 127.0.0.1 only where nodePortAddresses name localhost
    ");
}

#[test]
fn what_is_not_a_configuration_is_refused() {
    let mut refused = Vec::new();
    for text in [
        "",
        "a: [",
        "- a",
        "kind: KubeProxyConfiguration",
        "apiVersion: kubeproxy.config.k8s.io/v1beta1\nkind: KubeProxyConfiguration",
        "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeletConfiguration",
    ] {
        let mut file = NamedTempFile::new().unwrap();
        write!(file, "{text}").unwrap();
        let path = file.path().to_str().unwrap();
        let error = flags(&format!("--config {path}")).unwrap_err();
        refused.push(error.to_string().replace(path, "FILE"));
    }
    insta::assert_snapshot!(refused.join("\n"), @r"
    FILE: this is not a mapping of fields to values
    FILE: did not find expected node content at line 2 column 1, while parsing a flow node
    FILE: this is not a mapping of fields to values
    FILE: apiVersion: `` is not `kubeproxy.config.k8s.io/v1alpha1`
    FILE: apiVersion: `kubeproxy.config.k8s.io/v1beta1` is not `kubeproxy.config.k8s.io/v1alpha1`
    FILE: kind: `KubeletConfiguration` is not `KubeProxyConfiguration`
    ");
    insta::assert_snapshot!(flags("--config /nowhere/config.conf").unwrap_err(), @"cannot read the configuration file `/nowhere/config.conf`");
}

/// As kube-proxy, whose YAML reader stops at the end of the first document.
#[test]
fn the_first_document_of_a_file_counts_and_others_are_warned_of() {
    let head = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";
    let first = format!("{head}hostnameOverride: first\n");
    let warning = "FILE: more than one document is here; only the first one counts";
    for (text, warned) in [
        (format!("\u{feff}{first}"), false),
        (format!("\u{feff}---\n{first}"), false),
        (format!("{first}---\n"), false),
        (format!("---\n{first}---\n---\n# nothing\n"), false),
        (format!("{first}...\n"), false),
        (format!("{first}---\nkind: KubeletConfiguration\n"), true),
        (format!("{first}---\n---\n{head}hostnameOverride: third\n"), true),
        (format!("{first}---\na: [\n"), true),
    ] {
        let mut file = NamedTempFile::new().unwrap();
        write!(file, "{text}").unwrap();
        let path = file.path().to_str().unwrap();
        let line = format!("--config {path} --proxy-mode nftables");
        let loaded = flags(&line).unwrap_or_else(|error| panic!("{text:?}: {error}"));
        assert_eq!(loaded.config.model.node_name, "first", "{text:?}");
        let warnings: Vec<_> = loaded.warnings.iter().map(|it| it.replace(path, "FILE")).collect();
        assert_eq!(warnings, if warned { vec![warning] } else { vec![] }, "{text:?}");
    }
}

#[test]
fn verbosity_has_no_bound_of_ours() {
    assert_eq!(file("mode: auto\nlogging: {verbosity: 300}").config.log.verbosity, 300);
    assert_eq!(flags("-v 300").unwrap().config.log.verbosity, 300);
}

#[test]
fn wrong_types_name_the_field_and_the_value() {
    let fields = [
        "hostnameOverride: 5",
        "mode: userspace",
        "detectLocalMode: Guess",
        "iptables: {masqueradeBit: x}",
        "iptables: {syncPeriod: 30}",
        "nftables: {minSyncPeriod: soon}",
        "iptables: {syncPeriod: 30 seconds}",
        "conntrack: {tcpEstablishedTimeout: PT1H}",
        "ipvs: {minSyncPeriod: ''}",
        "nodePortAddresses: 10.0.0.0/8",
        "nodePortAddresses: [10.0.0.0/8, 7]",
        "featureGates: {AllowServiceExternalIPs: perhaps}",
        "conntrack: 5",
    ];
    insta::assert_snapshot!(fields.map(complaint).join("\n"), @r#"
        FILE: hostnameOverride: invalid type: integer `5`, expected a string
        FILE: mode: `userspace` is not one of auto, ebpf, nftables, iptables, ipvs and the empty word
        FILE: detectLocalMode: `Guess` is not one of ClusterCIDR, NodeCIDR, BridgeInterface and InterfaceNamePrefix
        FILE: iptables.masqueradeBit: invalid type: string "x", expected i32
        FILE: iptables.syncPeriod: invalid type: integer `30`, expected a string
        FILE: nftables.minSyncPeriod: `soon` is not a duration such as 30s, 5m or 1h30m
        FILE: iptables.syncPeriod: `30 seconds` is not a duration such as 30s, 5m or 1h30m
        FILE: conntrack.tcpEstablishedTimeout: `PT1H` is not a duration such as 30s, 5m or 1h30m
        FILE: ipvs.minSyncPeriod: `` is not a duration such as 30s, 5m or 1h30m
        FILE: nodePortAddresses: invalid type: string "10.0.0.0/8", expected a sequence
        FILE: nodePortAddresses[1]: invalid type: integer `7`, expected a string
        FILE: featureGates.AllowServiceExternalIPs: invalid type: string "perhaps", expected a boolean
        FILE: conntrack: invalid type: integer `5`, expected a mapping of fields to values
    "#);
}

#[test]
fn wrong_values_name_the_field_and_the_value() {
    let fields = [
        "clusterCIDR: 10.244.0.0",
        "clusterCIDR: 10.0.0.0/8,10.1.0.0/16",
        "detectLocalMode: BridgeInterface",
        "detectLocalMode: InterfaceNamePrefix",
        "iptables: {masqueradeBit: 32}",
        "mode: nftables\nnftables: {masqueradeBit: -1}",
        "iptables: {syncPeriod: -5s}",
        "mode: ipvs\nipvs: {syncPeriod: 1s, minSyncPeriod: 2s}",
        "mode: nftables\nnftables: {minSyncPeriod: -1s}",
        "mode: ipvs\nipvs: {excludeCIDRs: [10.0.0.0/8, 10.1.2.3]}",
        "mode: nftables\niptables: {masqueradeBit: 40}",
        "bindAddress: eth0",
        "healthzBindAddress: localhost:10256",
        "metricsBindAddress: 127.0.0.1:0",
        "nodePortAddresses: [primary, 10.0.0.0/8, primary]",
        "nodePortAddresses: [eth0]",
        "conntrack: {min: -1, udpTimeout: -1s}",
        "hostnameOverride: ' '",
        "logging: {format: xml}",
        "logging: {verbosity: 2147483648}",
        "oomScoreAdj: 1001",
        "clientConnection: {burst: -1}",
        "clientConnection: {qps: 0.0001}",
    ];
    insta::assert_snapshot!(fields.map(complaint).join("\n"), @r"
        FILE: clusterCIDR: `10.244.0.0` is not a network such as 10.0.0.0/16 or fd00::/64
        FILE: clusterCIDR: `10.0.0.0/8,10.1.0.0/16` has more than one network of a family
        FILE: detectLocal.bridgeInterface: the chosen way to tell local pods needs a name here
        FILE: detectLocal.interfaceNamePrefix: the chosen way to tell local pods needs a name here
        FILE: iptables.masqueradeBit: 32 is not a bit from 0 to 31
        FILE: nftables.masqueradeBit: -1 is not a bit from 0 to 31
        FILE: iptables.syncPeriod: -5s is not more than 0
        FILE: ipvs.syncPeriod: 1s is less than minSyncPeriod, which is 2s
        FILE: nftables.minSyncPeriod: -1s is less than 0
        FILE: ipvs.excludeCIDRs: `10.1.2.3` is not a network such as 10.0.0.0/16 or fd00::/64
        FILE: iptables.masqueradeBit: 40 is not a bit from 0 to 31
        FILE: bindAddress: `eth0` is not an IP address
        FILE: healthzBindAddress: `localhost:10256` is not an IP address with a port from 1 to 65535
        FILE: metricsBindAddress: `127.0.0.1:0` is not an IP address with a port from 1 to 65535
        FILE: nodePortAddresses[2]: `primary` stands there twice
        FILE: nodePortAddresses[0]: `eth0` is neither a network such as 192.0.2.0/24 nor one of the words primary, localhost and all
        FILE: conntrack.min: -1 is less than 0
        FILE: conntrack.udpTimeout: -1s is less than 0
        FILE: hostnameOverride: a node's name cannot be empty
        FILE: logging.format: `xml` is neither text nor json
        FILE: logging.verbosity: 2147483648 is more than 2147483647
        FILE: oomScoreAdj: 1001 is not from -1000 to 1000
        FILE: clientConnection.burst: -1 is less than 0
        FILE: clientConnection.qps: 0.0001 is next to nothing
    ");
}

#[test]
fn a_wrong_flag_is_called_by_its_name() {
    let lines = [
        "--cluster-cidr 10.0.0.0/8,10.1.0.0/16",
        "--iptables-masquerade-bit 40",
        "--nodeport-addresses localhost,10.0.0.0/8,localhost",
        "--healthz-bind-address nowhere",
        "--iptables-sync-period 1s --iptables-min-sync-period 2s",
        "--detect-local-mode BridgeInterface",
        "--source manifests:/d --service-cidr 10.96.0.0",
        "--conntrack-tcp-timeout-established -1s --conntrack-max-per-core -2",
        "--proxy-mode ipvs --ipvs-sync-period 1s --ipvs-min-sync-period 2s",
        "--proxy-mode ipvs --ipvs-exclude-cidrs 10.0.0.0/8,nowhere",
        "--oom-score-adj 5000",
    ];
    insta::assert_snapshot!(lines.map(|line| flags(line).unwrap_err().to_string()).join("\n"), @r"
        --cluster-cidr: `10.0.0.0/8,10.1.0.0/16` has more than one network of a family
        --iptables-masquerade-bit: 40 is not a bit from 0 to 31
        --nodeport-addresses: `localhost` stands there twice
        --healthz-bind-address: `nowhere` is not an IP address with a port from 1 to 65535
        --iptables-sync-period: 1s is less than minSyncPeriod, which is 2s
        --pod-bridge-interface: the chosen way to tell local pods needs a name here
        --service-cidr: `10.96.0.0` is not a network such as 10.0.0.0/16 or fd00::/64
        --conntrack-max-per-core: -2 is less than 0
        --conntrack-tcp-timeout-established: -1s is less than 0
        --ipvs-sync-period: 1s is less than minSyncPeriod, which is 2s
        --ipvs-exclude-cidrs: `nowhere` is not a network such as 10.0.0.0/16 or fd00::/64
        --oom-score-adj: 5000 is not from -1000 to 1000
    ");
}

#[test]
fn virtual_servers_of_others_are_left_out_of_what_is_taken_over() {
    let networks = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<IpNet>>();
    let given = file("ipvs: {excludeCIDRs: [192.0.2.0/24, 'fd00:1::/64']}");
    assert_eq!(given.config.take_over, Some(networks(&["192.0.2.0/24", "fd00:1::/64"])));
    let flagged = flags("--ipvs-exclude-cidrs 192.0.2.7/32,fd00:1::/64").unwrap();
    assert_eq!(flagged.config.take_over, Some(networks(&["192.0.2.7/32", "fd00:1::/64"])));
    assert_eq!(flags("").unwrap().config.take_over, Some(Vec::new()));
    assert_eq!(flags("--take-over=false").unwrap().config.take_over, None);
}

#[test]
fn fields_that_mean_nothing_are_warned_of_by_path() {
    let loaded = file(
        "mode: nftables\nhostnameOverride: a\nhostnameOverride: b\nhostnameOverwrite: c\nnftables: {masqueradeBits: 1}\n\
         oomScoreAdj: -500\nenableProfiling: true\nipvs: {scheduler: lc, tcpTimeout: 0s}\n\
         configSyncPeriod: 15m0s\nfeatureGates: {Other: true}\nconntrack: {tcpBeLiberal: true}\n\
         logging: {flushFrequency: 5s, vmodule: [{filePattern: a, verbosity: 1}]}",
    );
    assert_eq!(loaded.config.model.node_name, "b", "the last one counts");
    insta::assert_snapshot!(loaded.warnings.join("\n"), @r#"
        FILE: hostnameOverride is given twice; the last one counts
        FILE: enableProfiling has no effect here (it is set to true)
        FILE: hostnameOverwrite is not a known field
        FILE: ipvs.scheduler has no effect here (it is set to lc)
        FILE: logging.vmodule has no effect here (it is set to [{"filePattern":"a","verbosity":1}])
        FILE: nftables.masqueradeBits is not a known field
        these feature gates have no effect here: Other
    "#);
}

#[test]
fn with_a_file_only_some_flags_count_and_the_others_are_named() {
    let loaded = file_with(
        "mode: nftables\nlogging: {verbosity: 2, format: json}\nhostnameOverride: filed",
        "--proxy-mode auto --hostname-override flagged -v 4 --master https://a:6443,https://b:6443 \
         --cgroup-root /c --masquerade-all --nodeport-addresses 10.0.0.0/8 --iptables-sync-period 5s --profiling",
    )
    .unwrap();
    let config = loaded.config;
    assert_eq!(config.model.node_name, "flagged");
    assert_eq!(config.mode, ProxyMode::Auto);
    assert_eq!(
        config.model.node_port_addresses,
        NodePortSetting::PRIMARY,
        "the file's mode is the one imitated"
    );
    assert!(!config.model.masquerade_all);
    assert_eq!(config.sync_period, Duration::from_secs(30));
    assert_eq!(config.log, LogConfig { verbosity: 4, json: true });
    assert_eq!(config.cgroup_root.to_str(), Some("/c"));
    let servers = vec!["https://a:6443".to_owned(), "https://b:6443".to_owned()];
    assert_eq!(config.source, SourceConfig::Kubernetes { kubeconfig: None, servers });
    insta::assert_snapshot!(loaded.warnings.join("\n"), @r"
        these flags of kube-proxy have no effect here: --profiling
        `--config` is given, so these flags are ignored: --iptables-sync-period, --masquerade-all, --nodeport-addresses
    ");
}

#[test]
fn the_node_name_is_the_flags_then_the_files_then_the_hosts() {
    for (fields, line, name) in [
        ("hostnameOverride: ' File '", "--hostname-override Flag", "flag"),
        ("hostnameOverride: ' File '", "--hostname-override=", "file"),
        ("hostnameOverride: ' File '", "", "file"),
        ("hostnameOverride: ''", "", "host-name"),
    ] {
        assert_eq!(file_with(fields, line).unwrap().config.model.node_name, name, "{fields} {line}");
    }
    let nameless = Host { name: String::new(), ..host() };
    let error = load(&Line::try_parse_from(["weir"]).unwrap().args, &nameless).unwrap_err();
    assert_eq!(error.to_string(), "the host's name: a node's name cannot be empty");
}

/// R15, and which block of the file supplies what.
#[test]
fn mode_picks_the_block_and_the_nodeport_default() {
    const ALL: NodePortSetting = NodePortSetting::ALL;
    let blocks = "iptables: {masqueradeBit: 1, masqueradeAll: true, syncPeriod: 10s, minSyncPeriod: 2s}\n\
                  nftables: {masqueradeBit: 3, syncPeriod: 20s, minSyncPeriod: 4s}\n\
                  ipvs: {syncPeriod: 40s}";
    for (mode, bit, all, sync, min, node_ports) in [
        ("''", 1, true, 10, 2, ALL),
        ("iptables", 1, true, 10, 2, ALL),
        ("ipvs", 1, true, 40, 0, ALL),
        ("nftables", 3, false, 20, 4, NodePortSetting::PRIMARY),
        ("auto", 1, true, 10, 2, ALL),
        ("ebpf", 1, true, 10, 2, ALL),
    ] {
        let config = file(&format!("mode: {mode}\n{blocks}")).config;
        assert_eq!((config.model.masquerade_bit, config.model.masquerade_all), (bit, all), "{mode}");
        let periods = (config.sync_period.as_secs(), config.min_sync_period.as_secs());
        assert_eq!((periods, config.model.node_port_addresses), ((sync, min), node_ports), "{mode}");
    }
}

#[test]
fn r15_flags_alone_imitate_the_mode_they_name() {
    for (line, mode, node_ports) in [
        ("", ProxyMode::Auto, NodePortSetting::ALL),
        ("--proxy-mode=", ProxyMode::Auto, NodePortSetting::ALL),
        ("--proxy-mode auto", ProxyMode::Auto, NodePortSetting::ALL),
        ("--proxy-mode ebpf", ProxyMode::Ebpf, NodePortSetting::ALL),
        ("--proxy-mode iptables", ProxyMode::Auto, NodePortSetting::ALL),
        ("--proxy-mode nftables", ProxyMode::Nftables, NodePortSetting::PRIMARY),
        ("--proxy-mode nftables --nodeport-addresses primary", ProxyMode::Nftables, NodePortSetting::PRIMARY),
        (
            "--proxy-mode nftables --nodeport-addresses 192.0.2.7/24,::/0",
            ProxyMode::Nftables,
            NodePortSetting::of(vec!["192.0.2.0/24".parse().unwrap(), "::/0".parse().unwrap()]),
        ),
    ] {
        let config = flags(line).unwrap().config;
        assert_eq!((config.mode, config.model.node_port_addresses), (mode, node_ports), "{line}");
    }
}

#[test]
fn r13_r18_loopback_node_ports_follow_the_addresses_and_their_switches() {
    use LoopbackNodePorts::{Always, BySockets, Never};
    for (line, v4, v6) in [
        ("", BySockets, BySockets),
        ("--proxy-mode ebpf", BySockets, BySockets),
        ("--proxy-mode nftables", Never, Never),
        ("--nodeport-addresses primary", Never, Never),
        ("--nodeport-addresses all", BySockets, BySockets),
        ("--nodeport-addresses localhost", Always, Always),
        ("--proxy-mode nftables --nodeport-addresses localhost", Always, Always),
        ("--proxy-mode nftables --nodeport-addresses primary,localhost", Always, Always),
        ("--proxy-mode nftables --nodeport-addresses all,localhost", Always, Always),
        ("--nodeport-addresses 192.0.2.0/24", Never, BySockets),
        ("--nodeport-addresses 192.0.2.0/24,2001:db8::/32", Never, Never),
        ("--nodeport-addresses 0.0.0.0/0,2001:db8::/32", BySockets, Never),
        ("--nodeport-addresses 192.0.2.0/24,127.0.0.0/8,::/0", Always, BySockets),
        ("--nodeport-addresses ::1/128", BySockets, Always),
        // 127.0.0.1 is not in it.
        ("--nodeport-addresses 127.0.1.0/24", Never, BySockets),
        ("--iptables-localhost-nodeports", BySockets, BySockets),
        ("--iptables-localhost-nodeports=false", Never, Never),
        ("--iptables-localhost-nodeports=false --nodeport-addresses 127.0.0.0/8", Never, Never),
        (
            "--proxy-mode nftables --iptables-localhost-nodeports=false --nodeport-addresses localhost",
            Always,
            Always,
        ),
        (
            "--proxy-mode nftables --feature-gates KubeProxyNFTablesLocalhostNodePorts=false --nodeport-addresses localhost",
            Never,
            Never,
        ),
    ] {
        let expected = PerFamily { v4, v6 };
        assert_eq!(flags(line).unwrap().config.model.loopback_node_ports, expected, "{line}");
    }
    for (fields, on) in [
        ("iptables: {localhostNodePorts: null}", BySockets),
        ("iptables: {localhostNodePorts: true}", BySockets),
        ("iptables: {localhostNodePorts: false}", Never),
        ("mode: nftables", Never),
        ("mode: nftables\nnodePortAddresses: [localhost]", Always),
    ] {
        let loaded = file(fields);
        assert_eq!(loaded.config.model.loopback_node_ports, PerFamily { v4: on, v6: on }, "{fields}");
        assert!(!loaded.warnings.iter().any(|warning| warning.contains("localhostNodePorts")), "{fields}");
    }
}

#[test]
fn what_kube_proxy_reads_otherwise_than_others_is_read_as_it_reads_it() {
    let config =
        file("bindAddress: 010.001.0.9\nmetricsBindAddress: 010.0.0.1:05\nbindAddressHardFail: yes").config;
    assert_eq!(config.model.bind_address, Some("10.1.0.9".parse().unwrap()));
    assert_eq!(config.metrics, Some("10.0.0.1:5".parse().unwrap()));
    assert!(config.bind_hard_fail);
    assert!(!file("featureGates: {AllowServiceExternalIPs: off}").config.model.external_ips);
    assert_eq!(file("hostnameOverride: yes").config.model.node_name, "yes", "a name is no truth");
    for wrong in ["bindAddress: 010.001.0", "bindAddress: 1.2.3.999", "bindAddress: 1.2.+3.4"] {
        assert!(file_with(wrong, "").is_err(), "{wrong}");
    }
    // Only its mode ipvs looks at them.
    let loaded = file("ipvs: {excludeCIDRs: [nowhere]}");
    assert!(loaded.warnings.iter().any(|it| it.contains("`nowhere`")), "{:?}", loaded.warnings);
}

#[test]
fn r18_words_stand_for_networks_and_may_stand_beside_them() {
    let networks = |text: &str| text.split(' ').map(|net| net.parse().unwrap()).collect::<Vec<IpNet>>();
    for (given, primary, expected) in [
        ("[localhost]", false, networks("127.0.0.0/8 ::1/128")),
        ("[all]", false, networks("0.0.0.0/0 ::/0")),
        ("[primary, localhost]", true, networks("127.0.0.0/8 ::1/128")),
        ("[10.0.0.0/8, localhost, primary]", true, networks("10.0.0.0/8 127.0.0.0/8 ::1/128")),
    ] {
        let loaded = file(&format!("mode: nftables\nnodePortAddresses: {given}"));
        let setting = loaded.config.model.node_port_addresses;
        assert_eq!((setting.primary, setting.networks), (primary, expected), "{given}");
        let words: serde_json::Value = serde_yaml_ng::from_str(given).unwrap();
        assert_eq!(loaded.document["nodePortAddresses"], words, "told as it was written");
    }
    for (given, complaint) in [
        ("[primary, localhost, primary]", "nodePortAddresses[2]: `primary` stands there twice"),
        ("[localhost, localhost]", "nodePortAddresses[1]: `localhost` stands there twice"),
        (
            "[Localhost]",
            "nodePortAddresses[0]: `Localhost` is neither a network such as 192.0.2.0/24 nor one of the words",
        ),
    ] {
        let error = file_with(&format!("nodePortAddresses: {given}"), "").unwrap_err().to_string();
        assert!(error.contains(complaint), "{error}");
    }
}

#[test]
fn the_kernels_objects_are_where_told_or_where_they_usually_are() {
    for (line, cgroup_root, bpf_root) in
        [("", "/mounted/here", "/sys/fs/bpf/weir"), ("--cgroup-root /c --bpf-root /b/w", "/c", "/b/w")]
    {
        let config = flags(line).unwrap().config;
        assert_eq!((config.cgroup_root, config.bpf_root), (cgroup_root.into(), bpf_root.into()), "{line}");
    }
    let bare = Host { cgroup_root: None, ..host() };
    let loaded = load(&Line::try_parse_from(["weir"]).unwrap().args, &bare).unwrap();
    assert_eq!(loaded.config.cgroup_root.to_str(), Some("/sys/fs/cgroup"));
}

#[test]
fn a_kube_proxy_mode_means_auto_with_a_warning() {
    for (line, warned) in
        [("--proxy-mode=", true), ("--proxy-mode ipvs", true), ("--proxy-mode iptables", true), ("", false)]
    {
        let warnings = flags(line).unwrap().warnings;
        assert_eq!(
            warnings.iter().any(|warning| warning.contains("means auto here")),
            warned,
            "{line}: {warnings:?}"
        );
    }
}

#[test]
fn servers_listen_where_told_or_nowhere() {
    for (line, healthz, metrics) in [
        ("", "0.0.0.0:10256", "127.0.0.1:10249"),
        ("--bind-address 192.0.2.1", "0.0.0.0:10256", "127.0.0.1:10249"),
        ("--bind-address ::1", "[::]:10256", "[::1]:10249"),
        ("--healthz-bind-address 192.0.2.1 --metrics-bind-address [::]:1", "192.0.2.1:10256", "[::]:1"),
        ("--healthz-bind-address 192.0.2.1 --healthz-port 8", "192.0.2.1:8", "127.0.0.1:10249"),
        ("--healthz-port 8 --metrics-port 9", "0.0.0.0:8", "127.0.0.1:9"),
        ("--healthz-port 0 --metrics-bind-address=", "", ""),
    ] {
        let config = flags(line).unwrap().config;
        let shown =
            [config.healthz, config.metrics].map(|it| it.map(|it| it.to_string()).unwrap_or_default());
        assert_eq!(shown, [healthz, metrics], "{line}");
    }
    let config = file("healthzBindAddress: 192.0.2.1\nmetricsBindAddress: '::'").config;
    assert_eq!(config.healthz.unwrap().to_string(), "192.0.2.1:10256");
    assert_eq!(config.metrics.unwrap().to_string(), "[::]:10249");
}

#[test]
fn detectors_take_their_own_field() {
    for (line, detect_local) in [
        ("", DetectLocal::ClusterCidr(vec![])),
        ("--detect-local-mode NodeCIDR --cluster-cidr 10.0.0.1/8", DetectLocal::NodeCidr),
        ("--cluster-cidr 10.0.0.1/8", DetectLocal::ClusterCidr(vec!["10.0.0.0/8".parse().unwrap()])),
        (
            "--detect-local-mode BridgeInterface --pod-bridge-interface br0",
            DetectLocal::Bridge("br0".to_owned()),
        ),
        (
            "--detect-local-mode InterfaceNamePrefix --pod-interface-name-prefix veth",
            DetectLocal::InterfacePrefix("veth".to_owned()),
        ),
    ] {
        assert_eq!(flags(line).unwrap().config.model.detect_local, detect_local, "{line}");
    }
}

#[test]
fn the_manifests_source_takes_its_directory_and_ranges() {
    let line = "--source manifests:/m --service-cidr 10.96.0.0/16,fd00:96::/112 --manifest-status /s";
    let expected = SourceConfig::Manifests {
        dir: "/m".into(),
        service_ranges: vec!["10.96.0.0/16".parse().unwrap(), "fd00:96::/112".parse().unwrap()],
        status_file: Some("/s".into()),
    };
    assert_eq!(flags(line).unwrap().config.source, expected);
    assert_eq!(
        file_with("clientConnection: {kubeconfig: /k}", line).unwrap().config.source,
        expected,
        "it wins"
    );
}

#[test]
fn a_flag_given_twice_counts_the_last_time_and_a_list_grows() {
    let line = "--hostname-override a --hostname-override b --nodeport-addresses 10.0.0.0/8 --nodeport-addresses ::/0";
    let config = flags(line).unwrap().config;
    assert_eq!(config.model.node_name, "b");
    let both = ["10.0.0.0/8", "::/0"].map(|it| it.parse().unwrap()).to_vec();
    assert_eq!(config.model.node_port_addresses, NodePortSetting::of(both));
}

#[test]
fn an_empty_flag_is_as_good_as_none() {
    let empty =
        "--feature-gates= --nodeport-addresses= --master= --cluster-cidr= --kubeconfig= --bind-address=";
    assert_eq!(flags(empty).unwrap(), flags("").unwrap());
}

#[test]
fn r10_external_ips_follow_their_gate() {
    assert!(flags("").unwrap().config.model.external_ips);
    assert!(
        !flags("--feature-gates AllowServiceExternalIPs=false,Other=true").unwrap().config.model.external_ips
    );
    assert!(!file("featureGates: {AllowServiceExternalIPs: false}").config.model.external_ips);
}

#[test]
fn conntrack_settings_have_kube_proxys_defaults_and_zero_leaves_things_alone() {
    let defaults = "conntrack: {maxPerCore: 32768, min: 131072, tcpEstablishedTimeout: 24h, tcpCloseWaitTimeout: 1h0m0s}";
    let loaded = file(&format!("mode: nftables\n{defaults}"));
    assert_eq!(loaded.config.conntrack, flags("").unwrap().config.conntrack);
    assert_eq!(loaded.warnings, [""; 0]);

    let zeros = "conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}";
    assert_eq!(file(zeros).config.conntrack, Conntrack::default());

    let seconds = |seconds| Some(Duration::from_secs(seconds));
    let other = Conntrack {
        max_per_core: Some(1),
        min: 2,
        tcp_established_timeout: seconds(3),
        tcp_close_wait_timeout: seconds(4),
        tcp_be_liberal: true,
        udp_timeout: seconds(5),
        udp_stream_timeout: seconds(6),
    };
    let fields = "conntrack: {maxPerCore: 1, min: 2, tcpEstablishedTimeout: 3s, tcpCloseWaitTimeout: 4s, \
                  tcpBeLiberal: true, udpTimeout: 5s, udpStreamTimeout: 6s}";
    assert_eq!(file(fields).config.conntrack, other);
    let line = "--conntrack-max-per-core 1 --conntrack-min 2 --conntrack-tcp-timeout-established 3s \
                --conntrack-tcp-timeout-close-wait 4s --conntrack-tcp-be-liberal --conntrack-udp-timeout 5s \
                --conntrack-udp-timeout-stream 6s";
    assert_eq!(flags(line).unwrap().config.conntrack, other);
}

#[test]
fn the_request_limit_is_there_when_somebody_sets_one() {
    let limit = |requests, millis| Some(RequestLimit { requests, window: Duration::from_millis(millis) });
    for (fields, expected) in [
        ("clientConnection: {qps: 0, burst: 0}", None),
        ("clientConnection: {burst: 100}", None),
        ("clientConnection: {qps: -1, burst: 100}", None),
        ("clientConnection: {qps: 5, burst: 0}", limit(10, 2000)),
        ("clientConnection: {qps: 2.5, burst: 5}", limit(5, 2000)),
    ] {
        assert_eq!(file(fields).config.request_limit, expected, "{fields}");
    }
    let config = flags("--kube-api-qps=50 --kube-api-burst=100").unwrap().config;
    assert_eq!(config.request_limit, limit(100, 2000));
}

#[test]
fn the_oom_score_is_the_files_or_the_flags() {
    assert_eq!(file("oomScoreAdj: 0").config.oom_score_adj, Some(0));
    assert_eq!(flags("--oom-score-adj -500").unwrap().config.oom_score_adj, Some(-500));
}
