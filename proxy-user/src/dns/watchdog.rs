//! Checks that weir answers DNS queries, and claims or releases the DNS Service's addresses accordingly.
//!
//! In: the addresses at which weir should answer. Out: a [`Device`] that has them as long as test queries are
//! answered. The watchdog runs on a thread of its own and sends queries to each address by UDP and TCP, as a new
//! client would, so a hang of the responder does not stop it. It also restores routes to the device that another
//! program has removed.

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

/// The time between two rounds of test queries.
const BEAT: Duration = Duration::from_millis(500);
/// The time limit for an answer, which comes from the same machine.
const PATIENCE: Duration = Duration::from_millis(400);
/// The number of failed rounds in a row after which the addresses are released.
const MISSES: u32 = 2;
/// The most successful rounds that are needed before the addresses are claimed again. The number doubles with each
/// release, because a responder that fails at one address must not take queries of the other addresses again and
/// again.
const LONGEST_TRIAL: u32 = 64;

/// The addresses at which weir should answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// ClusterIPs with open sockets; empty until all Services and endpoints are known.
    pub(crate) addresses: BTreeSet<IpAddr>,
}

/// The ClusterIPs at which this node answers now.
pub(crate) type AnsweredAddresses = BTreeSet<IpAddr>;

/// Sends test queries, and owns the device.
pub(crate) struct Watchdog {
    device: Device,
    own: IpAddr,
    question: Name,
    misses: u32,
    /// Successful rounds since the last failed one.
    answered: u32,
    /// How many successful rounds are needed to claim addresses.
    trial: u32,
    last_warning: String,
}

impl Watchdog {
    /// Creates the device and claims weir's `own` address. Needs a tokio runtime.
    ///
    /// # Errors
    ///
    /// When weir cannot create the device or claim the address.
    pub(crate) async fn open(own: IpAddr, domain: &Name) -> Result<Self, DeviceError> {
        let mut device = Device::open().await?;
        device.claim(own).await?;
        let question = Name::from_ascii("dns-version").and_then(|name| name.append_domain(domain));
        Ok(Self {
            device,
            own,
            question: question.unwrap_or_else(|_| domain.clone()),
            // No address is claimed before the first answer.
            misses: MISSES,
            answered: 0,
            trial: 1,
            last_warning: String::new(),
        })
    }

    /// Claims and releases addresses until the sender of `wanted` is dropped or the device is gone, and sends the
    /// claimed ones to `answered`.
    pub(crate) async fn run(
        mut self,
        mut wanted: watch::Receiver<Wanted>,
        answered: watch::Sender<AnsweredAddresses>,
    ) {
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
            self.update(&now).await;
            answered.send_if_modified(|known| {
                let mut claimed = self.device.claimed().clone();
                claimed.remove(&self.own);
                let changed = *known != claimed;
                *known = claimed;
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
            self.warn(&error);
        }
        if !self.device.claimed().contains(&self.own)
            && let Err(error) = self.device.claim(self.own).await
        {
            self.warn(&error);
        }
    }

    /// Counts a round of test queries, which succeeded at every address or failed.
    fn note(&mut self, answers: bool) {
        if answers {
            (self.misses, self.answered) = (0, self.answered.saturating_add(1));
            return;
        }
        (self.misses, self.answered) = (self.misses.saturating_add(1), 0);
        // This miss releases the Service's addresses.
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

    /// Sends a test query on a new socket, because an old connection would not show what a new client gets.
    async fn answers_at(&self, address: IpAddr, way: ConnectionConfig) -> bool {
        let Ok(resolver) = resolver(self.own, address, way) else { return false };
        let lookup = resolver.lookup(self.question.clone(), RecordType::TXT);
        matches!(tokio::time::timeout(PATIENCE, lookup).await, Ok(Ok(_)))
    }

    /// Claims the wanted addresses if test queries are answered, else releases all but weir's own.
    async fn update(&mut self, wanted: &Wanted) {
        let has_claimed = self.device.claimed().len() > 1;
        let trusted = self.misses < MISSES && (has_claimed || self.answered >= self.trial);
        let addresses = if trusted { wanted.addresses.clone() } else { BTreeSet::new() };
        let others = self.device.claimed().iter().copied().filter(|address| *address != self.own);
        let others: BTreeSet<IpAddr> = others.collect();
        for address in others.difference(&addresses) {
            tracing::warn!(%address, "this node no longer answers DNS queries to this address; they go to the cluster's DNS Service");
            if let Err(error) = self.device.release(*address).await {
                self.warn(&error);
            }
        }
        for address in addresses.difference(&others) {
            match self.device.claim(*address).await {
                Ok(()) => {
                    self.last_warning.clear();
                    tracing::info!(%address, "this node answers DNS queries to this address");
                }
                Err(error) => self.warn(&error),
            }
        }
    }

    /// Logs an error, once for each text in a row.
    fn warn(&mut self, error: &DeviceError) {
        let cause = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
        let text = format!("{error}: {cause}");
        if text != self.last_warning {
            tracing::warn!(error = text, "DNS queries go to the cluster's DNS Service");
            self.last_warning = text;
        }
    }
}

/// A resolver without a cache that asks one of weir's addresses.
fn resolver(
    own: IpAddr,
    address: IpAddr,
    mut connection: ConnectionConfig,
) -> Result<TokioResolver, NetError> {
    // From weir's own address if it has the same family, because that address has no rate limit.
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
