//! Limits for open files.
//!
//! In: the process's RLIMIT_NOFILE. Out: the soft limit raised to the hard one, and a bound for each server; together the bounds
//! stay below the limit. Container runtimes start processes with a soft limit of 1,024, so without bounds one client with 1,024
//! connections would leave no file for the sources and the planes.

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use prometheus_client::metrics::counter::Counter;

use crate::{
    connection_limit::ConnectionLimit,
    dns::{InFlight, Room},
    observe::Metrics,
    relay::LoopbackPort,
};

/// The soft limit that container runtimes set; assumed if the kernel's answer is missing.
const USUAL: u64 = 1024;

#[derive(Clone, Copy, Debug)]
pub(super) struct Files(u64);

impl Files {
    /// Raises the soft limit to the hard one.
    pub(super) fn raise() -> Self {
        let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, hard)| {
            setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
            Ok(hard)
        });
        match raised {
            Ok(limit) => Self(limit),
            Err(error) => {
                tracing::warn!(%error, "cannot raise the limit of open files; the servers keep fewer connections");
                Self(getrlimit(Resource::RLIMIT_NOFILE).map_or(USUAL, |(soft, _)| soft))
            }
        }
    }

    /// `most`, but at most a quarter of the limit.
    fn share(self, most: u64) -> usize {
        // A quarter each leaves files for the rest, because not every server asks for that much.
        usize::try_from(most.min(self.0 / 4)).unwrap_or(usize::MAX)
    }

    /// For `/healthz` and the healthCheckNodePorts, whose clients are load balancers from anywhere.
    pub(super) fn health(self, metrics: &Metrics) -> ConnectionLimit {
        self.limit(256, 64, metrics.refused("health-connections"))
    }

    pub(super) fn metrics(self, metrics: &Metrics) -> ConnectionLimit {
        self.limit(64, 32, metrics.refused("metrics-connections"))
    }

    pub(super) fn names(self, metrics: &Metrics) -> Room {
        let (most, each) = self.lookups();
        Room {
            connections: self.limit(512, 32, metrics.refused("dns-connections")),
            lookups: InFlight::new(most, each, metrics.refused("dns-lookups")),
        }
    }

    /// For the relay, with a share for each NodePort. A connection takes two files.
    pub(super) fn relayed(self, metrics: &Metrics) -> ConnectionLimit<LoopbackPort> {
        let refused = metrics.refused("localhost-node-port-flows");
        ConnectionLimit::new(self.share(4096) / 2, self.share(1024) / 2, refused)
    }

    /// Concurrent upstream queries: of all clients, and of one.
    fn lookups(self) -> (usize, usize) {
        (self.share(1000), self.share(100))
    }

    fn limit(self, most: u64, each: u64, refused: Counter) -> ConnectionLimit {
        ConnectionLimit::new(self.share(most), self.share(each), refused)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_soft_limit_is_raised_to_the_hard_one() {
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, hard.min(512), hard).unwrap();
        assert_eq!(Files::raise().0, hard);
        assert_eq!(getrlimit(Resource::RLIMIT_NOFILE).unwrap(), (hard, hard));
    }

    #[test]
    fn a_small_limit_leaves_files_for_more_than_the_servers() {
        let small = Files(256);
        assert_eq!((small.share(512), small.share(32)), (64, 32));
        assert_eq!(small.lookups(), (64, 64));
        assert_eq!(Files(1 << 20).lookups(), (1000, 100));
    }
}
