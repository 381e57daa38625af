//! Listens for HTTP, as long and as stubbornly as kube-proxy does (P8).
//!
//! In: an address and a router. Out: answers, until told to stop.

use std::{io, net::SocketAddr, time::Duration};

use axum::Router;
use socket2::{Domain, Socket, Type};
use tokio::{net::TcpListener, sync::watch};
use tracing::{error, info};

/// How long answers under way may take once the server is to stop.
const GRACE: Duration = Duration::from_secs(5);

/// Why a server ended before it was told to.
#[derive(Debug, thiserror::Error)]
#[error("the {name} server cannot serve on {address}")]
pub struct ServerError {
    /// Which server.
    pub name: &'static str,
    /// Where.
    pub address: SocketAddr,
    /// Why.
    #[source]
    pub source: io::Error,
}

/// One HTTP server.
#[derive(Clone, Debug)]
pub struct Server {
    /// What it is for, in logs.
    pub name: &'static str,
    /// Where it listens.
    pub address: SocketAddr,
    /// Whether a failure is final instead of being tried again.
    pub hard_fail: bool,
    /// How long to wait before trying again.
    pub retry: Duration,
    /// Whether `[::]` leaves IPv4 to another server on the same port.
    pub v6_only: bool,
}

impl Server {
    /// A server that tries again every 5 seconds, unless `hard_fail`.
    #[must_use]
    pub const fn new(name: &'static str, address: SocketAddr, hard_fail: bool) -> Self {
        Self { name, address, hard_fail, retry: Duration::from_secs(5), v6_only: false }
    }

    /// One that leaves the other family's addresses to another server.
    #[must_use]
    pub const fn of_one_family(self) -> Self {
        Self { v6_only: true, ..self }
    }

    /// Serves `router` until `stop` becomes true or its sender is gone; then finishes what is under way.
    ///
    /// # Errors
    ///
    /// With `hard_fail`, when the address cannot be listened on. Without, never.
    pub async fn run(self, router: Router, stop: watch::Receiver<bool>) -> Result<(), ServerError> {
        self.run_and_tell(router, stop, |_| {}).await
    }

    /// The same, and tells `tell` of every failure.
    ///
    /// # Errors
    ///
    /// With `hard_fail`, when the address cannot be listened on. Without, never.
    pub async fn run_and_tell(
        self,
        router: Router,
        mut stop: watch::Receiver<bool>,
        tell: impl Fn(&io::Error),
    ) -> Result<(), ServerError> {
        loop {
            match self.attempt(router.clone(), stop.clone()).await {
                Ok(()) => return Ok(()),
                Err(source) if self.hard_fail => {
                    return Err(ServerError { name: self.name, address: self.address, source });
                }
                Err(error) => {
                    tell(&error);
                    let (server, address) = (self.name, self.address);
                    error!(server, %address, %error, retry = ?self.retry, "cannot serve, will try again");
                }
            }
            tokio::select! {
                () = tokio::time::sleep(self.retry) => {}
                () = stopped(&mut stop) => return Ok(()),
            }
        }
    }

    async fn attempt(&self, router: Router, stop: watch::Receiver<bool>) -> io::Result<()> {
        let listener = self.listen().await?;
        info!(server = self.name, address = %listener.local_addr()?, "serving");
        serve(listener, router, stop).await
    }
}

impl Server {
    async fn listen(&self) -> io::Result<TcpListener> {
        if !(self.v6_only && self.address.is_ipv6()) {
            return TcpListener::bind(self.address).await;
        }
        let socket = Socket::new(Domain::IPV6, Type::STREAM.nonblocking(), None)?;
        socket.set_only_v6(true)?;
        socket.set_reuse_address(true)?;
        socket.bind(&self.address.into())?;
        socket.listen(1024)?;
        TcpListener::from_std(socket.into())
    }
}

/// Serves on a listener that is there already.
pub(super) async fn serve(
    listener: TcpListener,
    router: Router,
    stop: watch::Receiver<bool>,
) -> io::Result<()> {
    let (mut graceful, mut overdue) = (stop.clone(), stop);
    let server = axum::serve(listener, router)
        .with_graceful_shutdown(async move { stopped(&mut graceful).await })
        .into_future();
    tokio::select! {
        result = server => result,
        () = async { stopped(&mut overdue).await; tokio::time::sleep(GRACE).await } => Ok(()),
    }
}

async fn stopped(stop: &mut watch::Receiver<bool>) {
    // An error means that the sender is gone, and with it whoever wanted the server.
    let _ = stop.wait_for(|stop| *stop).await;
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpStream,
        time::timeout,
    };

    use super::*;
    use crate::{
        model::Family,
        observe::{About, Health, Metrics, admin_router, health_router},
    };

    const LOCAL: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
    const LONG: Duration = Duration::from_secs(20);

    struct Running {
        address: SocketAddr,
        stop: watch::Sender<bool>,
        task: tokio::task::JoinHandle<io::Result<()>>,
    }

    fn about() -> About {
        let configuration = serde_json::json!({"mode": "auto"});
        About {
            proxy_mode: "nftables",
            configuration,
            words: vec!["run".to_owned(), "--profiling".to_owned()],
        }
    }

    async fn start(router: Router) -> Running {
        let listener = TcpListener::bind(LOCAL).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopping) = watch::channel(false);
        Running { address, stop, task: tokio::spawn(serve(listener, router, stopping)) }
    }

    /// The answer to `GET path`: status line, headers, empty line, body.
    async fn get(address: SocketAddr, path: &str) -> io::Result<String> {
        let mut stream = TcpStream::connect(address).await?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok(answer)
    }

    fn header<'a>(answer: &'a str, name: &str) -> Option<&'a str> {
        let start = format!("{name}: ");
        answer.split("\r\n").find_map(|line| line.strip_prefix(&start))
    }

    fn body(answer: &str) -> &str {
        answer.split_once("\r\n\r\n").unwrap().1
    }

    #[tokio::test]
    async fn p1_p4_health_over_http() {
        let (health, metrics) = (Health::new(Duration::from_secs(30)), Metrics::new());
        let server = start(health_router(&health, &metrics)).await;
        health.updated(Family::V4);

        let answer = get(server.address, "/healthz").await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
        assert_eq!(header(&answer, "content-type"), Some("application/json"));
        assert_eq!(header(&answer, "x-content-type-options"), Some("nosniff"));
        let json: serde_json::Value = serde_json::from_str(body(&answer)).unwrap();
        assert_eq!((&json["nodeEligible"], &json["healthy"]), (&false.into(), &true.into()));

        assert!(get(server.address, "/livez").await.unwrap().starts_with("HTTP/1.1 200 "));
        health.set_eligible(true);
        assert!(get(server.address, "/healthz").await.unwrap().starts_with("HTTP/1.1 200 "));
        assert!(get(server.address, "/other").await.unwrap().starts_with("HTTP/1.1 404 "));
        let counted = metrics.render();
        for line in [
            "kubeproxy_proxy_healthz_total{code=\"200\"} 1",
            "kubeproxy_proxy_healthz_total{code=\"503\"} 1",
            "kubeproxy_proxy_livez_total{code=\"200\"} 1",
        ] {
            assert!(counted.contains(line), "{line}");
        }
    }

    #[tokio::test]
    async fn p5_p6_p7_metrics_over_http() {
        let server = start(admin_router(&Metrics::new(), about())).await;
        assert_eq!(body(&get(server.address, "/healthz").await.unwrap()), "ok");
        let mode = get(server.address, "/proxyMode").await.unwrap();
        assert_eq!(body(&mode), "nftables");
        assert_eq!(header(&mode, "content-type"), Some("text/plain; charset=utf-8"));
        assert_eq!(header(&mode, "x-content-type-options"), Some("nosniff"));
        let metrics = get(server.address, "/metrics").await.unwrap();
        assert_eq!(header(&metrics, "content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
        assert!(body(&metrics).contains("kubeproxy_sync_proxy_rules_service_changes_total 0\n"));
        let indicators = get(server.address, "/metrics/slis").await.unwrap();
        assert_eq!(header(&indicators, "content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
        assert!(body(&indicators).contains("kubernetes_healthcheck{name=\"ping\",type=\"healthz\"} 1\n"));
        let configuration = get(server.address, "/configz").await.unwrap();
        assert_eq!(header(&configuration, "content-type"), Some("application/json"));
        assert_eq!(body(&configuration), r#"{"kubeproxy.config.k8s.io":{"mode":"auto"}}"#);
        let flags = get(server.address, "/flagz").await.unwrap();
        assert_eq!(header(&flags, "content-type"), Some("text/plain; charset=utf-8"));
        assert!(body(&flags).ends_with("\n\nprofiling=true\n"), "{flags}");
        assert!(body(&get(server.address, "/statusz").await.unwrap()).contains("\nStarted: "));
    }

    #[tokio::test]
    async fn stopping_closes_the_port() {
        let Running { address, stop, task } = start(Router::new()).await;
        assert!(get(address, "/").await.is_ok());
        stop.send(true).unwrap();
        timeout(LONG, task).await.unwrap().unwrap().unwrap();
        assert!(get(address, "/").await.is_err());
    }

    #[tokio::test]
    async fn p8_a_taken_port_is_tried_again_until_it_is_free() {
        let taken = TcpListener::bind(LOCAL).await.unwrap();
        let address = taken.local_addr().unwrap();
        let (stop, stopping) = watch::channel(false);
        let retry = Duration::from_millis(5);
        let server = Server { retry, ..Server::new("healthz", address, false) };
        let task = tokio::spawn(server.run(admin_router(&Metrics::new(), about()), stopping));
        // There is one thread, so the server makes its first attempt now, and fails.
        tokio::task::yield_now().await;
        drop(taken);
        let answer = timeout(LONG, async {
            loop {
                match get(address, "/healthz").await {
                    Ok(answer) if !answer.is_empty() => return answer,
                    _ => tokio::time::sleep(retry).await,
                }
            }
        });
        assert_eq!(body(&answer.await.unwrap()), "ok");
        stop.send(true).unwrap();
        timeout(LONG, task).await.unwrap().unwrap().unwrap();
    }

    #[tokio::test]
    async fn h3_two_families_have_a_server_each_on_one_port() {
        let v6 =
            |port| Server::new("v6", (std::net::Ipv6Addr::UNSPECIFIED, port).into(), true).of_one_family();
        let first = v6(0).listen().await.unwrap();
        let port = first.local_addr().unwrap().port();
        let second = Server::new("v4", (Ipv4Addr::UNSPECIFIED, port).into(), true).listen().await.unwrap();
        drop(first);
        v6(port).listen().await.unwrap();
        drop(second);
    }

    #[tokio::test]
    async fn p8_a_taken_port_is_fatal_with_hard_fail() {
        let taken = TcpListener::bind(LOCAL).await.unwrap();
        let address = taken.local_addr().unwrap();
        let (_stop, stopping) = watch::channel(false);
        let error = Server::new("metrics", address, true).run(Router::new(), stopping).await.unwrap_err();
        assert_eq!(error.to_string(), format!("the metrics server cannot serve on {address}"));
        assert_eq!(error.source.kind(), io::ErrorKind::AddrInUse);
    }
}
