//! The state of the manifests, to print and to save.
//!
//! In: the directory and the catalog. Out: [`ManifestStatus`], written to the status file.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::{catalog::Catalog, directory::Directory};
use crate::model::Protocol;

/// The state of the manifests.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ManifestStatus {
    /// Why the directory cannot be read. Its last content stays in force.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The files, by name.
    pub files: Vec<FileStatus>,
    /// The allocations, by Service.
    pub allocations: Vec<Allocation>,
    /// Warnings, which change nothing for traffic.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// The state of one file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FileStatus {
    /// The name of the file in the directory.
    pub name: String,
    /// The number of objects in its last valid content.
    pub objects: usize,
    /// Its errors. The last valid content stays in force.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<String>,
}

/// The addresses and ports that were allocated for a Service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Allocation {
    /// The Service as `namespace/name`.
    pub service: String,
    /// All its ClusterIPs if at least one of them was allocated; the first is the primary one.
    #[serde(default, rename = "clusterIPs", skip_serializing_if = "Vec::is_empty")]
    pub cluster_ips: Vec<IpAddr>,
    /// The allocated NodePorts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub node_ports: Vec<NodePortAllocation>,
    /// The allocated health check port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health_check_node_port: Option<u16>,
}

impl Allocation {
    /// Whether nothing was allocated.
    pub(super) fn is_empty(&self) -> bool {
        self.cluster_ips.is_empty() && self.node_ports.is_empty() && self.health_check_node_port.is_none()
    }
}

/// The allocated NodePort of a service port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodePortAllocation {
    /// The service port.
    pub port: u16,
    /// The transport protocol.
    pub protocol: Protocol,
    /// The allocated port.
    pub node_port: u16,
}

impl ManifestStatus {
    pub(super) fn of(error: Option<String>, directory: &Directory, catalog: &Catalog) -> Self {
        let files = directory.files().iter().map(|(name, file)| FileStatus {
            name: name.to_string(),
            objects: file.items.len(),
            errors: file
                .errors
                .iter()
                .chain(catalog.errors().filter(|error| error.file == *name))
                .map(|error| error.in_file().to_string())
                .collect(),
        });
        let files = files.collect();
        let allocations = catalog.allocations().cloned().collect();
        let warnings = directory
            .files()
            .values()
            .flat_map(|file| &file.warnings)
            .chain(catalog.warnings())
            .cloned()
            .collect();
        Self { error, files, allocations, warnings }
    }
}
