//! The command line: `weir run`, `weir plan`, `weir probe`, `weir cleanup`.
//!
//! In: the words of a command line. Out: a [`Command`] for `main` to dispatch. Called as `kube-proxy`, all words are
//! flags of `run`, so that the program can stand in for kube-proxy where only the image is changed.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
};

use clap::{Args, Parser, Subcommand};
use comfy_table::ContentArrangement;
use ipnet::IpNet;

use crate::config::{ConfigArgs, KernelArgs, LogArgs};

mod plan;
pub use plan::{NoSuchService, Output, PlanView};
mod probe;
pub use probe::ProbeView;

/// A Kubernetes service proxy: ClusterIPs, NodePorts and load-balancer addresses, made true on this node
#[derive(Debug, Parser)]
#[command(name = "weir", version, propagate_version = true, args_override_self = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Program this node, and keep it so
    #[command(display_name = "weir")]
    Run(Box<RunArgs>),
    /// Print what would be programmed, and program nothing
    Plan(Box<PlanArgs>),
    /// Say what this machine has of what the eBPF data plane needs
    Probe(ProbeArgs),
    /// Take everything that weir installed out of the kernel
    Cleanup(CleanupArgs),
}

/// `weir run`.
#[derive(Args, Debug)]
pub struct RunArgs {
    /// The same as `weir cleanup`: take everything out of the kernel and end
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true",
          action = clap::ArgAction::Set, hide_possible_values = true, hide_default_value = true, value_name = "BOOL")]
    pub cleanup: bool,
    /// Check the configuration, do what takes more rights than serving does, and end: set the sysctls of connection
    /// tracking, and mount a bpffs where eBPF needs one and none is
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true",
          action = clap::ArgAction::Set, hide_possible_values = true, hide_default_value = true, value_name = "BOOL")]
    pub init_only: bool,
    /// Write the configuration with all defaults to a file, and end
    #[arg(long, value_name = "FILE")]
    pub write_config_to: Option<PathBuf>,
    /// The configuration.
    #[command(flatten)]
    pub config: ConfigArgs,
}

/// `weir plan`.
#[derive(Args, Debug)]
pub struct PlanArgs {
    /// The configuration, which decides about masquerading and NodePorts as it would for `run`.
    #[command(flatten)]
    pub config: ConfigArgs,
    /// How to print it
    #[arg(short, long, value_name = "FORMAT", default_value = "table")]
    pub output: Output,
    /// Only this Service
    #[arg(long, value_name = "NAMESPACE/NAME", value_parser = service_name)]
    pub service: Option<String>,
}

/// `weir probe`.
#[derive(Args, Debug)]
pub struct ProbeArgs {
    /// Where the kernel's objects would be.
    #[command(flatten)]
    pub kernel: KernelArgs,
    /// How to print it
    #[arg(short, long, value_name = "FORMAT", default_value = "table")]
    pub output: Output,
}

/// `weir cleanup`.
#[derive(Args, Debug)]
pub struct CleanupArgs {
    /// Stay until told to end, so that a DaemonSet can do it on every node
    #[arg(long, conflicts_with = "kube_proxy")]
    pub stay: bool,
    /// Take out what kube-proxy left instead; weir's own stays
    #[arg(long)]
    pub kube_proxy: bool,
    /// With --kube-proxy: networks whose virtual servers of IPVS stay, because they are not kube-proxy's
    #[arg(long, value_name = "CIDR,…", value_delimiter = ',', requires = "kube_proxy")]
    pub ipvs_exclude_cidrs: Vec<IpNet>,
    /// Where the kernel's objects are.
    #[command(flatten)]
    pub kernel: KernelArgs,
    /// Logging.
    #[command(flatten)]
    pub log: LogArgs,
}

fn service_name(text: &str) -> Result<String, &'static str> {
    match text.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() => Ok(text.to_owned()),
        _ => Err("a Service is named NAMESPACE/NAME"),
    }
}

impl Cli {
    /// Reads a command line, the program's name first.
    ///
    /// # Errors
    ///
    /// When it cannot be understood, or asks for help; [`clap::Error::exit`] prints either.
    pub fn read(words: impl IntoIterator<Item = OsString>) -> Result<Self, clap::Error> {
        let mut words: Vec<OsString> = words.into_iter().collect();
        let program = words.first().map(Path::new).and_then(Path::file_name);
        if program.is_some_and(|name| name == "kube-proxy") {
            words.iter_mut().skip(1).for_each(dashed);
            words.insert(1, "run".into());
        }
        Self::try_parse_from(words)
    }
}

/// Rows below a header, in kubectl's form: columns three spaces apart, no rules, nothing cut.
fn columns(header: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    const BETWEEN: u16 = 3;
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(header).add_rows(rows);
    table.column_iter_mut().for_each(|column| {
        column.set_padding((0, BETWEEN));
    });
    table.lines().map(|line| format!("{}\n", line.trim_end())).collect()
}

/// Gives the name of a flag dashes for underscores, between which kube-proxy makes no difference.
fn dashed(word: &mut OsString) {
    let Some(flag) = word.to_str().filter(|word| word.starts_with("--")) else { return };
    let (name, value) = flag.split_at(flag.find('=').unwrap_or(flag.len()));
    *word = (name.replace('_', "-") + value).into();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> Result<Cli, clap::Error> {
        Cli::read(line.split(' ').map(OsString::from))
    }

    #[test]
    fn the_definition_is_sound() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
    }

    #[test]
    fn kubeadms_command_line_means_run() {
        let line =
            "/usr/local/bin/kube-proxy --config=/var/lib/kube-proxy/config.conf --hostname-override=n1";
        assert!(matches!(read(line).unwrap().command, Command::Run(args) if !args.cleanup));
    }

    #[test]
    fn underscores_in_kube_proxys_flags_are_as_good_as_dashes() {
        let line = "kube-proxy --write_config_to=/a_b --hostname_override n_1";
        let Command::Run(args) = read(line).unwrap().command else { panic!("{line} is not `run`") };
        assert_eq!(args.write_config_to.unwrap().to_str(), Some("/a_b"));
        assert!(read("weir run --write_config_to=/a").is_err());
    }

    #[test]
    fn cleanup_is_a_flag_of_run_too() {
        for (line, cleanup) in
            [("weir run", false), ("weir run --cleanup", true), ("kube-proxy --cleanup=false", false)]
        {
            assert!(
                matches!(read(line).unwrap().command, Command::Run(args) if args.cleanup == cleanup),
                "{line}"
            );
        }
    }

    #[test]
    fn every_kube_proxy_flag_is_taken() {
        let line = "kube-proxy --bind-address-hard-fail --profiling=false --conntrack-min 5 --ipvs-strict-arp \
                    --oom-score-adj -999 --masquerade-all=true -v=4 --v 2 --logging-format=json --vmodule=a=1 --vmodule=b=2 --config a --config b \
                    --iptables-sync-period 5s --kube-api-qps=5.5 --init-only --master http://127.0.0.1:1,http://h:2";
        let words = line.split_ascii_whitespace().filter(|word| *word != "-v=4");
        assert!(Cli::read(words.map(OsString::from)).is_ok());
        assert!(read("kube-proxy -v=4").is_ok());
        assert!(read("kube-proxy --feature-gates= --nodeport-addresses= --master= --cluster-cidr=").is_ok());
    }

    #[test]
    fn what_is_not_known_is_refused() {
        for line in [
            "weir",
            "weir explain",
            "weir run --no-such-flag",
            "weir plan --service web",
            "weir run --source x",
        ] {
            assert!(read(line).is_err(), "{line}");
        }
    }
}
