//! Where objects are put for the agents to find.

use std::path::PathBuf;

use anyhow::Result;
use weir::source::{Kind, Object};

use crate::control_plane::ControlPlane;

/// What the agents watch.
#[derive(Debug)]
pub(super) enum Store<'a> {
    /// A directory with one file for each name.
    Manifests(PathBuf),
    /// An API server.
    Cluster(ControlPlane<'a>),
}

impl Store<'_> {
    pub(super) fn manifests(directory: PathBuf) -> Result<Self> {
        std::fs::create_dir_all(&directory)?;
        Ok(Self::Manifests(directory))
    }

    pub(super) fn directory(&self) -> Option<PathBuf> {
        match self {
            Self::Manifests(directory) => Some(directory.clone()),
            Self::Cluster(_) => None,
        }
    }

    pub(super) fn kubeconfig(&self) -> Option<PathBuf> {
        match self {
            Self::Manifests(_) => None,
            Self::Cluster(plane) => Some(plane.kubeconfig()),
        }
    }

    /// Makes `objects` what there is under `name`; `gone` were there before.
    pub(super) fn put(&self, name: &str, gone: &[(Kind, String)], objects: &[Object]) -> Result<()> {
        match self {
            Self::Cluster(plane) => {
                plane.delete(gone)?;
                plane.apply(objects)
            }
            Self::Manifests(directory) => {
                let file = directory.join(format!("{name}.yaml"));
                if objects.is_empty() {
                    return Ok(std::fs::remove_file(file)?);
                }
                // Renamed into place, so that nobody reads half a file.
                let draft = directory.join(format!(".{name}.draft"));
                std::fs::write(&draft, documents(objects)?)?;
                Ok(std::fs::rename(draft, file)?)
            }
        }
    }
}

/// The objects as one YAML stream.
fn documents(objects: &[Object]) -> Result<String> {
    let mut text = String::new();
    for object in objects {
        let document = match object {
            Object::Service(object) => serde_yaml_ng::to_string(object)?,
            Object::EndpointSlice(object) => serde_yaml_ng::to_string(object)?,
            Object::Node(object) => serde_yaml_ng::to_string(object)?,
            Object::ServiceCidr(object) => serde_yaml_ng::to_string(object)?,
        };
        text.push_str("---\n");
        text.push_str(&document);
    }
    Ok(text)
}
