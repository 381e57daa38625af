//! The clients of one place: blocking sockets, a thread for each.
//!
//! In: what to do, and with which servers. Out: how many requests were answered, how fast and how soon. A lone client stays on one
//! core, on which its servers are too: what a request takes all in all is then seen in the rate.
//!
//! Why not one of the known load generators: rounds are compared turn by turn, tens of milliseconds each, in namespaces
//! side by side, with one server for all and no second connection to control it. wrk and fortio speak HTTP only, without
//! UDP and without a connect by itself; netperf and sockperf take turns of seconds and a control connection that would have to
//! reach the server through the Service as well. What iperf3 measures, it measures: see `iperf`.

use std::{
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket},
    sync::mpsc::{Sender, channel},
    thread::available_parallelism,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    sys::socket::{setsockopt, sockopt},
    unistd::Pid,
};

use super::{MESSAGE, load::Traffic};
use weir_tests::netns::Namespace;

/// The longest that an answer is waited for.
const PATIENCE: Duration = Duration::from_secs(5);

/// The result of a turn of some clients.
#[derive(Debug, Default)]
pub(super) struct Turn {
    /// Requests that were answered in a second.
    pub(super) rate: f64,
    /// Requests that were answered, with those of the warm-up.
    pub(super) requests: u64,
    /// How long each took that counts, in nanoseconds: for [`Traffic::Connect`] the connect alone, which is the way of
    /// the first packet and back.
    pub(super) latencies: Vec<u32>,
}

impl Turn {
    fn and(mut self, other: Self) -> Self {
        self.rate += other.rate;
        self.requests += other.requests;
        self.latencies.extend(other.latencies);
        self
    }
}

type Job = Box<dyn FnOnce() + Send>;

/// Threads in a namespace that wait for jobs, so that starting them is no part of what is measured.
pub(crate) struct Crew {
    threads: Vec<Sender<Job>>,
}

impl Crew {
    /// Starts so many threads, of which the first is the lone client.
    pub(super) fn start(place: &Namespace, size: usize) -> Result<Self> {
        let threads = (0..size).map(|number| {
            let (jobs, todo) = channel::<Job>();
            place.thread(move || {
                if number == 0 {
                    stay();
                } else {
                    spread(number);
                }
                todo.into_iter().for_each(|job| job());
            })?;
            Ok(jobs)
        });
        Ok(Self { threads: threads.collect::<Result<_>>()? })
    }

    /// Runs `work` on the lone client's thread.
    pub(crate) fn alone<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (answer, result) = channel();
        let job: Job = Box::new(move || drop(answer.send(work())));
        let lone = self.threads.first().context("a crew without threads")?;
        lone.send(job).ok().context("a client is gone")?;
        result.recv()?
    }

    /// The joint result of `clients`: one alone, or several of the others.
    pub(super) fn turn(
        &self,
        traffic: Traffic,
        clients: usize,
        to: &[SocketAddr],
        slot: Duration,
    ) -> Result<Turn> {
        let first = usize::from(clients > 1);
        let (answer, results) = channel();
        for jobs in self.threads.iter().skip(first).take(clients) {
            let (answer, to) = (answer.clone(), to.to_owned());
            let job: Job = Box::new(move || drop(answer.send(drive(traffic, &to, slot))));
            jobs.send(job).ok().context("a client is gone")?;
        }
        drop(answer);
        // All of them, also after one that failed: the next turn wants them back.
        let all: Vec<Result<Turn>> = results.into_iter().collect();
        all.into_iter().try_fold(Turn::default(), |sum, turn| Ok(sum.and(turn?)))
    }
}

/// Keeps the calling thread on the last core, which is not where interrupts go first.
pub(super) fn stay() {
    keep_on(cores() - 1);
}

/// Keeps the calling thread on a core, one number after the other on the next.
pub(super) fn spread(number: usize) {
    keep_on(number % cores());
}

fn cores() -> usize {
    available_parallelism().map_or(1, usize::from)
}

fn keep_on(core: usize) {
    let mut cores = CpuSet::new();
    // Where that is not allowed, it is only a less quiet measurement.
    let _ = cores.set(core).and_then(|()| sched_setaffinity(Pid::from_raw(0), &cores));
}

/// One client's turn, after a warm-up of a tenth of the time.
fn drive(traffic: Traffic, to: &[SocketAddr], slot: Duration) -> Result<Turn> {
    let first = *to.first().context("no address to ask")?;
    let mut message = [0x57; MESSAGE];
    match traffic {
        Traffic::Connect => timed(to, slot, |to| {
            let begin = Instant::now();
            let stream = connect(to)?;
            let connected = begin.elapsed();
            ask(&stream, &mut message)?;
            reset(&stream)?;
            Ok(Some(connected))
        }),
        Traffic::Request => {
            let stream = connect(first)?;
            timed(to, slot, |_| ask(&stream, &mut message).map(|()| None))
        }
        Traffic::ConnectedDatagram => {
            let socket = datagrams(first)?;
            socket.connect(first)?;
            timed(to, slot, |_| {
                socket.send(&message)?;
                socket.recv(&mut message).map(|_| None)
            })
        }
        Traffic::Datagram => {
            let socket = datagrams(first)?;
            timed(to, slot, |_| {
                socket.send_to(&message, first)?;
                socket.recv_from(&mut message).map(|_| None)
            })
        }
        Traffic::Bulk | Traffic::Packets => bail!("{} is iperf3's", traffic.name()),
    }
    .with_context(|| format!("{} to {first}", traffic.name()))
}

/// Repeats a request. Its own time counts, or the time since the one before.
fn timed(
    to: &[SocketAddr],
    slot: Duration,
    mut request: impl FnMut(SocketAddr) -> io::Result<Option<Duration>>,
) -> Result<Turn> {
    let mut targets = to.iter().copied().cycle();
    let mut during = |time: Duration| -> Result<Turn> {
        let mut turn = Turn::default();
        let begin = Instant::now();
        let mut last = begin;
        loop {
            let taken = request(targets.next().context("no address to ask")?)?;
            let now = Instant::now();
            let taken = taken.unwrap_or(now - last);
            turn.latencies.push(u32::try_from(taken.as_nanos()).unwrap_or(u32::MAX));
            last = now;
            turn.requests += 1;
            let elapsed = now - begin;
            if elapsed >= time {
                turn.rate = turn.requests as f64 / elapsed.as_secs_f64();
                return Ok(turn);
            }
        }
    };
    let warm_up = during(slot / 10)?.requests;
    let turn = during(slot)?;
    Ok(Turn { requests: turn.requests + warm_up, ..turn })
}

/// Connects, with bounded patience for answers.
pub(crate) fn connect(to: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// Has a connection closed with a reset. With thousands in TIME_WAIT, connections with translated destinations meet those
/// that had the same port before and are refused for their timestamps (`PAWSTimewait`): seconds that have nothing to do
/// with what is measured.
pub(crate) fn reset(stream: &TcpStream) -> io::Result<()> {
    Ok(setsockopt(stream, sockopt::Linger, &nix::libc::linger { l_onoff: 1, l_linger: 0 })?)
}

/// A socket of the family of `to`, with bounded patience for answers.
pub(crate) fn datagrams(to: SocketAddr) -> io::Result<UdpSocket> {
    let socket = if to.is_ipv4() {
        UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?
    } else {
        UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0))?
    };
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

fn ask(mut stream: &TcpStream, message: &mut [u8; MESSAGE]) -> io::Result<()> {
    stream.write_all(message)?;
    stream.read_exact(message)
}
