//! The clients of one topology: blocking sockets, a thread for each.
//!
//! In: what to do, and with whom. Out: how many requests a second were answered. A lone client stays on one core, on
//! which its servers are too: its rate then is the CPU time that a request takes all in all.

use std::{
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket},
    sync::mpsc::{Sender, channel},
    thread::available_parallelism,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    sys::socket::{setsockopt, sockopt},
    unistd::Pid,
};
use serde::{Deserialize, Serialize};

use super::MESSAGE;
use crate::netns::Namespace;

/// The longest that an answer is waited for.
const PATIENCE: Duration = Duration::from_secs(5);

/// What a client does over and over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Traffic {
    /// TCP: connect, one request, close.
    Connect,
    /// TCP: requests on one connection.
    Request,
    /// UDP: requests from a connected socket.
    ConnectedDatagram,
    /// UDP: requests from a socket that says with each where it goes.
    Datagram,
}

impl Traffic {
    /// What it is called in tables.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Connect => "TCP connect, request, close",
            Self::Request => "TCP requests, kept connection",
            Self::ConnectedDatagram => "UDP requests, connected",
            Self::Datagram => "UDP requests, unconnected",
        }
    }
}

type Job = Box<dyn FnOnce() + Send>;

/// Threads in a pod that do what they are told, so that starting them is no part of what is measured.
pub(in crate::bench) struct Crew {
    threads: Vec<Sender<Job>>,
}

impl Crew {
    /// Starts so many threads, of which the first is the lone client.
    ///
    /// # Errors
    ///
    /// When they cannot be started.
    pub(super) fn start(pod: &Namespace, size: usize) -> Result<Self> {
        let threads = (0..size).map(|number| {
            let (jobs, todo) = channel::<Job>();
            pod.thread(move || {
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
    ///
    /// # Errors
    ///
    /// What `work` says, or when the thread is gone.
    pub(in crate::bench) fn alone<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (answer, result) = channel();
        let job: Job = Box::new(move || drop(answer.send(work())));
        let lone = self.threads.first().context("a crew of nobody")?;
        lone.send(job).ok().context("a client is gone")?;
        result.recv()?
    }

    /// How many requests a second `clients` together get answered: one alone, or several of the others.
    ///
    /// # Errors
    ///
    /// When a request is not answered.
    pub(super) fn rate(
        &self,
        traffic: Traffic,
        clients: usize,
        to: &[SocketAddr],
        slot: Duration,
    ) -> Result<f64> {
        let first = usize::from(clients > 1);
        let (answer, results) = channel();
        for jobs in self.threads.iter().skip(first).take(clients) {
            let (answer, to) = (answer.clone(), to.to_owned());
            let job: Job = Box::new(move || drop(answer.send(drive(traffic, &to, slot))));
            jobs.send(job).ok().context("a client is gone")?;
        }
        drop(answer);
        results.into_iter().sum()
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

/// Requests a second of one client, after a warm-up of a tenth of the time.
fn drive(traffic: Traffic, to: &[SocketAddr], slot: Duration) -> Result<f64> {
    let first = *to.first().context("nobody to ask")?;
    let mut message = [0x57; MESSAGE];
    match traffic {
        Traffic::Connect => timed(to, slot, |to| {
            let stream = connect(to)?;
            ask(&stream, &mut message)?;
            reset(&stream)
        }),
        Traffic::Request => {
            let stream = connect(first)?;
            timed(to, slot, |_| ask(&stream, &mut message))
        }
        Traffic::ConnectedDatagram => {
            let socket = datagrams(first)?;
            socket.connect(first)?;
            timed(to, slot, |_| {
                socket.send(&message)?;
                socket.recv(&mut message).map(drop)
            })
        }
        Traffic::Datagram => {
            let socket = datagrams(first)?;
            timed(to, slot, |_| {
                socket.send_to(&message, first)?;
                socket.recv_from(&mut message).map(drop)
            })
        }
    }
    .with_context(|| format!("{} to {first}", traffic.name()))
}

fn timed(
    to: &[SocketAddr],
    slot: Duration,
    mut request: impl FnMut(SocketAddr) -> io::Result<()>,
) -> Result<f64> {
    let mut targets = to.iter().copied().cycle();
    let mut during = |time: Duration| -> Result<f64> {
        let begin = Instant::now();
        let mut requests = 0_u32;
        loop {
            request(targets.next().context("nobody to ask")?)?;
            requests += 1;
            let elapsed = begin.elapsed();
            if elapsed >= time {
                return Ok(f64::from(requests) / elapsed.as_secs_f64());
            }
        }
    };
    during(slot / 10)?;
    during(slot)
}

/// Connects, with bounded patience for answers.
pub(in crate::bench) fn connect(to: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(to)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// Has a connection closed with a reset. With thousands in TIME_WAIT, connections with translated destinations meet those
/// that had the same port before and are refused for their timestamps (`PAWSTimewait`): seconds that have nothing to do
/// with what is measured.
pub(in crate::bench) fn reset(stream: &TcpStream) -> io::Result<()> {
    Ok(setsockopt(stream, sockopt::Linger, &nix::libc::linger { l_onoff: 1, l_linger: 0 })?)
}

/// A socket of the family of `to`, with bounded patience for answers.
pub(in crate::bench) fn datagrams(to: SocketAddr) -> io::Result<UdpSocket> {
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
