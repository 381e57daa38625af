//! The time that the socket programs take, by the kernel's own clock.
//!
//! In: an agent, clients in its topology. Out: [`Cost`]s. The kernel counts runs and their time only while a process asks
//! it to (`BPF_ENABLE_STATS`), and stops by itself when that one is gone; reading the clock twice is in each figure.

use std::{
    collections::BTreeMap,
    fs,
    net::{SocketAddr, UdpSocket},
};

use anyhow::{Context as _, Result, ensure};
use aya::{
    programs::loaded_programs,
    sys::{Stats, enable_stats},
};
use serde::{Deserialize, Serialize};

use super::{
    paths::client::{Crew, connect, datagrams, reset},
    subject::Subject,
};

/// Repetitions of a case for one figure.
const REPEATS: u32 = 2000;
/// Figures for each case.
const ROUNDS: usize = 9;

/// The time that one program took in one case.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cost {
    /// The subject of the programs; none for those of the build under test.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub other: Option<Subject>,
    pub services: u32,
    pub program: String,
    pub case: String,
    /// Nanoseconds of one run, one figure for each round.
    pub nanoseconds: Vec<f64>,
}

/// Program, what clients do, the function that does it, and with which address.
type Case = (&'static str, &'static str, fn(SocketAddr) -> Result<()>, SocketAddr);

/// Measures all cases: `service` and `pod` are addresses of both families.
pub(super) fn measure(
    services: u32,
    agent: u32,
    crew: &Crew,
    service: [SocketAddr; 2],
    pod: [SocketAddr; 2],
) -> Result<Vec<Cost>> {
    let _counting = enable_stats(Stats::RunTime).context("making the kernel count what programs take")?;
    let names = names()?;
    let mut costs = Vec::new();
    for (program, case, client, to) in cases(service, pod) {
        let mut nanoseconds = Vec::new();
        for _ in 0..ROUNDS {
            let before = counted(agent, &names, program)?;
            crew.alone(move || client(to))?;
            let after = counted(agent, &names, program)?;
            let runs = after.1.saturating_sub(before.1);
            ensure!(runs > 0, "{program} does not run for {case}");
            nanoseconds.push(after.0.saturating_sub(before.0) as f64 / runs as f64);
        }
        costs.push(Cost {
            other: None,
            services,
            program: program.to_owned(),
            case: case.to_owned(),
            nanoseconds,
        });
    }
    Ok(costs)
}

fn cases([service, service6]: [SocketAddr; 2], [pod, pod6]: [SocketAddr; 2]) -> [Case; 13] {
    [
        ("connect4", "TCP to a ClusterIP", stream, service),
        ("connect4", "TCP to a pod", stream, pod),
        ("connect6", "TCP to a ClusterIP", stream, service6),
        ("connect6", "TCP to a pod", stream, pod6),
        ("sock_release", "TCP to a ClusterIP", stream, service),
        ("sock_release", "TCP to a pod", stream, pod),
        ("connect4", "UDP to a ClusterIP", connected, service),
        ("sendmsg4", "first datagram to a ClusterIP", first_datagram, service),
        ("sendmsg4", "next datagrams to a ClusterIP", next_datagrams, service),
        ("sendmsg4", "datagrams to a pod", next_datagrams, pod),
        ("sendmsg6", "next datagrams to a ClusterIP", next_datagrams, service6),
        ("recvmsg4", "answers from a ClusterIP", next_datagrams, service),
        ("recvmsg4", "answers from a pod", next_datagrams, pod),
    ]
}

fn stream(to: SocketAddr) -> Result<()> {
    (0..REPEATS).try_for_each(|_| Ok(reset(&connect(to)?)?))
}

fn connected(to: SocketAddr) -> Result<()> {
    (0..REPEATS).try_for_each(|_| Ok(datagrams(to)?.connect(to)?))
}

fn first_datagram(to: SocketAddr) -> Result<()> {
    (0..REPEATS).try_for_each(|_| exchange(&datagrams(to)?, to))
}

fn next_datagrams(to: SocketAddr) -> Result<()> {
    let socket = datagrams(to)?;
    (0..REPEATS).try_for_each(|_| exchange(&socket, to))
}

fn exchange(socket: &UdpSocket, to: SocketAddr) -> Result<()> {
    let mut message = [0; 64];
    socket.send_to(&message, to)?;
    socket.recv_from(&mut message)?;
    Ok(())
}

/// The names of all programs, by their numbers.
fn names() -> Result<BTreeMap<u64, String>> {
    // A program of another process may go while they are read.
    let known = loaded_programs().filter_map(Result::ok);
    Ok(known
        .map(|program| (program.id().into(), program.name_as_str().unwrap_or_default().to_owned()))
        .collect())
}

/// Nanoseconds and runs of one of the agent's programs so far.
fn counted(agent: u32, names: &BTreeMap<u64, String>, program: &str) -> Result<(u64, u64)> {
    let all = counted_by_name(agent, names)?;
    all.get(program).copied().with_context(|| format!("the agent has no program {program}"))
}

/// Nanoseconds and runs of all the agent's programs so far.
pub(super) fn counted_all(agent: u32) -> Result<BTreeMap<String, (u64, u64)>> {
    counted_by_name(agent, &names()?)
}

fn counted_by_name(agent: u32, names: &BTreeMap<u64, String>) -> Result<BTreeMap<String, (u64, u64)>> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{agent}/fdinfo"))? {
        let Ok(text) = fs::read_to_string(entry?.path()) else { continue };
        let field = |name: &str| -> Option<u64> {
            text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
        };
        if let Some(name) = field("prog_id:").and_then(|id| names.get(&id)) {
            let counts = field("run_time_ns:").zip(field("run_cnt:"));
            all.insert(name.clone(), counts.context("this kernel does not count runs")?);
        }
    }
    Ok(all)
}
