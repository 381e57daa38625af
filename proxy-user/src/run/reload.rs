//! Reloads of the configuration: a changed file, and SIGHUP.
//!
//! In: the file and the signal. Out: SIGHUP changes the log settings; a changed file restarts the process by `exec`. An invalid
//! file changes nothing: the error names the field, and the agent goes on. The same holds for a mode that this process cannot
//! run, because a pod keeps the rights and mounts that it was started with.

use std::{os::unix::process::CommandExt as _, path::Path, process::Command, sync::Arc, time::Duration};

use tokio::signal::unix::{SignalKind, signal};

use crate::{
    config::{Config, Error, Loaded},
    observe::Telemetry,
};

/// The pause between two reads of the file. A read costs microseconds, and unlike inotify it notices a replaced link or mount on
/// the path, as of a ConfigMap.
pub(super) const LOOK: Duration = Duration::from_secs(1);

/// Reads the configuration as the start did, from the same file and flags.
pub type Again = Arc<dyn Fn() -> Result<Loaded, Error> + Send + Sync>;

/// Applies the log settings of the file at each SIGHUP; flags still win over them.
pub(super) async fn follow_hangups(again: Again, telemetry: Telemetry) -> anyhow::Result<()> {
    let mut hangups = signal(SignalKind::hangup())?;
    while hangups.recv().await.is_some() {
        let log = match again() {
            Ok(loaded) => loaded.config.log,
            Err(error) => {
                tracing::error!(%error, "the log settings stay as they are");
                continue;
            }
        };
        match telemetry.set(log) {
            Ok(()) => tracing::info!(verbosity = log.verbosity, json = log.json, "log settings changed"),
            Err(error) => tracing::error!(%error, "the log settings stay as they are"),
        }
    }
    Ok(())
}

/// Answers why an agent with a configuration would end at its start.
pub(super) type Possible = fn(&Config) -> anyhow::Result<()>;

/// Reads the file periodically, and returns once it holds a valid configuration that differs from `running` and is
/// `possible`.
pub(super) async fn changed(running: Loaded, again: Again, possible: Possible, every: Duration) {
    let Some(file) = running.config.file.clone() else { return std::future::pending().await };
    let mut looks = tokio::time::interval(every);
    looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let (mut before, mut judged) = (read(&file), None);
    loop {
        looks.tick().await;
        let now = read(&file);
        // An editor may still be writing a file that changed just now.
        let at_rest = now.is_some() && now == before;
        before.clone_from(&now);
        if !at_rest || now == judged {
            continue;
        }
        judged = now;
        match again() {
            Ok(loaded) if loaded == running => {}
            Ok(loaded) => match judge(loaded.config, possible).await {
                Ok(()) => {
                    tracing::info!(file = %file.display(), "the configuration has changed, restarting with it");
                    return;
                }
                Err(error) => tracing::error!(
                    file = %file.display(),
                    "the configuration has changed, and an agent could not start with it here; the old one stays in force: {error:#}"
                ),
            },
            Err(error) => {
                tracing::error!(%error, "the configuration has changed and is invalid; the old one stays in force");
            }
        }
    }
}

/// Checks whether a configuration is possible, on a thread of its own because it loads programs.
async fn judge(config: Config, possible: Possible) -> anyhow::Result<()> {
    tokio::task::spawn_blocking(move || possible(&config)).await?
}

fn read(file: &Path) -> Option<Vec<u8>> {
    std::fs::read(file).ok()
}

/// Executes this binary again with the same arguments. Returns only with an error.
pub(super) fn start_anew() -> anyhow::Error {
    // `/proc/self/exe` is the running binary even if the file was replaced, so the version stays the same.
    let program = std::env::current_exe().ok().filter(|path| path.exists());
    let program = program.unwrap_or_else(|| "/proc/self/exe".into());
    let mut words = std::env::args_os();
    let mut command = Command::new(&program);
    if let Some(name) = words.next() {
        command.arg0(name);
    }
    let error = command.args(words).exec();
    anyhow::Error::from(error).context(format!("starting `{}` anew", program.display()))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    use clap::Parser as _;
    use tokio::time::timeout;

    use super::*;
    use crate::{
        cli::{Cli, Command},
        config::{self, Host, ProxyMode},
    };

    const OFTEN: Duration = Duration::from_millis(20);
    const LONG: Duration = Duration::from_secs(20);
    const HEAD: &str = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";

    /// A file, how often it was read as a configuration, and what reads it.
    fn reader(file: &Path) -> (Arc<AtomicUsize>, Again) {
        let words = ["weir", "run", "--hostname-override=n", "--config", file.to_str().unwrap()];
        let Command::Run(args) = Cli::try_parse_from(words).unwrap().command else { panic!("not run") };
        let reads = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&reads);
        let again = Arc::new(move || {
            counted.fetch_add(1, Relaxed);
            config::load(&args.config, &Host::this())
        });
        (reads, again)
    }

    /// As a process without the rights for eBPF.
    fn not_ebpf(config: &Config) -> anyhow::Result<()> {
        anyhow::ensure!(config.mode != ProxyMode::Ebpf, "there are no rights for it");
        Ok(())
    }

    async fn read_once_more(reads: &AtomicUsize) {
        let before = reads.load(Relaxed);
        while reads.load(Relaxed) == before {
            tokio::time::sleep(OFTEN / 4).await;
        }
    }

    #[tokio::test]
    async fn only_another_meaning_that_can_be_used_ends_the_agent() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("config.conf");
        std::fs::write(&file, format!("{HEAD}mode: nftables\n")).unwrap();
        let (reads, again) = reader(&file);
        let running = again().unwrap();
        let changed = tokio::spawn(changed(running, again, not_ebpf, OFTEN));
        read_once_more(&reads).await;
        for harmless in ["# said differently\nmode: nftables\n", "mode: none\n", "mode: ebpf\n"] {
            std::fs::write(&file, format!("{HEAD}{harmless}")).unwrap();
            read_once_more(&reads).await;
        }
        std::fs::remove_file(&file).unwrap();
        tokio::time::sleep(OFTEN * 4).await;
        assert!(!changed.is_finished());

        // As a ConfigMap changes: a link is renamed.
        std::fs::write(
            directory.path().join("data"),
            format!("{HEAD}mode: nftables\nclusterCIDR: 10.0.0.0/8"),
        )
        .unwrap();
        std::os::unix::fs::symlink("data", directory.path().join("draft")).unwrap();
        std::fs::rename(directory.path().join("draft"), &file).unwrap();
        timeout(LONG, changed).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn without_a_file_nothing_changes() {
        let (_, again) = reader(Path::new("/nowhere"));
        assert!(timeout(OFTEN * 4, changed(loaded_of_flags(), again, not_ebpf, OFTEN)).await.is_err());
    }

    fn loaded_of_flags() -> Loaded {
        let Command::Run(args) = Cli::try_parse_from(["weir", "run"]).unwrap().command else {
            panic!("not run")
        };
        config::load(&args.config, &Host::this()).unwrap()
    }
}
