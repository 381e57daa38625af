//! Places of the chart's values in the objects that it makes.
//!
//! In: the chart, with a few values set. Out: an error with the values and the place that lacks them.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::rendered::{named, rendered};
use crate::machine::Machine;

/// Values, and where Kubernetes or weir reads them.
struct Case {
    settings: Vec<&'static str>,
    kind: &'static str,
    place: String,
    /// The value at the place, or an element of the list there.
    expected: Value,
}

impl Case {
    fn new(settings: &[&'static str], kind: &'static str, place: &str, expected: Value) -> Self {
        Self { settings: settings.to_vec(), kind, place: place.to_owned(), expected }
    }

    fn pod(settings: &[&'static str], place: &str, expected: Value) -> Self {
        Self::new(settings, "DaemonSet", &format!("/spec/template/spec{place}"), expected)
    }

    fn agent(settings: &[&'static str], place: &str, expected: Value) -> Self {
        Self::pod(settings, &format!("/containers/0{place}"), expected)
    }

    fn argument(settings: &[&'static str], flag: &str) -> Self {
        Self::agent(settings, "/args", json!(flag))
    }

    fn dns(setting: &'static str, flag: &str) -> Self {
        Self::argument(&["dns.enabled=true", setting], flag)
    }
}

/// # Errors
///
/// With the values that are not in their place.
pub(super) fn check(machine: &Machine) -> Result<()> {
    for Case { settings, kind, place, expected } in cases() {
        let objects = rendered(machine, "kube-system", &settings)?;
        let found = named(&objects, kind)?.1.pointer(&place);
        let there = found == Some(&expected)
            || found.and_then(Value::as_array).is_some_and(|listed| listed.contains(&expected));
        ensure!(there, "{settings:?}: {place} of the {kind} is {found:?}, without {expected}");
    }
    networks_of_pods_are_configured(machine)?;
    another_name_is_that_of_all_objects(machine)?;
    println!("values: are in their places");
    Ok(())
}

fn cases() -> impl Iterator<Item = Case> {
    [arguments(), containers(), security(), monitors()].into_iter().flatten()
}

fn arguments() -> Vec<Case> {
    vec![
        Case::argument(&[], "--master=https://192.0.2.1:6443"),
        Case::argument(
            &["apiServer=", "apiServers={https://192.0.2.2:6443,https://192.0.2.3:6443}"],
            "--master=https://192.0.2.2:6443,https://192.0.2.3:6443",
        ),
        Case::argument(&["dns=true"], "--dns"),
        Case::argument(&["dns.enabled=true"], "--dns"),
        Case::dns("dns.domain=a.example", "--dns-domain=a.example"),
        Case::dns("dns.service=dns/dns", "--dns-service=dns/dns"),
        Case::dns("dns.address=fd00::53", "--dns-address=fd00::53"),
        Case::dns("dns.upstream={192.0.2.1,192.0.2.2}", "--dns-upstream=192.0.2.1,192.0.2.2"),
        Case::dns("dns.clients={192.0.2.0/24,::/0}", "--dns-clients=192.0.2.0/24,::/0"),
        Case::dns("dns.rate=1000000", "--dns-rate=1000000"),
        Case::dns("dns.ttl=0", "--dns-ttl=0"),
        Case::dns("dns.pods=false", "--dns-pods=false"),
        Case::dns("dns.topology=true", "--dns-topology=true"),
    ]
}

fn containers() -> Vec<Case> {
    const DIGEST: &str =
        "image.digest=sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
    let image = DIGEST.replace("image.digest=", "weir@");
    vec![
        Case::agent(&[DIGEST, "image.tag=v1"], "/image", json!(image)),
        Case::agent(&["image.tag=v1"], "/image", json!("weir:v1")),
        Case::agent(&["extraEnv[0].name=A"], "/env", json!({"name": "A"})),
        Case::pod(&["extraVolumes[0].name=a"], "/volumes", json!({"name": "a"})),
        Case::agent(
            &["extraVolumeMounts[0].name=a", "extraVolumeMounts[0].mountPath=/a"],
            "/volumeMounts",
            json!({"name": "a", "mountPath": "/a"}),
        ),
        Case::agent(&["startupProbe.periodSeconds=7"], "/startupProbe/periodSeconds", json!(7)),
        Case::agent(&["livenessProbe.timeoutSeconds=7"], "/livenessProbe/timeoutSeconds", json!(7)),
        Case::agent(&["readinessProbe.failureThreshold=7"], "/readinessProbe/failureThreshold", json!(7)),
    ]
}

fn security() -> Vec<Case> {
    let unconfined = json!({"type": "spc_t"});
    vec![
        Case::agent(&[], "/securityContext/seLinuxOptions", unconfined.clone()),
        Case::pod(&["cleanup=true"], "/initContainers/0/securityContext/seLinuxOptions", unconfined),
        Case::agent(&["securityContext.runAsUser=0"], "/securityContext/runAsUser", json!(0)),
        // The API server refuses a privileged container with allowPrivilegeEscalation: false.
        Case::agent(
            &["securityContext.privileged=true"],
            "/securityContext",
            json!({"privileged": true, "readOnlyRootFilesystem": true}),
        ),
        Case::pod(&["podSecurityContext.fsGroup=7"], "/securityContext/fsGroup", json!(7)),
        Case::new(
            &["serviceAccount.annotations.role=a"],
            "ServiceAccount",
            "/metadata/annotations/role",
            json!("a"),
        ),
    ]
}

fn monitors() -> Vec<Case> {
    const ADDRESS: &str = "metrics.bindAddress=0.0.0.0:9999";
    const ENABLED: &str = "metrics.serviceMonitor.enabled=true";
    let monitor = |setting, place, expected| {
        Case::new(&[ADDRESS, ENABLED, setting], "ServiceMonitor", place, json!(expected))
    };
    vec![
        monitor("metrics.serviceMonitor.interval=7s", "/spec/endpoints/0/interval", "7s"),
        monitor("metrics.serviceMonitor.labels.a=b", "/metadata/labels/a", "b"),
        Case::new(&[ADDRESS, ENABLED], "Service", "/spec/ports/0/port", json!(9999)),
    ]
}

fn networks_of_pods_are_configured(machine: &Machine) -> Result<()> {
    let objects = rendered(machine, "kube-system", &["clusterCIDR={10.0.0.0/8,fd00::/8}"])?;
    let text = named(&objects, "ConfigMap")?.1["data"]["config.conf"].as_str().unwrap_or_default();
    let configuration: Value = serde_yaml_ng::from_str(text)?;
    ensure!(configuration["clusterCIDR"] == "10.0.0.0/8,fd00::/8", "clusterCIDR is not in {text}");
    Ok(())
}

/// An object that keeps the release's name would clash with that of another release.
fn another_name_is_that_of_all_objects(machine: &Machine) -> Result<()> {
    let all = [
        "fullnameOverride=proxy",
        "metrics.bindAddress=0.0.0.0:10249",
        "metrics.podMonitor.enabled=true",
        "metrics.serviceMonitor.enabled=true",
        "metrics.dashboard.enabled=true",
    ];
    for object in rendered(machine, "kube-system", &all)? {
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        let own = name.strip_prefix("kube-system:").unwrap_or(name);
        let own = own == "proxy" || own.starts_with("proxy-");
        ensure!(own, "fullnameOverride=proxy: a {} is called {name}", object["kind"]);
    }
    Ok(())
}
