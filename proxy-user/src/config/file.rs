//! The KubeProxyConfiguration file, version v1alpha1.
//!
//! In: text. Out: a [`Configuration`] with the fields that weir uses, of which only the types are checked,
//! and a warning for each field that has no effect.

use std::{collections::BTreeMap, path::Path};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    Error, GoDuration, Problem,
    tree::{self, Tree},
};

/// The fields that weir uses. A missing field, null and the zero value of its type all mean "not set", as for
/// kube-proxy.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, rename_all = "camelCase", expecting = "a mapping of fields to values")]
pub(super) struct Configuration {
    pub(super) api_version: String,
    pub(super) kind: String,
    pub(super) feature_gates: BTreeMap<String, bool>,
    pub(super) client_connection: ClientConnection,
    pub(super) logging: Logging,
    pub(super) hostname_override: String,
    pub(super) bind_address: String,
    pub(super) healthz_bind_address: String,
    pub(super) metrics_bind_address: String,
    pub(super) bind_address_hard_fail: bool,
    pub(super) mode: Mode,
    pub(super) iptables: Iptables,
    pub(super) ipvs: Ipvs,
    pub(super) nftables: Rules,
    pub(super) detect_local_mode: DetectLocalMode,
    pub(super) detect_local: Detectors,
    #[serde(rename = "clusterCIDR")]
    pub(super) cluster_cidr: String,
    pub(super) node_port_addresses: Vec<String>,
    pub(super) conntrack: Conntrack,
    pub(super) oom_score_adj: Option<i32>,
    /// Set by flags only: in a file, an empty address means the default.
    #[serde(skip)]
    pub(super) healthz_off: bool,
    #[serde(skip)]
    pub(super) metrics_off: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, expecting = "a mapping of fields to values")]
pub(super) struct ClientConnection {
    pub(super) kubeconfig: String,
    /// Requests per second, and the size of a burst. 0 means not set; a negative number means no limit.
    pub(super) qps: f64,
    pub(super) burst: i32,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, expecting = "a mapping of fields to values")]
pub(super) struct Logging {
    pub(super) format: String,
    pub(super) verbosity: u32,
}

/// The iptables block: the settings of [`Rules`] and `localhostNodePorts`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, rename_all = "camelCase", expecting = "a mapping of fields to values")]
pub(super) struct Iptables {
    /// Not set means true.
    pub(super) localhost_node_ports: Option<bool>,
    pub(super) masquerade_bit: Option<i32>,
    pub(super) masquerade_all: bool,
    pub(super) sync_period: GoDuration,
    pub(super) min_sync_period: GoDuration,
}

impl Iptables {
    pub(super) fn new(localhost_node_ports: Option<bool>, rules: &Rules) -> Self {
        let Rules { masquerade_bit, masquerade_all, sync_period, min_sync_period } = *rules;
        Self { localhost_node_ports, masquerade_bit, masquerade_all, sync_period, min_sync_period }
    }

    /// The settings that the nftables block has too.
    pub(super) fn rules(&self) -> Rules {
        let Self { masquerade_bit, masquerade_all, sync_period, min_sync_period, .. } = *self;
        Rules { masquerade_bit, masquerade_all, sync_period, min_sync_period }
    }
}

/// The settings that the iptables and nftables blocks share.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, rename_all = "camelCase", expecting = "a mapping of fields to values")]
pub(super) struct Rules {
    pub(super) masquerade_bit: Option<i32>,
    pub(super) masquerade_all: bool,
    pub(super) sync_period: GoDuration,
    pub(super) min_sync_period: GoDuration,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, rename_all = "camelCase", expecting = "a mapping of fields to values")]
pub(super) struct Ipvs {
    #[serde(rename = "excludeCIDRs")]
    pub(super) exclude_cidrs: Vec<String>,
    pub(super) sync_period: GoDuration,
    pub(super) min_sync_period: GoDuration,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, rename_all = "camelCase", expecting = "a mapping of fields to values")]
pub(super) struct Detectors {
    pub(super) bridge_interface: String,
    pub(super) interface_name_prefix: String,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, rename_all = "camelCase", expecting = "a mapping of fields to values")]
pub(super) struct Conntrack {
    pub(super) max_per_core: Option<i32>,
    pub(super) min: Option<i32>,
    pub(super) tcp_established_timeout: Option<GoDuration>,
    pub(super) tcp_close_wait_timeout: Option<GoDuration>,
    pub(super) tcp_be_liberal: bool,
    pub(super) udp_timeout: GoDuration,
    pub(super) udp_stream_timeout: GoDuration,
}

/// The word is not one of those that the field accepts.
#[derive(Debug, thiserror::Error)]
#[error("`{given}` is not one of {known}")]
pub(super) struct UnknownWord {
    given: String,
    known: &'static str,
}

/// `mode` and `--proxy-mode`: the modes of kube-proxy and of weir.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "String", into = "&'static str")]
pub(super) enum Mode {
    #[default]
    Unset,
    Auto,
    Ebpf,
    Nftables,
    Iptables,
    Ipvs,
}

impl From<Mode> for &'static str {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Unset => "",
            Mode::Auto => "auto",
            Mode::Ebpf => "ebpf",
            Mode::Nftables => "nftables",
            Mode::Iptables => "iptables",
            Mode::Ipvs => "ipvs",
        }
    }
}

impl TryFrom<String> for Mode {
    type Error = UnknownWord;

    fn try_from(given: String) -> Result<Self, Self::Error> {
        Ok(match given.as_str() {
            "" => Self::Unset,
            "auto" => Self::Auto,
            "ebpf" => Self::Ebpf,
            "nftables" => Self::Nftables,
            "iptables" => Self::Iptables,
            "ipvs" => Self::Ipvs,
            _ => {
                return Err(UnknownWord {
                    given,
                    known: "auto, ebpf, nftables, iptables, ipvs and the empty string",
                });
            }
        })
    }
}

/// `detectLocalMode`. Not set means `ClusterCIDR`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "String", into = "&'static str")]
pub(super) enum DetectLocalMode {
    #[default]
    ClusterCidr,
    NodeCidr,
    BridgeInterface,
    InterfaceNamePrefix,
}

impl From<DetectLocalMode> for &'static str {
    fn from(mode: DetectLocalMode) -> Self {
        match mode {
            DetectLocalMode::ClusterCidr => "ClusterCIDR",
            DetectLocalMode::NodeCidr => "NodeCIDR",
            DetectLocalMode::BridgeInterface => "BridgeInterface",
            DetectLocalMode::InterfaceNamePrefix => "InterfaceNamePrefix",
        }
    }
}

impl TryFrom<String> for DetectLocalMode {
    type Error = UnknownWord;

    fn try_from(given: String) -> Result<Self, Self::Error> {
        Ok(match given.as_str() {
            "" | "ClusterCIDR" => Self::ClusterCidr,
            "NodeCIDR" => Self::NodeCidr,
            "BridgeInterface" => Self::BridgeInterface,
            "InterfaceNamePrefix" => Self::InterfaceNamePrefix,
            _ => {
                let known = "ClusterCIDR, NodeCIDR, BridgeInterface and InterfaceNamePrefix";
                return Err(UnknownWord { given, known });
            }
        })
    }
}

/// kube-proxy's fields that have no effect here, each with its default. A field that has its default causes
/// no warning.
const WITHOUT_EFFECT: [(&str, &str); 16] = [
    ("clientConnection.acceptContentTypes", ""),
    ("clientConnection.contentType", "application/vnd.kubernetes.protobuf"),
    ("configSyncPeriod", "15m0s"),
    ("enableProfiling", "false"),
    ("ipvs.scheduler", "rr"),
    ("ipvs.strictARP", "false"),
    ("ipvs.tcpFinTimeout", "0s"),
    ("ipvs.tcpTimeout", "0s"),
    ("ipvs.udpTimeout", "0s"),
    ("portRange", ""),
    ("showHiddenMetricsForVersion", ""),
    ("winkernel", ""),
    ("windowsRunAsService", "false"),
    ("logging.flushFrequency", "5s"),
    ("logging.options", ""),
    ("logging.vmodule", ""),
];

/// Reads the text of a file. Returns the fields that weir uses, and everything that was given. Each field
/// that is unknown, given twice or without effect adds a warning, and so does a document after the first.
///
/// # Errors
///
/// When the text is not YAML or not a KubeProxyConfiguration v1alpha1, or a field has the wrong type.
pub(super) fn parse(
    file: &Path,
    text: &str,
    warnings: &mut Vec<String>,
) -> Result<(Configuration, Value), Error> {
    let Tree { root: tree, twice, more } = tree::read(text)
        .map_err(|error| Error::Syntax { file: file.to_owned(), message: error.to_string() })?;
    let name = file.display();
    if more {
        warnings.push(format!("{name}: the file has more than one document; weir reads only the first"));
    }
    warnings.extend(
        twice.into_iter().map(|field| format!("{name}: {field} is given twice; the last value counts")),
    );

    if !tree.is_object() {
        return Err(problem(file, ".", "the document is not a mapping of fields to values".to_owned()));
    }
    let mut unread = Vec::new();
    let mut note = |path: serde_ignored::Path<'_>| unread.push(path.to_string());
    let mut track = serde_path_to_error::Track::new();
    let reader = serde_path_to_error::Deserializer::new(
        serde_ignored::Deserializer::new(&tree, &mut note),
        &mut track,
    );
    let parsed = Configuration::deserialize(reader);
    let configuration =
        parsed.map_err(|error| problem(file, &track.path().to_string(), error.to_string()))?;
    check_kind(file, &configuration)?;

    warnings.extend(
        unread.iter().filter_map(|field| unread_warning(&tree, field)).map(|it| format!("{name}: {it}")),
    );
    Ok((configuration, tree))
}

fn problem(file: &Path, field: &str, message: String) -> Error {
    let setting =
        if field == "." { file.display().to_string() } else { format!("{}: {field}", file.display()) };
    Error::Invalid(vec![Problem { setting, message }])
}

fn check_kind(file: &Path, configuration: &Configuration) -> Result<(), Error> {
    for (field, given, wanted) in [
        ("apiVersion", &configuration.api_version, "kubeproxy.config.k8s.io/v1alpha1"),
        ("kind", &configuration.kind, "KubeProxyConfiguration"),
    ] {
        if given != wanted {
            return Err(problem(file, field, format!("`{given}` is not `{wanted}`")));
        }
    }
    Ok(())
}

fn unread_warning(tree: &Value, field: &str) -> Option<String> {
    let within = |(known, _): &&(&str, &str)| {
        field.strip_prefix(known).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    };
    let Some((_, default)) = WITHOUT_EFFECT.iter().find(within) else {
        return Some(format!("{field} is not a known field"));
    };
    let value = tree.pointer(&format!("/{}", field.replace('.', "/")))?;
    let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let usual = is_zero(value) || text == *default;
    (!usual).then(|| format!("{field} has no effect here (it is set to {text})"))
}

/// Whether kube-proxy takes the value as "not set"; kubeadm writes such values for every field.
pub(super) fn is_zero(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(it) => !it,
        Value::Number(it) => it.as_f64() == Some(0.0),
        Value::String(it) => it.is_empty() || it.parse::<GoDuration>().is_ok_and(GoDuration::is_zero),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.values().all(is_zero),
    }
}
