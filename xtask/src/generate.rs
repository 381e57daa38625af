//! `cargo xtask generate`: files that are made from the code, so that they cannot contradict it.

use std::fs;

use anyhow::{Context as _, Result, ensure};

use crate::{
    chart,
    machine::Machine,
    process,
    setup::{self, Level},
};

const REFERENCE: &str = "docs/cli.md";

/// Writes the generated files, or with `check` only compares them.
///
/// # Errors
///
/// When weir cannot be built or asked, a file cannot be written, or with `check` a file is out of date.
pub(crate) fn run(machine: &Machine, check: bool) -> Result<()> {
    setup::run(machine, Level::Build)?;
    process::run(machine.cargo().args(["build", "--workspace", "--bin", "weir"]))?;
    let weir = machine.target_directory()?.join("debug/weir");
    // A width of its own, because the help is wrapped to the terminal's.
    let help = |path: &[String]| {
        process::read(
            machine.command(&weir).args(path).arg("--help").env("COLUMNS", "100").env("NO_COLOR", "1"),
        )
    };
    let files = [(REFERENCE, reference(help)?), (chart::README, chart::readme(machine)?)];
    let mut stale = Vec::new();
    for (name, text) in files {
        let file = machine.workspace.join(name);
        if fs::read_to_string(&file).unwrap_or_default() == text {
            continue;
        }
        if check {
            stale.push(name);
            continue;
        }
        fs::create_dir_all(file.parent().context("a generated file is in a directory")?)?;
        fs::write(&file, text).with_context(|| format!("writing {name}"))?;
        println!("wrote {name}");
    }
    ensure!(stale.is_empty(), "{}: out of date; run `cargo xtask generate`", stale.join(", "));
    Ok(())
}

/// The help of weir and of every subcommand, as `help` gives it for a path of subcommands.
fn reference(help: impl Fn(&[String]) -> Result<String>) -> Result<String> {
    let mut text =
        "# Command line reference\n\nMade by `cargo xtask generate` from what `weir --help` says.\n"
            .to_owned();
    let mut paths = vec![Vec::new()];
    while let Some(path) = paths.pop() {
        let said = help(&path)?;
        let title = [&["weir".to_owned()], &*path].concat().join(" ");
        text.push_str(&format!("\n## `{title}`\n\n```text\n{}\n```\n", trimmed(&said)));
        // Last in, first out: reversed, so that the order is that of the help.
        paths.extend(subcommands(&said).into_iter().rev().map(|name| [&*path, &[name]].concat()));
    }
    Ok(text)
}

fn trimmed(help: &str) -> String {
    help.trim().lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
}

/// The names under `Commands:`, without clap's own `help`.
fn subcommands(help: &str) -> Vec<String> {
    help.lines()
        .skip_while(|line| line.trim() != "Commands:")
        .skip(1)
        .take_while(|line| !line.trim().is_empty())
        // Names are indented by two; what goes on from the line before is indented further.
        .filter_map(|line| line.strip_prefix("  ").filter(|rest| !rest.starts_with(' ')))
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| *name != "help")
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HELP: &str = "About\n\nUsage: weir <COMMAND>\n\nCommands:\n  run   Runs\n        on and on\n  get   Shows\n  \
                        help  Print this\n\nOptions:\n  -h, --help  Print help\n";

    #[test]
    fn subcommands_are_those_the_help_lists() {
        assert_eq!(subcommands(HELP), ["run", "get"]);
        assert_eq!(subcommands("Usage: weir\n\nOptions:\n  -h  Help\n"), Vec::<String>::new());
    }

    #[test]
    fn every_subcommand_has_its_section_in_order() {
        let text = reference(|path| {
            Ok(match path.len() {
                0 => HELP.to_owned(),
                _ => format!("Help of {}  \n", path.join(" ")),
            })
        });
        let text = text.unwrap();
        let sections = text.lines().filter(|line| line.starts_with("## ")).collect::<Vec<_>>();
        assert_eq!(sections, ["## `weir`", "## `weir run`", "## `weir get`"]);
        assert!(text.contains("\nHelp of run\n"), "{text}");
    }
}
