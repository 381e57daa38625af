//! What happened to an object: the one thing that sources tell the model.
//!
//! In: objects of the Kubernetes API. Out: [`Change`]s, one for each that came, changed or went, and one for each kind that is
//! complete.

use std::fmt;

use k8s_openapi::{
    api::{
        core::v1::{Node, Service},
        discovery::v1::EndpointSlice,
        networking::v1::ServiceCIDR,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use serde::Serialize;

use super::ObjectName;

/// What a source watches. Each kind is listed and completed on its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub enum Kind {
    /// Services (W1).
    Service,
    /// EndpointSlices (W2).
    EndpointSlice,
    /// This Node (W3).
    Node,
    /// ServiceCIDRs (W3).
    ServiceCidr,
    /// The pods of this node.
    Pod,
    /// Namespaces, for what they say of their pods.
    Namespace,
}

impl Kind {
    /// Every kind that Services are made of.
    pub const ALL: [Self; 4] = [Self::Service, Self::EndpointSlice, Self::Node, Self::ServiceCidr];
    /// The kinds of the stream about pods, which only a cluster has.
    pub const PODS: [Self; 2] = [Self::Pod, Self::Namespace];

    /// The kind as manifests and messages call it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::Node => "Node",
            Self::ServiceCidr => "ServiceCIDR",
            Self::Pod => "Pod",
            Self::Namespace => "Namespace",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An object as its origin wrote it, less the metadata that weir does not read.
#[derive(Clone, Debug, PartialEq)]
pub enum Object {
    /// A Service.
    Service(Box<Service>),
    /// An EndpointSlice.
    EndpointSlice(Box<EndpointSlice>),
    /// This node's Node.
    Node(Box<Node>),
    /// A ServiceCIDR.
    ServiceCidr(Box<ServiceCIDR>),
}

impl Object {
    /// Which kind the object is of.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Service(_) => Kind::Service,
            Self::EndpointSlice(_) => Kind::EndpointSlice,
            Self::Node(_) => Kind::Node,
            Self::ServiceCidr(_) => Kind::ServiceCidr,
        }
    }

    /// The object's metadata.
    #[must_use]
    pub fn metadata(&self) -> &ObjectMeta {
        match self {
            Self::Service(object) => &object.metadata,
            Self::EndpointSlice(object) => &object.metadata,
            Self::Node(object) => &object.metadata,
            Self::ServiceCidr(object) => &object.metadata,
        }
    }

    /// The object's metadata, to change.
    pub fn metadata_mut(&mut self) -> &mut ObjectMeta {
        match self {
            Self::Service(object) => &mut object.metadata,
            Self::EndpointSlice(object) => &mut object.metadata,
            Self::Node(object) => &mut object.metadata,
            Self::ServiceCidr(object) => &mut object.metadata,
        }
    }

    /// The object's namespace and name.
    #[must_use]
    pub fn name(&self) -> ObjectName {
        ObjectName::of(self.metadata())
    }
}

/// One step of what happened at the origin, on a stream of objects `O`.
#[derive(Clone, Debug, PartialEq)]
pub enum Change<O = Object> {
    /// The object is new or has changed.
    Apply(O),
    /// The object is gone, or does not concern us any more.
    Delete(Kind, ObjectName),
    /// Everything of this kind that existed when the source started has been delivered. Sent once for every kind of the
    /// stream, also by sources that have no objects of it.
    Synced(Kind),
}
