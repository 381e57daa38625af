//! The two requests of sock_diag that weir uses: walk the sockets of a protocol and family, and destroy sockets.
//!
//! In: protocols and [`Name`]s. Out: sockets of the network namespace, with their cookies.

use std::{io, net::SocketAddr};

use netlink_packet_core::{
    Emitable as _, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NetlinkHeader,
    Parseable as _,
};
use netlink_packet_sock_diag::{
    SOCK_DESTROY, SOCK_DIAG_BY_FAMILY,
    inet::{ExtensionFlags, InetRequest, InetResponseHeader, SocketId, StateFlags},
};
use netlink_sys::protocols::NETLINK_SOCK_DIAG;

use crate::{
    model::{Family, Protocol},
    sys::netlink::{Channel, split},
};

/// Sockets that are destroyed with one system call. The kernel's responses must fit into the receive buffer.
const BATCH: usize = 64;

/// A socket of the kernel. A listening socket has an unspecified address as its peer.
pub(super) struct DiagSocket {
    /// The key of its entries in eBPF maps.
    pub(super) cookie: u64,
    /// Its local address and port.
    pub(super) own: SocketAddr,
    pub(super) peer: SocketAddr,
    pub(super) name: Name,
}

/// The sockets of a walk.
#[derive(Clone, Copy)]
pub(super) enum States {
    /// Sockets with a peer. Only these can be translated.
    Connected,
    /// Listening TCP sockets and UDP sockets without a peer.
    Waiting,
}

impl States {
    fn of(self, protocol: Protocol) -> StateFlags {
        match (self, protocol) {
            (Self::Connected, Protocol::Tcp) => {
                StateFlags::ESTABLISHED
                    | StateFlags::SYN_SENT
                    | StateFlags::FIN_WAIT1
                    | StateFlags::FIN_WAIT2
                    | StateFlags::CLOSE_WAIT
            }
            (Self::Connected, Protocol::Udp | Protocol::Sctp) => StateFlags::ESTABLISHED,
            (Self::Waiting, Protocol::Tcp) => StateFlags::LISTEN,
            (Self::Waiting, Protocol::Udp | Protocol::Sctp) => StateFlags::CLOSE,
        }
    }
}

/// Identifies a socket in a request.
pub(super) struct Name {
    family: u8,
    protocol: Protocol,
    id: SocketId,
}

impl Name {
    /// The name of a bound, unconnected socket of this process.
    pub(super) fn of(protocol: Protocol, socket: &socket2::Socket) -> io::Result<Self> {
        let local = socket.local_addr()?.as_socket().ok_or(io::ErrorKind::InvalidInput)?;
        let family = Family::of(local.ip());
        let cookie = socket.cookie()?;
        let (low, high) = (cookie as u32, (cookie >> 32) as u32);
        let mut id = unnamed(family);
        (id.source_address, id.source_port) = (local.ip(), local.port());
        id.cookie = [low.to_ne_bytes(), high.to_ne_bytes()].concat().try_into().unwrap_or_default();
        Ok(Self { family: number(family), protocol, id })
    }
}

/// Sends requests on a netlink socket of the network namespace in which it was opened.
pub(super) struct SockDiag(Channel);

impl SockDiag {
    pub(super) fn open() -> io::Result<Self> {
        Channel::open(NETLINK_SOCK_DIAG).map(Self)
    }

    /// Calls `visit` with every socket in one of these states.
    pub(super) fn walk(
        &mut self,
        protocol: Protocol,
        family: Family,
        states: States,
        mut visit: impl FnMut(DiagSocket),
    ) -> io::Result<()> {
        let name = Name { family: number(family), protocol, id: unnamed(family) };
        let flags = NLM_F_REQUEST | NLM_F_DUMP;
        self.0.send(&message(SOCK_DIAG_BY_FAMILY, flags, &name, states.of(protocol)))?;
        loop {
            for message in split(self.0.receive()?) {
                match message.message_type() {
                    NLMSG_DONE | NLMSG_ERROR => return answered(message.payload()),
                    SOCK_DIAG_BY_FAMILY => {
                        if let Some(found) = decode(protocol, message.payload()) {
                            visit(found);
                        }
                    }
                    _ => {}
                }
            }
        }
    }

    /// Destroys sockets and returns how many of them still existed.
    pub(super) fn destroy(&mut self, names: &[Name]) -> io::Result<u64> {
        let (mut destroyed, mut failed) = (0, None);
        for batch in names.chunks(BATCH) {
            let flags = NLM_F_REQUEST | NLM_F_ACK;
            let requests: Vec<u8> = batch
                .iter()
                .flat_map(|name| message(SOCK_DESTROY, flags, name, StateFlags::empty()))
                .collect();
            self.0.send(&requests)?;
            let mut answers = 0;
            while answers < batch.len() {
                for message in split(self.0.receive()?).filter(|it| it.message_type() == NLMSG_ERROR) {
                    answers += 1;
                    match answered(message.payload()) {
                        Ok(()) => destroyed += 1,
                        Err(error) if is_gone(&error) => {}
                        Err(error) => failed = Some(error),
                    }
                }
            }
        }
        failed.map_or(Ok(destroyed), Err)
    }
}

/// Whether the socket no longer exists, or another one has its addresses.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESTALE))
}

fn unnamed(family: Family) -> SocketId {
    match family {
        Family::V4 => SocketId::new_v4(),
        Family::V6 => SocketId::new_v6(),
    }
}

const fn number(family: Family) -> u8 {
    match family {
        Family::V4 => netlink_packet_sock_diag::AF_INET,
        Family::V6 => netlink_packet_sock_diag::AF_INET6,
    }
}

/// A request about the sockets that match `name`. The kernel uses `states` in a walk only.
fn message(kind: u16, flags: u16, name: &Name, states: StateFlags) -> Vec<u8> {
    let request = InetRequest {
        family: name.family,
        protocol: name.protocol.number(),
        extensions: ExtensionFlags::empty(),
        states,
        socket_id: name.id.clone(),
    };
    let mut header = NetlinkHeader::default();
    let start = header.buffer_len();
    let length = start + request.buffer_len();
    let mut bytes = vec![0; length];
    header.length = u32::try_from(length).unwrap_or(u32::MAX);
    (header.message_type, header.flags) = (kind, flags);
    header.emit(&mut bytes[..start]);
    request.emit(&mut bytes[start..]);
    bytes
}

/// The code at the start of an error message, an acknowledgement or the end of a walk, as a result.
fn answered(payload: &[u8]) -> io::Result<()> {
    let code = payload.first_chunk().map_or(-libc::EPROTO, |code| i32::from_ne_bytes(*code));
    if code < 0 { Err(io::Error::from_raw_os_error(-code)) } else { Ok(()) }
}

/// The socket in a response.
fn decode(protocol: Protocol, payload: &[u8]) -> Option<DiagSocket> {
    let header = InetResponseHeader::parse(payload)
        .inspect_err(|error| tracing::debug!(%error, "cannot parse a socket"))
        .ok()?;
    let id = header.socket_id;
    let peer = SocketAddr::new(id.destination_address.to_canonical(), id.destination_port);
    let own = SocketAddr::new(id.source_address.to_canonical(), id.source_port);
    // The cookie is two numbers, the low half first.
    let (low, high) = id.cookie.split_first_chunk()?;
    let (low, high) = (u32::from_ne_bytes(*low), u32::from_ne_bytes(*high.first_chunk()?));
    let cookie = u64::from(high) << 32 | u64::from(low);
    Some(DiagSocket { cookie, own, peer, name: Name { family: header.family, protocol, id } })
}
