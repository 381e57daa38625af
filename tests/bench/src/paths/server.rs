//! The servers of one topology: they send back what they get, a message at a time. The suites' servers name themselves in JSON, on
//! whatever core is free, which would be most of a figure.
//!
//! In: a namespace that has the endpoints' addresses. Out: threads that live as long as the process, and iperf3. A lone client's servers all run on that client's core, one
//! thread each; many clients share [`WORKERS`] threads, spread over all cores as the clients are.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket},
    sync::Arc,
};

use socket2::{Domain, Socket, Type};
use weir::model::Family;

use super::{
    MESSAGE,
    client::{spread, stay},
    iperf,
    topology::{BULK, Endpoints, LONE, SHARED, STRAIGHT},
};
use weir_tests::netns::Namespace;

/// Threads that serve many clients: one for each, so that a kept connection blocks no other client.
pub(super) const WORKERS: usize = 16;

/// Starts the servers of endpoints. The processes among them end when what is returned is dropped.
pub(super) fn start(pod: &Namespace, endpoints: Endpoints) -> anyhow::Result<Vec<iperf::Server>> {
    for port in [LONE, LONE + STRAIGHT] {
        Family::ALL.into_iter().try_for_each(|family| start_lone(pod, endpoints, family, port))?;
    }
    [SHARED, SHARED + STRAIGHT].into_iter().try_for_each(|port| start_shared(pod, port))?;
    Family::ALL
        .into_iter()
        .map(|family| iperf::Server::start(pod, SocketAddr::new(endpoints.addresses(family)[0], BULK)))
        .collect()
}

fn start_lone(pod: &Namespace, endpoints: Endpoints, family: Family, port: u16) -> anyhow::Result<()> {
    // Without a connection the answer has to come from the address that was asked.
    for address in endpoints.addresses(family) {
        let socket = pod.run(|| UdpSocket::bind((address, port)))?;
        pod.thread(move || {
            stay();
            echo_datagrams(&socket);
        })?;
    }
    let listener = listen(pod, family, port)?;
    pod.thread(move || {
        stay();
        echo(&listener);
    })?;
    Ok(())
}

fn start_shared(pod: &Namespace, port: u16) -> anyhow::Result<()> {
    let listener = Arc::new(listen(pod, Family::V4, port)?);
    for worker in 0..WORKERS {
        let listener = Arc::clone(&listener);
        pod.thread(move || {
            spread(worker);
            echo(&listener);
        })?;
    }
    Ok(())
}

fn listen(pod: &Namespace, family: Family, port: u16) -> anyhow::Result<TcpListener> {
    let any = match family {
        Family::V4 => IpAddr::from(Ipv4Addr::UNSPECIFIED),
        Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
    };
    let address = SocketAddr::new(any, port);
    let socket = pod.run(|| Socket::new(Domain::for_address(address), Type::STREAM, None))?;
    if family == Family::V6 {
        socket.set_only_v6(true)?;
    }
    socket.bind(&address.into())?;
    socket.listen(1024)?;
    Ok(socket.into())
}

/// One connection after the other, each to its end.
fn echo(listener: &TcpListener) {
    let mut message = [0; MESSAGE];
    for stream in listener.incoming() {
        // One that was reset meanwhile is the client's to count.
        let Ok(mut stream) = stream else { continue };
        while stream.read_exact(&mut message).and_then(|()| stream.write_all(&message)).is_ok() {}
    }
}

fn echo_datagrams(socket: &UdpSocket) {
    let mut message = [0; MESSAGE];
    loop {
        if let Ok((length, from)) = socket.recv_from(&mut message) {
            // A client that is gone needs no answer.
            let _ = socket.send_to(&message[..length], from);
        }
    }
}
