//! The wiring.
//!
//! Placeholder of the `config` branch with the signatures that `main` calls; the wiring itself replaces this file.

use std::collections::BTreeMap;

use crate::{
    config::{KernelArgs, Loaded, LogArgs},
    dataplane::State,
    observe::Telemetry,
    plan::{Frontend, PortId},
};

/// Programs this node until told to stop.
///
/// # Errors
///
/// Always.
pub fn run(loaded: Loaded) -> anyhow::Result<()> {
    let Loaded { config, warnings } = loaded;
    Telemetry::init(config.log)?;
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    anyhow::bail!("not wired")
}

/// What would be programmed.
///
/// # Errors
///
/// Always.
pub fn plan(_loaded: Loaded) -> anyhow::Result<(State, BTreeMap<Frontend, PortId>)> {
    anyhow::bail!("not wired")
}

/// Takes everything out of the kernel.
///
/// # Errors
///
/// Always.
pub fn cleanup(_kernel: &KernelArgs, log: &LogArgs) -> anyhow::Result<()> {
    Telemetry::init(log.config())?;
    anyhow::bail!("not wired")
}
