//! Where Kubernetes objects come from: a cluster's API server or a directory of manifests.
//!
//! In: a watch. Out: [`Change`]s on a channel, in the order they happened. A source never says that an object is gone
//! merely because it cannot reach its origin.

use k8s_openapi::api::{
    core::v1::{Node, Service},
    discovery::v1::EndpointSlice,
    networking::v1::ServiceCIDR,
};

use crate::model::ObjectName;

pub mod host;

/// What a source watches. Each kind is listed and completed on its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// Services (W1).
    Service,
    /// EndpointSlices (W2).
    EndpointSlice,
    /// This Node (W3).
    Node,
    /// ServiceCIDRs (W3).
    ServiceCidr,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 4] = [Self::Service, Self::EndpointSlice, Self::Node, Self::ServiceCidr];
}

/// An object as its origin wrote it, less the metadata nobody reads.
#[derive(Clone, Debug)]
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

/// One step of what happened at the origin.
#[derive(Clone, Debug)]
pub enum Change {
    /// The object is new or has changed.
    Apply(Object),
    /// The object is gone, or does not concern us any more.
    Delete(Kind, ObjectName),
    /// Everything of this kind that existed when the source started has been delivered. Sent once for every kind,
    /// also by sources that have no objects of it.
    Synced(Kind),
}
