//! Whether names are answered here, and whose the addresses are because of that.
//!
//! In: the addresses that should be answered at. Out: a [`Device`] that has them while the answers come, and gives them
//! back when they do not. It runs on a thread of its own, asks by UDP and by TCP as a client would, and depends on nothing of
//! what it watches.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use hickory_net::{NetError, runtime::TokioRuntimeProvider};
use hickory_proto::rr::{Name, RecordType};
use hickory_resolver::{
    TokioResolver,
    config::{ConnectionConfig, NameServerConfig, ResolveHosts, ResolverConfig, ResolverOpts},
};
use tokio::sync::watch;

use super::device::{DEVICE, Device, DeviceError};

/// How often is asked.
const BEAT: Duration = Duration::from_millis(500);
/// How long an answer may take that comes from the same machine.
const PATIENCE: Duration = Duration::from_millis(400);
/// How many answers may be missing before the addresses are given back.
const MISSES: u32 = 2;

/// What should be answered at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// ClusterIPs that there are sockets for, once everything is known that is to be answered from.
    pub addresses: BTreeSet<IpAddr>,
}

/// Which addresses are answered at now.
pub type Standing = BTreeSet<IpAddr>;

/// Watches over the answers.
pub struct Watchdog {
    device: Device,
    own: IpAddr,
    question: Name,
    ways: [TokioResolver; 2],
    misses: u32,
    complained: String,
}

impl Watchdog {
    /// Makes the device and takes our `own` address. Needs a tokio runtime.
    ///
    /// # Errors
    ///
    /// When there can be no device.
    pub async fn open(own: IpAddr, domain: &Name) -> Result<Self, DeviceError> {
        let mut device = Device::open().await?;
        device.claim(own).await?;
        let question = Name::from_ascii("dns-version").and_then(|name| name.append_domain(domain));
        let way = |connection| {
            resolver(own, connection).map_err(|error| DeviceError::Netlink(std::io::Error::other(error)))
        };
        let ways = [way(ConnectionConfig::udp())?, way(ConnectionConfig::tcp())?];
        Ok(Self {
            device,
            own,
            question: question.unwrap_or_else(|_| domain.clone()),
            ways,
            // Nobody has answered yet.
            misses: MISSES,
            complained: String::new(),
        })
    }

    /// Keeps the device at what is wanted and answered, until nobody wants anything any more or the device is gone.
    pub async fn run(mut self, mut wanted: watch::Receiver<Wanted>, standing: watch::Sender<Standing>) {
        let mut beat = tokio::time::interval(BEAT);
        loop {
            tokio::select! {
                _ = beat.tick() => {}
                changed = wanted.changed() => if changed.is_err() { return },
            }
            if !self.device.is_there() {
                tracing::warn!("somebody deleted the device `{DEVICE}`; it is made anew");
                return;
            }
            let now = wanted.borrow_and_update().clone();
            self.misses = if self.answers().await { 0 } else { self.misses.saturating_add(1) };
            self.settle(&now).await;
            standing.send_if_modified(|known| {
                let mut stands = self.device.claimed().clone();
                stands.remove(&self.own);
                let changed = *known != stands;
                *known = stands;
                changed
            });
        }
    }

    async fn answers(&self) -> bool {
        let [udp, tcp] = &self.ways;
        let (udp, tcp) = tokio::join!(self.answers_by(udp), self.answers_by(tcp));
        udp && tcp
    }

    async fn answers_by(&self, way: &TokioResolver) -> bool {
        let lookup = way.lookup(self.question.clone(), RecordType::TXT);
        matches!(tokio::time::timeout(PATIENCE, lookup).await, Ok(Ok(_)))
    }

    async fn settle(&mut self, wanted: &Wanted) {
        let addresses = if self.misses < MISSES { wanted.addresses.clone() } else { BTreeSet::new() };
        let others = self.device.claimed().iter().copied().filter(|address| *address != self.own);
        let others: BTreeSet<IpAddr> = others.collect();
        for address in others.difference(&addresses) {
            tracing::warn!(%address, "names are no longer answered here; the cluster's DNS Service has its address back");
            if let Err(error) = self.device.release(*address).await {
                self.complain(&error);
            }
        }
        for address in addresses.difference(&others) {
            match self.device.claim(*address).await {
                Ok(()) => {
                    self.complained.clear();
                    tracing::info!(%address, "names are answered here");
                }
                Err(error) => self.complain(&error),
            }
        }
    }

    /// Says what is wrong, once in a row.
    fn complain(&mut self, error: &DeviceError) {
        let cause = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
        let text = format!("{error}: {cause}");
        if text != self.complained {
            tracing::warn!(error = text, "names are left to the cluster's DNS Service");
            self.complained = text;
        }
    }
}

/// A way to ask ourselves, that remembers nothing.
fn resolver(own: IpAddr, mut connection: ConnectionConfig) -> Result<TokioResolver, NetError> {
    // From our own address, so that nobody else's questions count against these.
    connection.bind_addr = Some(SocketAddr::new(own, 0));
    let server = NameServerConfig::new(own, true, vec![connection]);
    let config = ResolverConfig::from_parts(None, Vec::new(), vec![server]);
    let mut options = ResolverOpts::default();
    options.ndots = 0;
    options.cache_size = 0;
    options.attempts = 1;
    options.timeout = PATIENCE;
    options.use_hosts_file = ResolveHosts::Never;
    TokioResolver::builder_with_config(config, TokioRuntimeProvider::default()).with_options(options).build()
}
