//! The steps of setup, in their order. A step does nothing where nothing is missing, so a second run costs nothing.

use std::{io::Write as _, time::Instant};

use anyhow::{Context as _, Result};

use super::{chart, compiler, go, kubernetes, level::Level, nft, system};
use crate::machine::Machine;

/// Something that a machine may lack.
struct Step {
    /// The first level that needs it.
    level: Level,
    /// The missing part, in words that follow "installing"; `None` when nothing is missing.
    missing: fn(&Machine, Level) -> Result<Option<String>>,
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
    Step { level: Level::Test, missing: missing_go, install: go::install },
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

/// Makes the machine ready for `level`. Returns how many steps installed something.
///
/// # Errors
///
/// When something is missing and cannot be installed; the text names what to do by hand.
pub(crate) fn run(machine: &Machine, level: Level) -> Result<usize> {
    let mut done = 0;
    for step in STEPS.iter().filter(|step| step.level <= level) {
        let Some(what) = (step.missing)(machine, level)? else { continue };
        install(&what, || (step.install)(machine, level))?;
        done += 1;
    }
    Ok(done)
}

/// Go is needed only where a program or a schema is missing that is made with it.
fn missing_go(machine: &Machine, level: Level) -> Result<Option<String>> {
    let needed = kubernetes::lacks_any(machine) || (level >= Level::Check && chart::lacks_any(machine));
    Ok(if needed { go::missing(machine) } else { None })
}

/// Installs `what` by `way`, and prints what it does.
pub(super) fn install(what: &str, way: impl FnOnce() -> Result<()>) -> Result<()> {
    print!("installing {what} ... ");
    std::io::stdout().flush()?;
    let start = Instant::now();
    let result = way();
    println!("{} ({:.1} s)", if result.is_ok() { "done" } else { "failed" }, start.elapsed().as_secs_f32());
    result.with_context(|| format!("installing {what}"))
}
