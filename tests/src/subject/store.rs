//! Where objects are put for the agents to find.

use std::{collections::BTreeSet, path::PathBuf};

use anyhow::{Result, bail};
use weir::model::{Kind, Object};

use crate::control_plane::ControlPlane;

pub(super) enum Store<'a> {
    /// A directory with one file for each name.
    Manifests(PathBuf),
    Cluster(Box<ControlPlane<'a>>),
}

impl<'a> Store<'a> {
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

    pub(super) fn kubeconfig(&self) -> Result<Option<PathBuf>> {
        match self {
            Self::Manifests(_) => Ok(None),
            Self::Cluster(plane) => plane.kubeconfig().map(Some),
        }
    }

    pub(super) fn cluster(&mut self) -> Result<&mut ControlPlane<'a>> {
        match self {
            Self::Manifests(_) => bail!("these agents read manifests, there is no API server"),
            Self::Cluster(plane) => Ok(plane),
        }
    }

    /// How many markers, one after the other, prove that everything put before is seen. An API server keeps the order.
    /// A reader of a directory may have passed a file before it was changed, and still read the marker written after it;
    /// the look that finds the next marker has begun later.
    pub(super) fn markers_needed(&self) -> usize {
        match self {
            Self::Manifests(_) => 2,
            Self::Cluster(_) => 1,
        }
    }

    /// Turns what there is under `name` from `old` into `new`.
    pub(super) fn put(&self, name: &str, old: &[Object], new: &[Object]) -> Result<()> {
        match self {
            Self::Cluster(plane) => {
                let gone: Vec<_> = old
                    .iter()
                    .map(identity)
                    .filter(|old| !new.iter().any(|new| identity(new) == *old))
                    .collect();
                let old: BTreeSet<String> = old.iter().map(document).collect::<Result<_>>()?;
                let mut changed = Vec::new();
                for object in new {
                    if !old.contains(&document(object)?) {
                        changed.push(object);
                    }
                }
                plane.delete(&gone)?;
                plane.apply(&changed)
            }
            Self::Manifests(directory) => {
                let file = directory.join(format!("{name}.yaml"));
                if old.is_empty() && new.is_empty() {
                    return Ok(());
                }
                if new.is_empty() {
                    return Ok(std::fs::remove_file(file)?);
                }
                let documents: Vec<String> = new.iter().map(document).collect::<Result<_>>()?;
                // Renamed into place, so that no reader sees half a file.
                let draft = directory.join(format!(".{name}.draft"));
                std::fs::write(&draft, documents.join("---\n"))?;
                Ok(std::fs::rename(draft, file)?)
            }
        }
    }
}

/// The key of an object within its namespace.
fn identity(object: &Object) -> (Kind, String) {
    let (kind, metadata) = match object {
        Object::Service(object) => (Kind::Service, &object.metadata),
        Object::EndpointSlice(object) => (Kind::EndpointSlice, &object.metadata),
        Object::Node(object) => (Kind::Node, &object.metadata),
        Object::ServiceCidr(object) => (Kind::ServiceCidr, &object.metadata),
    };
    (kind, metadata.name.clone().unwrap_or_default())
}

fn document(object: &Object) -> Result<String> {
    Ok(match object {
        Object::Service(object) => serde_yaml_ng::to_string(object)?,
        Object::EndpointSlice(object) => serde_yaml_ng::to_string(object)?,
        Object::Node(object) => serde_yaml_ng::to_string(object)?,
        Object::ServiceCidr(object) => serde_yaml_ng::to_string(object)?,
    })
}
