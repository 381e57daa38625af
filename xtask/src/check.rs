//! `cargo xtask check`: everything that can be checked of the code without running it on a kernel.

use std::{env, path::PathBuf, process::Command, time::Instant};

use anyhow::{Result, bail};

use crate::{
    arrows, chart, generate,
    machine::Machine,
    process, rules,
    setup::{self, Level},
};

/// Runs every check, also after one has failed.
///
/// # Errors
///
/// When something a check needs cannot be installed, or naming those that failed.
pub(crate) fn run(machine: &Machine) -> Result<()> {
    setup::run(machine, Level::Check)?;
    let mut failed = Vec::new();
    for (name, mut command) in commands(machine)? {
        println!("\n==== {name}: {}", process::describe(&command));
        let start = Instant::now();
        if let Err(error) = process::run(&mut command) {
            println!("{error:#}");
            failed.push(name);
        }
        println!("{name}: {:.1} s", start.elapsed().as_secs_f32());
    }
    let unknown = advisories(machine, &mut failed);
    println!("\n==== cited rules");
    if let Err(error) = rules::check(&machine.workspace) {
        println!("{error:#}");
        failed.push("cited rules");
    }
    println!("\n==== imports between rooms");
    if let Err(error) = arrows::check(&machine.workspace) {
        println!("{error:#}");
        failed.push("imports between rooms");
    }
    println!("\n==== chart");
    if let Err(error) = chart::check(machine) {
        println!("{error:#}");
        failed.push("chart");
    }
    println!("\n==== generated files");
    if let Err(error) = generate::run(machine, true) {
        println!("{error:#}");
        failed.push("generated files");
    }
    if let Some(why) = unknown {
        println!("\nnot checked: known vulnerabilities of dependencies. {why}");
    }
    if !failed.is_empty() {
        bail!("failed: {}", failed.join(", "));
    }
    Ok(())
}

/// Looks for known vulnerabilities where there is a database of them. It is not made here, because that needs a network that
/// few build machines have; without it the reason is returned.
fn advisories(machine: &Machine, failed: &mut Vec<&str>) -> Option<String> {
    const NAME: &str = "known vulnerabilities";
    let database = advisory_databases();
    println!("\n==== {NAME}");
    if !database.as_ref().is_some_and(|it| it.read_dir().is_ok_and(|mut entries| entries.next().is_some())) {
        let place = database.map_or_else(|| "cargo's directory".to_owned(), |it| it.display().to_string());
        let why = format!(
            "There is no database in {place}; `cargo deny check advisories` fetches it, with the network."
        );
        println!("{why}");
        return Some(why);
    }
    let mut deny = machine.cargo();
    if let Err(error) = process::run(deny.args(["deny", "--offline", "check", "advisories"])) {
        println!("{error:#}");
        failed.push(NAME);
    }
    None
}

/// Where cargo-deny keeps what it fetched.
fn advisory_databases() -> Option<PathBuf> {
    let home = || Some(PathBuf::from(env::var_os("HOME")?).join(".cargo"));
    let cargo = env::var_os("CARGO_HOME").map(PathBuf::from).or_else(home)?;
    Some(cargo.join("advisory-dbs"))
}

fn commands(machine: &Machine) -> Result<Vec<(&'static str, Command)>> {
    let cargo = |words: &str| {
        let mut cargo = machine.cargo();
        cargo.args(words.split_whitespace());
        cargo
    };
    let mut rustdoc = cargo("doc --workspace --no-deps");
    rustdoc.env("RUSTDOCFLAGS", "-D warnings");
    Ok(vec![
        ("formatting", cargo("fmt --all --check")),
        ("lints", cargo("clippy --workspace --all-targets -- -D warnings")),
        ("lints of the kernel programs", kernel_lints(machine)?),
        ("documentation", rustdoc),
        // Builds leave out what other platforms need, and the next check looks at all of it without the network.
        ("crates of all platforms", cargo("fetch --locked")),
        ("licences and sources", cargo("deny --offline check bans licenses sources")),
        ("unit tests", cargo("test --workspace --lib --bins")),
    ])
}

/// The kernel programs are empty when built for the host, so they are linted for the target they run on, the way
/// `proxy-user/build.rs` builds them.
fn kernel_lints(machine: &Machine) -> Result<Command> {
    let target = if cfg!(target_endian = "big") { "bpfeb" } else { "bpfel" };
    let mut clippy = machine.cargo();
    clippy.args(["clippy", "--package", "proxy-ebpf", "--release", "-Z", "build-std=core"]);
    clippy.args(["--target", &format!("{target}-unknown-none"), "--target-dir"]);
    clippy.arg(machine.target_directory()?.join("kernel-lints"));
    clippy.args(["--", "-D", "warnings"]);
    clippy.env("RUSTC_BOOTSTRAP", "1");
    clippy.env("RUSTFLAGS", format!("--cfg=bpf_target_arch=\"{}\"", env::consts::ARCH));
    Ok(clippy)
}
