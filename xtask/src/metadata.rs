//! The workspace's packages and targets, as `cargo metadata` prints them.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use serde::Deserialize;

use crate::{machine::Machine, process};

#[derive(Deserialize)]
pub(crate) struct Metadata {
    pub(crate) packages: Vec<Package>,
    pub(crate) target_directory: PathBuf,
}

#[derive(Deserialize)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) targets: Vec<Target>,
}

#[derive(Deserialize)]
pub(crate) struct Target {
    pub(crate) name: String,
    pub(crate) kind: Vec<String>,
}

impl Machine {
    /// Runs `cargo metadata`.
    pub(crate) fn metadata(&self) -> Result<Metadata> {
        let text = process::read(self.cargo().args(["metadata", "--no-deps", "--format-version", "1"]))?;
        serde_json::from_str(&text).context("reading the output of cargo metadata")
    }

    /// Where cargo writes what it builds.
    pub(crate) fn target_directory(&self) -> Result<PathBuf> {
        Ok(self.metadata()?.target_directory)
    }
}
