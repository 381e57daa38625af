//! Which pods the socket plane leaves alone, and for which reason.

use k8s_openapi::{
    api::core::v1::{Namespace as NamespaceObject, Pod as PodObjectOfApi},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use serde_json::{Value, json};

use crate::{
    model::{Change, Kind, ObjectName, PodChange, PodObject},
    optout::Pods,
};

/// A pod in namespace `shop`, with these additions.
fn pod(name: &str, metadata: Value, spec: Value) -> PodChange {
    let mut object = json!({
        "metadata": {"name": name, "namespace": "shop", "uid": format!("uid-{name}")},
        "spec": {"containers": [{"name": "main"}]},
    });
    for (part, more) in [("metadata", metadata), ("spec", spec)] {
        object[part].as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    }
    let object: PodObjectOfApi = serde_json::from_value(object).unwrap();
    Change::Apply(PodObject::Pod(Box::new(object)))
}

fn namespace(name: &str, metadata: Value) -> PodChange {
    let metadata: ObjectMeta = serde_json::from_value(metadata).unwrap();
    let metadata = ObjectMeta { name: Some(name.to_owned()), ..metadata };
    Change::Apply(PodObject::Namespace(Box::new(NamespaceObject { metadata, ..NamespaceObject::default() })))
}

fn choice(place: &str, value: &str) -> Value {
    json!({place: {"weir.dev/socket-lb": value}})
}

/// `uid: reason` of every pod that the socket plane leaves alone.
fn bypassed(pods: &Pods) -> Vec<String> {
    let bypassed = pods.bypassed().pods;
    bypassed.iter().map(|(uid, pod)| format!("{uid}: {}", pod.reason)).collect()
}

fn after(changes: impl IntoIterator<Item = PodChange>) -> Pods {
    let mut pods = Pods::default();
    changes.into_iter().for_each(|change| pods.apply(change));
    pods
}

/// Why the socket plane leaves a pod with these additions alone.
fn reason(metadata: Value, spec: Value) -> Option<String> {
    let pods = after([pod("a", metadata, spec)]);
    let first = pods.bypassed().pods.into_values().next()?;
    Some(first.reason.to_string())
}

#[test]
fn a_pods_choice_overrides_its_namespaces() {
    for place in ["annotations", "labels"] {
        let of = |of_pod: Option<&str>, of_namespace: Option<&str>| {
            let metadata = |value: Option<&str>| value.map_or(json!({}), |value| choice(place, value));
            let pods =
                after([pod("a", metadata(of_pod), json!({})), namespace("shop", metadata(of_namespace))]);
            bypassed(&pods).len()
        };
        let choices = [None, Some("on"), Some("off")];
        let table = choices.map(|pod| choices.map(|namespace| of(pod, namespace)));
        assert_eq!(table, [[0, 0, 1], [0, 0, 0], [1, 1, 1]], "{place}");
    }
}

#[test]
fn the_reason_names_pod_or_namespace() {
    let pods = after([
        namespace("shop", choice("labels", "off")),
        pod("a", choice("labels", "off"), json!({})),
        pod("b", json!({}), json!({})),
    ]);
    assert_eq!(
        bypassed(&pods),
        ["uid-a: weir.dev/socket-lb of the pod is off", "uid-b: weir.dev/socket-lb of the namespace is off"]
    );
}

#[test]
fn other_values_are_ignored_and_an_annotation_overrides_a_label() {
    for value in ["", "Off", "false", "true", "no"] {
        assert_eq!(reason(choice("annotations", value), json!({})), None, "{value}");
    }
    let both = |annotation: &str, label: &str| json!({"annotations": {"weir.dev/socket-lb": annotation}, "labels": {"weir.dev/socket-lb": label}});
    assert!(reason(both("off", "on"), json!({})).is_some());
    assert_eq!(reason(both("on", "off"), json!({})), None);
    assert!(reason(both("nonsense", "off"), json!({})).is_some());
}

#[test]
fn the_problem_of_a_wrong_value_names_its_field() {
    let Change::Apply(PodObject::Pod(object)) = pod("a", choice("annotations", "of"), json!({})) else {
        panic!("not a pod")
    };
    let mut problems = Vec::new();
    assert!(crate::optout::Pod::read(&object, &mut problems).is_some());
    let [problem] = &problems[..] else { panic!("{problems:?}") };
    assert_eq!(
        (&*problem.field, &*problem.value, problem.reason),
        ("metadata.annotations[weir.dev/socket-lb]", "of", "neither `on` nor `off`")
    );
}

#[test]
fn pods_with_their_own_kernel_opt_out_and_other_runtime_classes_do_not() {
    let by_class = |class: &str| reason(json!({}), json!({"runtimeClassName": class}));
    for class in [
        "kata",
        "kata-qemu",
        "kata-qemu-nvidia-gpu",
        "katacontainers",
        "kata-vm-isolation",
        "gvisor",
        "my-gvisor",
        "runsc",
        "runsc-kvm",
        "aws.firecracker",
        "kata-fc",
        "cloud-hypervisor",
        "edera",
        "urunc",
    ] {
        assert_eq!(by_class(class), Some(format!("runtime class {class} has a kernel of its own")));
    }
    for class in
        ["nvidia", "nvidia-cdi", "nvidia-legacy", "runc", "crun", "youki", "wasmtime-spin", "sysbox-runc"]
    {
        assert_eq!(by_class(class), None, "{class}");
    }
}

#[test]
fn pods_in_a_mesh_opt_out_by_container_or_annotation() {
    let opted_out = |mesh: &str| Some(format!("the mesh {mesh} has to see the Service's address"));
    for (container, mesh) in
        [("istio-proxy", "istio"), ("linkerd-proxy", "linkerd"), ("kuma-sidecar", "kuma")]
    {
        let containers = json!([{"name": "main"}, {"name": container}]);
        assert_eq!(reason(json!({}), json!({"containers": containers})), opted_out(mesh));
        let native = json!([{"name": container, "restartPolicy": "Always"}]);
        assert_eq!(reason(json!({}), json!({"initContainers": native})), opted_out(mesh));
    }
    for (key, value, mesh) in [
        ("sidecar.istio.io/status", "{}", "istio"),
        ("ambient.istio.io/redirection", "enabled", "istio ambient"),
        ("linkerd.io/proxy-version", "edge-25.1.1", "linkerd"),
        ("kuma.io/sidecar-injected", "true", "kuma"),
        ("consul.hashicorp.com/transparent-proxy-status", "enabled", "consul"),
        ("kmesh.net/redirection", "enabled", "kmesh"),
    ] {
        assert_eq!(reason(json!({"annotations": {key: value}}), json!({})), opted_out(mesh));
    }
    for (key, value) in [
        ("ambient.istio.io/redirection", "disabled"),
        ("kuma.io/sidecar-injected", "false"),
        ("linkerd.io/inject", "disabled"),
        ("sidecar.istio.io/inject", "false"),
    ] {
        assert_eq!(reason(json!({"annotations": {key: value}}), json!({})), None, "{key}");
    }
}

#[test]
fn mesh_labels_count_before_the_mesh_reports_success() {
    let mode = |mode: &str| json!({"labels": {"istio.io/dataplane-mode": mode}});
    let by_labels = |namespace_says: Value, pod_says: Value, spec: Value| {
        bypassed(&after([namespace("shop", namespace_says), pod("a", pod_says, spec)]))
    };
    let ambient = ["uid-a: the mesh istio ambient has to see the Service's address"];
    assert_eq!(by_labels(mode("ambient"), json!({}), json!({})), ambient);
    assert_eq!(by_labels(json!({}), mode("ambient"), json!({})), ambient);
    assert_eq!(
        by_labels(mode("Kmesh"), json!({}), json!({})),
        ["uid-a: the mesh kmesh has to see the Service's address"]
    );
    assert!(by_labels(mode("ambient"), mode("none"), json!({})).is_empty());
    assert!(by_labels(mode("ambient"), json!({}), json!({"hostNetwork": true})).is_empty());
    assert!(by_labels(mode("none"), json!({}), json!({})).is_empty());
}

#[test]
fn on_overrides_a_detected_reason() {
    for (metadata, spec) in [
        (choice("annotations", "on"), json!({"runtimeClassName": "kata"})),
        (choice("labels", "on"), json!({"containers": [{"name": "istio-proxy"}]})),
    ] {
        assert_eq!(reason(metadata, spec), None);
    }
    let pods = after([
        namespace("shop", choice("labels", "on")),
        pod("a", json!({}), json!({"runtimeClassName": "gvisor"})),
    ]);
    assert_eq!(bypassed(&pods), Vec::<String>::new());
}

#[test]
fn a_mirror_pods_cgroup_has_the_uid_of_the_static_pod() {
    let annotations = |mirror: bool| {
        let mut annotations = json!({"weir.dev/socket-lb": "off", "kubernetes.io/config.hash": "0a1b"});
        if mirror {
            annotations["kubernetes.io/config.mirror"] = json!("0a1b");
        }
        json!({"annotations": annotations})
    };
    let uids = |mirror| {
        let pods = after([pod("a", annotations(mirror), json!({}))]);
        pods.bypassed().pods.into_keys().next().unwrap()
    };
    assert_eq!(&*uids(true), "0a1b");
    assert_eq!(&*uids(false), "uid-a");
}

#[test]
fn pods_and_namespaces_may_change_and_both_kinds_must_be_complete() {
    let mut pods = after([pod("a", json!({}), json!({"hostNetwork": true}))]);
    assert!(bypassed(&pods).is_empty() && !pods.bypassed().complete);
    pods.apply(namespace("shop", choice("labels", "off")));
    assert_eq!(bypassed(&pods).len(), 1);
    pods.apply(Change::Synced(Kind::Pod));
    assert!(!pods.bypassed().complete);
    pods.apply(Change::Synced(Kind::Namespace));
    assert!(pods.bypassed().complete);
    pods.apply(namespace("shop", json!({})));
    assert!(bypassed(&pods).is_empty());
    pods.apply(pod("a", choice("labels", "off"), json!({})));
    assert_eq!(bypassed(&pods).len(), 1);
    pods.apply(Change::Delete(Kind::Pod, ObjectName::new("shop", "a")));
    assert!(bypassed(&pods).is_empty());
}

#[test]
fn pods_without_a_choice_are_undecided_and_pods_with_on_are_not() {
    let undecided =
        |pods: &Pods| -> Vec<String> { pods.bypassed().undecided.keys().map(ToString::to_string).collect() };
    let mut pods = after([
        pod("silent", json!({}), json!({})),
        pod("on", choice("annotations", "on"), json!({})),
        pod("off", choice("labels", "off"), json!({})),
    ]);
    assert_eq!(undecided(&pods), ["uid-silent"]);
    assert_eq!(pods.bypassed().pods.len(), 1);
    pods.apply(namespace("shop", choice("labels", "on")));
    assert!(undecided(&pods).is_empty());
}
