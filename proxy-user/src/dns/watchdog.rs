//! Whether names are answered here, and whose the addresses are because of that.
//!
//! In: the addresses that should be answered at. Out: a [`Device`] that has them while the answers come, and gives them
//! back when they do not. It runs on a thread of its own, asks at each address by UDP and by TCP as a new client would, and
//! depends on nothing of what it watches. It also makes routes to the device anew that another program has removed.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use futures::future::join_all;
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
/// The most beats with answers that are waited for before the addresses are claimed once more. Each time that they were
/// given back doubles it, because a server that answers at one address only must not take the others' queries again and
/// again.
const LONGEST_TRIAL: u32 = 64;

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
    misses: u32,
    /// Beats with answers since the last without.
    answered: u32,
    /// How many of those it takes to claim addresses.
    trial: u32,
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
        Ok(Self {
            device,
            own,
            question: question.unwrap_or_else(|_| domain.clone()),
            // There was no answer yet.
            misses: MISSES,
            answered: 0,
            trial: 1,
            complained: String::new(),
        })
    }

    /// Keeps the device at what is wanted and answered, until the sender of what is wanted or the device is gone.
    pub async fn run(mut self, mut wanted: watch::Receiver<Wanted>, standing: watch::Sender<Standing>) {
        let mut beat = tokio::time::interval(BEAT);
        loop {
            tokio::select! {
                _ = beat.tick() => {}
                changed = wanted.changed() => if changed.is_err() { return },
            }
            if !self.device.is_there() {
                tracing::warn!("another program deleted the device `{DEVICE}`; weir creates it again");
                return;
            }
            let now = wanted.borrow_and_update().clone();
            self.restore().await;
            let answers = self.answers().await;
            self.note(answers);
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

    async fn restore(&mut self) {
        let (restored, result) = self.device.restore().await;
        if !restored.is_empty() {
            tracing::warn!(addresses = ?restored, "another program removed routes to `{DEVICE}`; weir added them again");
        }
        if let Err(error) = result {
            self.complain(&error);
        }
        if !self.device.claimed().contains(&self.own)
            && let Err(error) = self.device.claim(self.own).await
        {
            self.complain(&error);
        }
    }

    /// Takes in whether there were answers at every address.
    fn note(&mut self, answers: bool) {
        if answers {
            (self.misses, self.answered) = (0, self.answered.saturating_add(1));
            return;
        }
        (self.misses, self.answered) = (self.misses.saturating_add(1), 0);
        // Given back just now: it had addresses of the Service.
        if self.misses == MISSES && self.device.claimed().len() > 1 {
            self.trial = self.trial.saturating_mul(2).min(LONGEST_TRIAL);
        }
    }

    async fn answers(&self) -> bool {
        let ways = self.device.claimed().iter().flat_map(|address| {
            [ConnectionConfig::udp(), ConnectionConfig::tcp()].map(|way| self.answers_at(*address, way))
        });
        join_all(ways).await.into_iter().all(|answers| answers)
    }

    /// Asks on a socket and a connection of its own, because one that is kept tells nothing about what a new client meets.
    async fn answers_at(&self, address: IpAddr, way: ConnectionConfig) -> bool {
        let Ok(resolver) = resolver(self.own, address, way) else { return false };
        let lookup = resolver.lookup(self.question.clone(), RecordType::TXT);
        matches!(tokio::time::timeout(PATIENCE, lookup).await, Ok(Ok(_)))
    }

    async fn settle(&mut self, wanted: &Wanted) {
        let stands = self.device.claimed().len() > 1;
        let trusted = self.misses < MISSES && (stands || self.answered >= self.trial);
        let addresses = if trusted { wanted.addresses.clone() } else { BTreeSet::new() };
        let others = self.device.claimed().iter().copied().filter(|address| *address != self.own);
        let others: BTreeSet<IpAddr> = others.collect();
        for address in others.difference(&addresses) {
            tracing::warn!(%address, "this node no longer answers DNS queries to this address; they go to the cluster's DNS Service");
            if let Err(error) = self.device.release(*address).await {
                self.complain(&error);
            }
        }
        for address in addresses.difference(&others) {
            match self.device.claim(*address).await {
                Ok(()) => {
                    self.complained.clear();
                    tracing::info!(%address, "this node answers DNS queries to this address");
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
            tracing::warn!(error = text, "DNS queries go to the cluster's DNS Service");
            self.complained = text;
        }
    }
}

/// A way to ask at one of our addresses, that remembers nothing.
fn resolver(
    own: IpAddr,
    address: IpAddr,
    mut connection: ConnectionConfig,
) -> Result<TokioResolver, NetError> {
    // From our own address where it is of the same family, so that questions of other clients do not count against these.
    if own.is_ipv4() == address.is_ipv4() {
        connection.bind_addr = Some(SocketAddr::new(own, 0));
    }
    let server = NameServerConfig::new(address, true, vec![connection]);
    let config = ResolverConfig::from_parts(None, Vec::new(), vec![server]);
    let mut options = ResolverOpts::default();
    options.ndots = 0;
    options.cache_size = 0;
    options.attempts = 1;
    options.timeout = PATIENCE;
    options.use_hosts_file = ResolveHosts::Never;
    TokioResolver::builder_with_config(config, TokioRuntimeProvider::default()).with_options(options).build()
}
