//! iperf3, for what it measures well: bytes and packets of one flow, as many as go through.
//!
//! In: where to, and how much. Out: a rate, as the receiving side saw it, and what both sides needed of the CPU. An amount
//! instead of a time keeps turns short; iperf3 has no time under a second.

use std::{
    net::SocketAddr,
    path::Path,
    process::Child,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use super::load::Traffic;
use weir_tests::{netns::Namespace, process::end};

/// Bytes in a millisecond of a turn: about what a fast machine gets through.
const BYTES: u128 = 3 << 20;
/// Packets in a millisecond of a turn.
const PACKETS: u128 = 250;
/// Bytes of a small packet.
const PACKET: u16 = 64;
/// The most attempts at a turn.
const ATTEMPTS: u32 = 6;
/// The longest that a server is waited for.
const PATIENCE: Duration = Duration::from_secs(10);

/// A server at one address.
pub(super) struct Server(Child);

impl Server {
    /// Starts one and waits until it listens.
    pub(super) fn start(namespace: &Namespace, at: SocketAddr) -> Result<Self> {
        let (address, port) = (at.ip().to_string(), at.port().to_string());
        let mut server = Self(namespace.spawn(Path::new("iperf3"), |iperf| {
            iperf.args(["--server", "--bind", &address, "--port", &port]);
            iperf.stdout(std::process::Stdio::null());
        })?);
        let begin = Instant::now();
        while !namespace.run(|| listens(at))? {
            if let Some(status) = server.0.try_wait()? {
                bail!("iperf3 --server at {at} ended: {status}");
            }
            ensure!(begin.elapsed() < PATIENCE, "iperf3 does not listen on {at}");
            thread::sleep(Duration::from_millis(10));
        }
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        end(&mut self.0);
    }
}

/// Connecting would be taken for a client, so the kernel's table is asked.
fn listens(at: SocketAddr) -> Result<bool> {
    let file = if at.is_ipv4() { "/proc/thread-self/net/tcp" } else { "/proc/thread-self/net/tcp6" };
    let text = std::fs::read_to_string(file)?;
    let port = format!(":{:04X}", at.port());
    let mut sockets = text.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    Ok(sockets.any(|socket| socket.len() > 3 && socket[1].ends_with(&port) && socket[3] == "0A"))
}

/// The result of a turn.
pub(super) struct Flood {
    /// Units of [`Traffic::unit`] that arrived in a second.
    pub(super) rate: f64,
    /// CPU time of both sides for one of them, in nanoseconds.
    pub(super) cpu_nanoseconds: f64,
}

/// One turn of `slot`, more or less.
pub(super) fn flood(clients: &Namespace, traffic: Traffic, to: SocketAddr, slot: Duration) -> Result<Flood> {
    let mut attempt = 1;
    loop {
        match once(clients, traffic, to, slot) {
            // The server takes one client at a time, and may not have done with the last one.
            Err(_) if attempt < ATTEMPTS => thread::sleep(Duration::from_millis(50) * attempt),
            result => return result,
        }
        attempt += 1;
    }
}

fn once(clients: &Namespace, traffic: Traffic, to: SocketAddr, slot: Duration) -> Result<Flood> {
    let milliseconds = slot.as_millis().max(1);
    let (address, port) = (to.ip().to_string(), to.port().to_string());
    let mut arguments = vec!["--client", &address, "--port", &port, "--json", "--connect-timeout", "2000"];
    // The client on one core, its server on another, where there are two.
    let cores = thread::available_parallelism().map_or(1, usize::from);
    if cores > 1 {
        arguments.extend(["--affinity", "0,1"]);
    }
    let amount = match traffic {
        Traffic::Bulk => milliseconds * BYTES,
        _ => milliseconds * PACKETS,
    }
    .to_string();
    let length = PACKET.to_string();
    match traffic {
        Traffic::Bulk => arguments.extend(["--bytes", &amount]),
        _ => arguments.extend(["--udp", "--length", &length, "--bitrate", "0", "--blockcount", &amount]),
    }
    let output = clients.output("iperf3", &arguments)?;
    let result: Value = serde_json::from_slice(&output.stdout).context("iperf3 wrote no JSON")?;
    if let Some(error) = result["error"].as_str() {
        bail!("iperf3 to {to}: {error}");
    }
    read(&result["end"], traffic).with_context(|| format!("iperf3 wrote {}", result["end"]))
}

fn read(end: &Value, traffic: Traffic) -> Option<Flood> {
    let number = |value: &Value| value.as_f64();
    let received = &end["sum_received"];
    let unit = if traffic == Traffic::Bulk { 1024.0 } else { f64::from(PACKET) };
    let rate = number(&received["bytes"])? / unit / number(&received["seconds"])?;
    let cpu = &end["cpu_utilization_percent"];
    let percent = number(&cpu["host_total"])? + number(&cpu["remote_total"])?;
    // On a machine that is busy enough not one packet may arrive in so short a turn: that is no rate.
    let arrived = rate.is_finite() && rate > 0.0;
    arrived.then(|| Flood { rate, cpu_nanoseconds: percent / 100.0 * 1e9 / rate })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn received_bytes_count() {
        let cpu = json!({ "host_total": 50.0, "remote_total": 150.0 });
        let end = json!({
            "sum_received": { "bytes": 2_048_000.0, "seconds": 2.0 },
            "sum": { "packets": 90_000, "seconds": 0.5 },
            "cpu_utilization_percent": cpu.clone(),
        });
        let bulk = read(&end, Traffic::Bulk).unwrap();
        assert_eq!((bulk.rate, bulk.cpu_nanoseconds), (1000.0, 2e6));
        let packets = read(&end, Traffic::Packets).unwrap();
        assert_eq!((packets.rate, packets.cpu_nanoseconds), (16_000.0, 125e3));
        assert!(read(&json!({}), Traffic::Bulk).is_none());
        let nothing =
            json!({ "sum_received": { "bytes": 0, "seconds": 0.5 }, "cpu_utilization_percent": cpu });
        assert!(read(&nothing, Traffic::Packets).is_none());
    }
}
