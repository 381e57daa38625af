//! The two requests of sock_diag that closing needs: walk the sockets of a protocol and family with what our map holds
//! for them, and destroy some.
//!
//! In: the descriptor of the map, [`SocketId`]s. Out: sockets that are in the map.

use std::{
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    os::fd::{AsRawFd as _, BorrowedFd},
};

use netlink_packet_core::{
    DefaultNla, Emitable as _, NLA_F_NESTED, NLA_HEADER_SIZE, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST,
    NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer, NetlinkHeader, NlasIterator, Parseable as _,
};
use netlink_packet_sock_diag::{
    SOCK_DESTROY, SOCK_DIAG_BY_FAMILY,
    inet::{ExtensionFlags, InetRequest, InetResponseHeader, SocketId, StateFlags},
};
use netlink_sys::{Socket, SocketAddr as NetlinkAddress, protocols::NETLINK_SOCK_DIAG};
use proxy_ebpf::{Endpoint, Origin};

use crate::model::{Family, Protocol};

// Numbers of linux/inet_diag.h and linux/sock_diag.h that the message crate does not have.
const INET_DIAG_REQ_SK_BPF_STORAGES: u16 = 2;
const SK_DIAG_BPF_STORAGE_REQ_MAP_FD: u16 = 1;
const INET_DIAG_SK_BPF_STORAGES: u16 = 20;
const SK_DIAG_BPF_STORAGE: u16 = 1;
const SK_DIAG_BPF_STORAGE_MAP_VALUE: u16 = 3;

/// The fixed part of an answer, struct inet_diag_msg.
const ANSWER: usize = 72;

/// The kernel sends no larger datagram in a dump.
const DATAGRAM: usize = 32 * 1024;

/// So many sockets are destroyed with one system call: their answers fit into the socket's buffer.
const BATCH: usize = 64;

/// A cookie that stands for any.
const NO_COOKIE: [u8; 8] = [0xff; 8];

/// A socket that is in the map.
pub(super) struct Found {
    pub(super) origin: Origin,
    pub(super) peer: SocketAddr,
    pub(super) name: Name,
}

/// What names a socket to the kernel.
pub(super) struct Name {
    family: u8,
    protocol: Protocol,
    id: SocketId,
}

impl Name {
    /// Of whichever socket has these ends; one that listens has no peer.
    pub(super) fn between(protocol: Protocol, local: SocketAddr, peer: Option<SocketAddr>) -> Self {
        let none = if local.is_ipv4() { SocketId::new_v4() } else { SocketId::new_v6() };
        let id = SocketId {
            source_address: local.ip(),
            source_port: local.port(),
            destination_address: peer.map_or(none.destination_address, |peer| peer.ip()),
            destination_port: peer.map_or(0, |peer| peer.port()),
            cookie: NO_COOKIE,
            ..none
        };
        Self { family: number(Family::of(local.ip())), protocol, id }
    }
}

/// One netlink socket in the network namespace it was opened in.
pub(super) struct Channel {
    socket: Socket,
    buffer: Vec<u8>,
}

impl Channel {
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
        socket.bind_auto()?;
        socket.connect(&NetlinkAddress::new(0, 0))?;
        // An error then carries the header of the request only, which is not looked at.
        socket.set_cap_ack(true)?;
        Ok(Self { socket, buffer: Vec::with_capacity(DATAGRAM) })
    }

    /// Hands every connected socket that `map` holds something for to `visit`.
    pub(super) fn walk(
        &mut self,
        protocol: Protocol,
        family: Family,
        map: BorrowedFd<'_>,
        visit: impl FnMut(Found),
    ) -> io::Result<()> {
        self.walk_raw(protocol, family, map.as_raw_fd(), visit)
    }

    /// Whether the kernel knows how to tell what maps hold (Linux 5.6): one that does has to refuse this.
    pub(super) fn knows_storage(&mut self) -> io::Result<bool> {
        match self.walk_raw(Protocol::Udp, Family::V4, -1, |_| {}) {
            Ok(()) => Ok(false),
            Err(error) if error.raw_os_error() == Some(libc::EBADF) => Ok(true),
            Err(error) => Err(error),
        }
    }

    fn walk_raw(
        &mut self,
        protocol: Protocol,
        family: Family,
        map: i32,
        mut visit: impl FnMut(Found),
    ) -> io::Result<()> {
        let map = DefaultNla::new(SK_DIAG_BPF_STORAGE_REQ_MAP_FD, map.to_ne_bytes().to_vec());
        let mut value = vec![0; map.buffer_len()];
        map.emit(&mut value);
        let storages = DefaultNla::new(INET_DIAG_REQ_SK_BPF_STORAGES | NLA_F_NESTED, value);
        let id = if family == Family::V4 { SocketId::new_v4() } else { SocketId::new_v6() };
        let name = Name { family: number(family), protocol, id };
        let flags = NLM_F_REQUEST | NLM_F_DUMP;
        self.send(&message(SOCK_DIAG_BY_FAMILY, flags, &name, Some(&storages)))?;
        loop {
            self.receive()?;
            for message in messages(&self.buffer) {
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

    /// Destroys these sockets and says how many were still there.
    pub(super) fn destroy(&mut self, names: &[Name]) -> io::Result<u64> {
        let (mut destroyed, mut failed) = (0, None);
        for batch in names.chunks(BATCH) {
            let flags = NLM_F_REQUEST | NLM_F_ACK;
            let requests: Vec<u8> =
                batch.iter().flat_map(|name| message(SOCK_DESTROY, flags, name, None)).collect();
            self.send(&requests)?;
            let mut answers = 0;
            while answers < batch.len() {
                self.receive()?;
                for message in messages(&self.buffer).filter(|it| it.message_type() == NLMSG_ERROR) {
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

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        self.socket.send(bytes, 0).map(|_| ())
    }

    fn receive(&mut self) -> io::Result<()> {
        loop {
            self.buffer.clear();
            match self.socket.recv(&mut self.buffer, 0) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                received => return received.map(|_| ()),
            }
        }
    }
}

/// Whether the socket is not there any more, or another took its place.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESTALE))
}

const fn number(family: Family) -> u8 {
    match family {
        Family::V4 => netlink_packet_sock_diag::AF_INET,
        Family::V6 => netlink_packet_sock_diag::AF_INET6,
    }
}

/// A request about the sockets that `name` names. Only connected ones can have been led anywhere; that the states count
/// in a walk alone is the kernel's way.
fn message(kind: u16, flags: u16, name: &Name, more: Option<&DefaultNla>) -> Vec<u8> {
    let states = match name.protocol {
        Protocol::Tcp => {
            StateFlags::ESTABLISHED
                | StateFlags::SYN_SENT
                | StateFlags::FIN_WAIT1
                | StateFlags::FIN_WAIT2
                | StateFlags::CLOSE_WAIT
        }
        Protocol::Udp | Protocol::Sctp => StateFlags::ESTABLISHED,
    };
    let request = InetRequest {
        family: name.family,
        protocol: name.protocol.number(),
        extensions: ExtensionFlags::empty(),
        states,
        socket_id: name.id.clone(),
    };
    let mut header = NetlinkHeader::default();
    let (start, end) = (header.buffer_len(), header.buffer_len() + request.buffer_len());
    let length = end + more.map_or(0, DefaultNla::buffer_len);
    let mut bytes = vec![0; length];
    header.length = u32::try_from(length).unwrap_or(u32::MAX);
    (header.message_type, header.flags) = (kind, flags);
    header.emit(&mut bytes[..start]);
    request.emit(&mut bytes[start..end]);
    if let Some(attribute) = more {
        attribute.emit(&mut bytes[end..]);
    }
    bytes
}

/// The messages of one datagram.
fn messages(datagram: &[u8]) -> impl Iterator<Item = NetlinkBuffer<&[u8]>> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        let length = NetlinkBuffer::new_checked(rest).ok()?.length() as usize;
        let message = NetlinkBuffer::new_checked(rest.get(..length)?).ok()?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

/// What an error message, an acknowledgement or the end of a walk says: all three begin with a code.
fn answered(payload: &[u8]) -> io::Result<()> {
    let code = payload.first_chunk().map_or(-libc::EPROTO, |code| i32::from_ne_bytes(*code));
    if code < 0 { Err(io::Error::from_raw_os_error(-code)) } else { Ok(()) }
}

/// The socket in an answer; `None` when the map holds nothing for it.
fn decode(protocol: Protocol, payload: &[u8]) -> Option<Found> {
    let storages = attribute(payload.get(ANSWER..)?, INET_DIAG_SK_BPF_STORAGES)?;
    let value = attribute(attribute(storages, SK_DIAG_BPF_STORAGE)?, SK_DIAG_BPF_STORAGE_MAP_VALUE)?;
    let header = InetResponseHeader::parse(payload)
        .inspect_err(|error| tracing::debug!(%error, "unreadable socket"))
        .ok()?;
    let id = header.socket_id;
    let peer = SocketAddr::new(canonical(id.destination_address), id.destination_port);
    Some(Found { origin: origin(value)?, peer, name: Name { family: header.family, protocol, id } })
}

/// The value of the attribute of this kind.
fn attribute(attributes: &[u8], kind: u16) -> Option<&[u8]> {
    let mut known = NlasIterator::new(attributes).map_while(Result::ok);
    let found = known.find(|attribute| attribute.kind() == kind)?;
    let end = usize::from(found.length());
    found.into_inner().get(NLA_HEADER_SIZE..end)
}

fn canonical(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V6(address) => address.to_canonical(),
        IpAddr::V4(_) => address,
    }
}

/// A map value, in the order of [`Origin`]'s fields.
fn origin(bytes: &[u8]) -> Option<Origin> {
    if bytes.len() != size_of::<Origin>() {
        return None;
    }
    let (since, rest) = bytes.split_first_chunk()?;
    let (service, rest) = rest.split_first_chunk()?;
    let (backend, rest) = rest.split_first_chunk()?;
    Some(Origin {
        since: u64::from_ne_bytes(*since),
        service: endpoint(service)?,
        backend: endpoint(backend)?,
        protocol: u32::from_ne_bytes(*rest.first_chunk()?),
        zero: 0,
    })
}

fn endpoint(bytes: &[u8; size_of::<Endpoint>()]) -> Option<Endpoint> {
    let (address, rest) = bytes.split_first_chunk::<16>()?;
    let address = canonical(Ipv6Addr::from(*address).into());
    Some(Endpoint::new(address, u16::from_be_bytes(*rest.first_chunk()?)))
}
