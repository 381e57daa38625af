//! Endpoints: one pod has all addresses of some networks, and answers with the one at which a client reached it.
//!
//! In: a namespace. Out: servers by TCP and UDP on [`TARGET`](super::cluster::TARGET), for as long as the process lives.

use std::{
    io::{IoSlice, IoSliceMut},
    net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6},
    os::fd::AsRawFd as _,
};

use anyhow::{Context as _, Result};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrIn6, recvmsg, sendmsg, setsockopt, sockopt,
};
use socket2::{Domain, Socket, Type};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream},
};
use weir_tests::{netns::Namespace, traffic::Answer};

use super::cluster::TARGET;

/// Starts them; they listen once this returns.
pub(crate) fn start(namespace: &Namespace) -> Result<()> {
    // No device has these addresses: a route makes them this host's.
    namespace.sysctl("net/ipv6/ip_nonlocal_bind", "1")?;
    let (streams, datagrams) = namespace.run(|| -> Result<_> {
        let streams = bound(Type::STREAM)?;
        streams.listen(1024)?;
        streams.set_nonblocking(true)?;
        let datagrams = bound(Type::DGRAM)?;
        setsockopt(&datagrams, sockopt::Ipv6RecvPacketInfo, &true)?;
        Ok((streams, datagrams))
    })?;
    namespace.thread(move || accept(streams.into()))?;
    namespace.thread(move || answer_datagrams(&datagrams))?;
    Ok(())
}

/// On all addresses of both families.
fn bound(kind: Type) -> Result<Socket> {
    let socket = Socket::new(Domain::IPV6, kind, None)?;
    socket.set_only_v6(false)?;
    socket.set_reuse_address(true)?;
    let any = SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, TARGET, 0, 0);
    socket.bind(&SocketAddr::from(any).into()).context("listening for the endpoints")?;
    Ok(socket)
}

fn answer(own: IpAddr, client: SocketAddr) -> Vec<u8> {
    let answer = Answer { backend: own.to_canonical().to_string(), client };
    let mut line = serde_json::to_vec(&answer).unwrap_or_default();
    line.push(b'\n');
    line
}

fn accept(listener: std::net::TcpListener) {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
    runtime.block_on(async {
        let Ok(listener) = TcpListener::from_std(listener) else { return };
        loop {
            if let Ok((stream, client)) = listener.accept().await {
                tokio::spawn(answer_lines(stream, client));
            }
        }
    });
}

async fn answer_lines(stream: TcpStream, client: SocketAddr) {
    let Ok(own) = stream.local_addr() else { return };
    let (read, mut write) = stream.into_split();
    let mut lines = BufReader::new(read).lines();
    while let Ok(Some(_)) = lines.next_line().await {
        if write.write_all(&answer(own.ip(), client)).await.is_err() {
            return;
        }
    }
}

/// The answer leaves from the address that was asked, which the kernel reports with the question.
fn answer_datagrams(socket: &Socket) {
    let mut question = [0; 64];
    let mut room = nix::cmsg_space!(nix::libc::in6_pktinfo);
    loop {
        let mut parts = [IoSliceMut::new(&mut question)];
        let received =
            recvmsg::<SockaddrIn6>(socket.as_raw_fd(), &mut parts, Some(&mut room), MsgFlags::empty());
        let Ok(message) = received else { continue };
        let Some(client) = message.address else { continue };
        let told = message.cmsgs().into_iter().flatten().find_map(|control| match control {
            ControlMessageOwned::Ipv6PacketInfo(info) => Some(info),
            _ => None,
        });
        let Some(info) = told else { continue };
        let own = IpAddr::from(info.ipi6_addr.s6_addr);
        let from = nix::libc::in6_pktinfo { ipi6_ifindex: 0, ..info };
        let answer = answer(own, SocketAddrV6::from(client).into());
        // The client may be gone.
        let _ = sendmsg(
            socket.as_raw_fd(),
            &[IoSlice::new(&answer)],
            &[ControlMessage::Ipv6PacketInfo(&from)],
            MsgFlags::empty(),
            Some(&client),
        );
    }
}
