//! [`Change`]: what the sources send to the model.
//!
//! In: objects of the Kubernetes API. Out: a [`Change`] for each object that is new, has changed or was
//! deleted, and one for each kind when its first list is complete.

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

/// A kind of object that a source watches. Each kind is listed and completed by itself.
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
    /// Pods of this node.
    Pod,
    /// Namespaces. Their annotations and labels apply to their pods.
    Namespace,
}

impl Kind {
    /// The kinds that plans of Services are made of.
    pub const ALL: [Self; 4] = [Self::Service, Self::EndpointSlice, Self::Node, Self::ServiceCidr];
    /// The kinds of the pod stream, which only a cluster has.
    pub const PODS: [Self; 2] = [Self::Pod, Self::Namespace];

    /// The name of the kind, as in manifests.
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

/// An object as its source read it, without the metadata that weir does not use.
#[derive(Clone, Debug, PartialEq)]
pub enum Object {
    /// A Service.
    Service(Box<Service>),
    /// An EndpointSlice.
    EndpointSlice(Box<EndpointSlice>),
    /// The Node object of this node.
    Node(Box<Node>),
    /// A ServiceCIDR.
    ServiceCidr(Box<ServiceCIDR>),
}

impl Object {
    /// The kind of the object.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Service(_) => Kind::Service,
            Self::EndpointSlice(_) => Kind::EndpointSlice,
            Self::Node(_) => Kind::Node,
            Self::ServiceCidr(_) => Kind::ServiceCidr,
        }
    }

    /// Metadata of the object.
    #[must_use]
    pub fn metadata(&self) -> &ObjectMeta {
        match self {
            Self::Service(object) => &object.metadata,
            Self::EndpointSlice(object) => &object.metadata,
            Self::Node(object) => &object.metadata,
            Self::ServiceCidr(object) => &object.metadata,
        }
    }

    /// Mutable metadata of the object.
    pub fn metadata_mut(&mut self) -> &mut ObjectMeta {
        match self {
            Self::Service(object) => &mut object.metadata,
            Self::EndpointSlice(object) => &mut object.metadata,
            Self::Node(object) => &mut object.metadata,
            Self::ServiceCidr(object) => &mut object.metadata,
        }
    }

    /// Namespace and name of the object.
    #[must_use]
    pub fn name(&self) -> ObjectName {
        ObjectName::of(self.metadata())
    }
}

/// One step on a stream of objects `O`.
#[derive(Clone, Debug, PartialEq)]
pub enum Change<O = Object> {
    /// The object is new or has changed.
    Apply(O),
    /// The object was deleted, or no longer matches the watch.
    Delete(Kind, ObjectName),
    /// Every object of this kind that existed at the start has been sent. Sent once for each kind of the
    /// stream, also by sources that have no objects of that kind.
    Synced(Kind),
}
