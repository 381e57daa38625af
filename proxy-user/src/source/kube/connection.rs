//! The way to an API server: which one, with which credentials, and whether it answers.
//!
//! In: [`KubeSource`]. Out: clients that outlive servers and tokens: every request goes to the server that answered
//! last, and a watch resumes where it was even on another one.

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
    answers::{Answers, is_watch},
    token::Token,
    versions::{Version, Versions},
};
use crate::{causes::causes, model::Kind};

/// Which program asks, in the way of Kubernetes' own.
const USER_AGENT: HeaderValue = HeaderValue::from_static(if cfg!(target_arch = "x86_64") {
    concat!("weir/", env!("CARGO_PKG_VERSION"), " (linux/amd64) node-proxy")
} else if cfg!(target_arch = "aarch64") {
    concat!("weir/", env!("CARGO_PKG_VERSION"), " (linux/arm64) node-proxy")
} else {
    concat!("weir/", env!("CARGO_PKG_VERSION"), " (linux) node-proxy")
});
/// After this many failures in a row the next server is tried, with credentials read anew.
const PATIENCE: u32 = 3;
/// For TCP to be set up.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// For TCP and TLS together. TCP alone says little of a server: the kernel of a machine whose server hangs accepts connections.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// For an answer to begin: longer than an API server takes to give up by itself.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a peer may say nothing before TCP asks whether it is still there.
const KEEPALIVE: Duration = Duration::from_secs(15);
/// How long an HTTP/2 connection may say nothing before the server is asked whether it is still there: TCP may be kept up for a
/// server that is gone, by a load balancer or by the kernel of a machine that swaps.
const PING_AFTER: Duration = Duration::from_secs(30);
/// How long the answer to that may take.
const PING_TIMEOUT: Duration = Duration::from_secs(15);
/// How long a connection is kept on which nothing is asked.
const IDLE: Duration = Duration::from_secs(30);
/// How many bytes of a watch the server may send before they are taken in.
const AHEAD: u32 = 1 << 20;
/// So that watches of some kinds that are not taken in leave room for those of others on their connection.
const KINDS: u32 = 8;

/// For how long the first reason of an outage stands for all: connections that break fail in several ways.
const SAME_REASON: Duration = Duration::from_secs(10);

/// What a connector sets up.
type Secured = <HttpsConnector<HttpConnector> as Service<Uri>>::Response;

/// A connection to whichever API server answers. Clones share it.
#[derive(Clone)]
pub struct Connection(Arc<Shared>);

/// Hears of a request and its answer.
pub type Tell = Arc<dyn Fn(&Asked<'_>) + Send + Sync>;

/// How the API server is asked, and who hears of the answers.
#[derive(Clone, Default)]
pub struct Manner {
    /// At most so many requests in each stretch of time as long as this.
    pub limit: Option<(u64, Duration)>,
    /// Is told of every request once its answer begins, or there will be none.
    pub tell: Option<Tell>,
}

/// A request, and what became of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked<'a> {
    /// The method.
    pub method: &'a Method,
    /// The API server's host and port.
    pub host: &'a str,
    /// The answer's status code; `None` where none came.
    pub code: Option<u16>,
    /// How long that took.
    pub took: Duration,
}

struct Shared {
    settings: KubeSource,
    manner: Manner,
    versions: Arc<Versions>,
    route: RwLock<Arc<Route>>,
    /// Held while a route is made, so that many failing watches make one.
    making: tokio::sync::Mutex<()>,
    outage: std::sync::Mutex<Option<Outage>>,
    /// Why the credentials could not be read anew last time.
    unreadable: std::sync::Mutex<Option<String>>,
    /// Whether the API server did not accept the credentials at its last answer.
    rejected: AtomicBool,
}

/// No server answers.
struct Outage {
    since: Instant,
    /// What was said of it last, and when.
    error: String,
    told: Instant,
}

/// One server with one set of credentials.
struct Route {
    client: Client,
    index: usize,
    server: Uri,
    failures: AtomicU32,
    rejected: AtomicBool,
}

impl Connection {
    /// Reads the credentials and prepares the connection. Sends nothing: a server that does not answer is no error.
    ///
    /// # Errors
    ///
    /// When the credentials cannot be read or are malformed.
    pub async fn open(settings: KubeSource) -> Result<Self, ConnectError> {
        Self::open_with(settings, Manner::default()).await
    }

    /// The same in this manner.
    ///
    /// # Errors
    ///
    /// When the credentials cannot be read or are malformed.
    pub async fn open_with(settings: KubeSource, manner: Manner) -> Result<Self, ConnectError> {
        if rustls::crypto::CryptoProvider::get_default().is_none() {
            // The only failure is that somebody else was faster, and then there is one.
            let _ = rustls::crypto::ring::default_provider().install_default();
        }
        let route = Route::make(&settings, &manner, 0).await?;
        let versions = Arc::new(versions(&settings).await?);
        Ok(Self(Arc::new(Shared {
            settings,
            manner,
            versions,
            route: RwLock::new(Arc::new(route)),
            making: tokio::sync::Mutex::default(),
            outage: std::sync::Mutex::default(),
            unreadable: std::sync::Mutex::default(),
            rejected: AtomicBool::default(),
        })))
    }

    /// A client for whatever else is asked of the API server.
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

    /// The API server requests go to now.
    #[must_use]
    pub fn server(&self) -> Uri {
        self.0.route().server.clone()
    }

    /// The Node this agent runs on.
    pub(super) fn node(&self) -> &str {
        &self.0.settings.node
    }

    /// As of when a kind is known.
    pub(super) fn known(&self, kind: Kind) -> Version {
        Version::of(kind, Arc::clone(&self.0.versions))
    }

    /// A client for one kind, whose answers are heard. One that breaks off counts against the server that gave it.
    pub(super) fn heard_client(&self, answers: Arc<Answers>) -> Client {
        let shared = Arc::clone(&self.0);
        let service = tower::service_fn(move |request: Request<Body>| {
            let (shared, answers) = (Arc::clone(&shared), Arc::clone(&answers));
            async move {
                let query = request.uri().query().unwrap_or_default().to_owned();
                let route = shared.usable_route().await;
                let answer = shared.send_by(&route, request).await.inspect_err(|_| answers.none())?;
                let broke_off = move || {
                    route.failures.fetch_add(1, Relaxed);
                };
                Ok::<_, BoxError>(answers.begun(&query, answer, broke_off))
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
        if let Some(tell) = &self.manner.tell {
            let code = answer.as_ref().ok().and_then(|answer| Some(answer.as_ref().ok()?.status().as_u16()));
            let host = route.server.authority().map_or("", http::uri::Authority::as_str);
            tell(&Asked { method: &method, host, code, took: asked.elapsed() });
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
                self.failed(route, format!("no answer came within {ANSWER_TIMEOUT:?}"));
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
                    "the API server does not accept the credentials; they are read anew until it does"
                );
            }
        } else if status.is_server_error() {
            self.failed(route, format!("it answers {status}"));
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

    /// Says once that no server answers, and once more where the reason is another one for a while.
    fn failed(&self, route: &Route, error: String) {
        route.failures.fetch_add(1, Relaxed);
        if self.rejected.load(Relaxed) {
            // A server ends the connections of those it does not accept.
            debug!(server = %route.server, error, "the API server does not answer");
            return;
        }
        let mut outage = self.outage.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        match &mut *outage {
            None => {
                warn!(server = %route.server, error, "the API server does not answer; what is programmed stays");
                *outage = Some(Outage { since: now, error, told: now });
            }
            Some(outage) if outage.error != error && outage.told.elapsed() >= SAME_REASON => {
                warn!(server = %route.server, error, "the API server does not answer, for another reason than before");
                (outage.error, outage.told) = (error, now);
            }
            Some(_) => {}
        }
    }

    /// The route, after making another one if this one has proved useless.
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
        match Route::make(&self.settings, &self.manner, route.index + usize::from(unreachable)).await {
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
                    warn!(error, "keeping the credentials read before");
                    *last = Some(error);
                }
                route.forgive();
                route
            }
        }
    }
}

impl Route {
    async fn make(settings: &KubeSource, manner: &Manner, index: usize) -> Result<Self, ConnectError> {
        let mut config = settings.credentials.load().await?;
        let index = index.checked_rem(settings.servers.len()).unwrap_or(0);
        if let Some(server) = settings.servers.get(index) {
            config.cluster_url = server.clone();
        }
        let from = settings.credentials.origin();
        let client = client(&config, manner).map_err(|source| ConnectError::Client { from, source })?;
        let server = config.cluster_url;
        Ok(Self { client, index, server, failures: AtomicU32::new(0), rejected: AtomicBool::new(false) })
    }

    fn is_usable(&self) -> bool {
        self.failures.load(Relaxed) < PATIENCE && !self.rejected.load(Relaxed)
    }

    fn forgive(&self) {
        self.failures.store(0, Relaxed);
        self.rejected.store(false, Relaxed);
    }
}

/// The versions that are kept of this cluster for this node. A cluster is told by its addresses and by the authority that
/// signs for it: another list of addresses, or another authority, costs no more than a list as of now.
async fn versions(settings: &KubeSource) -> Result<Versions, ConnectError> {
    let config = settings.credentials.load().await?;
    let servers: String = settings.servers.iter().map(|server| format!("{server} ")).collect();
    let authorities = config.root_cert.unwrap_or_default().concat();
    let url = config.cluster_url.to_string();
    let identity = [settings.node.as_bytes(), url.as_bytes(), servers.as_bytes(), &authorities];
    Ok(Versions::open(settings.versions.as_deref(), &identity))
}

/// A client without retries, whose connections notice within a minute that the peer has gone without a word. Watches share
/// one HTTP/2 connection where the server speaks that; everything else has connections of its own, which go when they have
/// been idle for a while.
fn client(config: &kube::Config, manner: &Manner) -> Result<Client, BoxError> {
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
    let limit = manner.limit.map(|(requests, window)| RateLimitLayer::new(requests, window));
    let service = ServiceBuilder::new()
        .option_layer(limit)
        .layer(config.base_uri_layer())
        .option_layer(without_token.auth_layer()?)
        .map_request(carry_token)
        .map_err(BoxError::from)
        .service(ask);
    Ok(Client::new(service, config.default_namespace.clone()))
}

/// A connector that gives up a server with which no TLS can be set up.
fn in_time(
    connector: HttpsConnector<HttpConnector>,
) -> impl Service<Uri, Response = Secured, Error = BoxError, Future: Send + Unpin> + Clone + Send + Sync {
    tower::service_fn(move |server: Uri| {
        let connecting = connector.clone().oneshot(server);
        Box::pin(async move { tokio::time::timeout(HANDSHAKE_TIMEOUT, connecting).await? })
    })
}

/// As `kube` makes it, and HTTP/2 as well.
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
