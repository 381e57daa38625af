//! Whether the socket plane serves a pod, or leaves its sockets alone, so that nftables serves the pod.
//!
//! In: a Pod and its Namespace. Out: [`SocketLb`]. An annotation or label on the pod decides, else one on the
//! namespace. Without either, weir leaves a pod alone if its sockets are not in the host's kernel, or if a
//! mesh inside its network namespace needs the Service's address.

use std::{fmt, sync::Arc};

use k8s_openapi::{api::core::v1 as api, apimachinery::pkg::apis::meta::v1::ObjectMeta};

use crate::model::{ObjectName, Problem};

/// The annotation or label with the value `on` or `off`. An annotation overrides a label.
pub const SOCKET_LB_KEY: &str = "weir.dev/socket-lb";

/// Words in RuntimeClass names that mean a kernel of the pod's own, in a virtual machine or in user space.
/// Connections from such a pod reach this node as packets. Classes that only select another low-level runtime
/// or a device (`crun`, `nvidia`, `wasmtime`) use the host's sockets.
const SANDBOXES: [&str; 8] =
    ["kata", "gvisor", "runsc", "firecracker", "hypervisor", "microvm", "edera", "urunc"];

/// The label on pods and namespaces by which Istio ambient and Kmesh select them. It is set before the pod
/// has a network, unlike the annotations by which they report success.
const MESH_MODE_LABEL: &str = "istio.io/dataplane-mode";
/// The values of the label that put a pod into a mesh, each with the name of the mesh.
const MESH_MODES: [(&str, &str); 2] = [("ambient", "istio ambient"), ("Kmesh", "kmesh")];

/// How to recognize that a pod is in a mesh.
struct Mesh {
    name: &'static str,
    /// The name of a container or init container.
    container: Option<&'static str>,
    /// An annotation with this value; `None` means any value.
    annotation: (&'static str, Option<&'static str>),
}

/// Meshes that redirect a pod's connections inside its network namespace and route by the destination
/// address. If that were a backend's address, they would pass the connection through unhandled.
const MESHES: [Mesh; 6] = [
    Mesh { name: "istio", container: Some("istio-proxy"), annotation: ("sidecar.istio.io/status", None) },
    Mesh {
        name: "istio ambient",
        container: None,
        annotation: ("ambient.istio.io/redirection", Some("enabled")),
    },
    Mesh {
        name: "linkerd",
        container: Some("linkerd-proxy"),
        annotation: ("linkerd.io/proxy-version", None),
    },
    Mesh {
        name: "kuma",
        container: Some("kuma-sidecar"),
        annotation: ("kuma.io/sidecar-injected", Some("true")),
    },
    Mesh {
        name: "consul",
        container: None,
        annotation: ("consul.hashicorp.com/transparent-proxy-status", None),
    },
    Mesh { name: "kmesh", container: None, annotation: ("kmesh.net/redirection", Some("enabled")) },
];

/// Whether the socket plane serves a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SocketLb {
    /// It translates the pod's sockets.
    On,
    /// It leaves them alone, and nftables serves the pod.
    Off(Reason),
}

/// The reason for leaving a pod's sockets alone.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// The pod's annotation or label is `off`.
    Pod,
    /// The namespace's annotation or label is `off`.
    Namespace,
    /// The pod has a kernel of its own, according to the name of this RuntimeClass.
    Sandbox(Arc<str>),
    /// The pod is in this mesh.
    Mesh(&'static str),
    /// A kubelet runs in the pod and has cgroups there.
    Cluster,
}

impl Reason {
    /// The reason as the value of a metric's label.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Pod => "pod",
            Self::Namespace => "namespace",
            Self::Sandbox(_) => "sandbox",
            Self::Mesh(_) => "mesh",
            Self::Cluster => "cluster",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pod => write!(f, "{SOCKET_LB_KEY} of the pod is off"),
            Self::Namespace => write!(f, "{SOCKET_LB_KEY} of the namespace is off"),
            Self::Sandbox(class) => write!(f, "runtime class {class} has a kernel of its own"),
            Self::Mesh(mesh) => write!(f, "the mesh {mesh} has to see the Service's address"),
            Self::Cluster => write!(f, "a cluster runs in the pod, and its own Services come first"),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Choice {
    On,
    Off,
}

/// The parts of a pod that decide about its sockets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Namespace and name of the pod.
    pub name: ObjectName,
    /// The UID in the name of the pod's cgroup. For a mirror pod it is the UID of the static pod.
    pub cgroup_uid: Arc<str>,
    choice: Option<Choice>,
    detected: Option<Reason>,
    mesh_mode: Option<Box<str>>,
    host_network: bool,
}

/// The parts of a namespace that decide about its pods' sockets. The default decides nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Namespace {
    choice: Option<Choice>,
    mesh_mode: Option<Box<str>>,
}

impl Pod {
    /// Reads a Pod and adds values that weir ignores to `problems`. `None` without a UID, which every pod in
    /// a cluster has.
    #[must_use]
    pub fn read(object: &api::Pod, problems: &mut Vec<Problem>) -> Option<Self> {
        let cgroup_uid = cgroup_uid(&object.metadata)?.into();
        let spec = object.spec.as_ref();
        let class = spec.and_then(|spec| spec.runtime_class_name.as_deref());
        let sandbox = class.filter(|class| is_sandbox(class)).map(|class| Reason::Sandbox(class.into()));
        Some(Self {
            name: ObjectName::of(&object.metadata),
            cgroup_uid,
            choice: read_choice(&object.metadata, problems),
            detected: sandbox.or_else(|| mesh(object).map(Reason::Mesh)),
            mesh_mode: mesh_mode(&object.metadata),
            host_network: spec.and_then(|spec| spec.host_network).unwrap_or(false),
        })
    }

    /// Whether the socket plane serves this pod of `namespace`.
    #[must_use]
    pub fn socket_lb(&self, namespace: &Namespace) -> SocketLb {
        let reason = match (self.choice, namespace.choice) {
            (Some(Choice::On), _) | (None, Some(Choice::On)) => None,
            (Some(Choice::Off), _) => Some(Reason::Pod),
            (None, Some(Choice::Off)) => Some(Reason::Namespace),
            (None, None) => self.detected.clone().or_else(|| self.mesh_by_label(namespace)),
        };
        reason.map_or(SocketLb::On, SocketLb::Off)
    }

    /// Whether neither the pod nor its namespace has an annotation or label that decides.
    pub(super) fn is_undecided(&self, namespace: &Namespace) -> bool {
        self.choice.is_none() && namespace.choice.is_none()
    }

    /// The pod's label overrides the namespace's. Neither applies to pods in the host's network.
    fn mesh_by_label(&self, namespace: &Namespace) -> Option<Reason> {
        let mode = self.mesh_mode.as_deref().or(namespace.mesh_mode.as_deref())?;
        let (_, mesh) = MESH_MODES.into_iter().find(|(known, _)| !self.host_network && *known == mode)?;
        Some(Reason::Mesh(mesh))
    }
}

impl Namespace {
    /// Reads a Namespace and adds values that weir ignores to `problems`.
    #[must_use]
    pub fn read(object: &api::Namespace, problems: &mut Vec<Problem>) -> Self {
        Self { choice: read_choice(&object.metadata, problems), mesh_mode: mesh_mode(&object.metadata) }
    }
}

fn cgroup_uid(metadata: &ObjectMeta) -> Option<&str> {
    let mirrored = annotation(metadata, "kubernetes.io/config.mirror")
        .and_then(|_| annotation(metadata, "kubernetes.io/config.hash"));
    mirrored.or(metadata.uid.as_deref()).filter(|uid| !uid.is_empty())
}

fn annotation<'a>(metadata: &'a ObjectMeta, key: &str) -> Option<&'a str> {
    metadata.annotations.as_ref()?.get(key).map(String::as_str)
}

fn read_choice(metadata: &ObjectMeta, problems: &mut Vec<Problem>) -> Option<Choice> {
    let places = [("annotations", &metadata.annotations), ("labels", &metadata.labels)];
    places.into_iter().find_map(|(place, values)| {
        let value = values.as_ref()?.get(SOCKET_LB_KEY)?;
        match value.as_str() {
            "on" => Some(Choice::On),
            "off" => Some(Choice::Off),
            _ => {
                let field = format!("metadata.{place}[{SOCKET_LB_KEY}]");
                problems.push(Problem::new(field, value, "neither `on` nor `off`"));
                None
            }
        }
    })
}

fn mesh_mode(metadata: &ObjectMeta) -> Option<Box<str>> {
    metadata.labels.as_ref()?.get(MESH_MODE_LABEL).map(|mode| mode.as_str().into())
}

/// Names of RuntimeClasses are free, so weir looks for known words: `kata-qemu`, `my-gvisor`,
/// `katacontainers`.
fn is_sandbox(class: &str) -> bool {
    class
        .split(|char: char| !char.is_ascii_alphanumeric())
        .any(|word| SANDBOXES.iter().any(|sandbox| word.starts_with(sandbox)))
}

fn mesh(object: &api::Pod) -> Option<&'static str> {
    let spec = object.spec.as_ref();
    let containers = spec.into_iter().flat_map(|spec| {
        // A native sidecar of Kubernetes is an init container that keeps running.
        spec.containers.iter().chain(spec.init_containers.iter().flatten())
    });
    let names: Vec<_> = containers.map(|container| container.name.as_str()).collect();
    let found = MESHES.iter().find(|mesh| {
        let (key, wanted) = mesh.annotation;
        mesh.container.is_some_and(|container| names.contains(&container))
            || annotation(&object.metadata, key)
                .is_some_and(|value| wanted.is_none_or(|wanted| value == wanted))
    });
    found.map(|mesh| mesh.name)
}
