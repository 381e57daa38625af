//! The virtual servers of kube-proxy's ipvs mode, and the sets of its rules.
//!
//! In: networks whose virtual servers belong to other programs. Out: a kernel without the other virtual servers
//! (`linux/ip_vs.h`) and without kube-proxy's sets (`linux/netfilter/ipset/ip_set.h`).

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;
use netlink_packet_core::{
    DecodeError, DefaultNla, Emitable, NLA_F_NESTED, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST,
    NetlinkDeserializable, NetlinkHeader, NetlinkMessage, NetlinkPayload, NetlinkSerializable, NlasIterator,
    ParseableParametrized,
};
use netlink_packet_generic::{
    GenlFamily, GenlHeader, GenlMessage,
    ctrl::{GenlCtrl, GenlCtrlCmd, nlas::GenlCtrlAttrs},
};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily, NetfilterSubsystem,
};
use netlink_sys::protocols::{NETLINK_GENERIC, NETLINK_NETFILTER};

use crate::sys::netlink::{Channel, messages, serialize};

/// The sets of kube-proxy's ipvs mode; for IPv6 with [`PREFIX_V6`] in place of [`PREFIX`].
const SETS: [&str; 17] = [
    "KUBE-CLUSTER-IP",
    "KUBE-EXTERNAL-IP",
    "KUBE-EXTERNAL-IP-LOCAL",
    "KUBE-HEALTH-CHECK-NODE-PORT",
    "KUBE-IPVS-IPS",
    "KUBE-LOAD-BALANCER",
    "KUBE-LOAD-BALANCER-FW",
    "KUBE-LOAD-BALANCER-LOCAL",
    "KUBE-LOAD-BALANCER-SOURCE-CIDR",
    "KUBE-LOAD-BALANCER-SOURCE-IP",
    "KUBE-LOOP-BACK",
    "KUBE-NODE-PORT-LOCAL-SCTP-HASH",
    "KUBE-NODE-PORT-LOCAL-TCP",
    "KUBE-NODE-PORT-LOCAL-UDP",
    "KUBE-NODE-PORT-SCTP-HASH",
    "KUBE-NODE-PORT-TCP",
    "KUBE-NODE-PORT-UDP",
];
const PREFIX: &str = "KUBE-";
const PREFIX_V6: &str = "KUBE-6-";
/// The longest name of a set; longer names are cut.
const SET_NAME_LEN: usize = 31;

/// Removes the virtual servers with an address outside of `excluded`, and returns their number.
///
/// # Errors
///
/// The kernel's.
pub(super) fn remove_servers(excluded: &[IpNet]) -> io::Result<usize> {
    let mut channel = Channel::open(NETLINK_GENERIC)?;
    let Some(family) = family(&mut channel)? else { return Ok(0) };
    let message = |command, attributes| {
        let server = VirtualServer { command, attributes };
        GenlMessage::new(GenlHeader { cmd: command, version: server.version() }, server, family)
    };
    let all = exchange(&mut channel, NLM_F_DUMP, message(VirtualServer::GET, Vec::new()))?;
    let mut count = 0;
    for GenlMessage { payload: server, .. } in all {
        let is_kube_proxys = server.address().is_some_and(|at| !excluded.iter().any(|net| net.contains(&at)));
        if is_kube_proxys {
            let delete = message(VirtualServer::DELETE, server.name());
            let deleted = existing(exchange(&mut channel, NLM_F_ACK, delete))?;
            count += usize::from(deleted.is_some());
        }
    }
    Ok(count)
}

/// Removes kube-proxy's sets. Returns how many there were, and which stay because a rule uses them.
///
/// # Errors
///
/// The kernel's.
pub(super) fn remove_sets() -> io::Result<(usize, Vec<String>)> {
    /// `IPSET_ERR_BUSY`.
    const BUSY: i32 = 4100;
    /// `NFNL_SUBSYS_IPSET`.
    const SUBSYSTEM: NetfilterSubsystem = NetfilterSubsystem::Other(6);
    /// `IPSET_CMD_DESTROY`.
    const DESTROY: u8 = 3;
    /// `IPSET_ATTR_PROTOCOL`, and the version that all supported kernels accept.
    const PROTOCOL: (u16, u8) = (1, 6);
    /// `IPSET_ATTR_SETNAME`.
    const NAME: u16 = 2;
    let mut channel = Channel::open(NETLINK_NETFILTER)?;
    let (mut count, mut kept) = (0, Vec::new());
    for name in SETS.iter().flat_map(|name| [(*name).to_owned(), name.replacen(PREFIX, PREFIX_V6, 1)]) {
        let mut text = name.clone().into_bytes();
        text.truncate(SET_NAME_LEN);
        text.push(0);
        let attributes = vec![DefaultNla::new(PROTOCOL.0, vec![PROTOCOL.1]), DefaultNla::new(NAME, text)];
        let inner = NetfilterMessageInner::Other { subsys: SUBSYSTEM, message_type: DESTROY, attributes };
        let header = NetfilterHeader::new(NetfilterProtoFamily::IPv4, 0, 0);
        let destroyed = exchange(&mut channel, NLM_F_ACK, NetfilterMessage::new(header, inner));
        match destroyed {
            Err(error) if error.raw_os_error() == Some(BUSY) => kept.push(name),
            destroyed => count += usize::from(existing(destroyed)?.is_some()),
        }
    }
    Ok((count, kept))
}

/// The generic netlink family of IPVS; `None` if the kernel has no IPVS.
fn family(channel: &mut Channel) -> io::Result<Option<u16>> {
    let name = GenlCtrlAttrs::FamilyName(VirtualServer::family_name().to_owned());
    let question = GenlMessage::from_payload(GenlCtrl { cmd: GenlCtrlCmd::GetFamily, nlas: vec![name] });
    let answers = existing(exchange(channel, NLM_F_ACK, question))?.unwrap_or_default();
    Ok(answers.into_iter().flat_map(|answer| answer.payload.nlas).find_map(|attribute| match attribute {
        GenlCtrlAttrs::FamilyId(number) => Some(number),
        _ => None,
    }))
}

/// `None` if the kernel does not have the object.
fn existing<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result.map_err(|error| (error.raw_os_error(), error)) {
        Ok(there) => Ok(Some(there)),
        Err((Some(libc::ENOENT | libc::ESRCH), _)) => Ok(None),
        Err((_, error)) => Err(error),
    }
}

/// Sends a request and returns all messages up to the end of a dump, or up to the acknowledgement with `NLM_F_ACK`.
fn exchange<I>(channel: &mut Channel, flags: u16, request: I) -> io::Result<Vec<I>>
where
    I: NetlinkSerializable + NetlinkDeserializable,
{
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | flags;
    let mut request = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(request));
    request.finalize();
    channel.send(&serialize(&[request]))?;
    let mut all = Vec::new();
    loop {
        for message in messages::<I>(channel.receive()?) {
            match message.payload {
                NetlinkPayload::Done(_) => return Ok(all),
                NetlinkPayload::Error(error) if error.raw_code() == 0 => return Ok(all),
                NetlinkPayload::Error(error) => {
                    return Err(io::Error::from_raw_os_error(-error.raw_code()));
                }
                NetlinkPayload::InnerMessage(message) => all.push(message),
                _ => {}
            }
        }
    }
}

/// A virtual server, or the attributes that identify one.
#[derive(Clone, Debug)]
struct VirtualServer {
    command: u8,
    /// `IPVS_SVC_ATTR_…` and their values.
    attributes: Vec<(u16, Vec<u8>)>,
}

impl VirtualServer {
    /// `IPVS_CMD_DEL_SERVICE`.
    const DELETE: u8 = 3;
    /// `IPVS_CMD_GET_SERVICE`.
    const GET: u8 = 4;
    /// `IPVS_CMD_ATTR_SERVICE`, which contains all other attributes.
    const ATTRIBUTES: u16 = 1;
    /// `IPVS_SVC_ATTR_AF`.
    const FAMILY: u16 = 1;
    /// `IPVS_SVC_ATTR_ADDR`.
    const ADDRESS: u16 = 3;
    /// `IPVS_SVC_ATTR_FWMARK`, the last attribute that identifies a virtual server.
    const LAST_OF_NAME: u16 = 5;

    fn value(&self, attribute: u16) -> Option<&[u8]> {
        self.attributes.iter().find_map(|(kind, value)| (*kind == attribute).then_some(&**value))
    }

    /// `None` if the virtual server has a mark instead of an address.
    fn address(&self) -> Option<IpAddr> {
        let family = u16::from_ne_bytes(*self.value(Self::FAMILY)?.first_chunk()?);
        let address = self.value(Self::ADDRESS)?;
        match i32::from(family) {
            libc::AF_INET => Some(Ipv4Addr::from(*address.first_chunk::<4>()?).into()),
            _ => Some(Ipv6Addr::from(*address.first_chunk::<16>()?).into()),
        }
    }

    fn name(self) -> Vec<(u16, Vec<u8>)> {
        self.attributes.into_iter().filter(|(kind, _)| *kind <= Self::LAST_OF_NAME).collect()
    }

    /// All attributes nested in one; `None` without attributes.
    fn nested(&self) -> Option<DefaultNla> {
        let one = |(kind, value): &(u16, Vec<u8>)| DefaultNla::new(*kind, value.clone());
        let all: Vec<_> = self.attributes.iter().map(one).collect();
        let mut bytes = vec![0; all.as_slice().buffer_len()];
        all.as_slice().emit(&mut bytes);
        (!all.is_empty()).then(|| DefaultNla::new(Self::ATTRIBUTES | NLA_F_NESTED, bytes))
    }
}

impl GenlFamily for VirtualServer {
    fn family_name() -> &'static str {
        "IPVS"
    }

    fn command(&self) -> u8 {
        self.command
    }

    fn version(&self) -> u8 {
        1
    }
}

impl Emitable for VirtualServer {
    fn buffer_len(&self) -> usize {
        self.nested().map_or(0, |nested| nested.buffer_len())
    }

    fn emit(&self, buffer: &mut [u8]) {
        if let Some(nested) = self.nested() {
            nested.emit(buffer);
        }
    }
}

impl ParseableParametrized<[u8], GenlHeader> for VirtualServer {
    fn parse_with_param(bytes: &[u8], header: GenlHeader) -> Result<Self, DecodeError> {
        let mut attributes = Vec::new();
        for outer in NlasIterator::new(bytes) {
            let outer = outer?;
            if outer.kind() == Self::ATTRIBUTES {
                for inner in NlasIterator::new(outer.value()) {
                    let inner = inner?;
                    attributes.push((inner.kind(), inner.value().to_vec()));
                }
            }
        }
        Ok(Self { command: header.cmd, attributes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(family: libc::c_int, address: &[u8]) -> VirtualServer {
        let mut padded = address.to_vec();
        padded.resize(16, 0);
        let attributes = vec![
            (VirtualServer::FAMILY, (family as u16).to_ne_bytes().to_vec()),
            (2, 6_u16.to_ne_bytes().to_vec()),
            (VirtualServer::ADDRESS, padded),
            (4, 80_u16.to_be_bytes().to_vec()),
            (6, b"rr\0".to_vec()),
        ];
        VirtualServer { command: VirtualServer::GET, attributes }
    }

    #[test]
    fn a_virtual_server_survives_encoding_and_is_identified_by_its_address() {
        let (v4, v6) = (Ipv4Addr::new(10, 96, 0, 10), "fd00:10:96::10".parse::<Ipv6Addr>().unwrap());
        for (server, address) in [
            (server(libc::AF_INET, &v4.octets()), IpAddr::from(v4)),
            (server(libc::AF_INET6, &v6.octets()), v6.into()),
        ] {
            let mut bytes = vec![0; server.buffer_len()];
            server.emit(&mut bytes);
            let header = GenlHeader { cmd: VirtualServer::GET, version: 1 };
            let read = VirtualServer::parse_with_param(&bytes, header).unwrap();
            assert_eq!(read.attributes, server.attributes);
            assert_eq!(read.address(), Some(address));
            assert_eq!(read.name(), server.attributes[..4], "the scheduler does not identify it");
        }
        assert_eq!(VirtualServer { command: 4, attributes: Vec::new() }.address(), None);
    }
}
