//! The one entry point for working on weir: `cargo xtask setup`, `demo`, `test`, `check`, `bench`, `image`, `kind`, `generate`.
//!
//! It compiles without anything that `setup` installs, because it is the first command on a fresh machine. weir and its
//! tests run as child processes.

#![deny(unsafe_code)]
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a developer reads what it prints")]

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use machine::Machine;

mod architecture;
mod arrows;
mod bench;
mod chart;
mod check;
mod demo;
mod generate;
mod image;
mod kind;
mod machine;
mod metadata;
mod picture;
mod process;
mod rules;
mod setup;
mod suites;
mod table;

/// Sets up, shows, tests, checks and measures weir.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what is missing on this machine; every other task does this for itself
    Setup {
        /// What the machine is made ready for; each level includes those before it
        #[arg(value_enum, default_value_t = setup::Level::Test)]
        level: setup::Level,
    },
    /// Show both data planes at work on two nodes made of network namespaces (needs root, or sudo)
    Demo(demo::Options),
    /// Run every test (needs root, or sudo; `--quick` does not)
    Test(suites::Options),
    /// Check formatting, lints, documentation, licences, unit tests and cited rules
    Check,
    /// Measure weir beside the real kube-proxy (needs root, or sudo)
    Bench {
        /// Options of the benchmark itself; `--help` lists them
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<std::ffi::OsString>,
    },
    /// Make the container image, without Docker
    Image(image::Options),
    /// Try weir in a real cluster that kind makes (needs Docker, kind and kubectl)
    Kind(kind::Options),
    /// Write the generated files: the command line reference and the chart's README
    Generate {
        /// Write nothing; fail when a file is out of date
        #[arg(long)]
        check: bool,
    },
}

fn main() -> ExitCode {
    match Machine::discover().and_then(|machine| perform(&machine, Cli::parse().task)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn perform(machine: &Machine, task: Task) -> Result<()> {
    match task {
        Task::Setup { level } => {
            if setup::run(machine, level)? == 0 {
                println!("nothing is missing");
            }
            Ok(())
        }
        Task::Demo(options) => demo::run(machine, &options),
        Task::Test(options) => suites::run(machine, &options),
        Task::Check => check::run(machine),
        Task::Bench { args } => bench::run(machine, &args),
        Task::Image(options) => image::run(machine, &options),
        Task::Kind(options) => kind::run(machine, &options),
        Task::Generate { check } => generate::run(machine, check),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
