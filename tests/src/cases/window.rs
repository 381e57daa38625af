//! TCP segments that connection tracking finds outside the window of their flow, and so translates no more.

use std::{
    io,
    net::{IpAddr, SocketAddr, UdpSocket},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use socket2::{Domain, Protocol, Socket, Type};

use super::*;
use crate::{
    objects::{pod, service},
    traffic::{Outcome, PATIENCE},
};

/// The payload of the forged segments, and of no other packet.
const FORGED: &[u8] = b"outside the window";

/// Numbers of which one at least is far outside any window: of what is sent, and of what is acknowledged.
const FAR_APART: [u32; 2] = [0x1000_0000, 0x9000_0000];

pub(super) fn cases() -> Vec<Case> {
    let local = service([pod(1, 1)]).everywhere().external_local();
    vec![
        case(
            "R1",
            "an answer outside the window does not reach its client from the backend's address",
            local,
        )
        .over(&[Transport::Tcp])
        .step(Step::Run("have the backend send segments far outside the window", answers)),
    ]
}

fn answers(run: &CaseRun<'_>) -> Result<()> {
    for (from, to) in [(POD12, CLUSTER), (OUTSIDE, EXTERNAL)] {
        let (flow, first) = run.flow(from, to)?;
        let client = first.client;
        // A raw socket is read as one for datagrams is.
        let heard: UdpSocket = run.namespace(from).run(|| raw(client.ip()))?.into();
        run.namespace(POD11).run(|| forge(client))?;
        let outcome = flow.ask(PATIENCE);
        ensure!(matches!(outcome, Outcome::Answer(_)), "{from} to {to:?}, then: {outcome}");
        // The answer took the way of the forged segments, behind them.
        let mut forged = Vec::new();
        let answered_by = loop {
            let (packet, source) = next(&heard, client).context("the answer is not heard")?;
            if holds(&packet, FORGED) {
                forged.push(source);
            }
            if holds(&packet, first.backend.as_bytes()) {
                break source;
            }
        };
        // The kernel still translates segments that it takes for old data sent again. The socket plane
        // translates none.
        forged.retain(|source| *source != answered_by);
        if run.differs(Difference::OutOfWindow) {
            ensure!(forged.is_empty(), "{from} to {to:?}: forged segments came from {forged:?}");
        } else {
            ensure!(!forged.is_empty(), "{from} to {to:?}: the forged segments are lost by themselves");
        }
    }
    Ok(())
}

fn raw(address: IpAddr) -> io::Result<Socket> {
    let socket =
        Socket::new(Domain::for_address(SocketAddr::new(address, 0)), Type::RAW, Some(Protocol::TCP))?;
    socket.set_read_timeout(Some(Duration::from_secs(30)))?;
    Ok(socket)
}

/// The next segment to the client's port, and which address it is from. Other cases' flows come by as well.
fn next(socket: &UdpSocket, client: SocketAddr) -> io::Result<(Vec<u8>, IpAddr)> {
    loop {
        let mut packet = vec![0; 4096];
        let (length, source) = socket.recv_from(&mut packet)?;
        packet.truncate(length);
        // The kernel hands out IPv4 headers, and no IPv6 ones.
        let header = if client.is_ipv4() { usize::from(packet[0] & 0xf) * 4 } else { 0 };
        if packet.get(header + 2..header + 4) == Some(&client.port().to_be_bytes()) {
            return Ok((packet, source.ip()));
        }
    }
}

fn holds(packet: &[u8], text: &[u8]) -> bool {
    packet.windows(text.len()).any(|part| part == text)
}

/// Sends from pod 1/1 what its server might, at another position in the stream.
fn forge(client: SocketAddr) -> io::Result<()> {
    let backend = POD11.server_address(Family::of(client.ip()));
    let backend = SocketAddr::new(backend, TARGET);
    let socket = raw(backend.ip())?;
    socket.bind(&SocketAddr::new(backend.ip(), 0).into())?;
    let both = FAR_APART.iter().flat_map(|sequence| FAR_APART.map(|other| [*sequence, other]));
    both.into_iter().try_for_each(|numbers| {
        let to = SocketAddr::new(client.ip(), 0).into();
        socket.send_to(&segment(backend, client, numbers), &to).map(drop)
    })
}

/// A segment with these numbers of what it sends and acknowledges, and data.
fn segment(from: SocketAddr, to: SocketAddr, numbers: [u32; 2]) -> Vec<u8> {
    const DATA_OFFSET: u8 = 5 << 4;
    const PSH_ACK: u8 = 0x18;
    let mut segment = [&from.port().to_be_bytes()[..], &to.port().to_be_bytes()].concat();
    numbers.iter().for_each(|number| segment.extend(number.to_be_bytes()));
    segment.extend([DATA_OFFSET, PSH_ACK]);
    segment.extend(1024_u16.to_be_bytes());
    segment.extend([0; 4]);
    segment.extend(FORGED);
    let checksum = checksum(from.ip(), to.ip(), &segment);
    segment[16..18].copy_from_slice(&checksum.to_be_bytes());
    segment
}

fn checksum(from: IpAddr, to: IpAddr, segment: &[u8]) -> u16 {
    const TCP: u8 = 6;
    let octets = |address: IpAddr| match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    let length = u16::try_from(segment.len()).unwrap_or_default().to_be_bytes();
    let summed = [&octets(from)[..], &octets(to), &[0, TCP], &length, segment].concat();
    let words =
        summed.chunks(2).map(|pair| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u32::from(*low)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}
