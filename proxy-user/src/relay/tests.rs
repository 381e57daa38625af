//! Clients, relay and backends on loopback addresses of this machine.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use prometheus_client::metrics::counter::Counter;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, UdpSocket},
    task::JoinHandle,
    time::timeout,
};

use super::{node_ports::Backends, *};
use crate::{
    connection_limit::ConnectionLimit,
    model::{Family, Protocol},
};

const LOOPBACK: [&str; 2] = ["127.0.0.1", "::1"];
const PATIENCE: Duration = Duration::from_secs(30);

fn backends(addresses: &[SocketAddr]) -> Backends {
    Backends { addresses: addresses.into(), affinity: None }
}

fn any(address: &str) -> SocketAddr {
    SocketAddr::new(address.parse::<IpAddr>().unwrap(), 0)
}

fn port(number: u16) -> LoopbackPort {
    LoopbackPort { family: Family::V4, protocol: Protocol::Tcp, number }
}

/// A relay to these backends, until the task is aborted.
fn streams(
    address: &str,
    backends: Backends,
    key: LoopbackPort,
    limit: &ConnectionLimit<LoopbackPort>,
) -> (SocketAddr, JoinHandle<()>) {
    let streams = Streams::bind(any(address)).unwrap();
    let at = streams.address().unwrap();
    let (picker, limit) = (Arc::new(Picker::new(backends)), limit.clone());
    (at, tokio::spawn(async move { match relay_streams(streams, key, picker, limit).await {} }))
}

fn room(most: usize, each: usize) -> (ConnectionLimit<LoopbackPort>, Counter) {
    let refused = Counter::default();
    (ConnectionLimit::new(most, each, refused.clone()), refused)
}

#[tokio::test]
async fn each_direction_of_a_connection_ends_by_itself() {
    for address in LOOPBACK {
        let backend = TcpListener::bind(any(address)).await.unwrap();
        let (at, _relay) =
            streams(address, backends(&[backend.local_addr().unwrap()]), port(1), &room(8, 8).0);
        let mut client = TcpStream::connect(at).await.unwrap();
        let question = vec![7; 1 << 20];
        let asked = async {
            client.write_all(&question).await.unwrap();
            client.shutdown().await.unwrap();
            let mut answer = Vec::new();
            client.read_to_end(&mut answer).await.unwrap();
            answer
        };
        let answered = async {
            let (mut server, _) = backend.accept().await.unwrap();
            let mut heard = Vec::new();
            server.read_to_end(&mut heard).await.unwrap();
            // The client has closed its direction, and the other direction still works.
            server.write_all(b"so many: ").await.unwrap();
            server.write_all(heard.len().to_string().as_bytes()).await.unwrap();
        };
        let (answer, ()) = timeout(PATIENCE, async { tokio::join!(asked, answered) }).await.unwrap();
        assert_eq!(String::from_utf8(answer).unwrap(), "so many: 1048576");
    }
}

#[tokio::test]
async fn a_failure_at_the_backend_is_a_reset_to_the_client() {
    let gone = TcpListener::bind(any("127.0.0.1")).await.unwrap().local_addr().unwrap();
    let (at, _relay) = streams("127.0.0.1", backends(&[gone]), port(1), &room(8, 8).0);
    let mut client = TcpStream::connect(at).await.unwrap();
    let read = timeout(PATIENCE, client.read(&mut [0; 8])).await.unwrap();
    assert_eq!(read.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset, "not an empty answer");
}

#[tokio::test]
async fn a_node_port_with_many_clients_takes_nothing_from_other_node_ports() {
    let backend = TcpListener::bind(any("127.0.0.1")).await.unwrap();
    let to = backends(&[backend.local_addr().unwrap()]);
    let (limit, refused) = room(16, 4);
    let (modest, _first) = streams("127.0.0.1", to.clone(), port(1), &limit);
    let (crowded, _second) = streams("127.0.0.1", to, port(2), &limit);
    let mut served = Vec::new();
    let mut connect = async |at| {
        let client = TcpStream::connect(at).await.unwrap();
        served.push(timeout(PATIENCE, backend.accept()).await.unwrap().unwrap().0);
        client
    };
    let mut kept = connect(modest).await;
    let mut crowd = Vec::new();
    for _ in 0..32 {
        crowd.push(connect(crowded).await);
    }
    assert_eq!(refused.get(), 28, "each client beyond the fourth closed an earlier one");
    let last = served.last_mut().unwrap();
    last.write_all(b"x").await.unwrap();
    timeout(PATIENCE, crowd.last_mut().unwrap().read_exact(&mut [0])).await.unwrap().unwrap();
    served[0].write_all(b"x").await.unwrap();
    timeout(PATIENCE, kept.read_exact(&mut [0])).await.unwrap().unwrap();
    let first = timeout(PATIENCE, crowd[0].read(&mut [0])).await.unwrap();
    assert_eq!(first.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
}

/// Answers each datagram with a name.
async fn named(address: &str, name: &'static str) -> SocketAddr {
    let socket = UdpSocket::bind(any(address)).await.unwrap();
    let at = socket.local_addr().unwrap();
    tokio::spawn(async move {
        let mut buffer = [0; 16];
        while let Ok((_, from)) = socket.recv_from(&mut buffer).await {
            let _ = socket.send_to(name.as_bytes(), from).await;
        }
    });
    at
}

async fn ask(client: &UdpSocket) -> String {
    client.send(b"name?").await.unwrap();
    let mut buffer = [0; 16];
    let length = timeout(PATIENCE, client.recv(&mut buffer)).await.unwrap().unwrap();
    String::from_utf8_lossy(&buffer[..length]).into_owned()
}

#[tokio::test]
async fn a_datagram_client_stays_with_its_backend_until_it_leaves() {
    for address in LOOPBACK {
        let servers = [named(address, "first").await, named(address, "second").await];
        let datagrams = Datagrams::bind(any(address)).unwrap();
        let at = datagrams.address().unwrap();
        let (picker, limit) = (Arc::new(Picker::new(backends(&servers))), room(64, 64).0);
        let relay = tokio::spawn(relay_datagrams(datagrams, port(1), Arc::clone(&picker), limit));
        let client = UdpSocket::bind(any(address)).await.unwrap();
        // A connected socket receives only from its peer.
        client.connect(at).await.unwrap();
        let first = ask(&client).await;
        for _ in 0..20 {
            assert_eq!(ask(&client).await, first);
        }
        let other = if first == "first" { servers[1] } else { servers[0] };
        picker.set(&backends(&[other]));
        for _ in 0..20 {
            assert_ne!(ask(&client).await, first);
        }
        relay.abort();
    }
}

#[tokio::test]
async fn datagram_clients_beyond_the_limit_replace_the_client_that_was_idle_longest() {
    let backend = named("127.0.0.1", "it").await;
    let datagrams = Datagrams::bind(any("127.0.0.1")).unwrap();
    let at = datagrams.address().unwrap();
    let (limit, refused) = room(4, 4);
    let picker = Arc::new(Picker::new(backends(&[backend])));
    let _relay = tokio::spawn(relay_datagrams(datagrams, port(1), picker, limit));
    for _ in 0..32 {
        let client = UdpSocket::bind(any("127.0.0.1")).await.unwrap();
        client.connect(at).await.unwrap();
        assert_eq!(ask(&client).await, "it");
    }
    assert_eq!(refused.get(), 28);
}
