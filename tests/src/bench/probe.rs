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

use anyhow::ensure;
use nix::sys::socket::{setsockopt, sockopt};

/// So many connects in a row without it mean that an endpoint is gone: with five endpoints, one in 10⁸ says so wrongly.
const GONE_AFTER: usize = 80;

/// Connects, and says which endpoint answered and when the connection stood.
///
/// # Errors
///
/// When nobody answers in time.
fn connect(to: SocketAddrV4, patience: Duration) -> io::Result<(Ipv4Addr, Instant)> {
    let mut stream = TcpStream::connect_timeout(&to.into(), patience)?;
    let at = Instant::now();
    // Closed with a reset, or thousands of connections in TIME_WAIT would eat the port range.
    setsockopt(&stream, sockopt::Linger, &nix::libc::linger { l_onoff: 1, l_linger: 0 })?;
    stream.set_read_timeout(Some(Duration::from_secs(1)))?;
    let mut own = [0; 4];
    stream.read_exact(&mut own)?;
    Ok((own.into(), at))
}

/// How long one attempt may take and how long to wait for the next, so that the answer is right to a few per cent and
/// a slow subject is not starved of CPU by its observer.
fn pace(elapsed: Duration) -> (Duration, Duration) {
    let attempt = (elapsed / 50).clamp(Duration::from_millis(2), Duration::from_millis(100));
    let pause = if elapsed < Duration::from_millis(100) { Duration::ZERO } else { elapsed / 300 };
    (attempt, pause)
}

/// Whether somebody answers there now.
#[must_use]
pub(super) fn answers(target: SocketAddrV4) -> bool {
    connect(target, Duration::from_millis(200)).is_ok()
}

/// Waits until every one of these has answered and says when the last one did.
///
/// # Errors
///
/// When one does not within `patience`.
pub(super) fn all_answer(targets: &[SocketAddrV4], patience: Duration) -> anyhow::Result<Instant> {
    let begin = Instant::now();
    let mut last = begin;
    for target in targets {
        loop {
            let (attempt, pause) = pace(begin.elapsed());
            if let Ok((_, at)) = connect(*target, attempt) {
                last = at;
                break;
            }
            ensure!(begin.elapsed() < patience, "{target} did not answer within {patience:?}");
            thread::sleep(pause.max(Duration::from_micros(100)));
        }
    }
    Ok(last)
}

/// Keeps connecting and says when `endpoint` answered last. Ends when it has not for a while after `written` was set.
///
/// # Errors
///
/// When it is still there after `patience`.
pub(super) fn last_answer(
    target: SocketAddrV4,
    endpoint: Ipv4Addr,
    written: &Arc<AtomicBool>,
    patience: Duration,
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
        ensure!(begin.elapsed() < patience, "{endpoint} still answers for {target} after {patience:?}");
        thread::sleep(pace(begin.elapsed()).1);
    }
    Ok(last)
}

/// Nanoseconds that connecting took.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct ConnectTimes {
    /// Straight to an endpoint.
    pub direct: Vec<u64>,
    /// Through a ClusterIP.
    pub service: Vec<u64>,
}

/// Connects `rounds` times to a Service and to an endpoint in turn.
///
/// # Errors
///
/// When a connection fails.
pub(super) fn compare(pairs: &[(SocketAddrV4, SocketAddrV4)], rounds: usize) -> anyhow::Result<ConnectTimes> {
    let mut times = ConnectTimes::default();
    let timed = |to: SocketAddrV4| -> anyhow::Result<u64> {
        let begin = Instant::now();
        let (_, at) = connect(to, Duration::from_secs(1))?;
        Ok(u64::try_from((at - begin).as_nanos())?)
    };
    for (service, direct) in pairs.iter().cycle().take(rounds) {
        times.direct.push(timed(*direct)?);
        times.service.push(timed(*service)?);
    }
    Ok(times)
}
