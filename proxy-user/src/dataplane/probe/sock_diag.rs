//! What the kernel's socket lists can do.
//!
//! In: nothing; the only socket touched is one made for the purpose. Out: [`Answer`]s.

use std::{io, net::UdpSocket};

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkBuffer};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_SOCK_DIAG};

use super::{Answer, machine::answer};

// Numbers of linux/sock_diag.h and linux/inet_diag.h.
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const INET_DIAG_REQ_SK_BPF_STORAGES: u16 = 2;
const SK_DIAG_BPF_STORAGE_REQ_MAP_FD: u16 = 1;
const NLA_F_NESTED: u16 = 1 << 15;
const NLMSG_ERROR: u16 = 2;

/// Whether a socket can be closed by somebody else (`SOCK_DESTROY`): tried on one of our own.
pub(super) fn destroy() -> Answer {
    let ask = || {
        let victim = UdpSocket::bind("0.0.0.0:0")?;
        let port = victim.local_addr()?.port();
        let cookie = socket2::SockRef::from(&victim).cookie()?;
        ask(SOCK_DESTROY, NLM_F_REQUEST | NLM_F_ACK, &request(libc::IPPROTO_UDP, port, cookie))
    };
    match ask() {
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Answer::No(String::new()),
        asked => answer(asked.map(|()| true)),
    }
}

/// Whether a list of sockets can show what a map stores with each: asked for a map that cannot be, which kernels that
/// know the question complain about.
pub(super) fn storage() -> Answer {
    let mut message = request(libc::IPPROTO_TCP, 0, 0);
    message.extend(attribute(
        INET_DIAG_REQ_SK_BPF_STORAGES | NLA_F_NESTED,
        &attribute(SK_DIAG_BPF_STORAGE_REQ_MAP_FD, &u32::MAX.to_ne_bytes()),
    ));
    match ask(SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | NLM_F_DUMP, &message) {
        Ok(()) => Answer::No(String::new()),
        Err(error) if error.raw_os_error() == Some(libc::EBADF) => Answer::Yes,
        Err(error) => answer(Err(error)),
    }
}

/// An `inet_diag_req_v2` for IPv4 sockets in no TCP state at all, so that a list of them is empty.
fn request(protocol: libc::c_int, port: u16, cookie: u64) -> Vec<u8> {
    let mut bytes = vec![0; 56];
    bytes[0] = u8::try_from(libc::AF_INET).unwrap_or_default();
    bytes[1] = u8::try_from(protocol).unwrap_or_default();
    bytes[8..10].copy_from_slice(&port.to_be_bytes());
    // Two numbers, the low half first.
    bytes[48..52].copy_from_slice(&(cookie as u32).to_ne_bytes());
    bytes[52..56].copy_from_slice(&((cookie >> 32) as u32).to_ne_bytes());
    bytes
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), value].concat()
}

/// Sends a request and reads the first answer: an error, or anything else.
fn ask(kind: u16, flags: u16, payload: &[u8]) -> io::Result<()> {
    let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let mut message = vec![0; 16 + payload.len()];
    let length = u32::try_from(message.len()).unwrap_or(u32::MAX);
    let mut header = NetlinkBuffer::new(&mut message);
    header.set_length(length);
    header.set_message_type(kind);
    header.set_flags(flags);
    message[16..].copy_from_slice(payload);
    socket.send(&message, 0)?;

    let (reply, _) = socket.recv_from_full()?;
    let malformed = || io::Error::new(io::ErrorKind::InvalidData, "the kernel's answer cannot be read");
    let reply = NetlinkBuffer::new_checked(&reply[..]).map_err(|_| malformed())?;
    if reply.message_type() != NLMSG_ERROR {
        return Ok(());
    }
    let code = reply.payload().first_chunk().copied().map(i32::from_ne_bytes).ok_or_else(malformed)?;
    if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-code)) }
}
