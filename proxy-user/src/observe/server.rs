//! HTTP servers, which try again to listen as kube-proxy does (P8).
//!
//! In: an address and a router. Out: responses, until a stop signal. Any client that reaches the node reaches some of
//! these servers, so a client has little time to send its request, and a limited share of the connections.

use std::{
    convert::Infallible,
    io,
    net::{Ipv6Addr, SocketAddr},
    time::Duration,
};

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
    service::TowerToHyperService,
};
use socket2::{Domain, Socket, Type};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
};
use tracing::{debug, error, info};

use crate::connection_limit::ConnectionLimit;

/// How long open requests may take after the stop signal.
const GRACE: Duration = Duration::from_secs(5);
/// The largest head of a request, in bytes.
const LARGEST_HEAD: usize = 16 << 10;
/// The pause after a failed accept or bind, for example without a free descriptor.
const PAUSE: Duration = Duration::from_millis(100);

/// Why a server ended before the stop signal.
#[derive(Debug, thiserror::Error)]
#[error("the {name} server cannot serve on {address}")]
pub struct ServerError {
    /// As in [`Server::name`].
    pub name: &'static str,
    /// The address that it could not listen on.
    pub address: SocketAddr,
    /// From `bind` or `listen`.
    #[source]
    pub source: io::Error,
}

/// One HTTP server.
#[derive(Clone, Debug)]
pub struct Server {
    /// Its purpose, for logs.
    pub name: &'static str,
    /// The address to listen on.
    pub address: SocketAddr,
    /// Ends at the first failure to listen, instead of trying again.
    pub hard_fail: bool,
    /// The pause before the next attempt to listen.
    pub retry: Duration,
    /// `0.0.0.0` and `[::]` mean the addresses of their own family only, so another server can have the same port of
    /// the other family. Otherwise both mean every address, as in kube-proxy.
    pub one_family: bool,
    /// How long a client may take to send its request, on a new connection and on one that it keeps.
    pub patience: Duration,
    /// Allows several requests on one connection.
    pub keep_alive: bool,
    /// Limits its connections.
    pub limit: ConnectionLimit,
}

impl Server {
    /// A server that tries to listen every 5 seconds, unless `hard_fail`, and waits 10 seconds for a request.
    #[must_use]
    pub const fn new(
        name: &'static str,
        address: SocketAddr,
        hard_fail: bool,
        limit: ConnectionLimit,
    ) -> Self {
        let (retry, patience) = (Duration::from_secs(5), Duration::from_secs(10));
        Self { name, address, hard_fail, retry, one_family: false, patience, keep_alive: true, limit }
    }

    /// Leaves the other family's addresses to another server.
    #[must_use]
    pub fn of_one_family(self) -> Self {
        Self { one_family: true, ..self }
    }

    /// Answers one request per connection.
    #[must_use]
    pub fn without_keep_alive(self) -> Self {
        Self { keep_alive: false, ..self }
    }

    /// Serves `router` until `stop` becomes true or its sender is dropped, and then finishes open requests.
    ///
    /// # Errors
    ///
    /// With `hard_fail`, when it cannot listen on the address. Without, never.
    pub async fn run(self, router: Router, stop: watch::Receiver<bool>) -> Result<(), ServerError> {
        self.run_and_report(router, stop, |_| {}).await
    }

    /// Like [`Server::run`], and calls `report` with every failure that is tried again.
    ///
    /// # Errors
    ///
    /// As [`Server::run`].
    pub async fn run_and_report(
        self,
        router: Router,
        mut stop: watch::Receiver<bool>,
        report: impl Fn(&io::Error),
    ) -> Result<(), ServerError> {
        loop {
            match self.attempt(router.clone(), stop.clone()).await {
                Ok(()) => return Ok(()),
                Err(source) if self.hard_fail => {
                    return Err(ServerError { name: self.name, address: self.address, source });
                }
                Err(error) => {
                    report(&error);
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

    /// Serves `router` until the future is dropped. The caller expects that another process has the address for a
    /// while, so failures to listen are not logged.
    pub async fn run_quietly(self, router: Router) -> Infallible {
        // The sender lives as long as this future.
        let (_never, stop) = watch::channel(false);
        loop {
            if let Ok(listener) = self.listen().await {
                self.serve(listener, router.clone(), stop.clone()).await;
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn attempt(&self, router: Router, stop: watch::Receiver<bool>) -> io::Result<()> {
        let listener = self.listen().await?;
        info!(server = self.name, address = %listener.local_addr()?, "serving");
        self.serve(listener, router, stop).await;
        Ok(())
    }

    async fn listen(&self) -> io::Result<TcpListener> {
        if !self.address.ip().is_unspecified() {
            return TcpListener::bind(self.address).await;
        }
        if self.one_family {
            return listen_on(self.address, true);
        }
        match listen_on((Ipv6Addr::UNSPECIFIED, self.address.port()).into(), false) {
            // This kernel has no IPv6.
            Err(error) if self.address.is_ipv4() && error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {
                TcpListener::bind(self.address).await
            }
            listener => listener,
        }
    }

    /// Serves on an open listener.
    async fn serve(&self, listener: TcpListener, router: Router, mut stop: watch::Receiver<bool>) {
        let under_way = GracefulShutdown::new();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = stopped(&mut stop) => break,
            };
            match accepted {
                Ok((stream, from)) => self.answer(stream, from, router.clone(), &under_way),
                Err(error) => {
                    debug!(server = self.name, %error, "cannot accept a connection");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
        drop(listener);
        // An error means that the time is over. Connections that are still open end with the process.
        let _ = tokio::time::timeout(GRACE, under_way.shutdown()).await;
    }

    /// Answers on one connection until the client ends it or its place is given away.
    fn answer(&self, stream: TcpStream, from: SocketAddr, router: Router, under_way: &GracefulShutdown) {
        let mut permit = self.limit.admit(from.ip());
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(self.patience)
            .max_buf_size(LARGEST_HEAD)
            .keep_alive(self.keep_alive)
            .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
        let connection = under_way.watch(connection);
        let server = self.name;
        tokio::spawn(async move {
            tokio::select! {
                ended = connection => if let Err(error) = ended {
                    debug!(server, %from, %error, "connection ended with an error");
                },
                () = permit.revoked() => debug!(server, %from, "connection closed to make room for another"),
            }
        });
    }
}

/// Listens on an unspecified address; the one of IPv6 includes IPv4, unless `v6_only`.
fn listen_on(address: SocketAddr, v6_only: bool) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), None)?;
    if address.is_ipv6() {
        // Set in both cases, because the kernel's default is a sysctl.
        socket.set_only_v6(v6_only)?;
    }
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(1024)?;
    TcpListener::from_std(socket.into())
}

async fn stopped(stop: &mut watch::Receiver<bool>) {
    // An error means that the sender is dropped, so no caller needs the server any more.
    let _ = stop.wait_for(|stop| *stop).await;
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpStream,
        time::timeout,
    };

    use prometheus_client::metrics::counter::Counter;

    use super::*;
    use crate::{
        model::Family,
        observe::{About, Health, Metrics, admin_router, health_router},
    };

    const LOCAL: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
    const LONG: Duration = Duration::from_secs(20);

    struct Running {
        address: SocketAddr,
        stop: watch::Sender<bool>,
        task: tokio::task::JoinHandle<()>,
    }

    fn about() -> About {
        let configuration = serde_json::json!({"mode": "auto"});
        About {
            proxy_mode: watch::channel("nftables").1,
            configuration,
            words: vec!["run".to_owned(), "--profiling".to_owned()],
        }
    }

    fn limit(most: usize) -> ConnectionLimit {
        ConnectionLimit::new(most, most, Counter::default())
    }

    async fn start(router: Router) -> Running {
        start_server(Server::new("test", LOCAL, true, limit(16)), router).await
    }

    async fn start_server(server: Server, router: Router) -> Running {
        let listener = server.listen().await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopping) = watch::channel(false);
        let task = tokio::spawn(async move { server.serve(listener, router, stopping).await });
        Running { address, stop, task }
    }

    /// The response to `GET path`: status line, headers, empty line, body.
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
        timeout(LONG, task).await.unwrap().unwrap();
        assert!(get(address, "/").await.is_err());
    }

    /// Connections that have sent half a request.
    async fn half_open(address: SocketAddr, count: usize) -> Vec<TcpStream> {
        let mut streams = Vec::new();
        for _ in 0..count {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(b"GET /healthz HTTP/1.1\r\nHo").await.unwrap();
            streams.push(stream);
        }
        streams
    }

    /// Waits until the server has closed a connection.
    async fn closed(stream: &mut TcpStream) {
        let mut rest = Vec::new();
        // A reset closes it as well.
        let _ = timeout(LONG, stream.read_to_end(&mut rest)).await.expect("the server keeps the connection");
    }

    #[tokio::test]
    async fn connections_with_unfinished_requests_make_room_for_other_clients() {
        let server = Server::new("test", LOCAL, true, limit(4));
        let running = start_server(server, admin_router(&Metrics::new(), about())).await;
        let mut lazy = half_open(running.address, 20).await;
        for _ in 0..10 {
            let answer = timeout(LONG, get(running.address, "/healthz")).await.unwrap().unwrap();
            assert_eq!(body(&answer), "ok");
        }
        for stream in &mut lazy[..16] {
            closed(stream).await;
        }
    }

    #[tokio::test]
    async fn an_idle_connection_is_closed() {
        let patience = Duration::from_millis(20);
        let server = Server { patience, ..Server::new("test", LOCAL, true, limit(4)) };
        let running = start_server(server, admin_router(&Metrics::new(), about())).await;
        for stream in &mut half_open(running.address, 2).await {
            closed(stream).await;
        }
        closed(&mut TcpStream::connect(running.address).await.unwrap()).await;
    }

    #[tokio::test]
    async fn without_keep_alive_a_connection_has_one_response() {
        let server = Server::new("test", LOCAL, true, limit(4)).without_keep_alive();
        let running = start_server(server, admin_router(&Metrics::new(), about())).await;
        let mut stream = TcpStream::connect(running.address).await.unwrap();
        stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        timeout(LONG, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
        assert_eq!((body(&answer), header(&answer, "connection")), ("ok", Some("close")));
    }

    #[tokio::test]
    async fn p8_a_taken_port_is_tried_again_until_it_is_free() {
        let taken = TcpListener::bind(LOCAL).await.unwrap();
        let address = taken.local_addr().unwrap();
        let (stop, stopping) = watch::channel(false);
        let retry = Duration::from_millis(5);
        let server = Server { retry, ..Server::new("healthz", address, false, limit(16)) };
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
        let of = |address: IpAddr, port| {
            Server::new("test", (address, port).into(), true, limit(1)).of_one_family()
        };
        let (v4, v6) = (IpAddr::from(Ipv4Addr::UNSPECIFIED), IpAddr::from(Ipv6Addr::UNSPECIFIED));
        let first = of(v6, 0).listen().await.unwrap();
        let port = first.local_addr().unwrap().port();
        let second = of(v4, port).listen().await.unwrap();
        drop(first);
        of(v6, port).listen().await.unwrap();
        drop(second);
    }

    #[tokio::test]
    async fn an_unspecified_address_of_either_family_is_every_address() {
        for wildcard in [IpAddr::from(Ipv4Addr::UNSPECIFIED), Ipv6Addr::UNSPECIFIED.into()] {
            let server = Server::new("test", (wildcard, 0).into(), true, limit(16));
            let running = start_server(server, admin_router(&Metrics::new(), about())).await;
            let port = running.address.port();
            for client in [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()] {
                let answer = get((client, port).into(), "/healthz").await;
                let answer = answer.unwrap_or_else(|error| panic!("{client} at {wildcard}: {error}"));
                assert_eq!(body(&answer), "ok", "{client} at {wildcard}");
            }
        }
    }

    #[tokio::test]
    async fn an_address_of_one_family_leaves_the_other_alone() {
        for (address, other) in [
            ("0.0.0.0:0", "[::1]"),
            ("127.0.0.1:0", "[::1]"),
            ("[::]:0", "127.0.0.1"),
            ("[::1]:0", "127.0.0.1"),
        ] {
            let server = Server::new("test", address.parse().unwrap(), true, limit(16)).of_one_family();
            let port = server.listen().await.unwrap().local_addr().unwrap().port();
            assert!(get(format!("{other}:{port}").parse().unwrap(), "/").await.is_err(), "{address}");
        }
    }

    #[tokio::test]
    async fn p8_a_taken_port_is_fatal_with_hard_fail() {
        let taken = TcpListener::bind(LOCAL).await.unwrap();
        let address = taken.local_addr().unwrap();
        let (_stop, stopping) = watch::channel(false);
        let error =
            Server::new("metrics", address, true, limit(1)).run(Router::new(), stopping).await.unwrap_err();
        assert_eq!(error.to_string(), format!("the metrics server cannot serve on {address}"));
        assert_eq!(error.source.kind(), io::ErrorKind::AddrInUse);
    }
}
