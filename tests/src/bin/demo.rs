//! The demo's command line; `cargo xtask demo` builds and runs it.

use std::process::ExitCode;

use clap::Parser;
use weir_tests::demo::{self, Options, interrupt};

/// Makes two nodes, four pods and a client outside of network namespaces, and connects to their Services through weir.
#[derive(Parser)]
struct Args {
    /// --proxy-mode of the agents
    #[arg(long, value_name = "MODE", default_value = "auto", value_parser = ["auto", "ebpf", "nftables"])]
    proxy_mode: String,
    /// Leave the cluster up until Ctrl-C
    #[arg(long)]
    keep: bool,
}

#[expect(clippy::print_stderr, reason = "the reason of a failure is for a person")]
fn main() -> ExitCode {
    let Args { proxy_mode, keep } = Args::parse();
    match demo::run(&Options { mode: proxy_mode, keep }) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) if interrupt::came() => {
            eprintln!("stopped; nothing is left on this machine");
            interrupt::EXIT_CODE.into()
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
