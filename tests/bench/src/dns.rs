//! Names: weir's answers beside CoreDNS's, both reading one API server.
//!
//! In: how long and how often. Out: queries a second and for each second of processor time, times of single queries, the
//! time to the first answer after a change, and what endpoints cost in memory. Both are asked over loopback in one
//! namespace, in turn, so that whatever else the machine does meets both.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use hickory_proto::rr::RecordType;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use weir::model::{Kind, Object};

use weir_tests::{
    assets,
    control_plane::ControlPlane,
    names::{Asker, query},
    netns::Namespace,
    objects::NAMESPACE,
};

use super::{metered::Metered, report::say};

/// Services with a ClusterIP, and headless ones, that are asked for.
const SERVICES: u8 = 200;
/// Queries under way at once while as many as possible are answered.
const WINDOW: usize = 64;
/// Endpoints that are added for the memory they take, and how many of them a slice has.
const ENDPOINTS: usize = 10_000;
const IN_A_SLICE: usize = 100;
/// An address that the API server can announce, which it wants, and never those of loopback.
const API_SERVER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 53);
/// How long anything may take to show.
const PATIENCE: Duration = Duration::from_secs(120);

#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    /// The number of turns of each server.
    pub(super) rounds: u32,
    /// How long a turn is.
    pub(super) turn: Duration,
    /// Changes; of each the first answer is waited for.
    pub(super) changes: u32,
}

/// The measurements of one server.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Seen {
    pub server: String,
    /// Queries a second, one figure for each turn.
    pub rate: Vec<f64>,
    /// Queries for each second of processor time.
    pub rate_by_core: Vec<f64>,
    /// Seconds of single queries, one after the other.
    pub alone: Vec<f64>,
    /// Seconds from the API server's answer to a change until the first answer with the change.
    pub change: Vec<f64>,
    /// Bytes of memory that the endpoints added.
    pub memory: Option<i64>,
}

struct Server {
    name: &'static str,
    address: IpAddr,
    process: Metered,
}

/// Measures both servers in turn.
pub(super) fn run(plan: &Plan) -> Result<Vec<Seen>> {
    let namespace = Namespace::new("names")?;
    namespace.ip(&[format!("addr add {API_SERVER}/32 dev lo")])?;
    let cluster = ControlPlane::start(&namespace, API_SERVER.into())?;
    let objects: Vec<Object> = (0..SERVICES).flat_map(objects).collect();
    cluster.apply(&objects.iter().collect::<Vec<_>>())?;
    let directory = tempfile::tempdir()?;
    let servers = start(&namespace, &cluster, directory.path())?;
    let mut seen: Vec<Seen> =
        servers.iter().map(|server| Seen { server: server.name.to_owned(), ..Seen::default() }).collect();
    for round in 0..plan.rounds {
        for (server, seen) in servers.iter().zip(&mut seen) {
            namespace.run(|| take_turn(server, plan.turn, seen))?;
            let rates = seen.rate.last().zip(seen.rate_by_core.last());
            say(format_args!("names, round {}: {} {rates:.0?} queries/s, /CPU s", round + 1, server.name));
        }
    }
    for number in 0..plan.changes {
        first_answers(&namespace, &cluster, &servers, number, &mut seen)?;
    }
    endpoints(&namespace, &cluster, &servers, &mut seen)?;
    seen.iter_mut().for_each(|seen| thin(&mut seen.alone));
    Ok(seen)
}

/// Leaves so many of the samples, spread evenly over all: tens of thousands would be most of the file.
fn thin(samples: &mut Vec<f64>) {
    const LEFT: usize = 1000;
    samples.sort_by(f64::total_cmp);
    let step = samples.len().div_ceil(LEFT).max(1);
    *samples = samples.iter().copied().step_by(step).collect();
}

fn service(name: &str, spec: &Value) -> Object {
    Object::Service(Box::new(read(&json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": name, "namespace": NAMESPACE }, "spec": spec,
    }))))
}

fn slice(name: &str, service: &str, endpoints: &Value) -> Object {
    let labels = json!({ "kubernetes.io/service-name": service, "service.kubernetes.io/headless": "" });
    Object::EndpointSlice(Box::new(read(&json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": { "name": name, "namespace": NAMESPACE, "labels": labels },
        "addressType": "IPv4", "ports": [{ "name": "http", "port": 80, "protocol": "TCP" }], "endpoints": endpoints,
    }))))
}

/// Reads a value of this file, which can always be read.
fn read<T: serde::de::DeserializeOwned + Default>(value: &Value) -> T {
    serde_json::from_value(value.clone()).unwrap_or_default()
}

/// A Service with a ClusterIP and a headless one with three endpoints.
fn objects(number: u8) -> [Object; 3] {
    let ports = json!([{ "name": "http", "port": 80 }]);
    let endpoints = (1..4).map(
        |last| json!({ "addresses": [format!("10.244.{number}.{last}")], "hostname": format!("e{last}") }),
    );
    let (web, db) = (format!("web-{number}"), format!("db-{number}"));
    [
        service(&web, &json!({ "clusterIP": format!("10.96.8.{number}"), "ports": ports.clone() })),
        service(&db, &json!({ "clusterIP": "None", "ports": ports })),
        slice(&db, &db, &Value::Array(endpoints.collect())),
    ]
}

/// CoreDNS is configured as kubeadm does it, which keeps the cluster's names out of the cache.
fn start(namespace: &Namespace, cluster: &ControlPlane<'_>, directory: &Path) -> Result<[Server; 2]> {
    let kubeconfig = cluster.kubeconfig()?;
    let corefile = directory.join("Corefile");
    let block = format!(
        ".:53 {{\n bind 127.0.0.2\n errors\n cache 30 {{\n disable success cluster.local\n disable denial cluster.local\n }}\n \
         loadbalance\n kubernetes cluster.local in-addr.arpa ip6.arpa {{\n \
         kubeconfig {}\n pods insecure\n fallthrough in-addr.arpa ip6.arpa\n ttl 30\n }}\n}}\n",
        kubeconfig.display()
    );
    std::fs::write(&corefile, block)?;
    let coredns = vec!["-conf".to_owned(), corefile.display().to_string()];
    let mut weir: Vec<String> =
        ["run", "--dns", "--proxy-mode=nftables", "--hostname-override=n", "--dns-rate=100000000"]
            .map(str::to_owned)
            .into();
    weir.push(format!("--kubeconfig={}", kubeconfig.display()));
    let launch = |name, program: &Path, arguments: &[String], address: &str| -> Result<Server> {
        let process = Metered::start(namespace, program, arguments, directory)?;
        Ok(Server { name, address: address.parse()?, process })
    };
    let mut servers = [
        launch("weir", &assets::weir()?, &weir, "169.254.20.53")?,
        launch("CoreDNS", &assets::kubernetes("coredns")?, &coredns, "127.0.0.2")?,
    ];
    let last = format!("db-{}.default.svc.cluster.local.", SERVICES - 1);
    for server in &mut servers {
        let address = server.address;
        await_that(&format!("{} answers", server.name), || {
            server.process.check()?;
            Ok(namespace.run(|| found(address, &last)) == 3)
        })?;
    }
    Ok(servers)
}

fn await_that(what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !holds()? {
        ensure!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// How many addresses a name has, none without an answer.
fn found(server: IpAddr, name: &str) -> usize {
    let ask = || Asker::new(server, false)?.ask(&query(name, RecordType::A, true)?);
    ask().map_or(0, |reply| reply.answers.len())
}

/// The bytes of all queries that are asked in turn.
fn questions() -> Result<Vec<Vec<u8>>> {
    let mut questions = Vec::new();
    for number in 0..SERVICES {
        for name in ["web", "db", "no"] {
            let name = format!("{name}-{number}.default.svc.cluster.local.");
            questions.push(query(&name, RecordType::A, true)?.to_vec()?);
        }
        let name = format!("_http._tcp.db-{number}.default.svc.cluster.local.");
        questions.push(query(&name, RecordType::SRV, true)?.to_vec()?);
    }
    Ok(questions)
}

fn take_turn(server: &Server, turn: Duration, seen: &mut Seen) -> Result<()> {
    let questions = questions()?;
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect(SocketAddr::new(server.address, 53))?;
    socket.set_read_timeout(Some(Duration::from_millis(200)))?;
    let mut buffer = [0; 4096];
    let (begin, cpu) = (Instant::now(), server.process.cpu()?);
    let (mut asked, mut answered) = (0, 0_u32);
    while begin.elapsed() < turn {
        for _ in 0..WINDOW {
            socket.send(&questions[asked % questions.len()])?;
            asked += 1;
        }
        for _ in 0..WINDOW {
            match socket.recv(&mut buffer) {
                Ok(_) => answered += 1,
                // Lost: the window starts anew.
                Err(_) => break,
            }
        }
    }
    let (took, used) = (begin.elapsed(), server.process.cpu()?.saturating_sub(cpu));
    seen.rate.push(f64::from(answered) / took.as_secs_f64());
    seen.rate_by_core.push(f64::from(answered) / used.as_secs_f64().max(1e-9));
    let begin = Instant::now();
    while begin.elapsed() < turn / 2 {
        let start = Instant::now();
        socket.send(&questions[asked % questions.len()])?;
        asked += 1;
        if socket.recv(&mut buffer).is_ok() {
            seen.alone.push(start.elapsed().as_secs_f64());
        }
    }
    Ok(())
}

/// Adds an endpoint, and lets a thread for each server ask until it is there.
fn first_answers(
    namespace: &Namespace,
    cluster: &ControlPlane<'_>,
    servers: &[Server],
    number: u32,
    seen: &mut [Seen],
) -> Result<()> {
    let endpoint = format!("new-{number}");
    let name = format!("{endpoint}.db-0.default.svc.cluster.local.");
    let more = slice(
        &endpoint,
        "db-0",
        &json!([{ "addresses": [format!("10.245.0.{}", number + 1)], "hostname": endpoint }]),
    );
    let stop = Arc::new(AtomicBool::new(false));
    let threads = servers.iter().map(|server| {
        let (address, name, stop) = (server.address, name.clone(), Arc::clone(&stop));
        namespace.thread(move || first_seen(address, &name, &stop))
    });
    let threads = threads.collect::<Result<Vec<_>>>()?;
    cluster.apply(&[&more])?;
    let written = Instant::now();
    await_that("both answer with the change", || {
        Ok(threads.iter().all(std::thread::JoinHandle::is_finished))
    })
    .inspect_err(|_| stop.store(true, Ordering::Relaxed))?;
    for (thread, seen) in threads.into_iter().zip(seen) {
        let Ok(Some(at)) = thread.join() else { bail!("a change was not seen") };
        seen.change.push(at.saturating_duration_since(written).as_secs_f64());
    }
    Ok(())
}

fn first_seen(server: IpAddr, name: &str, stop: &AtomicBool) -> Option<Instant> {
    let asker = Asker::new(server, true).ok()?;
    let question = query(name, RecordType::A, true).ok()?;
    while !stop.load(Ordering::Relaxed) {
        if asker.ask(&question).is_ok_and(|reply| !reply.answers.is_empty()) {
            return Some(Instant::now());
        }
        std::thread::sleep(Duration::from_micros(500));
    }
    None
}

/// Adds endpoints of one headless Service and looks what that costs.
fn endpoints(
    namespace: &Namespace,
    cluster: &ControlPlane<'_>,
    servers: &[Server],
    seen: &mut [Seen],
) -> Result<()> {
    let resident = |server: &Server| i64::try_from(server.process.memory().resident).context("memory");
    let before = servers.iter().map(resident).collect::<Result<Vec<_>>>()?;
    let slices: Vec<Object> = (0..ENDPOINTS / IN_A_SLICE)
        .map(|number| {
            let endpoints = (0..IN_A_SLICE).map(|last| json!({ "addresses": [format!("10.{}.{}.{}", 100 + number / 200, number % 200, last)] }));
            slice(&format!("many-{number}"), "many", &Value::Array(endpoints.collect()))
        })
        .collect();
    let many = service("many", &json!({ "clusterIP": "None", "ports": [{ "name": "http", "port": 80 }] }));
    cluster.apply(&[&many])?;
    cluster.apply(&slices.iter().collect::<Vec<_>>())?;
    let last = ENDPOINTS / IN_A_SLICE - 1;
    let name = format!("10-100-{last}-{}.many.default.svc.cluster.local.", IN_A_SLICE - 1);
    for (server, (before, seen)) in servers.iter().zip(before.into_iter().zip(seen)) {
        await_that("all endpoints are known", || Ok(namespace.run(|| found(server.address, &name)) == 1))?;
        seen.memory = Some(resident(server)? - before);
    }
    let names: Vec<_> = (0..=last).map(|number| (Kind::EndpointSlice, format!("many-{number}"))).collect();
    cluster.delete(&names)
}
