//! The command line: `weir run`, `weir plan`, `weir probe`, `weir cleanup`.
//!
//! In: the arguments of a command line. Out: a [`Command`] for `main` to dispatch. If the program is called
//! as `kube-proxy`, all arguments are flags of `run`, so an image of weir can replace an image of kube-proxy
//! in an unchanged DaemonSet.

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

/// A Kubernetes service proxy: programs ClusterIPs, NodePorts and load-balancer addresses on this node
#[derive(Debug, Parser)]
#[command(name = "weir", version, propagate_version = true, args_override_self = true)]
pub struct Cli {
    /// The command.
    #[command(subcommand)]
    pub command: Command,
}

/// A command with its flags.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Program this node and keep it up to date
    #[command(display_name = "weir")]
    Run(Box<RunArgs>),
    /// Print what weir would program, without touching the kernel
    Plan(Box<PlanArgs>),
    /// Show whether this machine has the kernel features of the socket plane (eBPF)
    Probe(ProbeArgs),
    /// Remove everything that weir installed in the kernel
    Cleanup(CleanupArgs),
}

/// Flags of `weir run`.
#[derive(Args, Debug)]
pub struct RunArgs {
    /// Remove everything that weir installed in the kernel and exit, as `weir cleanup` does
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true",
          action = clap::ArgAction::Set, hide_possible_values = true, hide_default_value = true, value_name = "BOOL")]
    pub cleanup: bool,
    /// Check the configuration, do the steps that need more rights than serving, and exit: set the conntrack
    /// sysctls, and mount a bpffs if the socket plane needs one and there is none
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true",
          action = clap::ArgAction::Set, hide_possible_values = true, hide_default_value = true, value_name = "BOOL")]
    pub init_only: bool,
    /// Write the configuration with all defaults to a file and exit
    #[arg(long, value_name = "FILE")]
    pub write_config_to: Option<PathBuf>,
    /// The configuration.
    #[command(flatten)]
    pub config: ConfigArgs,
}

/// Flags of `weir plan`.
#[derive(Args, Debug)]
pub struct PlanArgs {
    /// The configuration. It decides about masquerading and NodePorts as for `run`.
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Output format
    #[arg(short, long, value_name = "FORMAT", default_value = "table")]
    pub output: Output,
    /// Print only this Service
    #[arg(long, value_name = "NAMESPACE/NAME", value_parser = service_name)]
    pub service: Option<String>,
}

/// Flags of `weir probe`.
#[derive(Args, Debug)]
pub struct ProbeArgs {
    /// The place where objects would be pinned.
    #[command(flatten)]
    pub kernel: KernelArgs,
    /// Output format
    #[arg(short, long, value_name = "FORMAT", default_value = "table")]
    pub output: Output,
}

/// Flags of `weir cleanup`.
#[derive(Args, Debug)]
pub struct CleanupArgs {
    /// Keep running until a signal arrives, so that a DaemonSet can clean up every node
    #[arg(long, conflicts_with = "kube_proxy")]
    pub stay: bool,
    /// Remove what kube-proxy left in the kernel, and nothing of weir
    #[arg(long)]
    pub kube_proxy: bool,
    /// With --kube-proxy: networks of IPVS virtual servers to keep, because they are not kube-proxy's
    #[arg(long, value_name = "CIDR,…", value_delimiter = ',', requires = "kube_proxy")]
    pub ipvs_exclude_cidrs: Vec<IpNet>,
    /// The place of the pinned objects.
    #[command(flatten)]
    pub kernel: KernelArgs,
    /// Log settings.
    #[command(flatten)]
    pub log: LogArgs,
}

fn service_name(text: &str) -> Result<String, &'static str> {
    match text.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() => Ok(text.to_owned()),
        _ => Err("a Service is given as NAMESPACE/NAME"),
    }
}

impl Cli {
    /// Reads a command line; the first word is the program's name.
    ///
    /// # Errors
    ///
    /// When the command line is wrong, or asks for help or the version. [`clap::Error::exit`] prints all of
    /// these.
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

/// Rows below a header, in kubectl's form: columns three spaces apart, without rules, nothing truncated.
#[must_use]
pub fn columns(header: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    const BETWEEN: u16 = 3;
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(header).add_rows(rows);
    table.column_iter_mut().for_each(|column| {
        column.set_padding((0, BETWEEN));
    });
    table.lines().map(|line| format!("{}\n", line.trim_end())).collect()
}

/// Replaces underscores in a flag's name by dashes, because kube-proxy accepts either.
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
    fn clap_accepts_the_definition() {
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
    fn every_kube_proxy_flag_is_accepted() {
        let line = "kube-proxy --bind-address-hard-fail --profiling=false --conntrack-min 5 --ipvs-strict-arp \
                    --oom-score-adj -999 --masquerade-all=true -v=4 --v 2 --logging-format=json --vmodule=a=1 --vmodule=b=2 --config a --config b \
                    --iptables-sync-period 5s --kube-api-qps=5.5 --init-only --master http://127.0.0.1:1,http://h:2";
        let words = line.split_ascii_whitespace().filter(|word| *word != "-v=4");
        assert!(Cli::read(words.map(OsString::from)).is_ok());
        assert!(read("kube-proxy -v=4").is_ok());
        assert!(read("kube-proxy --feature-gates= --nodeport-addresses= --master= --cluster-cidr=").is_ok());
    }

    #[test]
    fn unknown_commands_flags_and_values_are_refused() {
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
