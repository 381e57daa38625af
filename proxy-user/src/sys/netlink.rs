//! A netlink socket for the rooms that ask the kernel about flows, sockets and other people's rules.
//!
//! In: requests. Out: the kernel's datagrams, taken apart into messages.

use std::io;

use netlink_packet_core::{
    NetlinkBuffer, NetlinkDeserializable, NetlinkHeader, NetlinkMessage, NetlinkPayload, NetlinkSerializable,
};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
};
use netlink_sys::{Socket, SocketAddr};
use nix::sys::socket::{setsockopt, sockopt};

/// The kernel sends no larger datagram in a dump.
const DATAGRAM: usize = 64 * 1024;

/// One netlink socket in the network namespace it was opened in; requests on it follow one another.
pub(crate) struct Channel {
    socket: Socket,
    buffer: Vec<u8>,
}

impl Channel {
    /// Opens one to a part of the kernel, as `NETLINK_NETFILTER`.
    pub(crate) fn open(protocol: isize) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        // An error then carries the header of the request only; what else is in it is not looked at.
        socket.set_cap_ack(true)?;
        Ok(Self { socket, buffer: Vec::with_capacity(DATAGRAM) })
    }

    /// Makes room for requests of so many bytes that the kernel is to take at once.
    pub(crate) fn make_room(&self, bytes: usize) -> io::Result<()> {
        Ok(setsockopt(&self.socket, sockopt::SndBufForce, &(bytes + DATAGRAM))?)
    }

    /// Sends requests in one datagram.
    pub(crate) fn send(&self, requests: &[u8]) -> io::Result<()> {
        self.socket.send(requests, 0).map(|_| ())
    }

    /// Waits for the next datagram.
    pub(crate) fn receive(&mut self) -> io::Result<&[u8]> {
        self.take(0)
    }

    /// The next datagram, if there is one.
    pub(crate) fn receive_ready(&mut self) -> io::Result<Option<&[u8]>> {
        match self.take(libc::MSG_DONTWAIT) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            taken => taken.map(Some),
        }
    }

    fn take(&mut self, flags: libc::c_int) -> io::Result<&[u8]> {
        loop {
            self.buffer.clear();
            match self.socket.recv(&mut self.buffer, flags) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                received => return received.map(|_| self.buffer.as_slice()),
            }
        }
    }
}

/// The messages of one datagram, unread.
pub(crate) fn split(datagram: &[u8]) -> impl Iterator<Item = NetlinkBuffer<&[u8]>> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        let length = NetlinkBuffer::new_checked(rest).ok()?.length() as usize;
        let message = NetlinkBuffer::new_checked(rest.get(..length)?).ok()?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

/// The messages of one datagram. One that cannot be understood is left out.
pub(crate) fn messages<I: NetlinkDeserializable>(datagram: &[u8]) -> impl Iterator<Item = NetlinkMessage<I>> {
    let read = split(datagram).map(|message| NetlinkMessage::deserialize(message.into_inner()));
    read.filter_map(|message| {
        message.inspect_err(|error| tracing::debug!(%error, "cannot parse a message")).ok()
    })
}

/// A request to a subsystem of netfilter; 0 is that of the message itself.
pub(crate) fn netfilter(
    flags: u16,
    family: NetfilterProtoFamily,
    subsystem: u16,
    inner: impl Into<NetfilterMessageInner>,
) -> NetlinkMessage<NetfilterMessage> {
    let mut header = NetlinkHeader::default();
    header.flags = flags;
    let inner = NetfilterMessage::new(NetfilterHeader::new(family, 0, subsystem), inner);
    let mut message = NetlinkMessage::new(header, NetlinkPayload::from(inner));
    message.finalize();
    message
}

/// Requests as the kernel takes them, one behind the other.
pub(crate) fn serialize<I: NetlinkSerializable>(requests: &[NetlinkMessage<I>]) -> Vec<u8> {
    let mut bytes = vec![0; requests.iter().map(NetlinkMessage::buffer_len).sum()];
    let mut start = 0;
    for request in requests {
        let end = start + request.buffer_len();
        request.serialize(&mut bytes[start..end]);
        start = end;
    }
    bytes
}
