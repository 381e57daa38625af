//! The state of the cluster that this node needs: Services, their endpoints, this Node.
//!
//! In: [`Change`]s. Out: the names of Services to plan again, and the input of
//! [`crate::plan::plan_service`]. Kubernetes API types end here.

use std::{borrow::Borrow, fmt, sync::Arc};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

mod address;
mod change;
mod cluster;
mod dns;
mod endpoint;
mod family;
#[cfg(test)]
pub(crate) mod fixture;
mod node;
mod pod_change;
mod service;
mod settings;
#[cfg(test)]
mod tests;
mod uid;

pub use address::{parse_address, parse_network, unusable};
pub use change::{Change, Kind, Object};
pub use cluster::{Model, report};
pub use dns::{DNS_PORT, DnsService, DnsServices, NameClients};
pub use endpoint::{Candidate, Endpoint, Endpoints, HEADLESS_LABEL, SERVICE_NAME_LABEL, Slice, SlicePort};
pub use family::{Family, PerFamily, Protocol};
pub use node::{LocalTraffic, Node, NodeView, ZONE_LABEL};
pub use pod_change::{PodChange, PodObject};
pub use service::PROXY_NAME_LABEL;
pub use service::{Removal, Service, ServicePort};
pub use settings::{DetectLocal, LoopbackNodePorts, NodePortSetting, Settings};
pub use uid::Uid;

/// Namespace and name of an object. The namespace is empty for cluster-wide objects.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectName(Arc<str>);

impl ObjectName {
    /// Builds the name of an object.
    #[must_use]
    pub fn new(namespace: &str, name: &str) -> Self {
        Self(format!("{namespace}/{name}").into())
    }

    /// The name in an object's metadata.
    #[must_use]
    pub fn of(metadata: &ObjectMeta) -> Self {
        let namespace = metadata.namespace.as_deref().unwrap_or_default();
        Self::new(namespace, metadata.name.as_deref().unwrap_or_default())
    }

    /// The namespace, empty for cluster-wide objects.
    #[must_use]
    pub fn namespace(&self) -> &str {
        self.0.split_once('/').map_or("", |(namespace, _)| namespace)
    }

    /// The name without the namespace.
    #[must_use]
    pub fn name(&self) -> &str {
        self.0.split_once('/').map_or(&self.0, |(_, name)| name)
    }
}

/// Look-ups by the text `namespace/name` need no copy of it.
impl Borrow<str> for ObjectName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.strip_prefix('/').unwrap_or(&self.0))
    }
}

impl fmt::Debug for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A value in an object that weir cannot use and ignores (W9).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The path of the field.
    pub field: String,
    /// The value as text.
    pub value: String,
    /// Why weir ignores it.
    pub reason: &'static str,
}

impl Problem {
    /// A problem with a value. Only the part of the value that a message shows is stored.
    #[must_use]
    pub fn new(field: String, value: &str, reason: &'static str) -> Self {
        Self { field, value: shortened(value), reason }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { field, value, reason } = self;
        write!(f, "`{field}` is ignored: `{value}` is {reason}")
    }
}

/// The part of a value that a message shows, because a value may be as long as its object.
fn shortened(value: &str) -> String {
    const LONGEST: usize = 128;
    let end = value.floor_char_boundary(LONGEST);
    let more = if end < value.len() { "…" } else { "" };
    format!("{}{more}", &value[..end])
}
