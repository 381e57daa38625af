//! Which suites there are, and what selects each in `cargo test`.
//!
//! In: the test targets as cargo names them, `tests/root.rs`, `tests/README.md`. Out: [`Suite`]s, and a line about each.
//!
//! The suites that need root are modules of one program, `root`. It runs once for each suite and skips the modules of all
//! others, so a suite has a process of its own and a change is linked once.

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::{Context as _, Result, bail};

use crate::{metadata::Metadata, table::columns};

/// The packages with test targets that need root.
const ROOT_PACKAGES: [&str; 2] = ["weir-tests", "weir-bench"];
/// The target with a module for each suite.
const ROOT_TARGET: &str = "root";
const ROOT_FILE: &str = "tests/root.rs";
const README: &str = "tests/README.md";
/// The parts of suites that need no kernel.
const ON_MEMORY: [&str; 2] = ["scenarios", "histories"];

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Suite {
    pub(super) name: String,
    /// Arguments of `cargo test` that select its program.
    pub(super) select: Vec<String>,
    /// Arguments that select its tests in that program.
    pub(super) filter: Vec<String>,
    pub(super) root: bool,
}

impl Suite {
    fn new(name: &str, select: &[&str], root: bool) -> Self {
        let select = select.iter().map(|&word| word.to_owned()).collect();
        Self { name: name.to_owned(), select, filter: Vec::new(), root }
    }

    /// The unit tests of all crates.
    pub(super) fn unit() -> Self {
        Self::new("unit", &["--lib", "--bins"], false)
    }

    /// A module of the program `root`, which has these modules.
    fn module(name: &str, all: &[String]) -> Self {
        let others = all.iter().filter(|other| *other != name);
        let filter = others.flat_map(|other| ["--skip".to_owned(), format!("suites::{other}::")]).collect();
        Self { filter, ..Self::new(name, &["--test", ROOT_TARGET], true) }
    }
}

/// The suites of the workspace: unit tests, documentation tests, then every test target, those that need root last.
pub(super) fn all(metadata: &Metadata, workspace: &Path) -> Result<Vec<Suite>> {
    let root = workspace.join(ROOT_FILE);
    let root = fs::read_to_string(&root).with_context(|| format!("reading {}", root.display()))?;
    Ok(of_targets(metadata, &modules(&root)))
}

fn of_targets(metadata: &Metadata, modules: &[String]) -> Vec<Suite> {
    let mut targets = BTreeMap::new();
    for package in &metadata.packages {
        for target in package.targets.iter().filter(|target| target.kind.iter().any(|kind| kind == "test")) {
            *targets.entry(&*target.name).or_default() |= ROOT_PACKAGES.contains(&&*package.name);
        }
    }
    let mut suites: Vec<Suite> = targets
        .into_iter()
        .filter(|(name, _)| *name != ROOT_TARGET)
        .map(|(name, root)| Suite::new(name, &["--test", name], root))
        .chain(modules.iter().map(|name| Suite::module(name, modules)))
        .collect();
    suites.sort_by(|one, other| (one.root, &one.name).cmp(&(other.root, &other.name)));
    // Everything is selected out of the whole workspace: cargo then builds the dependencies once for all suites.
    [Suite::unit(), Suite::new("doc", &["--doc"], false)].into_iter().chain(suites).collect()
}

/// The names of the modules below `mod suites`.
fn modules(root: &str) -> Vec<String> {
    root.lines()
        .skip_while(|line| *line != "mod suites {")
        .skip(1)
        .take_while(|line| *line != "}")
        .filter_map(|line| line.trim().strip_prefix("mod ")?.strip_suffix(';'))
        .map(str::to_owned)
        .collect()
}

/// The unit tests, and the scenarios and histories that are played to memory.
pub(super) fn quick() -> Vec<Suite> {
    let on_memory = ON_MEMORY.map(|name| Suite {
        filter: vec![format!("suites::{name}::memory")],
        ..Suite::new(name, &["--test", ROOT_TARGET], false)
    });
    std::iter::once(Suite::unit()).chain(on_memory).collect()
}

/// Those that are named; all when none is.
pub(super) fn chosen(all: Vec<Suite>, names: &[String]) -> Result<Vec<Suite>> {
    if let Some(unknown) = names.iter().find(|name| all.iter().all(|suite| suite.name != **name)) {
        let known = all.iter().map(|suite| &*suite.name).collect::<Vec<_>>().join(", ");
        bail!("there is no suite `{unknown}`; there are {known}");
    }
    Ok(all.into_iter().filter(|suite| names.is_empty() || names.contains(&suite.name)).collect())
}

/// A line about each suite, as tests/README.md has it.
pub(super) fn text(suites: &[Suite], workspace: &Path) -> Result<String> {
    let readme = workspace.join(README);
    let readme = fs::read_to_string(&readme).with_context(|| format!("reading {}", readme.display()))?;
    let lines = lines(&readme);
    let proves = |suite: &Suite| lines.get(&*suite.name).copied().unwrap_or("<none>").to_owned();
    let rows: Vec<Vec<String>> = suites.iter().map(|suite| vec![suite.name.clone(), proves(suite)]).collect();
    Ok(columns(&["SUITE", "PROVES"], &rows))
}

/// The column `proves` of the page's table, by suite: `` | `name` | file | proves | … ``.
fn lines(readme: &str) -> BTreeMap<&str, &str> {
    let rows = readme.lines().filter_map(|line| {
        let (name, cells) = line.strip_prefix("| `")?.split_once("` | ")?;
        Some((name, cells.split(" | ").nth(1)?.trim()))
    });
    rows.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metadata() -> Metadata {
        serde_json::from_str(
            r#"{"target_directory": "/target", "packages": [
                {"name": "proxy-user", "targets": [
                    {"name": "weir", "kind": ["lib"]}, {"name": "weir", "kind": ["bin"]}, {"name": "cli", "kind": ["test"]}]},
                {"name": "weir-bench", "targets": [{"name": "bench", "kind": ["test"]}]},
                {"name": "weir-tests", "targets": [
                    {"name": "root", "kind": ["test"]}, {"name": "build-script-build", "kind": ["custom-build"]}]}]}"#,
        )
        .unwrap()
    }

    fn suites() -> Vec<Suite> {
        of_targets(
            &metadata(),
            &modules("mod objects;\n\nmod suites {\n    mod agents;\n    mod packets;\n}\nmod x;\n"),
        )
    }

    #[test]
    fn suites_are_targets_and_modules_with_those_that_need_root_last() {
        let suites = suites();
        let names = suites.iter().map(|suite| (&*suite.name, suite.root)).collect::<Vec<_>>();
        let expected = [
            ("unit", false),
            ("doc", false),
            ("cli", false),
            ("agents", true),
            ("bench", true),
            ("packets", true),
        ];
        assert_eq!(names, expected);
        assert_eq!(
            (&*suites[4].select, suites[4].filter.len()),
            (&["--test", "bench"].map(str::to_owned)[..], 0)
        );
        assert_eq!(suites[5].select, ["--test", "root"]);
        assert_eq!(suites[5].filter, ["--skip", "suites::agents::"]);
    }

    #[test]
    fn a_suite_that_does_not_exist_is_named_and_not_skipped() {
        let names = |names: &[&str]| {
            let names = names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
            chosen(suites(), &names)
        };
        assert_eq!(names(&[]).unwrap().len(), 6);
        assert_eq!(names(&["packets", "unit"]).unwrap().len(), 2);
        let error = names(&["unit", "pakets"]).unwrap_err().to_string();
        assert!(error.contains("pakets") && error.contains("packets"), "{error}");
    }

    #[test]
    fn quick_needs_no_root() {
        let quick = quick();
        assert!(quick.iter().all(|suite| !suite.root), "{quick:?}");
        assert_eq!(quick[1].filter, ["suites::scenarios::memory"]);
    }

    /// The files of the workspace itself.
    #[test]
    fn every_suite_has_its_line_and_its_file() {
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let root = fs::read_to_string(workspace.join(ROOT_FILE)).unwrap();
        let readme = fs::read_to_string(workspace.join(README)).unwrap();
        let modules = modules(&root);
        let mut names: Vec<&str> =
            modules.iter().map(String::as_str).chain(["bench", "doc", "unit"]).collect();
        names.sort_unstable();
        assert_eq!(lines(&readme).into_keys().collect::<Vec<_>>(), names);
        let mut files: Vec<String> = fs::read_dir(workspace.join("tests/suites"))
            .unwrap()
            .map(|entry| entry.unwrap().path().file_stem().unwrap().to_string_lossy().into_owned())
            .collect();
        files.sort_unstable();
        assert_eq!(files, modules);
        assert!(ON_MEMORY.iter().all(|name| modules.iter().any(|module| module == name)));
    }
}
