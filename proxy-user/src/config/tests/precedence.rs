//! The order of file, flags and defaults for each setting.

use super::*;

/// The configuration that kubeadm 1.36 installs: mostly nulls and zeros.
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
        FILE: mode: no mode means auto here; without eBPF, NodePorts answer on 127.0.0.1 only if nodePortAddresses contains localhost
    ");
}

#[test]
fn verbosity_may_be_any_number_that_kube_proxy_accepts() {
    assert_eq!(file("mode: auto\nlogging: {verbosity: 300}").config.log.verbosity, 300);
    assert_eq!(flags("-v 300").unwrap().config.log.verbosity, 300);
}

#[test]
fn with_a_file_some_flags_count_and_a_warning_names_the_ignored_ones() {
    let loaded = file_with(
        "mode: nftables\nlogging: {verbosity: 2, format: json}\nhostnameOverride: filed",
        "--proxy-mode auto --hostname-override flagged -v 4 --master https://a:6443,https://b:6443 \
         --cgroup-root /c --masquerade-all --nodeport-addresses 10.0.0.0/8 --iptables-sync-period 5s --profiling",
    )
    .unwrap();
    let config = loaded.config;
    assert_eq!(config.model.node_name, "flagged");
    assert_eq!(config.mode, ProxyMode::Auto);
    assert_eq!(config.model.node_port_addresses, NodePortSetting::PRIMARY, "the file's mode is imitated");
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
fn the_node_name_comes_from_the_flag_else_the_file_else_the_host() {
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

#[test]
fn cgroup_root_and_bpf_root_have_defaults() {
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
fn the_manifest_source_has_a_directory_ranges_and_a_status_file() {
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
        "--source overrides the kubeconfig"
    );
}

#[test]
fn the_last_value_of_a_repeated_flag_counts_and_lists_are_joined() {
    let line = "--hostname-override a --hostname-override b --nodeport-addresses 10.0.0.0/8 --nodeport-addresses ::/0";
    let config = flags(line).unwrap().config;
    assert_eq!(config.model.node_name, "b");
    let both = ["10.0.0.0/8", "::/0"].map(|it| it.parse().unwrap()).to_vec();
    assert_eq!(config.model.node_port_addresses, NodePortSetting::of(both));
}

#[test]
fn an_empty_flag_means_not_set() {
    let empty =
        "--feature-gates= --nodeport-addresses= --master= --cluster-cidr= --kubeconfig= --bind-address=";
    assert_eq!(flags(empty).unwrap(), flags("").unwrap());
}
