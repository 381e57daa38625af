//! `cargo xtask setup`: installs what is missing on this machine, and says each thing it does.
//!
//! In: the [`Machine`] and how far to go. Out: a machine on which `cargo build` works, then the demo, the tests, the
//! checks. Every step first looks whether it has anything to do, so a second run costs nothing.

use std::{io::Write as _, time::Instant};

use anyhow::{Context as _, Result};
use clap::ValueEnum;

use crate::machine::Machine;

mod archive;
mod chart;
mod compiler;
mod cross;
mod kubernetes;
mod nft;
mod system;

pub(crate) use archive::FILE_LISTS;
pub(crate) use chart::{schemas as chart_schemas, tools as chart_tools};
pub(crate) use cross::{Cross, cross};
pub(crate) use kubernetes::assets as kubernetes_assets;
pub(crate) use nft::readers as nft_readers;

/// What to be ready for; each level includes those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Level {
    /// `cargo build`
    Build,
    /// `cargo xtask demo`
    Demo,
    /// `cargo xtask test`
    Test,
    /// `cargo xtask check`
    Check,
}

/// One thing that a machine may lack.
struct Step {
    /// From which level on it is needed.
    level: Level,
    /// What is missing, in words that follow "installing"; `None` when nothing is.
    missing: fn(&Machine, Level) -> Result<Option<String>>,
    /// Installs it.
    install: fn(&Machine, Level) -> Result<()>,
}

const STEPS: &[Step] = &[
    Step { level: Level::Build, missing: system::missing, install: system::install },
    Step { level: Level::Build, missing: compiler::missing_rust_src, install: compiler::install_rust_src },
    Step {
        level: Level::Build,
        missing: compiler::missing_bpf_linker,
        install: compiler::install_bpf_linker,
    },
    Step { level: Level::Test, missing: nft::missing, install: nft::install },
    Step { level: Level::Test, missing: kubernetes::missing_go, install: kubernetes::install_go },
    Step {
        level: Level::Test,
        missing: |machine, _| kubernetes::missing_program(machine, &kubernetes::ETCD),
        install: |machine, _| kubernetes::build_program(machine, &kubernetes::ETCD),
    },
    Step {
        level: Level::Test,
        missing: |machine, _| kubernetes::missing_program(machine, &kubernetes::API_SERVER),
        install: |machine, _| kubernetes::build_program(machine, &kubernetes::API_SERVER),
    },
    Step {
        level: Level::Test,
        missing: |machine, _| kubernetes::missing_program(machine, &kubernetes::KUBE_PROXY),
        install: |machine, _| kubernetes::build_program(machine, &kubernetes::KUBE_PROXY),
    },
    Step {
        level: Level::Test,
        missing: |machine, _| kubernetes::missing_program(machine, &kubernetes::NEXT_KUBE_PROXY),
        install: |machine, _| kubernetes::build_program(machine, &kubernetes::NEXT_KUBE_PROXY),
    },
    Step {
        level: Level::Test,
        missing: |machine, _| kubernetes::missing_program(machine, &kubernetes::COREDNS),
        install: |machine, _| kubernetes::build_program(machine, &kubernetes::COREDNS),
    },
    Step {
        level: Level::Check,
        missing: compiler::missing_cargo_deny,
        install: compiler::install_cargo_deny,
    },
    Step {
        level: Level::Check,
        missing: |machine, _| Ok(chart::missing_program(machine, &chart::HELM)),
        install: |machine, _| chart::build_program(machine, &chart::HELM),
    },
    Step {
        level: Level::Check,
        missing: |machine, _| Ok(chart::missing_program(machine, &chart::KUBECONFORM)),
        install: |machine, _| chart::build_program(machine, &chart::KUBECONFORM),
    },
    Step { level: Level::Check, missing: chart::missing_schemas, install: chart::install_schemas },
];

/// Makes the machine ready for `level`. Returns how many steps had something to do.
///
/// # Errors
///
/// When something is missing and cannot be installed; the error says what to do by hand.
pub(crate) fn run(machine: &Machine, level: Level) -> Result<usize> {
    let mut done = 0;
    for step in STEPS.iter().filter(|step| step.level <= level) {
        let Some(what) = (step.missing)(machine, level)? else { continue };
        install(&what, || (step.install)(machine, level))?;
        done += 1;
    }
    Ok(done)
}

/// Installs `what` by `way`, and says so.
fn install(what: &str, way: impl FnOnce() -> Result<()>) -> Result<()> {
    print!("installing {what} ... ");
    std::io::stdout().flush()?;
    let start = Instant::now();
    let result = way();
    println!("{} ({:.1} s)", if result.is_ok() { "done" } else { "failed" }, start.elapsed().as_secs_f32());
    result.with_context(|| format!("installing {what}"))
}
