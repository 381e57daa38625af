//! The healthCheckNodePort servers (H1 to H6), which tell load balancers whether this node has endpoints of a Service.
//!
//! In: for each Service with such a port, how many local endpoints are in force. Out: HTTP servers, which open, close
//! and move as Services change.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use axum::{
    Router,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use tokio::sync::{mpsc, watch};

use super::{Events, Health, Server, Trouble};
use crate::{
    connection_limit::ConnectionLimit,
    model::{Family, ObjectName, Uid},
};

/// The health check of one Service, as it is in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthCheckState {
    /// The healthCheckNodePort (H1).
    pub port: u16,
    /// Distinct addresses of local ready endpoints (H2).
    pub local_endpoints: usize,
    /// The addresses that the server listens on (H3).
    pub addresses: Vec<IpAddr>,
    /// The Service's uid, for events about it.
    pub uid: Option<Uid>,
}

/// Sends changes to the task that runs the servers.
#[derive(Clone, Debug)]
pub struct HealthChecks(mpsc::UnboundedSender<(ObjectName, Option<HealthCheckState>)>);

impl HealthChecks {
    /// Starts the task, without servers. Each server answers 200 only while `health` is healthy (H4), and all servers
    /// end with `stopping`. A server that cannot listen reports to `events` (H6). The servers share `limit`, because
    /// clients from outside reach all of them.
    #[must_use]
    pub fn start(
        health: Health,
        events: Events,
        limit: ConnectionLimit,
        stopping: watch::Receiver<bool>,
    ) -> Self {
        let (sender, mut receiver) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            let mut open: HashMap<ObjectName, Open> = HashMap::new();
            while let Some((service, state)) = receiver.recv().await {
                change(&mut open, service, state, &health, &events, &limit, &stopping);
            }
        });
        Self(sender)
    }

    /// Without servers: a test receives the changes.
    #[cfg(test)]
    pub(crate) fn channel() -> (Self, mpsc::UnboundedReceiver<(ObjectName, Option<HealthCheckState>)>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (Self(sender), receiver)
    }

    /// Sets or removes the health check of a Service.
    pub fn set(&self, service: ObjectName, state: Option<HealthCheckState>) {
        // An error means that the task has ended, because the agent ends.
        let _ = self.0.send((service, state));
    }

    /// The unspecified address of a family, which stands for all addresses of this host.
    #[must_use]
    pub const fn anywhere(family: Family) -> IpAddr {
        match family {
            Family::V4 => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            Family::V6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        }
    }
}

/// The servers of one Service.
struct Open {
    port: u16,
    addresses: Vec<IpAddr>,
    local_endpoints: Arc<AtomicUsize>,
    /// Closing it ends the servers.
    _stop: watch::Sender<bool>,
}

fn change(
    open: &mut HashMap<ObjectName, Open>,
    service: ObjectName,
    state: Option<HealthCheckState>,
    health: &Health,
    events: &Events,
    limit: &ConnectionLimit,
    stopping: &watch::Receiver<bool>,
) {
    let Some(HealthCheckState { port, local_endpoints, addresses, uid }) = state else {
        open.remove(&service);
        return;
    };
    let same = open.get(&service).filter(|open| open.port == port && open.addresses == addresses);
    if let Some(open) = same {
        open.local_endpoints.store(local_endpoints, Ordering::Relaxed);
        return;
    }
    open.remove(&service);
    if *stopping.borrow() {
        return;
    }
    let local_endpoints = Arc::new(AtomicUsize::new(local_endpoints));
    let (stop, stopped) = watch::channel(false);
    let answer = Answering {
        service: service.clone(),
        local_endpoints: Arc::clone(&local_endpoints),
        health: health.clone(),
    };
    for address in &addresses {
        let address = SocketAddr::new(*address, port);
        let server = Server::new("healthCheckNodePort", address, false, limit.clone())
            .of_one_family()
            .without_keep_alive();
        let report = unable_to_listen(events.clone(), service.clone(), uid, server.address);
        tokio::spawn(server.run_and_report(router(answer.clone()), stopped.clone(), report));
    }
    open.insert(service, Open { port, addresses, local_endpoints, _stop: stop });
}

/// Reports that a Service's server cannot listen (H6).
fn unable_to_listen(
    events: Events,
    service: ObjectName,
    uid: Option<Uid>,
    address: SocketAddr,
) -> impl Fn(&io::Error) {
    move |error| {
        let note = format!("cannot listen on {address} for the healthCheckNodePort: {error}");
        let trouble = Trouble::of_service(service.clone(), "FailedToStartServiceHealthcheck", "Listen", note);
        events.report(trouble.with_uid(uid).of_this_node_alone());
    }
}

#[derive(Clone)]
struct Answering {
    service: ObjectName,
    local_endpoints: Arc<AtomicUsize>,
    health: Health,
}

/// Answers any path and method alike (H3).
fn router(answering: Answering) -> Router {
    Router::new().fallback(move || std::future::ready(answering.respond()))
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Body<'a> {
    service: Named<'a>,
    local_endpoints: usize,
    service_proxy_healthy: bool,
}

#[derive(Serialize)]
struct Named<'a> {
    namespace: &'a str,
    name: &'a str,
}

impl Answering {
    fn respond(&self) -> Response {
        let local_endpoints = self.local_endpoints.load(Ordering::Relaxed);
        let service_proxy_healthy = self.health.healthy();
        let ok = local_endpoints > 0 && service_proxy_healthy;
        let code = if ok { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        let service = Named { namespace: self.service.namespace(), name: self.service.name() };
        let body = Body { service, local_endpoints, service_proxy_healthy };
        let mut text = Vec::new();
        let mut writer = serde_json::Serializer::with_formatter(
            &mut text,
            serde_json::ser::PrettyFormatter::with_indent(b"\t"),
        );
        if let Err(error) = body.serialize(&mut writer) {
            return (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response();
        }
        let headers = [
            (header::CONTENT_TYPE.as_str(), "application/json".to_owned()),
            (header::X_CONTENT_TYPE_OPTIONS.as_str(), "nosniff".to_owned()),
            ("X-Load-Balancing-Endpoint-Weight", local_endpoints.to_string()),
        ];
        (code, headers, text).into_response()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::{TcpListener, TcpStream},
    };

    use super::*;
    use crate::observe::{Metrics, Subject};

    const LOCALHOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    fn limit() -> ConnectionLimit {
        ConnectionLimit::new(16, 16, prometheus_client::metrics::counter::Counter::default())
    }

    /// A port that no process listens on, unless one takes it in between.
    async fn free_port() -> u16 {
        TcpListener::bind((LOCALHOST, 0)).await.unwrap().local_addr().unwrap().port()
    }

    async fn ask(port: u16) -> Option<String> {
        let mut stream = TcpStream::connect((LOCALHOST, port)).await.ok()?;
        stream.write_all(b"POST /whatever HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.ok()?;
        Some(answer)
    }

    async fn until(port: u16, wanted: impl Fn(Option<&str>) -> bool) -> Option<String> {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
        loop {
            let answer = ask(port).await;
            if wanted(answer.as_deref()) {
                return answer;
            }
            assert!(tokio::time::Instant::now() < deadline, "last answer: {answer:?}");
            tokio::task::yield_now().await;
        }
    }

    fn state(port: u16, local_endpoints: usize) -> Option<HealthCheckState> {
        Some(HealthCheckState { port, local_endpoints, addresses: vec![LOCALHOST], uid: None })
    }

    #[tokio::test]
    async fn h3_h4_h5_h6_the_answer_follows_what_is_in_force() {
        let (_stop, stopping) = watch::channel(false);
        let checks =
            HealthChecks::start(Health::new(Duration::from_secs(30)), Events::logged(), limit(), stopping);
        let service = ObjectName::new("shop", "cart");
        let first = free_port().await;

        checks.set(service.clone(), state(first, 2));
        let answer = until(first, |answer| answer.is_some()).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        let lower = answer.to_ascii_lowercase();
        for line in [
            "content-type: application/json\r\n",
            "x-content-type-options: nosniff\r\n",
            "x-load-balancing-endpoint-weight: 2\r\n",
        ] {
            assert!(lower.contains(line), "{answer}");
        }
        let body = "{\n\t\"service\": {\n\t\t\"namespace\": \"shop\",\n\t\t\"name\": \"cart\"\n\t},\n\
                    \t\"localEndpoints\": 2,\n\t\"serviceProxyHealthy\": true\n}";
        assert!(answer.ends_with(body), "{answer}");

        checks.set(service.clone(), state(first, 0));
        let unavailable =
            |answer: Option<&str>| answer.is_some_and(|answer| answer.starts_with("HTTP/1.1 503 "));
        let answer = until(first, unavailable).await.unwrap();
        assert!(answer.to_ascii_lowercase().contains("x-load-balancing-endpoint-weight: 0\r\n"), "{answer}");

        let second = free_port().await;
        checks.set(service.clone(), state(second, 1));
        until(second, |answer| answer.is_some_and(|answer| answer.starts_with("HTTP/1.1 200 "))).await;
        until(first, |answer| answer.is_none()).await;

        checks.set(service, None);
        until(second, |answer| answer.is_none()).await;
    }

    #[tokio::test]
    async fn h6_a_taken_port_makes_an_event_about_the_service() {
        let (_stop, stopping) = watch::channel(false);
        let (events, mut troubles) = Events::channel(Metrics::new());
        let checks = HealthChecks::start(Health::new(Duration::from_secs(30)), events, limit(), stopping);
        let taken = TcpListener::bind((LOCALHOST, 0)).await.unwrap();
        let port = taken.local_addr().unwrap().port();
        checks.set(ObjectName::new("shop", "cart"), state(port, 1));
        let trouble = tokio::time::timeout(Duration::from_secs(20), troubles.recv()).await.unwrap().unwrap();
        assert_eq!(trouble.about, Subject::Service(ObjectName::new("shop", "cart")));
        assert_eq!((trouble.reason, trouble.action), ("FailedToStartServiceHealthcheck", "Listen"));
        let cause = io::Error::from_raw_os_error(libc::EADDRINUSE);
        assert_eq!(
            trouble.note,
            format!("cannot listen on 127.0.0.1:{port} for the healthCheckNodePort: {cause}")
        );
    }
}
