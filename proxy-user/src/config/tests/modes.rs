//! The effects of `mode`, and the reading of addresses and feature gates (R10, R13, R15, R18).

use super::*;

/// R15, and the block of the file that each mode reads.
#[test]
fn r15_mode_decides_about_the_block_and_the_nodeport_default() {
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
fn r15_without_a_file_the_flag_decides_which_mode_is_imitated() {
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
fn r13_r18_loopback_node_ports_depend_on_addresses_and_switches() {
    use LoopbackNodePorts::{Always, Never, SocketPlaneOnly};
    for (line, v4, v6) in [
        ("", SocketPlaneOnly, SocketPlaneOnly),
        ("--proxy-mode ebpf", SocketPlaneOnly, SocketPlaneOnly),
        ("--proxy-mode nftables", Never, Never),
        ("--nodeport-addresses primary", Never, Never),
        ("--nodeport-addresses all", SocketPlaneOnly, SocketPlaneOnly),
        ("--nodeport-addresses localhost", Always, Always),
        ("--proxy-mode nftables --nodeport-addresses localhost", Always, Always),
        ("--proxy-mode nftables --nodeport-addresses primary,localhost", Always, Always),
        ("--proxy-mode nftables --nodeport-addresses all,localhost", Always, Always),
        ("--nodeport-addresses 192.0.2.0/24", Never, SocketPlaneOnly),
        ("--nodeport-addresses 192.0.2.0/24,2001:db8::/32", Never, Never),
        ("--nodeport-addresses 0.0.0.0/0,2001:db8::/32", SocketPlaneOnly, Never),
        ("--nodeport-addresses 192.0.2.0/24,127.0.0.0/8,::/0", Always, SocketPlaneOnly),
        ("--nodeport-addresses ::1/128", SocketPlaneOnly, Always),
        // This network does not contain 127.0.0.1.
        ("--nodeport-addresses 127.0.1.0/24", Never, SocketPlaneOnly),
        ("--iptables-localhost-nodeports", SocketPlaneOnly, SocketPlaneOnly),
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
        ("iptables: {localhostNodePorts: null}", SocketPlaneOnly),
        ("iptables: {localhostNodePorts: true}", SocketPlaneOnly),
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
fn leading_zeros_and_yaml_booleans_are_read_as_kube_proxy_reads_them() {
    let config =
        file("bindAddress: 010.001.0.9\nmetricsBindAddress: 010.0.0.1:05\nbindAddressHardFail: yes").config;
    assert_eq!(config.model.bind_address, Some("10.1.0.9".parse().unwrap()));
    assert_eq!(config.metrics, Some("10.0.0.1:5".parse().unwrap()));
    assert!(config.bind_hard_fail);
    assert!(!file("featureGates: {AllowServiceExternalIPs: off}").config.model.external_ips);
    assert_eq!(file("hostnameOverride: yes").config.model.node_name, "yes", "a name is not a boolean");
    for wrong in ["bindAddress: 010.001.0", "bindAddress: 1.2.3.999", "bindAddress: 1.2.+3.4"] {
        assert!(file_with(wrong, "").is_err(), "{wrong}");
    }
    // kube-proxy reads this field in mode ipvs only.
    let loaded = file("ipvs: {excludeCIDRs: [nowhere]}");
    assert!(loaded.warnings.iter().any(|it| it.contains("`nowhere`")), "{:?}", loaded.warnings);
}

#[test]
fn r18_names_stand_for_networks_and_may_be_mixed_with_them() {
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
        assert_eq!(loaded.document["nodePortAddresses"], words, "the document keeps the names");
    }
    for (given, message) in [
        ("[primary, localhost, primary]", "nodePortAddresses[2]: `primary` is given twice"),
        ("[localhost, localhost]", "nodePortAddresses[1]: `localhost` is given twice"),
        (
            "[Localhost]",
            "nodePortAddresses[0]: `Localhost` is neither a network such as 192.0.2.0/24 nor one of the names",
        ),
    ] {
        let error = file_with(&format!("nodePortAddresses: {given}"), "").unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
}

#[test]
fn iptables_ipvs_and_no_mode_mean_auto_with_a_warning() {
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
fn r10_the_feature_gate_switches_external_ips_off() {
    assert!(flags("").unwrap().config.model.external_ips);
    assert!(
        !flags("--feature-gates AllowServiceExternalIPs=false,Other=true").unwrap().config.model.external_ips
    );
    assert!(!file("featureGates: {AllowServiceExternalIPs: false}").config.model.external_ips);
}
