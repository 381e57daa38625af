//! The only wiring: sources, engine, data plane, servers, and how they stop.
//!
//! ```text
//! source (tasks) ──Change──▶ engine (own thread: model, planner, data plane) ──Suspects──▶ conntrack (own thread)
//! host addresses ───────────▶   ▲  │                                        └─▶ health, metrics ──▶ servers (tasks)
//! rule set watch (own thread) ──┘  ▼ kernel
//! ```

use std::{
    collections::BTreeMap,
    convert::Infallible,
    net::IpAddr,
    path::{Path, PathBuf},
    pin::pin,
    sync::Arc,
};

use anyhow::{Context as _, bail};
use ipnet::IpNet;
use tokio::sync::{mpsc, oneshot, watch};

use crate::{
    config::{Config, KernelArgs, Loaded, LogArgs, RequestLimit, SourceConfig},
    dataplane::{
        Dataplane as _, Memory, Stack, State,
        conntrack::{Conntrack, Suspects},
        ebpf::{Place, Retired},
        kube_proxy,
        nftables::Nftables,
    },
    model::{Change, Family, Model, PerFamily},
    observe::{
        About, Events, Health, HealthChecks, Metrics, Server, Telemetry, Trouble, admin_router, health_router,
    },
    places::Places,
    plan::{Frontend, Planner, PortId},
    source::{
        SourceStatus, host,
        kube::{self, Asked, Connection, Credentials, KubeSource, Manner},
        manifests::{self, ManifestSource, ManifestStatus},
    },
};

mod bpffs;
mod census;
mod choice;
mod dns;
mod engine;
mod files;
mod left_out;
mod lock;
mod machine;
mod manager;
mod planes;
pub mod pods;
mod relay;
mod reload;
mod sockets;
mod takeover;

pub use choice::choose;
pub use reload::Again;

use engine::{Engine, Inputs, Opened};
use files::Files;
use lock::{Holder, Lock};
use planes::Planes;

/// Changes that may wait between a source and the engine; a source that is further ahead waits itself.
const WAITING_CHANGES: usize = 4096;

/// Where as of when the cluster is known is kept: what is programmed does not live longer either.
const VERSIONS: &str = "/run/weir/versions";

/// Programs this node until told to stop, or until the configuration file changes: then this program starts anew. What
/// is programmed stays when this ends. `again` reads the configuration once more.
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
            // In this order, so that a free lock is taken before anything else is begun.
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
    // A watch thread may be waiting in the kernel; it holds nothing that needs an orderly end.
    runtime.shutdown_background();
    match result? {
        Ended::Told => Ok(()),
        Ended::Changed => Err(reload::start_anew()),
    }
}

fn say_waiting(Holder { process }: Holder) {
    tracing::warn!(process, "another agent serves this node; this one waits until that one ends");
}

/// Answers on `/healthz` that this node is not ready, for as long as another agent serves it. That agent has the port as a
/// rule, and answers itself.
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
    let Origin { events, connection } = match start_source(&config, changes_in, &metrics).await {
        Ok(origin) => origin,
        Err(error) => {
            // What the kernel lacks is told first: with it missing, no source would be of use.
            planes::look(&config)?;
            return Err(error);
        }
    };
    // An agent that cannot ask for Services leaves the machine as it is.
    machine::prepare(&config.conntrack, config.oom_score_adj);
    tokio::spawn(host::watch(addresses_in));
    tokio::spawn(manager::follow(health.clone()));
    let names = match &config.dns {
        Some(dns) => Some(dns::start(&config, dns, addresses.clone(), files, &metrics)?),
        None => None,
    };

    let health_places = files.health(&metrics);
    let health_checks =
        HealthChecks::start(health.clone(), events.clone(), health_places.clone(), stopping.clone());
    let engine = Engine::new(config.model.clone(), metrics.clone(), health.clone())
        .with_retry(config.sync_period)
        .with_health_checks(health_checks)
        .with_events(events.clone())
        .with_names(names)
        .with_optional_node(matches!(config.source, SourceConfig::Manifests { .. }))
        .with_conntrack(clean_conntrack(metrics.clone())?)
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
    // Sources and engine are at work on their own threads meanwhile.
    let planes = Planes::open(&config)?;
    let words = std::env::args().skip(1).collect();
    let (mode_in, mode) = watch::channel(planes.mode());
    if let Some(news) = relay {
        relay::start(news, mode.clone(), files, &metrics)?;
    }
    let about = About { proxy_mode: mode, configuration: document, words };
    let (opened, sockets) = go_along(planes, connection, &config, &metrics, mode_in)?;
    // An engine that is gone has panicked, which is found out when it is joined.
    let _ = open.send(opened);
    let told = events;
    told.tell(Trouble::starting());
    let places = [health_places, files.metrics(&metrics)];
    let servers = tokio::spawn(serve_http(config, health, metrics, about, places, told, stopping));

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
        () = sockets::removed(sockets) => {
            bail!("somebody removed our kernel programs or their maps from the BPF file system; start the agent again")
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

/// Waits for a signal that asks to end.
async fn signalled() -> anyhow::Result<&'static str> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut term, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(tokio::select! {
        _ = term.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    })
}

/// Starts what goes along with the data planes that there are.
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
        metrics.count_services(move || sockets::counts(&counted));
    }
    let closing = match &sockets {
        Some(place) => {
            let maps = place.sockets();
            if let Some(connection) = connection {
                let status = Arc::new(SourceStatus::default());
                show_silences(metrics, &status);
                let census = pods::start(connection, status, &maps, &place.cgroup_root)?;
                sockets::watch_bypassed(census, metrics);
            }
            sockets::watch_troubles(&maps, metrics)?;
            sockets::watch_usage(place.clone(), metrics);
            if let Some(links) = links {
                sockets::keep_attached(links, place.clone(), metrics)?;
            }
            sockets::forget_clients(place.clone())?;
            sockets::close(place, metrics)?
        }
        None => None,
    };
    Ok((Opened { plane, foreign, sockets: closing, mode }, sockets))
}

/// A source at work.
struct Origin {
    /// Where events about its objects go.
    events: Events,
    /// The API server, where there is one.
    connection: Option<Connection>,
}

async fn start_source(
    config: &Config,
    changes: mpsc::Sender<Change>,
    metrics: &Metrics,
) -> anyhow::Result<Origin> {
    let status = Arc::new(SourceStatus::default());
    Ok(match &config.source {
        SourceConfig::Kubernetes { kubeconfig, servers } => {
            let credentials = kubeconfig.clone().map_or(Credentials::InCluster, Credentials::Kubeconfig);
            let servers = servers.iter().map(|server| {
                server.parse().with_context(|| format!("`{server}` is not the address of an API server"))
            });
            let servers = servers.collect::<anyhow::Result<_>>()?;
            let (node, versions) = (config.model.node_name.clone(), Some(VERSIONS.into()));
            let source = KubeSource { credentials, servers, node, versions };
            let connection = Connection::open_with(source, manner(config, metrics)).await?;
            tracing::info!(node = config.model.node_name, server = %connection.server(), "watching the API server");
            show_silences(metrics, &status);
            let events = Events::start(connection.client(), &config.model.node_name, metrics.clone());
            match &config.dns {
                Some(_) => tokio::spawn(kube::watch_with_names(connection.clone(), changes, status)),
                None => tokio::spawn(kube::watch(connection.clone(), changes, status)),
            };
            Origin { events, connection: Some(connection) }
        }
        SourceConfig::Manifests { .. } => {
            let source = manifest_source(config)?;
            tracing::info!(node = config.model.node_name, directory = %source.directory.display(), "watching manifests");
            let (view, _) = watch::channel(Arc::new(ManifestStatus::default()));
            tokio::spawn(manifests::watch(source, changes, status, view));
            Origin { events: Events::logged(), connection: None }
        }
    })
}

fn show_silences(metrics: &Metrics, status: &Arc<SourceStatus>) {
    let status = Arc::clone(status);
    metrics.show_silences(move || status.silences());
}

/// How the API server is asked; every request is counted.
fn manner(config: &Config, metrics: &Metrics) -> Manner {
    let limit = config.request_limit.map(|RequestLimit { requests, window }| (requests, window));
    let metrics = metrics.clone();
    let tell = move |asked: &Asked<'_>| {
        metrics.asked(asked.method.as_str(), asked.host, asked.code, asked.took);
    };
    Manner { limit, tell: Some(Arc::new(tell)) }
}

fn manifest_source(config: &Config) -> anyhow::Result<ManifestSource> {
    let SourceConfig::Manifests { dir, service_ranges, status_file } = &config.source else {
        bail!("this needs `--source manifests:DIR`");
    };
    let mut source = ManifestSource::new(dir, &config.model.node_name);
    if !service_ranges.is_empty() {
        source.service_ranges.clone_from(service_ranges);
    }
    source.status_file.clone_from(status_file);
    source.last_good = Some(ManifestSource::place_until_reboot(dir));
    source.names = config.dns.is_some();
    Ok(source)
}

/// Clears stale flows behind the engine's back: a walk over a large table must not hold up the next change. What comes
/// while a walk is under way is one walk later.
fn clean_conntrack(metrics: Metrics) -> anyhow::Result<mpsc::UnboundedSender<Suspects>> {
    let mut conntrack = Conntrack::open()?;
    let (sender, mut receiver) = mpsc::unbounded_channel::<Suspects>();
    std::thread::Builder::new().name("conntrack".to_owned()).spawn(move || {
        while let Some(mut suspects) = receiver.blocking_recv() {
            while let Ok(later) = receiver.try_recv() {
                suspects.extend(later);
            }
            let started = std::time::Instant::now();
            match conntrack.clean(&suspects) {
                Ok(deleted) => {
                    let deleted = usize::try_from(deleted).unwrap_or(usize::MAX);
                    // The walk is one for all families; it is booked on the first that had a part in it.
                    if let Some(family) = suspects.families().into_iter().next() {
                        metrics.conntrack_cleaned(family, started.elapsed(), deleted);
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "stale UDP flows may still lead to backends that are gone")
                }
            }
        }
    })?;
    Ok(sender)
}

async fn serve_http(
    config: Config,
    health: Health,
    metrics: Metrics,
    about: About,
    [health_places, metrics_places]: [Places; 2],
    events: Events,
    stopping: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let server = |name, reason, address, places, router| {
        let (stopping, events) = (stopping.clone(), events.clone());
        async move {
            match address {
                Some(address) => {
                    let tell = move |error: &std::io::Error| {
                        let note = format!("{name} cannot be served at {address}: {error}");
                        events.tell(Trouble::of_node(reason, "StartKubeProxy", note));
                    };
                    let server = Server::new(name, address, config.bind_hard_fail, places);
                    server.run_and_tell(router, stopping, tell).await
                }
                None => {
                    let mut stopping = stopping;
                    // An error means that nobody can ask to stop any more, which is a stop too.
                    let _ = stopping.wait_for(|stop| *stop).await;
                    Ok(())
                }
            }
        }
    };
    tokio::try_join!(
        server(
            "healthz",
            "FailedToStartProxierHealthcheck",
            config.healthz,
            health_places,
            health_router(&health, &metrics)
        ),
        server(
            "metrics",
            "FailedToStartMetricServer",
            config.metrics,
            metrics_places,
            admin_router(&metrics, about)
        ),
    )?;
    Ok(())
}

/// What would be programmed from a directory of manifests, and whose each frontend is. The kernel is not touched.
///
/// # Errors
///
/// When the source is not a directory, or something in it is wrong.
pub fn plan(loaded: Loaded) -> anyhow::Result<(State, BTreeMap<Frontend, PortId>)> {
    let Loaded { config, warnings, document: _ } = loaded;
    Telemetry::init(config.log)?;
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    let mut model = Model::new(config.model.clone());
    for change in manifests::load_once(&manifest_source(&config)?)? {
        model.apply(change);
    }
    let mut planner = Planner::default();
    for name in model.take_dirty() {
        planner.update(&name, model.plan(&name));
    }
    left_out::tell(&mut model, &mut planner, &Events::logged());
    planner.update_node(model.node_plan());
    let mut memory = Memory::default();
    memory.apply(&planner.complete())?;
    let mut owners = BTreeMap::new();
    for port in planner.services().flat_map(|(_, plan)| &plan.ports) {
        owners.extend(port.frontends.iter().map(|planned| (planned.frontend, port.id.clone())));
    }
    Ok((memory.dump()?, owners))
}

/// Does what needs privileges the agent can do without afterwards: connection tracking, and a bpffs. Nothing is programmed.
///
/// # Errors
///
/// When logging cannot be set up, or something without which the agent would not start cannot be done.
pub fn init_only(loaded: &Loaded) -> anyhow::Result<()> {
    let Loaded { config, warnings, document: _ } = loaded;
    Telemetry::init(config.log)?;
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    machine::prepare(&config.conntrack, config.oom_score_adj);
    bpffs::ensure(config)
}

/// Writes the whole configuration, defaults and all, to a file.
///
/// # Errors
///
/// When the file cannot be written.
pub fn write_config(loaded: &Loaded, path: &Path) -> anyhow::Result<()> {
    let text = serde_yaml_ng::to_string(&loaded.document)?;
    std::fs::write(path, text).with_context(|| format!("cannot write `{}`", path.display()))
}

/// Takes what kube-proxy left out of the kernel, except virtual servers of IPVS in the `excluded` networks.
///
/// # Errors
///
/// When something could not be removed.
pub fn cleanup_kube_proxy(excluded: &[IpNet], log: &LogArgs) -> anyhow::Result<()> {
    Telemetry::init(log.config())?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (removed, failed) = runtime.block_on(kube_proxy::remove(excluded));
    takeover::tell(&removed);
    let failed: Vec<String> =
        failed.into_iter().map(|error| format!("{:#}", anyhow::Error::from(error))).collect();
    if failed.is_empty() { Ok(()) } else { bail!("{}", failed.join("\n")) }
}

/// Takes everything of ours out of the kernel, and with `stay` lives on until told to end, as pods have to.
///
/// # Errors
///
/// When something could not be removed.
pub fn cleanup(kernel: &KernelArgs, log: &LogArgs, stay: bool) -> anyhow::Result<()> {
    Telemetry::init(log.config())?;
    if let Some(Holder { process }) = Holder::of_this_node() {
        tracing::warn!(
            process,
            "an agent serves this node; what is removed now, it programs again, so end it first"
        );
    }
    let place = Place { bpf_root: kernel.bpf_root.clone(), cgroup_root: PathBuf::new() };
    let packets = Nftables::open(PerFamily { v4: true, v6: true })?;
    Stack::new(packets, Retired::new(place)).remove()?;
    tracing::info!(
        bpf_root = %kernel.bpf_root.display(),
        "removed weir's tables of both families, and the kernel programs with their maps"
    );
    if stay { ended() } else { Ok(()) }
}

/// Waits until told to end.
fn ended() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let name = runtime.block_on(signalled())?;
    tracing::info!(signal = name, "stopping");
    Ok(())
}

/// The families served.
fn served(families: PerFamily<bool>) -> impl Iterator<Item = Family> {
    Family::ALL.into_iter().filter(move |family| *families.get(*family))
}

/// The addresses a host tells of; empty until it has told.
type Addresses = watch::Receiver<Vec<IpAddr>>;
