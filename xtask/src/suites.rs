//! `cargo xtask test`: every test of the workspace, suite by suite, and a table of them at the end.
//!
//! In: the test targets as cargo knows them. Out: the output of cargo and of the tests as it comes, the table, and
//! failure when anything failed. What needs a kernel or an API server is a test target of its own and runs as root,
//! one test at a time: such tests share what a machine has only one of.

use std::{
    collections::BTreeMap,
    env,
    ffi::{OsStr, OsString},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use comfy_table::{CellAlignment, Table, presets};
use serde::Deserialize;

use crate::{
    machine::Machine,
    process,
    setup::{self, Level},
};

/// The package whose test targets need root.
const ROOT_PACKAGE: &str = "weir-tests";

/// What `cargo xtask test` can be told.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Run only these suites, named as in the table; all when none is named
    suites: Vec<String>,
    /// Say which suites there are and run none
    #[arg(long)]
    list: bool,
    #[command(flatten)]
    chaos: Chaos,
    /// Passed to the tests: a part of their names, or options as in `cargo test -- --help`
    #[arg(last = true)]
    args: Vec<String>,
}

/// What the suite `chaos` can be told.
#[derive(clap::Args)]
struct Chaos {
    /// Suite chaos: how many minutes it lasts, both data planes together [default: 3]
    #[arg(long, value_name = "N")]
    minutes: Option<f64>,
    /// Suite chaos: do what a run with this seed did
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

#[derive(Debug, PartialEq, Eq)]
struct Suite {
    name: String,
    /// What selects it in `cargo test`.
    select: Vec<String>,
    root: bool,
}

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    target_directory: PathBuf,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    targets: Vec<Target>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
}

impl Machine {
    fn metadata(&self) -> Result<Metadata> {
        let text = process::read(self.cargo().args(["metadata", "--no-deps", "--format-version", "1"]))?;
        serde_json::from_str(&text).context("reading what cargo metadata wrote")
    }

    /// Where cargo builds to.
    pub(crate) fn target_directory(&self) -> Result<PathBuf> {
        Ok(self.metadata()?.target_directory)
    }
}

/// What a suite came to.
#[derive(Debug, Default, PartialEq, Eq)]
struct Outcome {
    passed: usize,
    failed: usize,
    ignored: usize,
    /// Whether cargo was content, which it also is not when a test did not compile or died.
    good: bool,
    took: Duration,
    failures: Failures,
}

/// What failed tests said, each in its first lines: a log that is cut in the middle still ends with them.
#[derive(Debug, Default, PartialEq, Eq)]
struct Failures {
    lines: Vec<String>,
    /// How many more lines of the test at hand are kept.
    room: usize,
}

impl Failures {
    /// Lines kept of one test.
    const LINES: usize = 30;

    /// Takes a line that a test program wrote. What a failed test said comes below `---- its name stdout ----`.
    fn read(&mut self, line: &str) {
        if line.starts_with("---- ") && line.ends_with(" stdout ----") {
            self.room = Self::LINES;
        } else if line == "failures:" || line.trim().eq_ignore_ascii_case("stack backtrace:") {
            self.room = 0;
        }
        if self.room > 0 && !line.is_empty() {
            self.room -= 1;
            self.lines.push(line.to_owned());
        }
    }
}

/// Runs the tests.
///
/// # Errors
///
/// When something they need cannot be installed, this cannot become root, or any test fails.
pub(crate) fn run(machine: &Machine, options: &Options) -> Result<()> {
    let metadata = machine.metadata()?;
    let suites = chosen(discover(&metadata), &options.suites)?;
    if options.list {
        suites.iter().for_each(|suite| println!("{}", suite.name));
        return Ok(());
    }
    // Before the long part: a run that cannot become root ends here, it does not skip half of the tests.
    machine.as_root(&machine.path, "testing with real packets")?;
    setup::run(machine, Level::Test)?;
    process::run(machine.cargo().args(["build", "--workspace", "--bins"]))?;
    let mut environment = environment(machine, &metadata.target_directory.join("debug"))?;
    environment.extend(options.chaos.environment());
    let mut outcomes = Vec::new();
    for (index, suite) in suites.iter().enumerate() {
        println!("\n==== suite {} of {}: {}", index + 1, suites.len(), suite.name);
        outcomes.push(follow(&mut command(machine, suite, &options.args, &environment)?)?);
    }
    println!("\n{}", table(&suites, &outcomes));
    for (suite, outcome) in
        suites.iter().zip(&outcomes).filter(|(_, outcome)| !outcome.failures.lines.is_empty())
    {
        println!("\n==== {}: what failed\n{}", suite.name, outcome.failures.lines.join("\n"));
    }
    let bad =
        suites.iter().zip(&outcomes).filter(|(_, outcome)| !outcome.good).map(|(suite, _)| &*suite.name);
    match bad.collect::<Vec<_>>() {
        bad if bad.is_empty() => Ok(()),
        bad => bail!("failed: {}", bad.join(", ")),
    }
}

/// The suites of the workspace: unit tests, documentation tests, then every test target, those that need root last.
fn discover(metadata: &Metadata) -> Vec<Suite> {
    let mut targets = BTreeMap::new();
    for package in &metadata.packages {
        for target in package.targets.iter().filter(|target| target.kind.iter().any(|kind| kind == "test")) {
            *targets.entry(&*target.name).or_default() |= package.name == ROOT_PACKAGE;
        }
    }
    // Everything is selected out of the whole workspace: cargo then builds the dependencies once for all suites.
    let suite = |name: &str, select: &[&str], root| Suite {
        name: name.to_owned(),
        select: select.iter().map(|&word| word.to_owned()).collect(),
        root,
    };
    let mut suites = vec![suite("unit", &["--lib", "--bins"], false), suite("doc", &["--doc"], false)];
    suites.extend(targets.into_iter().map(|(name, root)| suite(name, &["--test", name], root)));
    suites.sort_by_key(|suite| suite.root);
    suites
}

fn chosen(all: Vec<Suite>, names: &[String]) -> Result<Vec<Suite>> {
    if let Some(unknown) = names.iter().find(|name| all.iter().all(|suite| suite.name != **name)) {
        let known = all.iter().map(|suite| &*suite.name).collect::<Vec<_>>().join(", ");
        bail!("there is no suite `{unknown}`; there are {known}");
    }
    Ok(all.into_iter().filter(|suite| names.is_empty() || names.contains(&suite.name)).collect())
}

/// What tests and benchmark are told: where weir was `built`, where Kubernetes' programs are (kube-proxy by `PATH`), which `nft`s to list
/// tables with.
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
    // A test's error says where it comes from; the frames below it fill logs whose middle is then cut.
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
    cargo.args(args);
    Ok(cargo)
}

/// The variable by which cargo is told what to run test programs with.
fn runner_variable() -> String {
    let triple = format!("{}-unknown-linux-gnu", env::consts::ARCH);
    format!("CARGO_TARGET_{}_RUNNER", triple.to_uppercase().replace('-', "_"))
}

fn follow(cargo: &mut Command) -> Result<Outcome> {
    let start = Instant::now();
    let mut outcome = Outcome::default();
    let good = process::follow(cargo, |line| {
        println!("{line}");
        outcome.count(line);
        outcome.failures.read(line);
    })?;
    Ok(Outcome { good, took: start.elapsed(), ..outcome })
}

impl Outcome {
    /// Adds up `test result: ok. 3 passed; 0 failed; 1 ignored; …`; any other line changes nothing.
    fn count(&mut self, line: &str) {
        let Some((_, counts)) = line.strip_prefix("test result: ").and_then(|rest| rest.split_once(". "))
        else {
            return;
        };
        for count in counts.split("; ") {
            let Some((number, what)) = count.split_once(' ') else { continue };
            let Ok(number) = number.parse::<usize>() else { continue };
            match what {
                "passed" => self.passed += number,
                "failed" => self.failed += number,
                "ignored" => self.ignored += number,
                _ => {}
            }
        }
    }

    fn verdict(&self) -> &'static str {
        match (self.good, self.failed) {
            (true, _) => "ok",
            (false, 0) => "broken",
            (false, _) => "FAILED",
        }
    }
}

fn table(suites: &[Suite], outcomes: &[Outcome]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY);
    table.set_header(["suite", "passed", "failed", "ignored", "seconds", ""]);
    for (suite, outcome) in suites.iter().zip(outcomes) {
        let Outcome { passed, failed, ignored, took, .. } = outcome;
        table.add_row([
            suite.name.clone(),
            passed.to_string(),
            failed.to_string(),
            ignored.to_string(),
            format!("{:.1}", took.as_secs_f32()),
            outcome.verdict().to_owned(),
        ]);
    }
    for column in table.column_iter_mut().skip(1).take(4) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metadata() -> Metadata {
        serde_json::from_str(
            r#"{"target_directory": "/target", "packages": [
                {"name": "proxy-user", "targets": [
                    {"name": "weir", "kind": ["lib"]}, {"name": "weir", "kind": ["bin"]}, {"name": "cli", "kind": ["test"]}]},
                {"name": "weir-tests", "targets": [
                    {"name": "packets", "kind": ["test"]}, {"name": "apiserver", "kind": ["test"]},
                    {"name": "build-script-build", "kind": ["custom-build"]}]}]}"#,
        )
        .unwrap()
    }

    #[test]
    fn suites_are_the_test_targets_with_those_that_need_root_last() {
        let suites = discover(&metadata());
        let names = suites.iter().map(|suite| (&*suite.name, suite.root)).collect::<Vec<_>>();
        let expected =
            [("unit", false), ("doc", false), ("cli", false), ("apiserver", true), ("packets", true)];
        assert_eq!(names, expected);
        assert_eq!(suites[4].select, ["--test", "packets"]);
    }

    #[test]
    fn a_suite_that_does_not_exist_is_named_and_not_skipped() {
        let names = |names: &[&str]| {
            let names = names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
            chosen(discover(&metadata()), &names)
        };
        assert_eq!(names(&[]).unwrap().len(), 5);
        assert_eq!(names(&["packets", "unit"]).unwrap().len(), 2);
        let error = names(&["unit", "pakets"]).unwrap_err().to_string();
        assert!(error.contains("pakets") && error.contains("packets"), "{error}");
    }

    #[test]
    fn the_chaos_suite_is_told_only_what_was_said() {
        let chaos = Chaos { minutes: Some(60.0), seed: None, acts: Some("flush".to_owned()) };
        let said: Vec<_> = chaos.environment().collect();
        assert_eq!(said, [("WEIR_CHAOS_MINUTES", "60".into()), ("WEIR_CHAOS_ACTS", "flush".into())]);
    }

    #[test]
    fn results_add_up_over_the_programs_of_a_suite() {
        let mut outcome = Outcome::default();
        for line in [
            "running 4 tests",
            "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s",
            "test result: FAILED. 10 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.20s",
        ] {
            outcome.count(line);
        }
        assert_eq!((outcome.passed, outcome.failed, outcome.ignored), (13, 2, 1));
    }

    #[test]
    fn what_failed_tests_said_is_kept_without_their_backtraces() {
        let mut failures = Failures::default();
        for line in [
            "test a ... FAILED",
            "failures:",
            "---- a stdout ----",
            "Error: no answer",
            "",
            "Caused by:",
            "Stack backtrace:",
            "   0: main",
            "---- b stdout ----",
            "thread 'b' panicked",
            "failures:",
            "    a",
        ] {
            failures.read(line);
        }
        let expected = [
            "---- a stdout ----",
            "Error: no answer",
            "Caused by:",
            "---- b stdout ----",
            "thread 'b' panicked",
        ];
        assert_eq!(failures.lines, expected);
        (0..100).for_each(|_| failures.read("---- c stdout ----"));
        failures.lines.clear();
        (0..100).for_each(|number| failures.read(&number.to_string()));
        assert_eq!(failures.lines.len(), Failures::LINES - 1, "its name is one");
    }

    #[test]
    fn a_suite_that_died_before_its_tests_is_not_taken_for_good() {
        let died = Outcome { passed: 3, ..Outcome::default() };
        assert_eq!(died.verdict(), "broken");
        let text = table(&discover(&metadata())[..1], &[died]).to_string();
        assert!(text.contains("unit") && text.contains("broken"), "{text}");
    }
}
