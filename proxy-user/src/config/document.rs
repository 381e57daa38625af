//! The configuration in kube-proxy's own format with every default filled in: what `/configz` serves and
//! `--write-config-to` writes.
//!
//! In: the fields as given in a file or by flags. Out: a whole KubeProxyConfiguration.

use serde_json::{Map, Value, json};

use super::{GoDuration, file::is_zero};

/// Fields in which zero is a value, so that only a missing one has the default.
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

/// A whole document from the fields `given`, of which those that are not known are left out.
pub(super) fn whole(given: &Value) -> Value {
    let mut document = overlay(&defaults(), given, "");
    if let Value::Object(fields) = &mut document {
        // As kube-proxy has it, which leaves these out when nothing is in them.
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

/// What kube-proxy has where nothing is given, except that both blocks of rules show their defaults whatever the mode.
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
