//! The connection to the API server: which server, with which credentials, and whether it answers.
//!
//! In: [`KubeSource`]. Out: clients that survive a change of server or token. Each request goes to the server
//! that answered last, and a watch resumes at its last version even on another server.

use std::{
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU32, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use http::{HeaderValue, Method, Request, Response, StatusCode, Uri, header};
use hyper_rustls::{FixedServerNameResolver, HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client as HttpClient, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use kube::{
    Client,
    client::{Body, ConfigExt},
};
use tower::{BoxError, Service, ServiceBuilder, ServiceExt as _, limit::RateLimitLayer};
use tracing::{debug, info, warn};

use super::{
    ConnectError, KubeSource,
    responses::{Responses, is_watch},
    token::Token,
    versions::{Version, Versions},
};
use crate::{causes::causes, model::Kind};

/// The user agent, in the form of Kubernetes' own clients.
const USER_AGENT: HeaderValue = HeaderValue::from_static(if cfg!(target_arch = "x86_64") {
    concat!("weir/", env!("CARGO_PKG_VERSION"), " (linux/amd64) node-proxy")
} else if cfg!(target_arch = "aarch64") {
    concat!("weir/", env!("CARGO_PKG_VERSION"), " (linux/arm64) node-proxy")
} else {
    concat!("weir/", env!("CARGO_PKG_VERSION"), " (linux) node-proxy")
});
/// After this many failures in a row weir tries the next server, and reads the credentials again.
const PATIENCE: u32 = 3;
/// The timeout of the TCP handshake.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// The timeout of TCP and TLS handshakes together. The TCP handshake alone proves little, because a kernel
/// completes it even if the server process hangs.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// The timeout of the response header. It is longer than the API server's own timeout.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// The idle time before the kernel sends a TCP keepalive probe.
const KEEPALIVE: Duration = Duration::from_secs(15);
/// The idle time of an HTTP/2 connection before a ping is sent. TCP keepalive is not enough, because a load
/// balancer, or the kernel of a machine that swaps, answers it for a dead server.
const PING_AFTER: Duration = Duration::from_secs(30);
/// The timeout of a ping.
const PING_TIMEOUT: Duration = Duration::from_secs(15);
/// How long an unused connection is kept.
const IDLE: Duration = Duration::from_secs(30);
/// The flow-control window of an HTTP/2 stream in bytes.
const AHEAD: u32 = 1 << 20;
/// The window of a connection is that of this many streams, so that watches that are not read leave room for
/// the others.
const KINDS: u32 = 8;

/// How long the first reason of an outage is not replaced, because one outage breaks connections in several
/// ways.
const SAME_REASON: Duration = Duration::from_secs(10);

/// The stream that a connector returns.
type Secured = <HttpsConnector<HttpConnector> as Service<Uri>>::Response;

/// A connection to the API servers, of which one is used at a time. Clones share it.
#[derive(Clone)]
pub struct Connection(Arc<Shared>);

/// Called after each request.
pub type RequestObserver = Arc<dyn Fn(&RequestReport<'_>) + Send + Sync>;

/// Options of a connection.
#[derive(Clone, Default)]
pub struct ConnectionOptions {
    /// The most requests in each interval of this length.
    pub limit: Option<(u64, Duration)>,
    /// Called after each request, when the response header has arrived or the request has failed.
    pub observer: Option<RequestObserver>,
}

/// A finished request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestReport<'a> {
    /// The HTTP method.
    pub method: &'a Method,
    /// Host and port of the API server.
    pub host: &'a str,
    /// The status code of the response; `None` if there was none.
    pub code: Option<u16>,
    /// The time until the response header or the failure.
    pub duration: Duration,
}

struct Shared {
    settings: KubeSource,
    options: ConnectionOptions,
    versions: Arc<Versions>,
    route: RwLock<Arc<Route>>,
    /// Locked while a route is made, so that many failing watches make only one.
    making: tokio::sync::Mutex<()>,
    outage: std::sync::Mutex<Option<Outage>>,
    /// The error of the last attempt to read the credentials again.
    unreadable: std::sync::Mutex<Option<String>>,
    /// Whether the API server rejected the credentials in its last response.
    rejected: AtomicBool,
}

/// The time during which no server answers.
struct Outage {
    since: Instant,
    /// The reason that was logged last, and when.
    error: String,
    logged: Instant,
}

/// A server, with one set of credentials.
struct Route {
    client: Client,
    index: usize,
    server: Uri,
    failures: AtomicU32,
    rejected: AtomicBool,
}

impl Connection {
    /// Reads the credentials and prepares the connection. Sends nothing, so an unreachable server is not an
    /// error.
    ///
    /// # Errors
    ///
    /// When the credentials cannot be read or are malformed.
    pub async fn open(settings: KubeSource) -> Result<Self, ConnectError> {
        Self::open_with(settings, ConnectionOptions::default()).await
    }

    /// Opens a connection with options.
    ///
    /// # Errors
    ///
    /// When the credentials cannot be read or are malformed.
    pub async fn open_with(settings: KubeSource, options: ConnectionOptions) -> Result<Self, ConnectError> {
        if rustls::crypto::CryptoProvider::get_default().is_none() {
            // This fails only if another thread installed a provider meanwhile, which is as good.
            let _ = rustls::crypto::ring::default_provider().install_default();
        }
        let route = Route::make(&settings, &options, 0).await?;
        let versions = Arc::new(versions(&settings).await?);
        Ok(Self(Arc::new(Shared {
            settings,
            options,
            versions,
            route: RwLock::new(Arc::new(route)),
            making: tokio::sync::Mutex::default(),
            outage: std::sync::Mutex::default(),
            unreadable: std::sync::Mutex::default(),
            rejected: AtomicBool::default(),
        })))
    }

    /// A client for requests other than the watches of sources.
    #[must_use]
    pub fn client(&self) -> Client {
        let shared = Arc::clone(&self.0);
        let service = tower::service_fn(move |request| {
            let shared = Arc::clone(&shared);
            async move {
                let route = shared.usable_route().await;
                shared.send_by(&route, request).await
            }
        });
        Client::new(service, "default")
    }

    /// The API server that requests go to now.
    #[must_use]
    pub fn server(&self) -> Uri {
        self.0.route().server.clone()
    }

    /// The name of this node's Node.
    pub(super) fn node(&self) -> &str {
        &self.0.settings.node
    }

    /// The stored resource version of a kind.
    pub(super) fn known(&self, kind: Kind) -> Version {
        Version::of(kind, Arc::clone(&self.0.versions))
    }

    /// A client for the watches of one kind. `responses` wraps them, and a body that ends with an
    /// error counts as a failure of the server.
    pub(super) fn watch_client(&self, responses: Arc<Responses>) -> Client {
        let shared = Arc::clone(&self.0);
        let service = tower::service_fn(move |request: Request<Body>| {
            let (shared, responses) = (Arc::clone(&shared), Arc::clone(&responses));
            async move {
                let query = request.uri().query().unwrap_or_default().to_owned();
                let route = shared.usable_route().await;
                let answer =
                    shared.send_by(&route, request).await.inspect_err(|_| responses.no_response())?;
                let broke_off = move || {
                    route.failures.fetch_add(1, Relaxed);
                };
                Ok::<_, BoxError>(responses.wrap(&query, answer, broke_off))
            }
        });
        Client::new(service, "default")
    }
}

impl Shared {
    fn route(&self) -> Arc<Route> {
        Arc::clone(&self.route.read().unwrap_or_else(PoisonError::into_inner))
    }

    async fn send_by(&self, route: &Route, mut request: Request<Body>) -> Result<Response<Body>, BoxError> {
        request.headers_mut().insert(header::USER_AGENT, USER_AGENT);
        let (method, asked) = (request.method().clone(), Instant::now());
        let answer = tokio::time::timeout(ANSWER_TIMEOUT, route.client.send(request)).await;
        if let Some(observer) = &self.options.observer {
            let code = answer.as_ref().ok().and_then(|answer| Some(answer.as_ref().ok()?.status().as_u16()));
            let host = route.server.authority().map_or("", http::uri::Authority::as_str);
            observer(&RequestReport { method: &method, host, code, duration: asked.elapsed() });
        }
        match answer {
            Ok(Ok(answer)) => {
                self.answered(route, answer.status());
                Ok(answer)
            }
            Ok(Err(error)) => {
                self.failed(route, causes(&error));
                Err(error.into())
            }
            Err(elapsed) => {
                self.failed(route, format!("no response within {ANSWER_TIMEOUT:?}"));
                Err(elapsed.into())
            }
        }
    }

    fn answered(&self, route: &Route, status: StatusCode) {
        if status == StatusCode::UNAUTHORIZED {
            route.rejected.store(true, Relaxed);
            if !self.rejected.swap(true, Relaxed) {
                warn!(
                    server = %route.server, credentials = self.settings.credentials.origin(),
                    "the API server rejects the credentials; reading them again until it accepts them"
                );
            }
        } else if status.is_server_error() {
            self.failed(route, format!("its response is {status}"));
            return;
        } else if self.rejected.swap(false, Relaxed) {
            info!(server = %route.server, "the API server accepts the credentials again");
        }
        route.failures.store(0, Relaxed);
        let outage = self.outage.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(outage) = outage {
            info!(server = %route.server, outage = ?outage.since.elapsed(), "the API server answers again");
        }
    }

    /// Logs once that no server answers, and again if the reason changes.
    fn failed(&self, route: &Route, error: String) {
        route.failures.fetch_add(1, Relaxed);
        if self.rejected.load(Relaxed) {
            // A server closes the connections of clients that it rejects.
            debug!(server = %route.server, error, "the API server does not answer");
            return;
        }
        let mut outage = self.outage.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        match &mut *outage {
            None => {
                warn!(server = %route.server, error, "the API server does not answer; the kernel keeps serving the last state");
                *outage = Some(Outage { since: now, error, logged: now });
            }
            Some(outage) if outage.error != error && outage.logged.elapsed() >= SAME_REASON => {
                warn!(server = %route.server, error, "the API server still does not answer, now for another reason");
                (outage.error, outage.logged) = (error, now);
            }
            Some(_) => {}
        }
    }

    /// The present route, or a new one if that one has failed too often.
    async fn usable_route(&self) -> Arc<Route> {
        let route = self.route();
        if route.is_usable() {
            return route;
        }
        let _making = self.making.lock().await;
        let route = self.route();
        if route.is_usable() {
            return route;
        }
        let unreachable = !route.rejected.load(Relaxed);
        match Route::make(&self.settings, &self.options, route.index + usize::from(unreachable)).await {
            Ok(next) => {
                if next.server != route.server {
                    info!(from = %route.server, to = %next.server, "trying another API server");
                }
                let next = Arc::new(next);
                *self.route.write().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&next);
                *self.unreadable.lock().unwrap_or_else(PoisonError::into_inner) = None;
                next
            }
            Err(error) => {
                let error = causes(&error);
                let mut last = self.unreadable.lock().unwrap_or_else(PoisonError::into_inner);
                if last.as_ref() != Some(&error) {
                    warn!(error, "cannot read the credentials again; keeping the previous ones");
                    *last = Some(error);
                }
                route.reset_failures();
                route
            }
        }
    }
}

impl Route {
    async fn make(
        settings: &KubeSource,
        options: &ConnectionOptions,
        index: usize,
    ) -> Result<Self, ConnectError> {
        let mut config = settings.credentials.load().await?;
        let index = index.checked_rem(settings.servers.len()).unwrap_or(0);
        if let Some(server) = settings.servers.get(index) {
            config.cluster_url = server.clone();
        }
        let from = settings.credentials.origin();
        let client = client(&config, options).map_err(|source| ConnectError::Client { from, source })?;
        let server = config.cluster_url;
        Ok(Self { client, index, server, failures: AtomicU32::new(0), rejected: AtomicBool::new(false) })
    }

    fn is_usable(&self) -> bool {
        self.failures.load(Relaxed) < PATIENCE && !self.rejected.load(Relaxed)
    }

    fn reset_failures(&self) {
        self.failures.store(0, Relaxed);
        self.rejected.store(false, Relaxed);
    }
}

/// The stored resource versions of this cluster and node. A cluster is identified by its addresses and by its
/// certificate authority. If either changes, the only cost is a fresh list.
async fn versions(settings: &KubeSource) -> Result<Versions, ConnectError> {
    let config = settings.credentials.load().await?;
    let servers: String = settings.servers.iter().map(|server| format!("{server} ")).collect();
    let authorities = config.root_cert.unwrap_or_default().concat();
    let url = config.cluster_url.to_string();
    let identity = [settings.node.as_bytes(), url.as_bytes(), servers.as_bytes(), &authorities];
    Ok(Versions::open(settings.versions.as_deref(), &identity))
}

/// A client without retries. Its connections detect a dead peer within a minute. Watches share one HTTP/2
/// connection if the server supports it. Other requests have connections of their own, which are closed after
/// a short idle time.
fn client(config: &kube::Config, options: &ConnectionOptions) -> Result<Client, BoxError> {
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_connect_timeout(Some(CONNECT_TIMEOUT));
    tcp.set_keepalive(Some(KEEPALIVE));
    tcp.set_keepalive_interval(Some(KEEPALIVE / 3));
    tcp.set_keepalive_retries(Some(3));
    tcp.set_tcp_user_timeout(Some(2 * KEEPALIVE));
    let others = HttpClient::builder(TokioExecutor::new())
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(IDLE)
        .build(in_time(config.rustls_https_connector_with_connector(tcp.clone())?));
    let watches = HttpClient::builder(TokioExecutor::new())
        .timer(TokioTimer::new())
        .http2_initial_stream_window_size(AHEAD)
        .http2_initial_connection_window_size(AHEAD * KINDS)
        .http2_keep_alive_interval(PING_AFTER)
        .http2_keep_alive_timeout(PING_TIMEOUT)
        .http2_keep_alive_while_idle(true)
        .build(in_time(both_versions(config, tcp)?));
    let ask = tower::service_fn(move |request: Request<Body>| {
        let client = if is_watch(request.uri().query()) { &watches } else { &others };
        client.request(request)
    });
    let mut without_token = config.clone();
    let token = Token::taken_from(&mut without_token.auth_info)?.map(Arc::new);
    let carry_token = move |mut request: Request<Body>| {
        if let Some(token) = &token {
            request.headers_mut().insert(header::AUTHORIZATION, token.header());
        }
        request
    };
    let limit = options.limit.map(|(requests, window)| RateLimitLayer::new(requests, window));
    let service = ServiceBuilder::new()
        .option_layer(limit)
        .layer(config.base_uri_layer())
        .option_layer(without_token.auth_layer()?)
        .map_request(carry_token)
        .map_err(BoxError::from)
        .service(ask);
    Ok(Client::new(service, config.default_namespace.clone()))
}

/// A connector that limits the time for TCP and TLS together.
fn in_time(
    connector: HttpsConnector<HttpConnector>,
) -> impl Service<Uri, Response = Secured, Error = BoxError, Future: Send + Unpin> + Clone + Send + Sync {
    tower::service_fn(move |server: Uri| {
        let connecting = connector.clone().oneshot(server);
        Box::pin(async move { tokio::time::timeout(HANDSHAKE_TIMEOUT, connecting).await? })
    })
}

/// `kube`'s TLS configuration, with HTTP/2 added.
fn both_versions(
    config: &kube::Config,
    tcp: HttpConnector,
) -> Result<HttpsConnector<HttpConnector>, BoxError> {
    let mut builder =
        HttpsConnectorBuilder::new().with_tls_config(config.rustls_client_config()?).https_or_http();
    if let Some(name) = &config.tls_server_name {
        builder = builder.with_server_name_resolver(FixedServerNameResolver::new(name.clone().try_into()?));
    }
    Ok(builder.enable_all_versions().wrap_connector(tcp))
}
