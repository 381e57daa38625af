//! A netlink socket, for requests about flows, sockets and the rules of other programs.
//!
//! In: requests. Out: the kernel's datagrams, split into messages.

use std::io;

use netlink_packet_core::{
    NetlinkBuffer, NetlinkDeserializable, NetlinkHeader, NetlinkMessage, NetlinkPayload, NetlinkSerializable,
};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
};
use netlink_sys::{Socket, SocketAddr};
use nix::sys::socket::{setsockopt, sockopt};

/// The largest datagram of a dump, in bytes.
const DATAGRAM: usize = 64 * 1024;

/// A netlink socket in the network namespace in which it was opened. It has one request at a time.
pub(crate) struct Channel {
    socket: Socket,
    buffer: Vec<u8>,
}

impl Channel {
    /// Opens a socket of a netlink protocol such as `NETLINK_NETFILTER`.
    pub(crate) fn open(protocol: isize) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        // Error messages then contain only the header of the request. weir does not need the rest.
        socket.set_cap_ack(true)?;
        Ok(Self { socket, buffer: Vec::with_capacity(DATAGRAM) })
    }

    /// Enlarges the send buffer for a datagram of this size.
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

    /// The next datagram, or `None` if none has arrived.
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

/// The messages of one datagram, not parsed.
pub(crate) fn split(datagram: &[u8]) -> impl Iterator<Item = NetlinkBuffer<&[u8]>> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        let length = NetlinkBuffer::new_checked(rest).ok()?.length() as usize;
        let message = NetlinkBuffer::new_checked(rest.get(..length)?).ok()?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

/// The messages of one datagram, without those that cannot be parsed.
pub(crate) fn messages<I: NetlinkDeserializable>(datagram: &[u8]) -> impl Iterator<Item = NetlinkMessage<I>> {
    let read = split(datagram).map(|message| NetlinkMessage::deserialize(message.into_inner()));
    read.filter_map(|message| {
        message.inspect_err(|error| tracing::debug!(%error, "cannot parse a message")).ok()
    })
}

/// A request to a subsystem of netfilter; with 0 the message names its own subsystem.
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

/// The bytes of requests, one after the other, for one datagram.
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
