//! Sysctls of connection tracking, and oom_score_adj, as kube-proxy sets them.
//!
//! In: the configuration. Out: the written values. Where the kernel refuses a write, as in a container with a read-only /proc/sys,
//! a warning names the value to set by hand, and weir serves all the same.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::{config::Conntrack, stale::flows::Conntrack as Tracking};

/// The upper bound, whatever the number of CPUs (K8).
const MOST_CONNECTIONS: u64 = 1 << 20;
const MAX: &str = "proc/sys/net/netfilter/nf_conntrack_max";
/// kube-proxy's default: the kernel kills it among the last.
const OOM_SCORE: i32 = -999;

#[derive(Debug, thiserror::Error)]
#[error("cannot set {} to {wanted}, it is {found}; set it by hand or change the field", path.display())]
struct NotSet {
    path: PathBuf,
    wanted: u64,
    found: String,
    #[source]
    source: io::Error,
}

/// Writes all values, and warns about those that cannot be written.
pub(crate) fn prepare(conntrack: &Conntrack, oom_score: Option<i32>) {
    // The sysctls appear with the module, which a fresh node loads only when the first rule needs it.
    if !Path::new("/").join(MAX).exists()
        && let Err(error) = Tracking::open().and_then(|mut tracking| tracking.load())
    {
        tracing::warn!(%error, "cannot load connection tracking before its first use");
    }
    match aya::util::online_cpus() {
        Ok(cpus) => limit(conntrack, cpus.len() as u64, Path::new("/")),
        Err((_, error)) => {
            tracing::warn!(%error, "cannot read the number of CPUs, the limits of connection tracking stay unchanged")
        }
    }
    let path = "/proc/self/oom_score_adj";
    let score = oom_score.unwrap_or(OOM_SCORE);
    let known = fs::read_to_string(path).unwrap_or_default();
    if known.trim() == score.to_string() {
        return;
    }
    match fs::write(path, score.to_string()) {
        // The kubelet sets an equally low value for node-critical pods.
        Err(error) if oom_score.is_none() => tracing::debug!(%error, score, "oom_score_adj stays unchanged"),
        Err(error) => {
            tracing::warn!(%error, score, "cannot set oomScoreAdj, which takes CAP_SYS_RESOURCE");
        }
        Ok(()) => {}
    }
}

/// Writes the values for `cpus` CPUs, below `root`.
fn limit(conntrack: &Conntrack, cpus: u64, root: &Path) {
    for problem in limits(conntrack, cpus).into_iter().filter_map(|(path, wanted)| {
        let path = root.join(path);
        set(&path, wanted).err().map(|(found, source)| NotSet { path, wanted, found, source })
    }) {
        let cause = std::error::Error::source(&problem).map(ToString::to_string);
        tracing::warn!(cause, "{problem}");
    }
    if let Err(error) = widen(conntrack, cpus, root) {
        tracing::warn!(%error, "the hash table of connection tracking is too small for its limit");
    }
}

/// The sysctls and their values.
fn limits(conntrack: &Conntrack, cpus: u64) -> Vec<(&'static str, u64)> {
    let Conntrack {
        max_per_core: _,
        min: _,
        tcp_established_timeout,
        tcp_close_wait_timeout,
        tcp_be_liberal,
        udp_timeout,
        udp_stream_timeout,
    } = *conntrack;
    let seconds = |timeout: Option<Duration>| timeout.map(|timeout| timeout.as_secs());
    [
        (MAX, most_connections(conntrack, cpus)),
        ("proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established", seconds(tcp_established_timeout)),
        ("proc/sys/net/netfilter/nf_conntrack_tcp_timeout_close_wait", seconds(tcp_close_wait_timeout)),
        ("proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal", tcp_be_liberal.then_some(1)),
        ("proc/sys/net/netfilter/nf_conntrack_udp_timeout", seconds(udp_timeout)),
        ("proc/sys/net/netfilter/nf_conntrack_udp_timeout_stream", seconds(udp_stream_timeout)),
    ]
    .into_iter()
    .filter_map(|(path, value)| Some((path, value?)))
    .collect()
}

fn most_connections(conntrack: &Conntrack, cpus: u64) -> Option<u64> {
    let scaled = u64::from(conntrack.max_per_core?) * cpus;
    Some(if scaled > MOST_CONNECTIONS { MOST_CONNECTIONS } else { scaled.max(conntrack.min.into()) })
}

/// Sizes the hash table for the limit. All network namespaces share the table.
fn widen(conntrack: &Conntrack, cpus: u64, root: &Path) -> io::Result<()> {
    let Some(most) = most_connections(conntrack, cpus) else { return Ok(()) };
    let limit = fs::read_to_string(root.join(MAX))?;
    if !limit.trim().parse::<u64>().is_ok_and(|limit| limit >= most) {
        return Ok(());
    }
    let path = root.join("sys/module/nf_conntrack/parameters/hashsize");
    let buckets = fs::read_to_string(&path)?;
    if buckets.trim().parse::<u64>().is_ok_and(|buckets| buckets >= most / 4) {
        return Ok(());
    }
    fs::write(&path, (most / 4).to_string())
}

/// Writes a value unless the present one will do. The error has the present value.
fn set(path: &Path, wanted: u64) -> Result<(), (String, io::Error)> {
    let found = fs::read_to_string(path).map_err(|error| ("missing".to_owned(), error))?;
    let found = found.trim();
    if does(path, found, wanted) {
        return Ok(());
    }
    fs::write(path, wanted.to_string()).map_err(|error| (found.to_owned(), error))?;
    tracing::info!(setting = %path.display(), from = found, to = wanted, "set");
    Ok(())
}

/// Whether the present value may stay. The limit is only raised, because an administrator may have set more (K8).
fn does(path: &Path, found: &str, wanted: u64) -> bool {
    found == wanted.to_string()
        || (path.ends_with(MAX) && found.parse().is_ok_and(|found: u64| found > wanted))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ESTABLISHED: &str = "proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established";
    const HASH: &str = "sys/module/nf_conntrack/parameters/hashsize";

    /// kube-proxy's defaults.
    fn usual() -> Conntrack {
        Conntrack {
            max_per_core: Some(32 << 10),
            min: 128 << 10,
            tcp_established_timeout: Some(Duration::from_secs(24 * 3600)),
            tcp_close_wait_timeout: Some(Duration::from_secs(3600)),
            ..Conntrack::default()
        }
    }

    #[test]
    fn the_limit_follows_the_cpus_between_the_least_and_a_million() {
        for (max_per_core, min, cpus, limit) in [
            (Some(32 << 10), 128 << 10, 2, Some(128 << 10)),
            (Some(32 << 10), 128 << 10, 8, Some(256 << 10)),
            (Some(32 << 10), 128 << 10, 64, Some(1 << 20)),
            (Some(32 << 10), 2 << 20, 2, Some(2 << 20)),
            (Some(32 << 10), 2 << 20, 64, Some(1 << 20)),
            (Some(1), 0, 4, Some(4)),
            (None, 128 << 10, 64, None),
        ] {
            let conntrack = Conntrack { max_per_core, min, ..Conntrack::default() };
            assert_eq!(most_connections(&conntrack, cpus), limit, "{conntrack:?} {cpus}");
        }
    }

    #[test]
    fn only_what_is_configured_is_set() {
        assert_eq!(limits(&Conntrack::default(), 2), []);
        let all = Conntrack {
            tcp_be_liberal: true,
            udp_timeout: Some(Duration::from_secs(5)),
            udp_stream_timeout: Some(Duration::from_secs(6)),
            ..usual()
        };
        let values: Vec<u64> = limits(&all, 2).into_iter().map(|(_, value)| value).collect();
        assert_eq!(values, [131_072, 86_400, 3600, 1, 5, 6]);
    }

    /// File systems that hold these settings.
    fn machine(settings: [(&str, &str); 3]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, value) in settings {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, value).unwrap();
        }
        root
    }

    #[test]
    fn what_cannot_be_set_keeps_nothing_else_from_being_set() {
        // There is no nf_conntrack_tcp_timeout_close_wait.
        let root = machine([(ESTABLISHED, "432000\n"), (MAX, "65536\n"), (HASH, "16384\n")]);
        limit(&usual(), 2, root.path());
        let read = |path| fs::read_to_string(root.path().join(path)).unwrap();
        assert_eq!([MAX, ESTABLISHED, HASH].map(read), ["131072", "86400", "32768"]);

        fs::write(root.path().join(HASH), "65536\n").unwrap();
        limit(&usual(), 2, root.path());
        assert_eq!(read(HASH), "65536\n", "a larger table stays");
    }

    #[test]
    fn room_for_more_connections_than_asked_for_is_never_taken_away_k8() {
        let root = machine([(ESTABLISHED, "999999\n"), (MAX, "2000000\n"), (HASH, "16384\n")]);
        limit(&usual(), 2, root.path());
        let read = |path| fs::read_to_string(root.path().join(path)).unwrap();
        // A time is what was asked for, and the table suits at least that.
        assert_eq!([MAX, ESTABLISHED, HASH].map(read), ["2000000\n", "86400", "32768"]);
    }
}
