//! Texts, fields and flags that are refused or warned of, each with its name.

use super::*;

#[test]
fn a_text_that_is_not_a_configuration_is_refused() {
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
    FILE: the document is not a mapping of fields to values
    FILE: did not find expected node content at line 2 column 1, while parsing a flow node
    FILE: the document is not a mapping of fields to values
    FILE: apiVersion: `` is not `kubeproxy.config.k8s.io/v1alpha1`
    FILE: apiVersion: `kubeproxy.config.k8s.io/v1beta1` is not `kubeproxy.config.k8s.io/v1alpha1`
    FILE: kind: `KubeletConfiguration` is not `KubeProxyConfiguration`
    ");
    insta::assert_snapshot!(flags("--config /nowhere/config.conf").unwrap_err(), @"cannot read the configuration file `/nowhere/config.conf`");
}

/// As in kube-proxy: its YAML reader stops at the end of the first document.
#[test]
fn only_the_first_document_of_a_file_counts_and_further_ones_cause_a_warning() {
    let head = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";
    let first = format!("{head}hostnameOverride: first\n");
    let warning = "FILE: the file has more than one document; weir reads only the first";
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
    insta::assert_snapshot!(fields.map(refusal).join("\n"), @r#"
        FILE: hostnameOverride: invalid type: integer `5`, expected a string
        FILE: mode: `userspace` is not one of auto, ebpf, nftables, iptables, ipvs and the empty string
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
    insta::assert_snapshot!(fields.map(refusal).join("\n"), @r"
        FILE: clusterCIDR: `10.244.0.0` is not a network such as 10.0.0.0/16 or fd00::/64
        FILE: clusterCIDR: `10.0.0.0/8,10.1.0.0/16` has more than one network of a family
        FILE: detectLocal.bridgeInterface: the chosen detectLocalMode needs a name here
        FILE: detectLocal.interfaceNamePrefix: the chosen detectLocalMode needs a name here
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
        FILE: nodePortAddresses[2]: `primary` is given twice
        FILE: nodePortAddresses[0]: `eth0` is neither a network such as 192.0.2.0/24 nor one of the names primary, localhost and all
        FILE: conntrack.min: -1 is less than 0
        FILE: conntrack.udpTimeout: -1s is less than 0
        FILE: hostnameOverride: a node's name cannot be empty
        FILE: logging.format: `xml` is neither text nor json
        FILE: logging.verbosity: 2147483648 is more than 2147483647
        FILE: oomScoreAdj: 1001 is not from -1000 to 1000
        FILE: clientConnection.burst: -1 is less than 0
        FILE: clientConnection.qps: 0.0001 is less than one request an hour
    ");
}

#[test]
fn wrong_values_of_flags_name_the_flag() {
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
        --nodeport-addresses: `localhost` is given twice
        --healthz-bind-address: `nowhere` is not an IP address with a port from 1 to 65535
        --iptables-sync-period: 1s is less than minSyncPeriod, which is 2s
        --pod-bridge-interface: the chosen detectLocalMode needs a name here
        --service-cidr: `10.96.0.0` is not a network such as 10.0.0.0/16 or fd00::/64
        --conntrack-max-per-core: -2 is less than 0
        --conntrack-tcp-timeout-established: -1s is less than 0
        --ipvs-sync-period: 1s is less than minSyncPeriod, which is 2s
        --ipvs-exclude-cidrs: `nowhere` is not a network such as 10.0.0.0/16 or fd00::/64
        --oom-score-adj: 5000 is not from -1000 to 1000
    ");
}

#[test]
fn fields_without_effect_cause_a_warning_with_their_path() {
    let loaded = file(
        "mode: nftables\nhostnameOverride: a\nhostnameOverride: b\nhostnameOverwrite: c\nnftables: {masqueradeBits: 1}\n\
         oomScoreAdj: -500\nenableProfiling: true\nipvs: {scheduler: lc, tcpTimeout: 0s}\n\
         configSyncPeriod: 15m0s\nfeatureGates: {Other: true}\nconntrack: {tcpBeLiberal: true}\n\
         logging: {flushFrequency: 5s, vmodule: [{filePattern: a, verbosity: 1}]}",
    );
    assert_eq!(loaded.config.model.node_name, "b", "the last one counts");
    insta::assert_snapshot!(loaded.warnings.join("\n"), @r#"
        FILE: hostnameOverride is given twice; the last value counts
        FILE: enableProfiling has no effect here (it is set to true)
        FILE: hostnameOverwrite is not a known field
        FILE: ipvs.scheduler has no effect here (it is set to lc)
        FILE: logging.vmodule has no effect here (it is set to [{"filePattern":"a","verbosity":1}])
        FILE: nftables.masqueradeBits is not a known field
        these feature gates have no effect here: Other
    "#);
}
