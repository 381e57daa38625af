//! Changes of this node's pods and of namespaces. They have a stream of their own, so that Services never
//! wait for pods.

use k8s_openapi::api::core::v1::{Namespace, Pod};

use super::{Change, Kind, ObjectName};

/// An object of the pod stream.
#[derive(Clone, Debug, PartialEq)]
pub enum PodObject {
    /// A pod of this node that has not finished.
    Pod(Box<Pod>),
    /// A namespace, also one without pods on this node.
    Namespace(Box<Namespace>),
}

impl PodObject {
    /// The kind of the object.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Pod(_) => Kind::Pod,
            Self::Namespace(_) => Kind::Namespace,
        }
    }

    /// Namespace and name of the object.
    #[must_use]
    pub fn name(&self) -> ObjectName {
        ObjectName::of(match self {
            Self::Pod(object) => &object.metadata,
            Self::Namespace(object) => &object.metadata,
        })
    }
}

/// A change of a pod or a namespace.
pub type PodChange = Change<PodObject>;
