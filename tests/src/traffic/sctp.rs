//! SCTP without a kernel that has SCTP sockets: the first two packets of an association, by raw sockets.
//!
//! The client sends an INIT; the server replies with an INIT ACK whose state cookie is its answer. Connection tracking
//! and NAT see what they would see of a real association, and that is all the proxy has a part in.

use std::{
    io::{self, Read as _},
    net::SocketAddr,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU16, Ordering},
    },
};

use socket2::Socket;

const INIT: u8 = 1;
const INIT_ACK: u8 = 2;
/// The type of the parameter that holds a state cookie.
const COOKIE: u16 = 7;
/// Bytes before the parameters of an INIT or INIT ACK: common header, chunk header, fixed fields.
const FIXED: usize = 12 + 4 + 16;
/// Any number: there is never more than one association on a pair of ports.
const TAG: u32 = 0x7765_6972;

/// A packet with one chunk.
#[derive(Debug)]
pub(super) struct Packet {
    pub(super) source: u16,
    pub(super) destination: u16,
    kind: u8,
    /// The state cookie, empty if there is none.
    pub(super) cookie: Vec<u8>,
}

impl Packet {
    /// The reply with this cookie.
    pub(super) fn reply(&self, cookie: Vec<u8>) -> Self {
        Self { source: self.destination, destination: self.source, kind: INIT_ACK, cookie }
    }

    /// Whether it asks for an association.
    pub(super) fn asks(&self) -> bool {
        self.kind == INIT
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let parameter = if self.cookie.is_empty() { 0 } else { 4 + self.cookie.len() };
        // An INIT goes without verification tag; its ACK carries the INIT's.
        let tag = if self.kind == INIT { 0 } else { TAG };
        let length = (4 + 16 + parameter) as u16;
        let mut bytes = Vec::with_capacity(FIXED + parameter + 3);
        bytes.extend(self.source.to_be_bytes());
        bytes.extend(self.destination.to_be_bytes());
        bytes.extend(tag.to_be_bytes());
        bytes.extend([0; 4]);
        bytes.extend([self.kind, 0]);
        bytes.extend(length.to_be_bytes());
        bytes.extend(TAG.to_be_bytes());
        // Window, streams out and in, first sequence number.
        bytes.extend(65_536_u32.to_be_bytes());
        bytes.extend([0, 1, 0, 1]);
        bytes.extend(1_u32.to_be_bytes());
        if parameter > 0 {
            bytes.extend(COOKIE.to_be_bytes());
            bytes.extend((parameter as u16).to_be_bytes());
            bytes.extend(&self.cookie);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
        let sum = crc32c(&bytes).to_le_bytes();
        bytes[8..12].copy_from_slice(&sum);
        bytes
    }

    /// Reads what a raw socket received; those of IPv4 deliver the IP header too.
    pub(super) fn decode(mut bytes: &[u8], ipv4: bool) -> Option<Self> {
        if ipv4 {
            let header = usize::from(bytes.first()? & 0xf) * 4;
            bytes = bytes.get(header..)?;
        }
        let word = |at: usize| Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]));
        let cookie = match word(FIXED) {
            Some(COOKIE) => bytes.get(FIXED + 4..FIXED + usize::from(word(FIXED + 2)?))?.to_vec(),
            _ => Vec::new(),
        };
        Some(Self { source: word(0)?, destination: word(2)?, kind: *bytes.get(12)?, cookie })
    }
}

/// Asks on a connected raw socket, from a source port that this process has not used for long. One at a time: a raw socket
/// gets refusals by address, so it would take one of another port of the same node for its own.
pub(super) fn exchange(socket: &Socket, to: SocketAddr) -> io::Result<Vec<u8>> {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    // Errors from before this turn belong to another call.
    socket.take_error()?;
    let source = 20_000 + NEXT.fetch_add(1, Ordering::Relaxed) % 40_000;
    let question = Packet { source, destination: to.port(), kind: INIT, cookie: Vec::new() };
    socket.send(&question.encode())?;
    let mut buffer = [0; 512];
    loop {
        let received = (&mut &*socket).read(&mut buffer)?;
        if let Some(answer) = Packet::decode(&buffer[..received], to.is_ipv4())
            && (answer.source, answer.destination, answer.kind) == (to.port(), source, INIT_ACK)
        {
            return Ok(answer.cookie);
        }
    }
}

/// CRC-32C, the checksum of SCTP.
fn crc32c(bytes: &[u8]) -> u32 {
    let step = |crc: u32, byte: &u8| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0x82f6_3b78 * (crc & 1)))
    };
    !bytes.iter().fold(!0, step)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksum_is_that_of_the_standard() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn packets_are_read_as_written() {
        let question = Packet { source: 1, destination: 2, kind: INIT, cookie: Vec::new() };
        let reply = Packet::decode(&question.encode(), false).unwrap().reply(b"hello".to_vec());
        let read = Packet::decode(&reply.encode(), false).unwrap();
        assert_eq!((read.source, read.destination, read.kind), (2, 1, INIT_ACK));
        assert_eq!(read.cookie, b"hello");
    }
}
