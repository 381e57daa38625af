//! What a cluster says of this node's pods: a stream of its own, so that Services never wait for pods.

use k8s_openapi::api::core::v1::{Namespace, Pod};

use super::{Change, Kind, ObjectName};

/// An object of the stream about pods.
#[derive(Clone, Debug, PartialEq)]
pub enum PodObject {
    /// A pod of this node that has not finished.
    Pod(Box<Pod>),
    /// Any namespace.
    Namespace(Box<Namespace>),
}

impl PodObject {
    /// Which kind the object is of.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Pod(_) => Kind::Pod,
            Self::Namespace(_) => Kind::Namespace,
        }
    }

    /// The object's namespace and name.
    #[must_use]
    pub fn name(&self) -> ObjectName {
        ObjectName::of(match self {
            Self::Pod(object) => &object.metadata,
            Self::Namespace(object) => &object.metadata,
        })
    }
}

/// One step of what happened to pods and namespaces.
pub type PodChange = Change<PodObject>;
