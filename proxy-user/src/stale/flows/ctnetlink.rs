//! The requests of ctnetlink that weir uses: walk the UDP flows of a [`Scope`], find a flow by its tuple, and delete
//! flows.
//!
//! In: scopes and [`Entry`]s. Out: entries, one at a time, as the kernel sends them.

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use netlink_packet_core::{
    DefaultNla, Emitable as _, NLA_F_NESTED, NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST,
    NetlinkMessage, NetlinkPayload, Nla,
};
use netlink_packet_netfilter::{
    NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
    conntrack::{ConntrackAttribute, ConntrackMessage, IPTuple, ProtoTuple, Protocol, Tuple},
};
use netlink_sys::protocols::NETLINK_NETFILTER;

use super::suspect::Flow;
use crate::{
    model::Family,
    plan::{Destination, Frontend},
    sys::netlink::{Channel, messages, netfilter, serialize},
};

// Numbers of linux/netfilter/nfnetlink_conntrack.h that the message crate does not define.
const IPCTNL_MSG_CT_GET: u8 = 1;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_ID: u16 = 12;
const CTA_ZONE: u16 = 18;
const CTA_FILTER: u16 = 25;
const CTA_FILTER_ORIG_FLAGS: u16 = 1;
const FILTER_DESTINATION_ADDRESS: u32 = 1 << 1;
const FILTER_PROTOCOL: u32 = 1 << 3;
const FILTER_DESTINATION_PORT: u32 = 1 << 5;

/// Which flows a walk asks the kernel for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Scope {
    /// UDP flows to this frontend; in IPv6 also flows to the same port of other addresses.
    Frontend(Frontend),
    /// All UDP flows of a family.
    Udp(Family),
    /// All flows of a family, for kernels before 5.8, which cannot filter.
    Everything(Family),
}

/// A UDP flow, and the attributes that identify it in a request.
pub(super) struct Entry {
    pub(super) flow: Flow,
    family: NetfilterProtoFamily,
    name: Vec<ConntrackAttribute>,
}

/// How a walk ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Walked {
    /// The kernel sent all flows of the scope.
    All,
    /// The table changed during the walk, so flows may be missing.
    Interrupted,
    /// The kernel cannot filter: it refused, or sent flows outside the scope.
    Unfiltered,
}

/// Sends requests on a netlink socket.
pub(super) struct Requests(Channel);

impl Requests {
    pub(super) fn open() -> io::Result<Self> {
        Channel::open(NETLINK_NETFILTER).map(Self)
    }

    /// Calls `visit` with every UDP flow in `scope`, while the kernel is still walking its table.
    pub(super) fn walk(
        &mut self,
        scope: Scope,
        mut visit: impl FnMut(Entry) -> io::Result<()>,
    ) -> io::Result<Walked> {
        self.0.send(&serialize(&[request(scope)]))?;
        let mut walked = Walked::All;
        let mut failed = None;
        loop {
            for message in messages::<NetfilterMessage>(self.0.receive()?) {
                if message.header.flags & NLM_F_DUMP_INTR != 0 && walked == Walked::All {
                    walked = Walked::Interrupted;
                }
                match message.payload {
                    NetlinkPayload::Done(done) if done.code == 0 => return failed.map_or(Ok(walked), Err),
                    NetlinkPayload::Done(done) => return ended(scope, done.code),
                    NetlinkPayload::Error(error) => return ended(scope, error.raw_code()),
                    NetlinkPayload::InnerMessage(message) => {
                        let entry = decode(message);
                        if !scope.holds(entry.as_ref()) {
                            walked = Walked::Unfiltered;
                        }
                        // weir reads the rest of the dump after an error too, because the next request uses the same
                        // socket.
                        if let (Some(entry), None) = (entry, &failed) {
                            failed = visit(entry).err();
                        }
                    }
                    _ => {}
                }
            }
        }
    }

    /// The UDP flow from `client` to `destination`, if there is one.
    pub(super) fn find(&mut self, client: SocketAddr, destination: SocketAddr) -> io::Result<Option<Entry>> {
        self.0.send(&serialize(&[question(client, destination)]))?;
        loop {
            for message in messages::<NetfilterMessage>(self.0.receive()?) {
                match message.payload {
                    NetlinkPayload::InnerMessage(message) => return Ok(decode(message)),
                    NetlinkPayload::Error(error) if error.raw_code() == -libc::ENOENT => return Ok(None),
                    NetlinkPayload::Error(error) => return Err(error.to_io()),
                    _ => {}
                }
            }
        }
    }

    /// Deletes flows and returns how many of them still existed.
    pub(super) fn delete(&mut self, entries: &mut Vec<Entry>) -> io::Result<u64> {
        let requests: Vec<_> = entries.drain(..).map(deletion).collect();
        if requests.is_empty() {
            return Ok(0);
        }
        self.0.send(&serialize(&requests))?;
        let (mut deleted, mut answers, mut failed) = (0, 0, None);
        while answers < requests.len() {
            for message in messages::<NetfilterMessage>(self.0.receive()?) {
                let NetlinkPayload::Error(error) = message.payload else { continue };
                answers += 1;
                match error.code.map(|code| -code.get()) {
                    None => deleted += 1,
                    Some(libc::ENOENT) => {}
                    Some(_) => failed = Some(error.to_io()),
                }
            }
        }
        failed.map_or(Ok(deleted), Err)
    }
}

/// The result of a walk that the kernel ended with an error.
fn ended(scope: Scope, code: i32) -> io::Result<Walked> {
    match (scope, -code) {
        (_, libc::EINTR) => Ok(Walked::Interrupted),
        (Scope::Frontend(_) | Scope::Udp(_), libc::EOPNOTSUPP | libc::EINVAL) => Ok(Walked::Unfiltered),
        (_, errno) => Err(io::Error::from_raw_os_error(errno)),
    }
}

impl Scope {
    fn family(&self) -> Family {
        match self {
            Self::Frontend(frontend) => frontend.destination.family(),
            Self::Udp(family) | Self::Everything(family) => *family,
        }
    }

    /// Whether a kernel that filters would have sent this flow; `None` is a flow of another protocol.
    fn holds(&self, entry: Option<&Entry>) -> bool {
        match (self, entry) {
            (Self::Everything(_), _) => true,
            (_, None) => false,
            (Self::Udp(_), Some(_)) => true,
            (Self::Frontend(frontend), Some(entry)) => {
                let to = entry.flow.destination;
                let address = filtered_address(frontend).is_none_or(|address| address == to.ip());
                address && frontend.port == to.port()
            }
        }
    }

    /// The attributes of a filter: the original tuple, and the parts of it to compare.
    fn filter(&self) -> Vec<DefaultNla> {
        let mut flags = FILTER_PROTOCOL;
        let mut proto = vec![ProtoTuple::Protocol(Protocol::Udp)];
        let mut tuple = Vec::new();
        match self {
            Self::Everything(_) => return Vec::new(),
            Self::Udp(_) => {}
            Self::Frontend(frontend) => {
                flags |= FILTER_DESTINATION_PORT;
                proto.push(ProtoTuple::DestinationPort(frontend.port));
                if let Some(address) = filtered_address(frontend) {
                    flags |= FILTER_DESTINATION_ADDRESS;
                    tuple.push(Tuple::Ip(vec![IPTuple::DestinationAddress(address)]));
                }
            }
        }
        tuple.push(Tuple::Proto(proto));
        let flags = DefaultNla::new(CTA_FILTER_ORIG_FLAGS, flags.to_ne_bytes().to_vec());
        vec![nested(CTA_TUPLE_ORIG, &tuple[..]), nested(CTA_FILTER, &[flags][..])]
    }
}

/// The address for the kernel's filter. Never an IPv6 address, because kernels up to 6.18 at least invert that
/// comparison and send the flows to all *other* addresses. The filter then has the port only.
fn filtered_address(frontend: &Frontend) -> Option<IpAddr> {
    match frontend.destination {
        Destination::Address(address) if address.is_ipv4() => Some(address),
        Destination::Address(_) | Destination::NodePort(_) => None,
    }
}

fn nested<T: Nla>(kind: u16, parts: &[T]) -> DefaultNla {
    let mut value = vec![0; parts.buffer_len()];
    parts.emit(&mut value);
    DefaultNla::new(kind | NLA_F_NESTED, value)
}

fn request(scope: Scope) -> NetlinkMessage<NetfilterMessage> {
    get(NLM_F_REQUEST | NLM_F_DUMP, scope.family(), scope.filter())
}

fn question(client: SocketAddr, destination: SocketAddr) -> NetlinkMessage<NetfilterMessage> {
    let addresses = vec![IPTuple::SourceAddress(client.ip()), IPTuple::DestinationAddress(destination.ip())];
    let ports = vec![
        ProtoTuple::Protocol(Protocol::Udp),
        ProtoTuple::SourcePort(client.port()),
        ProtoTuple::DestinationPort(destination.port()),
    ];
    let tuple = [Tuple::Ip(addresses), Tuple::Proto(ports)];
    get(NLM_F_REQUEST, Family::of(client.ip()), vec![nested(CTA_TUPLE_ORIG, &tuple[..])])
}

fn get(flags: u16, family: Family, attributes: Vec<DefaultNla>) -> NetlinkMessage<NetfilterMessage> {
    let family = match family {
        Family::V4 => NetfilterProtoFamily::IPv4,
        Family::V6 => NetfilterProtoFamily::IPv6,
    };
    // `ConntrackMessage::Get` would remove the nested flag of a filter, and the kernel would refuse it.
    let get = ConntrackMessage::Other { message_type: IPCTNL_MSG_CT_GET, attributes };
    netfilter(flags, family, 0, get)
}

fn deletion(entry: Entry) -> NetlinkMessage<NetfilterMessage> {
    netfilter(NLM_F_REQUEST | NLM_F_ACK, entry.family, 0, ConntrackMessage::Delete(entry.name))
}

/// The UDP flow in a message; `None` for every other protocol.
fn decode(message: NetfilterMessage) -> Option<Entry> {
    let family = message.header.family;
    let NetfilterMessageInner::Conntrack(ConntrackMessage::New(attributes)) = message.inner else {
        return None;
    };
    let mut name = Vec::new();
    let (mut asks, mut answers) = (None, None);
    for attribute in attributes {
        match attribute {
            ConntrackAttribute::CtaTupleOrig(tuple) => {
                asks = udp_ends(&tuple);
                name.push(ConntrackAttribute::CtaTupleOrig(tuple));
            }
            ConntrackAttribute::CtaTupleReply(tuple) => {
                answers = udp_ends(&tuple).map(|(source, _)| source);
            }
            // The zone is part of the key. The id protects a new flow with the same tuple.
            ConntrackAttribute::Other(raw) if [CTA_ZONE, CTA_ID].contains(&raw.kind()) => {
                name.push(ConntrackAttribute::Other(raw));
            }
            _ => {}
        }
    }
    let (client, destination) = asks?;
    Some(Entry { flow: Flow { client: client.ip(), destination, answers: answers? }, family, name })
}

/// Source and destination of a UDP tuple.
fn udp_ends(tuple: &[Tuple]) -> Option<(SocketAddr, SocketAddr)> {
    let (mut from, mut to) = (None, None);
    let (mut from_port, mut to_port) = (None, None);
    let mut udp = false;
    for part in tuple {
        match part {
            Tuple::Ip(parts) => parts.iter().for_each(|part| match part {
                IPTuple::SourceAddress(address) => from = Some(*address),
                IPTuple::DestinationAddress(address) => to = Some(*address),
                _ => {}
            }),
            Tuple::Proto(parts) => parts.iter().for_each(|part| match part {
                ProtoTuple::Protocol(protocol) => udp = *protocol == Protocol::Udp,
                ProtoTuple::SourcePort(port) => from_port = Some(*port),
                ProtoTuple::DestinationPort(port) => to_port = Some(*port),
                _ => {}
            }),
            _ => {}
        }
    }
    udp.then_some((SocketAddr::new(from?, from_port?), SocketAddr::new(to?, to_port?)))
}
