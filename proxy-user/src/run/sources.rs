//! The source of Services that the configuration names, at work.
//!
//! In: the configuration. Out: changes for the engine, and where events about objects go.

use std::sync::Arc;

use anyhow::{Context as _, bail};
use tokio::sync::{mpsc, watch};

use crate::{
    config::{Config, RequestLimit, SourceConfig},
    model::Change,
    observe::{Events, Metrics},
    source::{
        SourceStatus,
        kube::{self, Connection, ConnectionOptions, Credentials, KubeSource, RequestReport},
        manifests::{self, ManifestSource, ManifestStatus},
    },
};

/// Keeps the resource versions until the next reboot, which is as long as programmed state lives.
const VERSIONS: &str = "/run/weir/versions";

pub(super) struct Origin {
    pub(super) events: Events,
    /// The API server, where there is one.
    pub(super) connection: Option<Connection>,
}

pub(super) async fn start(
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
            let connection = Connection::open_with(source, options(config, metrics)).await?;
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

pub(super) fn show_silences(metrics: &Metrics, status: &Arc<SourceStatus>) {
    let status = Arc::clone(status);
    metrics.show_silences(move || status.silences());
}

/// Limits and counts requests to the API server.
fn options(config: &Config, metrics: &Metrics) -> ConnectionOptions {
    let limit = config.request_limit.map(|RequestLimit { requests, window }| (requests, window));
    let metrics = metrics.clone();
    let observer = move |request: &RequestReport<'_>| {
        metrics.count_request(request.method.as_str(), request.host, request.code, request.duration);
    };
    ConnectionOptions { limit, observer: Some(Arc::new(observer)) }
}

pub(super) fn manifest_source(config: &Config) -> anyhow::Result<ManifestSource> {
    let SourceConfig::Manifests { dir, service_ranges, status_file } = &config.source else {
        bail!("this needs `--source manifests:DIR`");
    };
    let mut source = ManifestSource::new(dir, &config.model.node_name);
    if !service_ranges.is_empty() {
        source.service_ranges.clone_from(service_ranges);
    }
    source.status_file.clone_from(status_file);
    source.last_good = Some(ManifestSource::last_good_until_reboot(dir));
    source.names = config.dns.is_some();
    Ok(source)
}
