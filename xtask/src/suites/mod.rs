//! `cargo xtask test`: every test of the workspace, suite by suite, and a table of them at the end.
//!
//! In: the suites of [`list`]. Out: the output of cargo and of the tests as it comes, the table, and failure when anything
//! failed. A suite that needs a kernel or an API server runs as root, one test at a time, because such tests share what a
//! machine has only one of.

use std::{
    env,
    ffi::{OsStr, OsString},
    path::Path,
    process::Command,
    time::Instant,
};

use anyhow::{Result, bail};

use crate::{
    machine::Machine,
    process,
    setup::{self, Level},
};
use list::Suite;
use outcome::{Outcome, table};

mod list;
mod outcome;

/// What `cargo xtask test` takes.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Run only these suites, named as in the table; all when none is named
    suites: Vec<String>,
    /// Print the suites, with a line about what each proves, and run none
    #[arg(long)]
    list: bool,
    /// Run what needs neither root nor a kernel: unit tests, and scenarios and histories on memory
    #[arg(long, conflicts_with_all = ["suites", "list", "args"])]
    quick: bool,
    #[command(flatten)]
    chaos: Chaos,
    /// Passed to the tests: a part of their names, or options as in `cargo test -- --help`
    #[arg(last = true)]
    args: Vec<String>,
}

/// What the suite `chaos` takes.
#[derive(clap::Args)]
struct Chaos {
    /// Suite chaos: how many minutes it lasts, both data planes together [default: 3]
    #[arg(long, value_name = "N")]
    minutes: Option<f64>,
    /// Suite chaos: repeat the run with this seed
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Suite chaos: only acts with one of these in their names
    #[arg(long, value_name = "PART,…")]
    acts: Option<String>,
}

impl Chaos {
    /// The variables that the suite reads.
    fn environment(&self) -> impl Iterator<Item = (&'static str, OsString)> {
        let variables = [
            ("WEIR_CHAOS_MINUTES", self.minutes.map(|minutes| minutes.to_string())),
            ("WEIR_CHAOS_SEED", self.seed.map(|seed| seed.to_string())),
            ("WEIR_CHAOS_ACTS", self.acts.clone()),
        ];
        variables.into_iter().filter_map(|(name, value)| Some((name, value?.into())))
    }
}

/// Runs the tests.
///
/// # Errors
///
/// When something they need cannot be installed, this cannot become root, or any test fails.
pub(crate) fn run(machine: &Machine, options: &Options) -> Result<()> {
    if options.quick {
        setup::run(machine, Level::Build)?;
        return run_all(machine, &list::quick(), &[], &[]);
    }
    let metadata = machine.metadata()?;
    let suites = list::chosen(list::all(&metadata, &machine.workspace)?, &options.suites)?;
    if options.list {
        print!("{}", list::text(&suites, &machine.workspace)?);
        return Ok(());
    }
    // Before the long part: a run that cannot become root ends here, it does not skip half of the tests.
    machine.as_root(&machine.path, "testing with real packets")?;
    setup::run(machine, Level::Test)?;
    process::run(machine.cargo().args(["build", "--workspace", "--bins"]))?;
    let mut environment = environment(machine, &metadata.target_directory.join("debug"))?;
    environment.extend(options.chaos.environment());
    run_all(machine, &suites, &options.args, &environment)
}

fn run_all(
    machine: &Machine,
    suites: &[Suite],
    args: &[String],
    environment: &[(&str, OsString)],
) -> Result<()> {
    let mut outcomes = Vec::new();
    for (index, suite) in suites.iter().enumerate() {
        println!("\n==== suite {} of {}: {}", index + 1, suites.len(), suite.name);
        outcomes.push(follow(&mut command(machine, suite, args, environment)?)?);
    }
    println!("\n{}", table(suites, &outcomes));
    let ended = || suites.iter().zip(&outcomes);
    for (suite, failures) in ended().filter_map(|(suite, outcome)| Some((suite, outcome.failures()?))) {
        println!("\n==== {}: failures\n{failures}", suite.name);
    }
    let bad = ended().filter(|(_, outcome)| !outcome.good).map(|(suite, _)| &*suite.name);
    match bad.collect::<Vec<_>>() {
        bad if bad.is_empty() => Ok(()),
        bad => bail!("failed: {}", bad.join(", ")),
    }
}

/// The environment of tests and benchmark: where weir was `built`, where Kubernetes' programs are (kube-proxy by `PATH`), and which
/// `nft`s list tables.
pub(crate) fn environment(machine: &Machine, built: &Path) -> Result<Vec<(&'static str, OsString)>> {
    let [server, proxy, names, next] = setup::kubernetes_assets(machine);
    let path = [server.clone(), proxy, names].into_iter().chain(env::split_paths(&machine.path));
    Ok(vec![
        ("WEIR_BIN", built.join("weir").into()),
        ("KUBEBUILDER_ASSETS", server.into()),
        ("PATH", env::join_paths(path)?),
        ("WEIR_NEXT_KUBE_PROXY", next.join("kube-proxy").into()),
        ("WEIR_NFT_READERS", env::join_paths(setup::nft_readers(machine))?),
    ])
}

fn command(
    machine: &Machine,
    suite: &Suite,
    args: &[String],
    environment: &[(&str, OsString)],
) -> Result<Command> {
    let mut cargo = machine.cargo();
    cargo.args(["test", "--workspace", "--no-fail-fast"]).args(&suite.select);
    cargo.envs(environment.iter().map(|(name, value)| (name, value)));
    // A test's error says where it comes from; the frames below it fill logs, and long logs are cut in the middle.
    cargo.env("RUST_LIB_BACKTRACE", "0");
    cargo.arg("--");
    if suite.root {
        cargo.arg("--test-threads=1");
        let path = environment.iter().find(|(name, _)| *name == "PATH").map(|(_, path)| path);
        let root = machine.as_root(path.unwrap_or(&machine.path), "testing with real packets")?;
        if !root.is_empty() {
            // Only the tests become root: what cargo builds stays the user's.
            cargo.env(runner_variable(), root.join(OsStr::new(" ")));
        }
    }
    cargo.args(&suite.filter).args(args);
    Ok(cargo)
}

/// The variable from which cargo reads the program that runs test programs.
fn runner_variable() -> String {
    let triple = format!("{}-unknown-linux-gnu", env::consts::ARCH);
    format!("CARGO_TARGET_{}_RUNNER", triple.to_uppercase().replace('-', "_"))
}

fn follow(cargo: &mut Command) -> Result<Outcome> {
    let start = Instant::now();
    let mut outcome = Outcome::default();
    outcome.good = process::follow(cargo, |line| {
        println!("{line}");
        outcome.read(line);
    })?;
    outcome.took = start.elapsed();
    Ok(outcome)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chaos_suite_gets_only_the_options_that_were_given() {
        let chaos = Chaos { minutes: Some(60.0), seed: None, acts: Some("flush".to_owned()) };
        let given: Vec<_> = chaos.environment().collect();
        assert_eq!(given, [("WEIR_CHAOS_MINUTES", "60".into()), ("WEIR_CHAOS_ACTS", "flush".into())]);
    }
}
