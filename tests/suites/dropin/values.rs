//! Values of a configuration: each line is taken or refused by weir as by the real kube-proxy, of the newest version
//! that there is, or stands here with the reason why not.

use std::{fs, path::Path, process::Command};

use anyhow::Result;
use weir_tests::assets;

const HEAD: &str = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";

/// weir does not check a field that means nothing to it: Services are served the same with every value.
const NOTHING: &str = "the field has no effect here, so its value is not judged";
const WARNED: &str = "a gate that weir does not know is named in a warning";
const CLEAR: &str = "spaces and a comma at the end leave no doubt";

/// Lines that both take or both refuse.
const ALIKE: &[&str] = &[
    "nodePortAddresses: [localhost]",
    "nodePortAddresses: [all]",
    "nodePortAddresses: [primary, localhost]",
    "nodePortAddresses: [primary, primary]",
    "nodePortAddresses: [localhost, 10.0.0.0/8, localhost]",
    "nodePortAddresses: [10.0.0.0/8, 10.0.0.0/8]",
    "nodePortAddresses: [Localhost]",
    "nodePortAddresses: ['']",
    "nodePortAddresses: [010.0.0.0/8]",
    "nodePortAddresses: [10.0.0.1/8]",
    "nodePortAddresses: [10.0.0.0]",
    "nodePortAddresses: ['::ffff:10.0.0.0/104']",
    "nodePortAddresses: [' 10.0.0.0/8']",
    "nodePortAddresses: []",
    "nodePortAddresses: null",
    "featureGates: {KubeProxyNFTablesLocalhostNodePorts: true}",
    "featureGates: {NFTablesNetlink: true}",
    "featureGates: {KubeProxyIPVS: false}",
    "clusterCIDR: 10.0.0.0/8,10.1.0.0/16",
    "clusterCIDR: 10.0.0.0/8,fd00::/8",
    "clusterCIDR: 10.0.0.0/8,fd00::/8,fd01::/16",
    "clusterCIDR: x",
    "detectLocalMode: NodeCIDR\nclusterCIDR: x",
    "detectLocalMode: ClusterCIDR\nclusterCIDR: ''",
    "detectLocalMode: x",
    "detectLocalMode: BridgeInterface",
    "detectLocalMode: BridgeInterface\ndetectLocal: {bridgeInterface: br0}",
    "detectLocalMode: InterfaceNamePrefix",
    "mode: userspace",
    "mode: kernelspace",
    "mode: IPTables",
    "mode: ipvs",
    "mode: ''",
    "iptables: {masqueradeBit: 32}",
    "iptables: {masqueradeBit: -1}",
    "mode: nftables\niptables: {masqueradeBit: 40}",
    "mode: nftables\nnftables: {masqueradeBit: 40}",
    "nftables: {masqueradeBit: 40}",
    "mode: ipvs\nnftables: {masqueradeBit: 40}",
    "iptables: {syncPeriod: 0s}",
    "iptables: {syncPeriod: -1s}",
    "iptables: {syncPeriod: 1s, minSyncPeriod: 2s}",
    "iptables: {minSyncPeriod: -1s}",
    "mode: nftables\niptables: {syncPeriod: -1s}",
    "mode: nftables\nnftables: {syncPeriod: -1s}",
    "mode: ipvs\nipvs: {syncPeriod: -1s}",
    "mode: ipvs\nipvs: {excludeCIDRs: [x]}",
    "ipvs: {excludeCIDRs: [x]}",
    "ipvs: {tcpTimeout: -1s}",
    "mode: ipvs\nipvs: {scheduler: nosuch}",
    "configSyncPeriod: 0s",
    "bindAddress: ''",
    "bindAddress: x",
    "bindAddress: 010.1.1.1",
    "bindAddress: '::'",
    "bindAddress: ::ffff:1.2.3.4",
    "healthzBindAddress: ''",
    "healthzBindAddress: localhost:10256",
    "healthzBindAddress: 127.0.0.1",
    "healthzBindAddress: ':10256'",
    "healthzBindAddress: 127.0.0.1:0",
    "healthzBindAddress: 127.0.0.1:70000",
    "healthzBindAddress: '[::1]:10256'",
    "healthzBindAddress: '::1'",
    "healthzBindAddress: '::1:10256'",
    "metricsBindAddress: ''",
    "metricsBindAddress: x",
    "metricsBindAddress: 010.0.0.1:5",
    "showHiddenMetricsForVersion: '1.36'",
    "conntrack: {maxPerCore: -1}",
    "conntrack: {min: -1}",
    "conntrack: {min: 2147483648}",
    "conntrack: {tcpEstablishedTimeout: -1s}",
    "conntrack: {tcpCloseWaitTimeout: -1s}",
    "conntrack: {udpTimeout: -1s}",
    "conntrack: {udpStreamTimeout: -1s}",
    "conntrack: {tcpEstablishedTimeout: 500ms}",
    "oomScoreAdj: 1001",
    "oomScoreAdj: -1000",
    "oomScoreAdj: null",
    "clientConnection: {burst: -1}",
    "clientConnection: {burst: 0, qps: -1}",
    "clientConnection: {contentType: x}",
    "logging: {format: xml}",
    "logging: {format: json}",
    "logging: {format: JSON}",
    "logging: {verbosity: -1}",
    "logging: {verbosity: 2147483648}",
    "logging: {verbosity: 4294967296}",
    "logging: {flushFrequency: 5}",
    "logging: {flushFrequency: 5s}",
    "logging: {vmodule: [{filePattern: a, verbosity: 1}]}",
    "logging: {options: {json: {splitStream: true}}}",
    "hostnameOverride: ''",
    "enableProfiling: true",
    "portRange: x",
    "winkernel: {networkName: a, sourceVip: b, enableDSR: true, rootHnsEndpointName: c, forwardHealthCheckVip: true}",
    "windowsRunAsService: true",
    "noSuchField: 1",
    "Mode: nftables",
    "mode: nftables\nmode: iptables",
    "bindAddressHardFail: yes",
    "iptables: {localhostNodePorts: false}",
    "iptables: null",
    "iptables: {syncPeriod: 30}",
    "iptables: {syncPeriod: 30000000000}",
    "iptables: {syncPeriod: '30'}",
    "iptables: {syncPeriod: ''}",
    "iptables: {syncPeriod: 1d}",
    "metricsBindHardFail: true",
    "nftables: {masqueradeAll: true}",
    "detectLocal: {bridgeInterface: 5}",
];

/// Lines that weir alone takes, and why.
const TAKEN: &[(&str, &str)] = &[
    ("featureGates: {NoSuchGate: true}", WARNED),
    ("featureGates: {AllAlpha: true}", WARNED),
    ("clusterCIDR: 10.0.0.0/8, fd00::/8", CLEAR),
    ("clusterCIDR: 10.0.0.0/8,", CLEAR),
    ("mode: ipvs\nipvs: {tcpTimeout: -1s}", NOTHING),
    ("mode: ipvs\nipvs: {udpTimeout: -1s}", NOTHING),
    ("mode: ipvs\nipvs: {tcpFinTimeout: -1s}", NOTHING),
    ("configSyncPeriod: -1s", NOTHING),
    ("showHiddenMetricsForVersion: '1.35'", NOTHING),
    ("showHiddenMetricsForVersion: x", NOTHING),
    ("showHiddenMetricsForVersion: '1.1'", NOTHING),
    ("logging: {flushFrequency: -5s}", NOTHING),
    ("logging: {format: json, vmodule: [{filePattern: a, verbosity: 1}]}", NOTHING),
    ("logging: {vmodule: [{filePattern: '', verbosity: 1}]}", NOTHING),
    ("logging: {vmodule: [{filePattern: 'a,b', verbosity: 1}]}", NOTHING),
    ("logging: {options: {text: {splitStream: true, infoBufferSize: 1Ki}}}", NOTHING),
    ("logging: {options: {json: {infoBufferSize: x}}}", NOTHING),
    ("enableProfiling: x", NOTHING),
    ("iptables: []", "a list without anything says nothing"),
    ("bindAddressHardFail: 'yes'", "a quoted truth can mean nothing else"),
];

/// Lines that weir alone refuses, and why.
const REFUSED: &[(&str, &str)] = &[
    ("clientConnection: {qps: 0.0001}", "no agent could work with a request in three hours"),
    ("hostnameOverride: ' '", "kube-proxy ends when it starts, and not when it reads the file"),
];

/// Whether a program takes a configuration, and its message.
fn takes(program: &Path, first: Option<&str>, directory: &Path, line: &str) -> Result<(bool, String)> {
    let (file, written) = (directory.join("config.yaml"), directory.join("written"));
    fs::write(&file, format!("{HEAD}{line}\n"))?;
    // Both check all of it before they write, and do nothing else.
    let mut command = Command::new(program);
    command.args(first).arg(format!("--config={}", file.display()));
    let output = command.arg(format!("--write-config-to={}", written.display())).output()?;
    Ok((output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned()))
}

#[test]
fn each_value_is_taken_or_refused_as_by_kube_proxy() -> Result<()> {
    let (kube_proxy, weir) = (assets::next_kube_proxy()?, assets::weir()?);
    let directory = tempfile::tempdir()?;
    let mut wrong = Vec::new();
    let alike = ALIKE.iter().map(|line| (*line, None));
    let taken = TAKEN.iter().map(|(line, why)| (*line, Some((true, *why))));
    let refused = REFUSED.iter().map(|(line, why)| (*line, Some((false, *why))));
    for (line, different) in alike.chain(taken).chain(refused) {
        let (theirs, they) = takes(&kube_proxy, None, directory.path(), line)?;
        let (ours, we) = takes(&weir, Some("run"), directory.path(), line)?;
        match different {
            None if ours != theirs => wrong.push(format!("{line:?}: kube-proxy: {they}weir: {we}")),
            Some((takes, why)) if (ours, theirs) != (takes, !takes) => {
                wrong.push(format!("{line:?} does not differ so ({why}): kube-proxy: {they}weir: {we}"));
            }
            _ => {}
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}
