//! Clients in the node's namespace, and what they see of a Service and when.

use std::{
    io::{self, Read as _},
    net::{Ipv4Addr, SocketAddrV4, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Socket, Type};

use super::bound::Deadline;

/// So many connects in a row without it mean that an endpoint is gone: with five endpoints, one in 10⁸ is wrong.
const GONE_AFTER: usize = 80;
/// The period in which [`alive`] connects.
const BEAT: Duration = Duration::from_millis(2);

/// Connects. The endpoint that answered, and when the connection stood.
///
/// # Errors
///
/// Without an answer in time.
fn connect(to: SocketAddrV4, patience: Duration) -> io::Result<(Ipv4Addr, Instant)> {
    let stream = TcpStream::connect_timeout(&to.into(), patience)?;
    let at = Instant::now();
    Ok((answered(stream)?, at))
}

/// Which endpoint answers a client with this source address.
pub(super) fn answer_to(from: Ipv4Addr, to: SocketAddrV4) -> io::Result<Ipv4Addr> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.bind(&SocketAddrV4::new(from, 0).into())?;
    socket.connect_timeout(&to.into(), Duration::from_millis(200))?;
    answered(socket.into())
}

/// The endpoint at the other end.
fn answered(mut stream: TcpStream) -> io::Result<Ipv4Addr> {
    // Closed with a reset, or thousands of connections in TIME_WAIT would eat the port range.
    setsockopt(&stream, sockopt::Linger, &nix::libc::linger { l_onoff: 1, l_linger: 0 })?;
    stream.set_read_timeout(Some(Duration::from_secs(1)))?;
    let mut own = [0; 4];
    stream.read_exact(&mut own)?;
    Ok(own.into())
}

/// How long one attempt may take and how long to wait for the next, so that the answer is right to a few per cent and
/// a slow subject is not starved of CPU by its observer.
fn pace(elapsed: Duration) -> (Duration, Duration) {
    let attempt = (elapsed / 50).clamp(Duration::from_millis(2), Duration::from_millis(100));
    let pause = if elapsed < Duration::from_millis(100) { Duration::ZERO } else { elapsed / 300 };
    (attempt, pause)
}

/// Whether an endpoint answers there now.
#[must_use]
pub(super) fn answers(target: SocketAddrV4) -> bool {
    connect(target, Duration::from_millis(200)).is_ok()
}

/// Waits until every one of these has answered. When the last one did.
pub(super) fn all_answer(targets: &[SocketAddrV4], deadline: Deadline) -> anyhow::Result<Instant> {
    let begin = Instant::now();
    let mut last = begin;
    for target in targets {
        loop {
            let (attempt, pause) = pace(begin.elapsed());
            if let Ok((_, at)) = connect(*target, attempt) {
                last = at;
                break;
            }
            deadline.check().with_context(|| format!("waiting for {target}"))?;
            thread::sleep(pause.max(Duration::from_micros(100)));
        }
    }
    Ok(last)
}

/// Keeps connecting. When `endpoint` answered first.
pub(super) fn first_answer(
    target: SocketAddrV4,
    endpoint: Ipv4Addr,
    deadline: Deadline,
) -> anyhow::Result<Instant> {
    let begin = Instant::now();
    loop {
        let (attempt, pause) = pace(begin.elapsed());
        if let Ok((own, at)) = connect(target, attempt)
            && own == endpoint
        {
            return Ok(at);
        }
        deadline.check().with_context(|| format!("waiting for {endpoint} to answer for {target}"))?;
        thread::sleep(pause);
    }
}

/// Keeps connecting. When `endpoint` answered last. Ends when it has not for a while after `written` was set.
pub(super) fn last_answer(
    target: SocketAddrV4,
    endpoint: Ipv4Addr,
    written: &Arc<AtomicBool>,
    deadline: Deadline,
) -> anyhow::Result<Instant> {
    let begin = Instant::now();
    let mut last = begin;
    let mut since = 0;
    while since < GONE_AFTER {
        let was_written = written.load(Ordering::Acquire);
        if let Ok((own, at)) = connect(target, Duration::from_millis(200)) {
            if own == endpoint {
                (last, since) = (at, 0);
            } else if was_written {
                since += 1;
            }
        }
        deadline.check().with_context(|| format!("waiting for {endpoint} to leave {target}"))?;
        thread::sleep(pace(begin.elapsed()).1);
    }
    Ok(last)
}

/// Connects from time to time until `stop`. How often, and how often in vain.
#[must_use]
pub(super) fn alive(target: SocketAddrV4, stop: &AtomicBool) -> (u32, u32) {
    let (mut connects, mut failed) = (0, 0);
    while !stop.load(Ordering::Acquire) {
        connects += 1;
        failed += u32::from(!answers(target));
        thread::sleep(BEAT);
    }
    (connects, failed)
}

/// Waits until `gone` answers none of these clients any more. When the last of them was answered by another.
pub(super) fn all_moved(
    clients: &[Ipv4Addr],
    to: SocketAddrV4,
    gone: Ipv4Addr,
    deadline: Deadline,
) -> anyhow::Result<Instant> {
    let mut last = Instant::now();
    for client in clients {
        while answer_to(*client, to).map_or(true, |endpoint| endpoint == gone) {
            deadline.check().with_context(|| format!("waiting for {gone} to leave {to}"))?;
            thread::sleep(BEAT);
        }
        last = Instant::now();
    }
    Ok(last)
}
