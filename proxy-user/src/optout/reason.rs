//! Whether the sockets of one pod are led to backends, or left alone for the packet rules.
//!
//! In: a Pod and its Namespace. Out: [`SocketLb`]. Who says it in so many words, on the pod or else on the namespace, is
//! obeyed. Otherwise pods are left alone whose sockets are not the host kernel's, and pods with a mesh inside their
//! network namespace that has to see which Service was asked for.

use std::{fmt, sync::Arc};

use k8s_openapi::{api::core::v1 as api, apimachinery::pkg::apis::meta::v1::ObjectMeta};

use crate::model::{ObjectName, Problem};

/// The annotation or label that decides, with the value `on` or `off`. Of the two the annotation counts.
pub const SOCKET_LB_KEY: &str = "weir.dev/socket-lb";

/// Words of RuntimeClass names that stand for a kernel of the pod's own, be it in a virtual machine or in user space. What
/// its processes connect to reaches this node as packets. Classes that only choose another low-level runtime or a device
/// (`crun`, `nvidia`, `wasmtime`) use the host's sockets.
const SANDBOXES: [&str; 8] =
    ["kata", "gvisor", "runsc", "firecracker", "hypervisor", "microvm", "edera", "urunc"];

/// The label of Istio's and Kmesh's kind of mesh, on pods and namespaces. It is there before the pod's network is, other
/// than the annotations by which they say that they are done.
const MESH_MODE_LABEL: &str = "istio.io/dataplane-mode";
/// Its values that put a pod into a mesh, and that mesh.
const MESH_MODES: [(&str, &str); 2] = [("ambient", "istio ambient"), ("Kmesh", "kmesh")];

/// How a mesh shows in a pod.
struct Mesh {
    name: &'static str,
    /// A container, or init container, of this name.
    container: Option<&'static str>,
    /// An annotation with this value, or with any.
    annotation: (&'static str, Option<&'static str>),
}

/// Meshes that redirect a pod's connections inside its network namespace and choose by the address asked for. With a
/// backend's address they would let the connection through as none of theirs.
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

/// What happens to a pod's sockets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SocketLb {
    /// They are led to backends.
    On,
    /// They are left alone; the packet rules serve the pod.
    Off(Reason),
}

/// Why a pod's sockets are left alone.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// The pod says so.
    Pod,
    /// Its namespace says so.
    Namespace,
    /// It has a kernel of its own, by the name of this RuntimeClass.
    Sandbox(Arc<str>),
    /// This mesh is at work in it.
    Mesh(&'static str),
    /// A kubelet has cgroups in it.
    Cluster,
}

impl Reason {
    /// The kind of reason in one word, for metrics.
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

/// A pod, as far as its sockets are concerned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Namespace and name.
    pub name: ObjectName,
    /// The UID that is part of its cgroup's name: for a mirror pod that of the static pod it mirrors.
    pub cgroup_uid: Arc<str>,
    choice: Option<Choice>,
    detected: Option<Reason>,
    mesh_mode: Option<Box<str>>,
    host_network: bool,
}

/// A namespace, as far as its pods' sockets are concerned. [`Namespace::default`] says nothing about them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Namespace {
    choice: Option<Choice>,
    mesh_mode: Option<Box<str>>,
}

impl Pod {
    /// Reads a Pod; adds values that mean nothing to `problems`. `None` without a UID, which no pod in a cluster lacks.
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

    /// What happens to this pod's sockets, being in `namespace`.
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

    /// Whether neither the pod nor its namespace says what is to happen.
    pub(super) fn is_undecided(&self, namespace: &Namespace) -> bool {
        self.choice.is_none() && namespace.choice.is_none()
    }

    /// The pod's label counts before the namespace's, and neither concerns pods on the host's network.
    fn mesh_by_label(&self, namespace: &Namespace) -> Option<Reason> {
        let mode = self.mesh_mode.as_deref().or(namespace.mesh_mode.as_deref())?;
        let (_, mesh) = MESH_MODES.into_iter().find(|(known, _)| !self.host_network && *known == mode)?;
        Some(Reason::Mesh(mesh))
    }
}

impl Namespace {
    /// Reads a Namespace; adds values that mean nothing to `problems`.
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

/// Names are free, so only their words tell: `kata-qemu`, `my-gvisor`, `katacontainers`.
fn is_sandbox(class: &str) -> bool {
    class
        .split(|char: char| !char.is_ascii_alphanumeric())
        .any(|word| SANDBOXES.iter().any(|sandbox| word.starts_with(sandbox)))
}

fn mesh(object: &api::Pod) -> Option<&'static str> {
    let spec = object.spec.as_ref();
    let containers = spec.into_iter().flat_map(|spec| {
        // A sidecar of Kubernetes' own kind is an init container that goes on running.
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
