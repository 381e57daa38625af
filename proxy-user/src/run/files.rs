//! How many files this process may have open, and how many of them its servers may take.
//!
//! In: the limits that the process was started with. Out: the soft limit at the hard one, and bounds for the servers that
//! together stay below it. Container runtimes start processes with a soft limit of 1,024, which one client with as many
//! connections would use up for the sources, the planes and all servers.

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use prometheus_client::metrics::counter::Counter;

use crate::{
    dns::{Room, UnderWay},
    observe::Metrics,
    places::Places,
    relay::Port,
};

/// What is assumed where the kernel does not tell.
const USUAL: u64 = 1024;

/// The limit in force.
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

    /// `most`, or the part of the limit that stands for it where the limit is smaller than usual.
    fn share(self, most: u64) -> usize {
        // Together the servers ask for fewer than four times the usual limit, and get a quarter of it each at most.
        usize::try_from(most.min(self.0 / 4)).unwrap_or(usize::MAX)
    }

    /// Room for clients of `/healthz` and of the healthCheckNodePorts: load balancers from anywhere.
    pub(super) fn health(self, metrics: &Metrics) -> Places {
        self.places(256, 64, metrics.refused("health-connections"))
    }

    /// Room for clients of `/metrics`.
    pub(super) fn metrics(self, metrics: &Metrics) -> Places {
        self.places(64, 32, metrics.refused("metrics-connections"))
    }

    /// Room for clients that ask for names.
    pub(super) fn names(self, metrics: &Metrics) -> Room {
        let (most, each) = self.lookups();
        Room {
            connections: self.places(512, 32, metrics.refused("dns-connections")),
            lookups: UnderWay::new(most, each, metrics.refused("dns-lookups")),
        }
    }

    /// Room for what is relayed from loopback addresses, a share for each NodePort. A connection takes two files.
    pub(super) fn relayed(self, metrics: &Metrics) -> Places<Port> {
        let refused = metrics.refused("localhost-node-port-flows");
        Places::new(self.share(4096) / 2, self.share(1024) / 2, refused)
    }

    /// How many names may be asked of the upstream at a time, and how many of them for one client.
    fn lookups(self) -> (usize, usize) {
        (self.share(1000), self.share(100))
    }

    fn places(self, most: u64, each: u64, refused: Counter) -> Places {
        Places::new(self.share(most), self.share(each), refused)
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
