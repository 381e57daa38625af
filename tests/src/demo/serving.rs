//! Which planes serve, and why.
//!
//! In: a node whose agent is ready. Out: the planes that the agent reports at `/proxyMode`, and the reason that a probe
//! of the same kernel and the same directories gives.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, TcpStream},
    path::Path,
};

use anyhow::{Context as _, Result};
use weir::{dns, machine::probe::Probe};

use crate::{
    node::{Location, Topology},
    wait::DEADLINE,
};

/// Where kube-proxy's metrics are, and weir's.
const METRICS_PORT: u16 = 10249;

/// The plane that a connection goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Via {
    /// eBPF hooks at the cgroup of the client.
    Socket,
    /// Packets, translated by nftables.
    Nftables,
}

impl Via {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Socket => "socket",
            Self::Nftables => "nftables",
        }
    }
}

/// The planes that serve, and why.
pub(super) struct Serving {
    pub(super) planes: Vec<Via>,
    /// A sentence, and lines below it.
    pub(super) reason: String,
    /// Why names are not answered, where they are not.
    pub(super) without_names: Option<String>,
}

impl Serving {
    /// Asks the agent of node 1. `obstacle` is the reason why the node has no cgroup or no bpffs, where that is so.
    pub(super) fn find(topology: &Topology, mode: &str, obstacle: Option<&str>, log: &Path) -> Result<Self> {
        let node = topology.at(Location::Host(1));
        let bpf_root = topology.bpf_root(1)?;
        let (served, probe, names) =
            node.run(|| (proxy_mode(), Probe::of(topology.cgroup_root(1), &bpf_root), dns::openable()));
        let planes = match served?.as_str() {
            "ebpf" => vec![Via::Socket, Via::Nftables],
            _ => vec![Via::Nftables],
        };
        let reason = if planes.contains(&Via::Socket) {
            let needed = probe.findings.iter().filter(|finding| finding.needed).count();
            format!(
                "The socket plane (eBPF) serves, because Linux {} has all {needed} features that it needs.\n\
                 nftables serves the rest: clients outside, and sockets that eBPF hooks do not see.",
                probe.kernel
            )
        } else {
            format!("nftables serves alone, because {}", obstacles(mode, obstacle, &probe, log))
        };
        let without_names = names.err().map(|error| format!("{:#}", anyhow::Error::from(error)));
        Ok(Self { planes, reason, without_names })
    }
}

/// Why there is no socket plane, as the end of a sentence.
fn obstacles(mode: &str, obstacle: Option<&str>, probe: &Probe, log: &Path) -> String {
    let listed = |lines: &[String]| format!(":\n  {}", lines.join("\n  "));
    if mode == "nftables" {
        return "the mode is nftables.".to_owned();
    }
    if let Some(obstacle) = obstacle {
        return format!("the demo cannot make what the socket plane needs{}", listed(&[obstacle.to_owned()]));
    }
    let reasons = probe.reasons();
    if !reasons.is_empty() {
        return format!("Linux {} lacks what the socket plane needs{}", probe.kernel, listed(&reasons));
    }
    let log = std::fs::read_to_string(log).unwrap_or_default();
    let is_trouble = |line: &&str| line.contains(" WARN ") || line.contains(" ERROR ");
    let lines: Vec<String> = log.lines().filter(is_trouble).map(str::to_owned).collect();
    format!("the socket plane did not start{}", listed(&lines))
}

/// The agent's answer at `/proxyMode`, in the calling thread's namespace.
fn proxy_mode() -> Result<String> {
    let mut stream =
        TcpStream::connect((Ipv4Addr::LOCALHOST, METRICS_PORT)).context("the agent serves no HTTP")?;
    stream.set_read_timeout(Some(DEADLINE))?;
    stream.write_all(b"GET /proxyMode HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (_, body) = answer.split_once("\r\n\r\n").context("the agent's answer has no body")?;
    Ok(body.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use weir::machine::probe::{Answer, Finding};

    use super::*;

    #[test]
    fn each_obstacle_of_the_socket_plane_is_a_reason() {
        let probe = |answer| Probe {
            kernel: "4.19.0".to_owned(),
            findings: vec![Finding {
                feature: "links".to_owned(),
                since: "5.7",
                needed: true,
                purpose: "They attach programs.",
                answer,
            }],
            set_retval: true,
            namespace_cookie: true,
            socket_destroy: true,
        };
        let log = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(log.path(), "T  INFO one\nT  WARN two\nT ERROR three\n").unwrap();
        let lacking = probe(Answer::No(String::new()));
        let reason = |mode, obstacle, probe: &Probe| obstacles(mode, obstacle, probe, log.path());
        assert_eq!(reason("nftables", None, &lacking), "the mode is nftables.");
        assert_eq!(
            reason("auto", Some("EPERM"), &lacking),
            "the demo cannot make what the socket plane needs:\n  EPERM"
        );
        assert_eq!(
            reason("auto", None, &lacking),
            "Linux 4.19.0 lacks what the socket plane needs:\n  links: no (since Linux 5.7). They attach programs."
        );
        assert_eq!(
            reason("auto", None, &probe(Answer::Yes)),
            "the socket plane did not start:\n  T  WARN two\n  T ERROR three"
        );
    }
}
