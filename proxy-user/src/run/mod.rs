//! The only wiring: sources, engine, data plane, servers, and how they stop.
//!
//! ```text
//! source (tasks) ──Change──▶ engine (own thread: model, planner, data plane) ──Suspects──▶ stale (own threads)
//! host addresses ───────────▶   ▲  │                                        └─▶ health, metrics ──▶ servers (tasks)
//! rule set watch (own thread) ──┘  ▼ kernel
//! ```

use std::{convert::Infallible, pin::pin, sync::Arc};

use anyhow::{Context as _, bail};
use tokio::sync::{mpsc, oneshot, watch};

use crate::{
    config::{Config, Loaded, SourceConfig},
    dataplane::ebpf::Place,
    dns, machine,
    model::{Family, PerFamily},
    observe::{About, Health, HealthChecks, Metrics, Server, Telemetry, Trouble, health_router},
    optout, relay,
    source::{SourceStatus, host, kube::Connection},
    stale, takeover,
};

mod census;
mod choice;
mod commands;
mod engine;
mod files;
mod http;
mod left_out;
mod lock;
mod manager;
mod planes;
mod reload;
mod socket_plane;
mod sources;

pub use choice::choose;
pub use commands::{cleanup, cleanup_kube_proxy, init_only, plan, write_config};
pub use reload::Again;

use engine::{Engine, Inputs, Opened};
use files::Files;
use lock::{Holder, Lock};
use planes::Planes;
use sources::Origin;

/// Changes that may wait between a source and the engine. A full queue blocks the source.
const WAITING_CHANGES: usize = 4096;

/// Programs this node until a signal ends the agent. A changed configuration file restarts the process by `exec`. Programmed state
/// stays in the kernel. `again` reads the configuration once more.
///
/// # Errors
///
/// When the kernel refuses what the data plane needs, the source's credentials are unusable, or a server that must
/// listen cannot.
pub fn run(loaded: Loaded, again: Again) -> anyhow::Result<()> {
    let telemetry = Telemetry::init(loaded.config.log)?;
    for warning in &loaded.warnings {
        tracing::warn!("{warning}");
    }
    let files = Files::raise();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("starting the runtime")?;
    let result = runtime.block_on(async {
        tokio::spawn(reload::follow_hangups(Arc::clone(&again), telemetry));
        let (config, document) = (loaded.config.clone(), loaded.document.clone());
        let mut changed = pin!(reload::changed(loaded, again, planes::possible, reload::LOOK));
        let lock = tokio::select! {
            // In this order, so that a free lock is taken before `/healthz` of the waiting agent is served.
            biased;
            lock = Lock::take(say_waiting) => lock,
            never = stand_by(&config, files) => match never {},
            name = signalled() => {
                tracing::info!(signal = name?, "stopping; this agent has programmed nothing");
                return Ok(Ended::Told);
            }
            () = &mut changed => return Ok(Ended::Changed),
        };
        let ended = serve(config, document, files, changed).await;
        if matches!(ended, Ok(Ended::Changed)) {
            lock.keep_over_exec();
        }
        ended
    });
    // Threads that wait in the kernel hold nothing that needs an orderly end.
    runtime.shutdown_background();
    match result? {
        Ended::Told => Ok(()),
        Ended::Changed => Err(reload::start_anew()),
    }
}

fn say_waiting(Holder { process }: Holder) {
    tracing::warn!(process, "another agent serves this node; this agent waits until the other ends");
}

/// Answers `/healthz` with "not ready" while another agent serves this node. Usually the other agent has the port and answers
/// itself.
async fn stand_by(config: &Config, files: Files) -> Infallible {
    let Some(address) = config.healthz else { return std::future::pending().await };
    let metrics = Metrics::new();
    let router = health_router(&Health::new(config.sync_period), &metrics);
    let server = Server::new("healthz", address, false, files.health(&metrics));
    server.run_quietly(router).await
}

/// Why the agent ends without an error.
enum Ended {
    Told,
    Changed,
}

async fn serve(
    config: Config,
    document: serde_json::Value,
    files: Files,
    changed: impl Future<Output = ()>,
) -> anyhow::Result<Ended> {
    let (stop, stopping) = watch::channel(false);
    let metrics = Metrics::new();
    let health = Health::new(config.sync_period);
    let (changes_in, changes) = mpsc::channel(WAITING_CHANGES);
    let (addresses_in, addresses) = watch::channel(Vec::new());
    let Origin { events, connection } = match sources::start(&config, changes_in, &metrics).await {
        Ok(origin) => origin,
        Err(error) => {
            // A missing kernel feature is reported before the source's error, because no source helps without it.
            planes::look(&config)?;
            return Err(error);
        }
    };
    // Only now, so that an agent without a source leaves the machine unchanged.
    machine::prepare(&config.conntrack, config.oom_score_adj);
    tokio::spawn(host::watch(addresses_in));
    tokio::spawn(manager::follow(health.clone()));
    let names = match &config.dns {
        Some(dns) => Some(dns::start(&config, dns, addresses.clone(), files.names(&metrics), &metrics)?),
        None => None,
    };

    let health_limit = files.health(&metrics);
    let health_checks =
        HealthChecks::start(health.clone(), events.clone(), health_limit.clone(), stopping.clone());
    let engine = Engine::new(config.model.clone(), metrics.clone(), health.clone())
        .with_retry(config.sync_period)
        .with_health_checks(health_checks)
        .with_events(events.clone())
        .with_names(names)
        .with_optional_node(matches!(config.source, SourceConfig::Manifests { .. }))
        .with_conntrack(stale::flows::start(metrics.clone())?)
        .with_first(
            config.take_over.clone().map(|excluded| takeover::start(excluded, config.model.families)),
        );
    let (open, opened) = oneshot::channel();
    let inputs = Inputs { changes, addresses, opened, stopping: stopping.clone() };
    let (engine, relay) = match relay::relayed(&config.model) {
        PerFamily { v4: false, v6: false } => (engine, None),
        relayed => {
            let (relay, news) = mpsc::unbounded_channel();
            (engine.with_relay(relay, relayed), Some(news))
        }
    };
    let engine = std::thread::Builder::new().name("engine".to_owned()).spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(engine.run(inputs));
        anyhow::Ok(())
    })?;
    // The sources and the engine already work on their own threads.
    let planes = Planes::open(&config)?;
    let words = std::env::args().skip(1).collect();
    let (mode_in, mode) = watch::channel(planes.mode());
    if let Some(news) = relay {
        relay::start(news, mode.clone(), files.relayed(&metrics), &metrics)?;
    }
    let about = About { proxy_mode: mode, configuration: document, words };
    let (opened, sockets) = go_along(planes, connection, &config, &metrics, mode_in)?;
    // The receiver is gone only if the engine panicked; the join below reports that.
    let _ = open.send(opened);
    let told = events;
    told.report(Trouble::starting());
    let limits = [health_limit, files.metrics(&metrics)];
    let servers = tokio::spawn(http::serve(config, health, metrics, about, limits, told, stopping));

    let ended = tokio::select! {
        name = signalled() => {
            tracing::info!(signal = name?, "stopping; what is programmed stays in the kernel");
            Ended::Told
        }
        () = changed => Ended::Changed,
        ended = servers => {
            ended??;
            Ended::Told
        }
        () = socket_plane::removed(sockets) => {
            bail!("another program removed weir's kernel programs or maps from the BPF file system; start the agent again")
        }
    };
    if matches!(ended, Ended::Told) {
        manager::ending();
    }
    stop.send_replace(true);
    let engine = tokio::task::spawn_blocking(move || engine.join()).await?;
    engine.map_err(|_| anyhow::anyhow!("the engine panicked"))??;
    Ok(ended)
}

/// Waits for SIGTERM or SIGINT.
async fn signalled() -> anyhow::Result<&'static str> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut term, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(tokio::select! {
        _ = term.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    })
}

/// Starts everything that runs beside the open planes.
fn go_along(
    planes: Planes,
    connection: Option<Connection>,
    config: &Config,
    metrics: &Metrics,
    mode: watch::Sender<&'static str>,
) -> anyhow::Result<(Opened, Option<Place>)> {
    let Planes { plane, foreign, sockets, dropped, counted, links } = planes;
    let dropped = Arc::new(dropped);
    if config.dns.is_some() {
        tokio::spawn(dns::tell_of_strangers(
            Arc::clone(&dropped),
            config.model.detect_local.clone(),
            metrics.clone(),
        ));
    }
    metrics.count_drops(move || planes::drops(&dropped));
    if let Some(counted) = counted {
        metrics.count_services(move || socket_plane::counts(&counted));
    }
    let closing = match &sockets {
        Some(place) => {
            let maps = place.sockets();
            if let Some(connection) = connection {
                let status = Arc::new(SourceStatus::default());
                sources::show_silences(metrics, &status);
                let census = optout::start(connection, status, &maps, &place.cgroup_root)?;
                optout::show_census(census, metrics);
            }
            socket_plane::watch_troubles(&maps, metrics)?;
            socket_plane::watch_usage(place.clone(), metrics);
            if let Some(links) = links {
                socket_plane::keep_attached(links, place.clone(), metrics)?;
            }
            socket_plane::forget_clients(place.clone())?;
            stale::sockets::start(place, metrics)?
        }
        None => None,
    };
    Ok((Opened { plane, foreign, sockets: closing, mode }, sockets))
}

/// The families served.
fn served(families: PerFamily<bool>) -> impl Iterator<Item = Family> {
    Family::ALL.into_iter().filter(move |family| *families.get(*family))
}
