//! What became of the manifests, in a form to print and to save.
//!
//! In: the directory and the catalog. Out: [`ManifestStatus`], which `weir status` shows.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::{catalog::Catalog, directory::Directory};
use crate::model::Protocol;

/// What became of the manifests.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ManifestStatus {
    /// Why the directory cannot be read. What it last held stays in force.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The files, by name.
    pub files: Vec<FileStatus>,
    /// What Services were given, by Service.
    pub allocations: Vec<Allocation>,
    /// What is odd but does no harm.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// What became of one file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FileStatus {
    /// The file's name in the directory.
    pub name: String,
    /// How many objects it held when it was last right.
    pub objects: usize,
    /// What is wrong with it. What it last held rightly stays in force.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<String>,
}

/// What a Service was given because its manifest left the choice.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Allocation {
    /// The Service, as `namespace/name`.
    pub service: String,
    /// All its ClusterIPs when at least one of them was allocated; the first is the primary one.
    #[serde(default, rename = "clusterIPs", skip_serializing_if = "Vec::is_empty")]
    pub cluster_ips: Vec<IpAddr>,
    /// The NodePorts that were allocated.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub node_ports: Vec<NodePortAllocation>,
    /// The health check port that was allocated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health_check_node_port: Option<u16>,
}

impl Allocation {
    /// Whether nothing was left to choose.
    pub(super) fn is_empty(&self) -> bool {
        self.cluster_ips.is_empty() && self.node_ports.is_empty() && self.health_check_node_port.is_none()
    }
}

/// The NodePort of one service port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodePortAllocation {
    /// The service port.
    pub port: u16,
    /// Its protocol.
    pub protocol: Protocol,
    /// What it was given.
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
