//! The configuration in kube-proxy's own format with all defaults, for `/configz` and `--write-config-to`.
//!
//! In: the fields as given in a file or by flags. Out: a complete KubeProxyConfiguration.

use std::net::SocketAddr;

use serde_json::{Map, Value, json};

use super::{
    Config, ConfigArgs, GoDuration, NodePortSetting,
    file::{Configuration, Mode, is_zero},
};

/// Fields in which zero is a value, so that only a missing field gets the default.
const ZERO_IS_A_VALUE: [&str; 8] = [
    "conntrack.maxPerCore",
    "conntrack.min",
    "conntrack.tcpCloseWaitTimeout",
    "conntrack.tcpEstablishedTimeout",
    "iptables.localhostNodePorts",
    "iptables.masqueradeBit",
    "nftables.masqueradeBit",
    "oomScoreAdj",
];

/// The configuration in kube-proxy's format: the fields as given, the flags that override them, and defaults.
pub(super) fn of(tree: &Value, configuration: &Configuration, args: &ConfigArgs, config: &Config) -> Value {
    let mut document = complete(tree);
    let address = |address: Option<SocketAddr>| address.map(|it| it.to_string()).unwrap_or_default();
    let name = args.hostname_override.as_ref().filter(|name| !name.is_empty());
    let mode = match args.proxy_mode.unwrap_or(configuration.mode) {
        Mode::Unset => Mode::Auto,
        mode => mode,
    };
    document["healthzBindAddress"] = address(config.healthz).into();
    document["metricsBindAddress"] = address(config.metrics).into();
    document["hostnameOverride"] = name.unwrap_or(&configuration.hostname_override).as_str().into();
    document["mode"] = <&str>::from(mode).into();
    if configuration.node_port_addresses.is_empty()
        && config.model.node_port_addresses == NodePortSetting::PRIMARY
    {
        document["nodePortAddresses"] = ["primary"].into();
    }
    document["logging"]["verbosity"] = config.log.verbosity.into();
    document["logging"]["format"] = if config.log.json { "json" } else { "text" }.into();
    document
}

/// The complete document made of the fields `given`. Unknown fields are left out.
fn complete(given: &Value) -> Value {
    let mut document = overlay(&defaults(), given, "");
    if let Value::Object(fields) = &mut document {
        // kube-proxy omits the field if no gate is set.
        if let Some(gates) = given.get("featureGates").filter(|gates| !is_zero(gates)) {
            fields.insert("featureGates".to_owned(), gates.clone());
        }
    }
    document
}

fn overlay(default: &Value, given: &Value, path: &str) -> Value {
    match (default, given) {
        (Value::Object(known), Value::Object(fields)) => {
            let field = |(name, default): (&String, &Value)| {
                let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                let given = fields.get(name).filter(|given| !given.is_null());
                (name.clone(), given.map_or_else(|| default.clone(), |given| overlay(default, given, &path)))
            };
            Value::Object(known.iter().map(field).collect::<Map<_, _>>())
        }
        (default, given) if is_zero(given) && !ZERO_IS_A_VALUE.contains(&path) => default.clone(),
        (_, Value::String(text)) if path.ends_with("Period") || path.ends_with("Timeout") => {
            text.parse::<GoDuration>().map_or_else(|_| given.clone(), |it| String::from(it).into())
        }
        (_, given) => given.clone(),
    }
}

/// kube-proxy's defaults, except that both blocks of rules show their defaults in every mode.
fn defaults() -> Value {
    let rules =
        json!({"masqueradeAll": false, "masqueradeBit": 14, "minSyncPeriod": "1s", "syncPeriod": "30s"});
    let mut iptables = rules.clone();
    iptables["localhostNodePorts"] = true.into();
    let client = json!({
        "acceptContentTypes": "", "burst": 10, "contentType": "application/vnd.kubernetes.protobuf",
        "kubeconfig": "", "qps": 5,
    });
    let conntrack = json!({
        "maxPerCore": 32768, "min": 131_072, "tcpBeLiberal": false, "tcpCloseWaitTimeout": "1h0m0s",
        "tcpEstablishedTimeout": "24h0m0s", "udpStreamTimeout": "0s", "udpTimeout": "0s",
    });
    let ipvs = json!({
        "excludeCIDRs": null, "minSyncPeriod": "0s", "scheduler": "", "strictARP": false, "syncPeriod": "30s",
        "tcpFinTimeout": "0s", "tcpTimeout": "0s", "udpTimeout": "0s",
    });
    let buffers = json!({"json": {"infoBufferSize": "0"}, "text": {"infoBufferSize": "0"}});
    let logging = json!({"flushFrequency": "5s", "format": "text", "options": buffers, "verbosity": 0});
    let winkernel = json!({
        "enableDSR": false, "forwardHealthCheckVip": false, "networkName": "", "rootHnsEndpointName": "",
        "sourceVip": "",
    });
    json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration",
        "bindAddress": "0.0.0.0", "bindAddressHardFail": false, "clientConnection": client, "clusterCIDR": "",
        "configSyncPeriod": "15m0s", "conntrack": conntrack,
        "detectLocal": {"bridgeInterface": "", "interfaceNamePrefix": ""}, "detectLocalMode": "ClusterCIDR",
        "enableProfiling": false, "healthzBindAddress": "0.0.0.0:10256", "hostnameOverride": "",
        "iptables": iptables, "ipvs": ipvs, "logging": logging, "metricsBindAddress": "127.0.0.1:10249",
        "mode": "auto", "nftables": rules, "nodePortAddresses": null, "oomScoreAdj": -999, "portRange": "",
        "showHiddenMetricsForVersion": "", "winkernel": winkernel,
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use tempfile::NamedTempFile;

    use super::*;
    use crate::config::tests::{file, file_with, flags};

    /// The expected text is kube-proxy v1.36.3's for this file, in the block of its mode and in the blocks of
    /// no mode.
    #[test]
    fn p7_the_document_is_complete_and_equals_kube_proxys() {
        let loaded = file(
            "bindAddress: '::'\nhealthzBindAddress: 192.0.2.1\niptables: {syncPeriod: 90s, minSyncPeriod: 1500ms, \
             localhostNodePorts: false, masqueradeBit: 0}\nconntrack: {maxPerCore: 0, tcpEstablishedTimeout: 0s, min: null}\n\
             logging: {verbosity: 3, format: json}\nfeatureGates: {AllowServiceExternalIPs: true}\nunheardOf: {a: 1}\n\
             portRange: 1-2\nnodePortAddresses: [10.0.0.0/8]\nclientConnection: {qps: 0, kubeconfig: /k}",
        );
        let document = &loaded.document;
        for (field, expected) in [
            ("/apiVersion", json!("kubeproxy.config.k8s.io/v1alpha1")),
            ("/bindAddress", json!("::")),
            ("/healthzBindAddress", json!("192.0.2.1:10256")),
            ("/metricsBindAddress", json!("[::1]:10249")),
            ("/iptables/syncPeriod", json!("1m30s")),
            ("/iptables/minSyncPeriod", json!("1.5s")),
            ("/iptables/masqueradeBit", json!(0)),
            ("/iptables/localhostNodePorts", json!(false)),
            ("/nftables/masqueradeBit", json!(14)),
            ("/conntrack/maxPerCore", json!(0)),
            ("/conntrack/min", json!(131_072)),
            ("/conntrack/tcpEstablishedTimeout", json!("0s")),
            ("/conntrack/tcpCloseWaitTimeout", json!("1h0m0s")),
            ("/logging/verbosity", json!(3)),
            ("/logging/format", json!("json")),
            ("/featureGates", json!({"AllowServiceExternalIPs": true})),
            ("/portRange", json!("1-2")),
            ("/nodePortAddresses", json!(["10.0.0.0/8"])),
            ("/clientConnection/qps", json!(5)),
            ("/clientConnection/kubeconfig", json!("/k")),
            ("/mode", json!("auto")),
            ("/oomScoreAdj", json!(-999)),
        ] {
            assert_eq!(document.pointer(field), Some(&expected), "{field}");
        }
        assert_eq!(document.get("unheardOf"), None);

        let given = file_with(
            "mode: ipvs\nhostnameOverride: filed",
            "--proxy-mode ebpf --hostname-override flagged -v 4",
        );
        let document = given.unwrap().document;
        assert_eq!((&document["mode"], &document["hostnameOverride"]), (&json!("ebpf"), &json!("flagged")));
        assert_eq!(document["logging"]["verbosity"], json!(4));

        let line = "--cluster-cidr 10.0.0.0/8 --conntrack-min 0 --healthz-port 0 --oom-score-adj 1";
        let document = flags(line).unwrap().document;
        assert_eq!((&document["clusterCIDR"], &document["oomScoreAdj"]), (&json!("10.0.0.0/8"), &json!(1)));
        assert_eq!((&document["conntrack"]["min"], &document["healthzBindAddress"]), (&json!(0), &json!("")));
    }

    #[test]
    fn a_written_document_loads_as_the_same_configuration() {
        let line =
            "--cluster-cidr 10.0.0.0/8 --proxy-mode nftables --iptables-sync-period 5s --conntrack-min 7";
        let written = flags(line).unwrap();
        let text = serde_yaml_ng::to_string(&written.document).unwrap();
        let mut file = NamedTempFile::new().unwrap();
        write!(file, "{text}").unwrap();
        let read = flags(&format!("--config {}", file.path().display())).unwrap();
        // A default of kube-proxy becomes an explicit setting once it is written down.
        let config = Config { oom_score_adj: None, request_limit: None, file: None, ..read.config };
        assert_eq!(config, written.config);
        assert_eq!(read.warnings, [""; 0]);
    }
}
