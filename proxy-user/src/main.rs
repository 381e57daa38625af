//! The `weir` binary: reads the command line, sets logging up, and hands over to the library.

use std::{io::Write as _, process::ExitCode, sync::Arc};

use weir::{
    cli::{Cli, Command, PlanView, ProbeView},
    config::{self, Host},
    dns::openable,
    machine::probe::Probe,
    run,
};

fn main() -> ExitCode {
    weir::sys::bpf::share_heap();
    let cli = Cli::read(std::env::args_os()).unwrap_or_else(|error| error.exit());
    match execute(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "weir: {error:#}");
            // Exit code 2, as for a wrong flag: a restart does not help until the configuration is corrected.
            if error.is::<config::Error>() { ExitCode::from(2) } else { ExitCode::FAILURE }
        }
    }
}

fn execute(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Run(args) if args.cleanup => run::cleanup(&args.config.kernel, &args.config.log, false),
        Command::Run(args) => {
            let args = *args;
            let loaded = config::load(&args.config, &Host::this())?;
            if let Some(path) = &args.write_config_to {
                return run::write_config(&loaded, path);
            }
            if args.init_only { run::init_only(&loaded) } else { start(loaded, args.config) }
        }
        Command::Plan(args) => {
            let (state, owners) = run::plan(config::load(&args.config, &Host::this())?)?;
            let view = PlanView::new(&state, &owners, args.service.as_deref())?;
            Ok(std::io::stdout().write_all(view.render(args.output)?.as_bytes())?)
        }
        Command::Probe(args) => {
            let kernel = &args.kernel;
            let probe = Probe::of(&kernel.cgroup_root(&Host::this()), &kernel.bpf_root);
            let view = ProbeView::new(probe).with_names(openable());
            Ok(std::io::stdout().write_all(view.render(args.output)?.as_bytes())?)
        }
        Command::Cleanup(args) if args.kube_proxy => {
            run::cleanup_kube_proxy(&args.ipvs_exclude_cidrs, &args.log)
        }
        Command::Cleanup(args) => run::cleanup(&args.kernel, &args.log, args.stay),
    }
}

fn start(loaded: config::Loaded, args: config::ConfigArgs) -> anyhow::Result<()> {
    run::run(loaded, Arc::new(move || config::load(&args, &Host::this())))
}
