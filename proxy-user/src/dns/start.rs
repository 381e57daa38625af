//! Starts the DNS responder on threads of its own, so that the engine waits for no query and no query waits for the
//! kernel.
//!
//! In: the configuration, and the names that the engine fills. Out: sockets, a watchdog, and metrics.
//!
//! ```text
//! engine ──Names──▶ supervise (own runtime: sockets, upstream, clients) ──Wanted──▶ watchdog (own thread: device)
//!                       └─▶ metrics                    ◀──────AnsweredAddresses──────┘
//! ```

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use hickory_proto::rr::Name;
use tokio::{sync::watch, task::JoinSet};

use super::{
    AnsweredAddresses, Clients, Counters, Forwarder, InFlight, Limits, Origin, Outcome, Replier, Responder,
    SharedNames, Sockets, Wanted, Watchdog, Zone, connections, datagrams, names::Names,
};
use crate::{
    config::{Config, DetectLocal, DnsConfig},
    connection_limit::ConnectionLimit,
    dataplane::nftables::{Drops, Strangers},
    model::{DnsService, NameClients, ObjectName},
    observe::Metrics,
    source::host::Addresses,
};

/// The period of checks without a notification: resolv.conf, ports that become free, counts.
const BEAT: Duration = Duration::from_secs(1);
/// The period of reading the kernel's counter of flows that were passed on.
const STRANGERS_BEAT: Duration = Duration::from_secs(5);
/// The pause before the next attempt to create the device.
const PAUSE: Duration = Duration::from_secs(5);

/// How much clients may have at a time.
pub(crate) struct Room {
    /// TCP connections.
    pub(crate) connections: ConnectionLimit,
    /// Questions to the upstream servers.
    pub(crate) lookups: InFlight,
}

/// Starts the threads, which run until the process ends. Returns the names, which the engine fills, and the channel by
/// which it reports changes.
///
/// # Errors
///
/// When a thread does not start, or the domain is invalid.
pub(crate) fn start(
    config: &Config,
    dns: &DnsConfig,
    addresses: Addresses,
    room: Room,
    metrics: &Metrics,
) -> anyhow::Result<(SharedNames, watch::Sender<u32>)> {
    let names: SharedNames = {
        let names = Names::new(&config.model.node_name);
        Arc::new(RwLock::new(names.with_dns_service(dns.service.clone())))
    };
    let domain = Name::from_ascii(format!("{}.", dns.domain))?;
    let zone = Zone { domain: domain.clone(), ttl: dns.ttl, pods: dns.pods, topology: dns.topology };
    let responder = Arc::new(Responder {
        replier: Replier::new(Arc::clone(&names), zone),
        forwarder: Forwarder::new(domain.clone(), room.lookups),
        limit: room.connections,
        limits: Limits::new(dns.rate).with_own(dns.address),
        counters: Counters::default(),
    });
    let (seen, changes) = watch::channel(0);
    let (wanted_in, wanted) = watch::channel(Wanted::default());
    let (standing_in, standing) = watch::channel(AnsweredAddresses::default());
    let supervisor = Supervisor {
        responder,
        names: Arc::clone(&names),
        config: dns.clone(),
        detect_local: config.model.detect_local.clone(),
        wanted: wanted_in,
        metrics: metrics.clone(),
        counted: BTreeMap::new(),
        open: BTreeMap::new(),
        complained: BTreeSet::new(),
        taken: BTreeSet::new(),
        warnings: Warnings::default(),
    };
    std::thread::Builder::new().name("dns".to_owned()).spawn(move || {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("dns")
            .enable_all()
            .build()?;
        runtime.block_on(supervisor.run(changes, addresses, standing));
        anyhow::Ok(())
    })?;
    let own = dns.address;
    std::thread::Builder::new().name("dns-watch".to_owned()).spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(watch_over(own, domain, wanted, standing_in));
        anyhow::Ok(())
    })?;
    Ok((names, seen))
}

/// Runs a watchdog, and starts a new one when it fails or its device is deleted.
async fn watch_over(
    own: IpAddr,
    domain: Name,
    wanted: watch::Receiver<Wanted>,
    standing: watch::Sender<AnsweredAddresses>,
) {
    let mut complained = String::new();
    loop {
        match Watchdog::open(own, &domain).await {
            Ok(watchdog) => {
                complained.clear();
                watchdog.run(wanted.clone(), standing.clone()).await;
                standing.send_replace(AnsweredAddresses::default());
                if wanted.has_changed().is_err() {
                    return;
                }
            }
            Err(error) => {
                let text = format!("{:#}", anyhow::Error::from(error));
                if text != complained {
                    tracing::error!(error = text, "DNS queries go to the cluster's DNS Service");
                    complained = text;
                }
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}

struct Supervisor {
    responder: Arc<Responder>,
    names: SharedNames,
    config: DnsConfig,
    detect_local: DetectLocal,
    wanted: watch::Sender<Wanted>,
    metrics: Metrics,
    /// The last count of each outcome in the metrics.
    counted: BTreeMap<&'static str, u64>,
    /// The tasks at each address.
    open: BTreeMap<IpAddr, JoinSet<()>>,
    /// Addresses that weir could not listen on and has warned of.
    complained: BTreeSet<IpAddr>,
    /// Addresses of the Service that another program has on this host.
    taken: BTreeSet<IpAddr>,
    warnings: Warnings,
}

/// The state of the names that matters here: the cluster's DNS Service and the pods' networks.
struct Known {
    synced: bool,
    /// The DNS Service, if it exists.
    service: Option<ObjectName>,
    addresses: BTreeSet<IpAddr>,
    endpoints: Vec<SocketAddr>,
    pod_networks: Vec<ipnet::IpNet>,
}

/// The warnings that were logged, so that each is logged once.
#[derive(Default)]
struct Warnings {
    all_answered: bool,
    refused: bool,
    service: Option<Option<ObjectName>>,
}

impl Warnings {
    fn all_are_answered(&mut self) {
        if !std::mem::replace(&mut self.all_answered, true) {
            tracing::warn!(
                "weir cannot distinguish pods from other clients, so it answers DNS queries of every client that reaches this \
                 node's addresses; set --cluster-cidr, or --detect-local-mode NodeCIDR"
            );
        }
    }

    fn refused(&mut self, client: Option<IpAddr>, detect: &DetectLocal, own: IpAddr) {
        if let Some(client) = client
            && !std::mem::replace(&mut self.refused, true)
        {
            tracing::warn!(
                address = %client,
                "refused a query for a name, because {} does not have the address of the client; pods with such addresses get \
                 no answers at {own}",
                field(detect)
            );
        }
    }

    /// Logs which Service is the cluster's DNS Service.
    fn service(&mut self, known: &Known, config: &DnsConfig) {
        if !known.synced || self.service.as_ref() == Some(&known.service) {
            return;
        }
        match (&known.service, &config.service) {
            (Some(service), DnsService::Detected) => {
                tracing::info!(%service, "found the cluster's DNS Service")
            }
            (Some(_), DnsService::Named(_)) => {}
            (None, wanted) => tracing::warn!(
                "there is no DNS Service {wanted}, so names are answered at {} only; --dns-service names another one",
                config.address
            ),
        }
        self.service = Some(known.service.clone());
    }
}

/// Counts flows to the DNS Service that the rules pass on to its endpoints because of their source, and warns once with
/// one such source. Runs until the process ends.
pub(crate) async fn tell_of_strangers(dropped: Arc<Drops>, detect: DetectLocal, metrics: Metrics) {
    let mut beat = tokio::time::interval(STRANGERS_BEAT);
    let (mut warned, mut counted) = (false, None);
    loop {
        beat.tick().await;
        let dropped = Arc::clone(&dropped);
        let Ok(Ok(Strangers { flows, addresses })) =
            tokio::task::spawn_blocking(move || dropped.strangers()).await
        else {
            continue;
        };
        // The counter is older than this process, and starts again when the tables are new.
        let before = counted.replace(flows).unwrap_or(flows);
        metrics.count_queries("passed-on", flows.saturating_sub(before));
        if let Some(address) = addresses.first()
            && !std::mem::replace(&mut warned, true)
        {
            tracing::warn!(
                %address,
                "the cluster's DNS Service itself answers queries of some clients of this node, because {} does not have their \
                 addresses",
                field(&detect)
            );
        }
    }
}

/// The setting that has the pods' networks.
fn field(detect: &DetectLocal) -> &'static str {
    match detect {
        DetectLocal::NodeCidr => "spec.podCIDRs of this Node (and --dns-clients)",
        _ => "clusterCIDR (--cluster-cidr, and --dns-clients)",
    }
}

impl Supervisor {
    async fn run(
        mut self,
        mut changes: watch::Receiver<u32>,
        mut addresses: Addresses,
        mut standing: watch::Receiver<AnsweredAddresses>,
    ) {
        let mut beat = tokio::time::interval(BEAT);
        loop {
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { return },
                Ok(()) = addresses.changed() => {}
                Ok(()) = standing.changed() => {}
                _ = beat.tick() => {
                    self.update_counts();
                    let refused = self.responder.limits.take_refused();
                    self.warnings.refused(refused, &self.detect_local, self.config.address);
                }
            }
            changes.mark_unchanged();
            let known = self.known();
            let host = addresses.borrow_and_update().clone();
            self.metrics.set_answered_addresses(standing.borrow_and_update().len());
            self.warnings.service(&known, &self.config);
            let free = self.leave_alone(&known, &host);
            self.set_clients(&known, host);
            self.set_servers(&known);
            self.listen(&free, known.synced);
        }
    }

    fn known(&self) -> Known {
        let names = self.names.read().unwrap_or_else(PoisonError::into_inner);
        let addresses = names.dns_addresses();
        Known {
            synced: names.is_synced(),
            service: addresses.and(names.dns_service().cloned()),
            addresses: addresses.unwrap_or_default().iter().copied().collect(),
            endpoints: names.dns_endpoints(),
            pod_networks: names.pod_networks().to_vec(),
        }
    }

    /// Adds the answered addresses to the host's own, because without another route the host sends from them.
    fn set_clients(&mut self, known: &Known, mut host: Vec<IpAddr>) {
        host.extend(known.addresses.iter().copied().chain([self.config.address]));
        host.sort_unstable();
        let networks = NameClients::new(&self.detect_local, &known.pod_networks, &self.config.clients);
        if known.synced && networks.is_none() {
            self.warnings.all_are_answered();
        }
        self.responder.limits.set_clients(Clients { host, networks });
    }

    /// Sets the upstream's servers, without the addresses at which weir itself answers.
    fn set_servers(&self, known: &Known) {
        let ours = |server: &SocketAddr| {
            known.addresses.contains(&server.ip()) || server.ip() == self.config.address
        };
        let (origin, mut servers) = if !self.config.upstream.is_empty() {
            (Origin::Given, self.config.upstream.clone())
        } else if known.service.is_some() || !known.synced {
            // The cluster's DNS may have names that the node's own servers deny, so those cannot replace it while it
            // is down.
            (Origin::Service, known.endpoints.clone())
        } else {
            (Origin::Node, resolv_conf())
        };
        servers.retain(|server| !ours(server));
        self.responder.forwarder.set_servers(origin, &servers);
    }

    /// The Service's addresses without those that another program has on this host, such as NodeLocal DNSCache.
    fn leave_alone(&mut self, known: &Known, host: &[IpAddr]) -> BTreeSet<IpAddr> {
        if host.is_empty() {
            // The host's addresses are not known yet.
            return BTreeSet::new();
        }
        let (taken, free): (BTreeSet<_>, BTreeSet<_>) =
            known.addresses.iter().copied().partition(|address| host.contains(address));
        for address in taken.difference(&self.taken) {
            tracing::warn!(%address, "the DNS Service's address is already an address of this host; weir leaves it to the program that answers there");
        }
        self.taken = taken;
        free
    }

    /// Opens sockets at every wanted address, and sends the addresses with sockets to the watchdog.
    fn listen(&mut self, wanted: &BTreeSet<IpAddr>, synced: bool) {
        let all: BTreeSet<IpAddr> = wanted.iter().copied().chain([self.config.address]).collect();
        for address in &all {
            if !self.open.contains_key(address) {
                self.open_at(*address);
            }
        }
        let ready = wanted.iter().copied().filter(|address| synced && self.open.contains_key(address));
        let addresses: BTreeSet<IpAddr> = ready.collect();
        self.wanted.send_if_modified(|wanted| {
            let changed = wanted.addresses != addresses;
            wanted.addresses = addresses;
            changed
        });
        self.open.retain(|address, _| all.contains(address));
    }

    fn open_at(&mut self, address: IpAddr) {
        match Sockets::bind(address) {
            Ok(Sockets { udp, tcp }) => {
                let mut tasks = JoinSet::new();
                tasks.spawn(datagrams(Arc::clone(&self.responder), udp));
                tasks.spawn(connections(Arc::clone(&self.responder), tcp));
                self.open.insert(address, tasks);
                self.complained.remove(&address);
            }
            Err(error) if self.complained.insert(address) => {
                tracing::warn!(%address, %error, "cannot listen on this address, so DNS queries go to the cluster's DNS Service");
            }
            Err(_) => {}
        }
    }

    fn update_counts(&mut self) {
        for outcome in Outcome::ALL {
            let now = self.responder.counters.of(outcome);
            let counted = self.counted.entry(outcome.as_str()).or_default();
            self.metrics.count_queries(outcome.as_str(), now - *counted);
            *counted = now;
        }
    }
}

/// The servers of this host's own resolver.
fn resolv_conf() -> Vec<SocketAddr> {
    let Ok((config, _)) = hickory_resolver::system_conf::read_system_conf() else { return Vec::new() };
    let servers = config.name_servers.iter();
    let mut servers: Vec<SocketAddr> = servers
        .filter_map(|server| Some(SocketAddr::new(server.ip, server.connections.first()?.port)))
        .collect();
    servers.dedup();
    servers
}
