//! Names that are not the cluster's: asked of the upstream, and remembered for as long as it says.
//!
//! In: a name and a type, and who is upstream now. Out: an [`Answer`]. What is remembered and what is under way are
//! bounded. The upstream is believed about the name it was asked for and about nothing else.

use std::{
    net::SocketAddr,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use hickory_net::{DnsError, NetError, NoRecords, runtime::TokioRuntimeProvider};
use hickory_proto::{
    op::ResponseCode,
    rr::{Name, RData, Record, RecordType},
};
use hickory_resolver::{
    TokioResolver,
    config::{ConnectionConfig, NameServerConfig, ResolveHosts, ResolverConfig, ResolverOpts},
};
use tokio::sync::Semaphore;

use super::{answer::Answer, question};

/// Answers remembered, at most.
const MOST_REMEMBERED: u64 = 10_000;
/// Questions under way, at most; more are answered with SERVFAIL at once.
const MOST_UNDER_WAY: usize = 1_000;
/// What is remembered longer than this may have changed.
const LONGEST: Duration = Duration::from_secs(300);

/// Asks the upstream.
#[derive(Debug)]
pub struct Forwarder {
    domain: Name,
    upstream: RwLock<Upstream>,
    under_way: Semaphore,
}

#[derive(Debug, Default)]
struct Upstream {
    servers: Vec<SocketAddr>,
    resolver: Option<Arc<TokioResolver>>,
}

impl Forwarder {
    /// Nobody is upstream yet; names of `domain` are never believed to be told there.
    #[must_use]
    pub fn new(domain: Name) -> Self {
        Self { domain, upstream: RwLock::default(), under_way: Semaphore::new(MOST_UNDER_WAY) }
    }

    /// Says who is upstream from now on. What was remembered from others is forgotten.
    ///
    /// # Errors
    ///
    /// When there can be no resolver for them; the ones before stay.
    pub fn set_servers(&self, servers: Vec<SocketAddr>) -> Result<(), NetError> {
        let mut upstream = self.upstream.write().unwrap_or_else(PoisonError::into_inner);
        if upstream.servers == servers {
            return Ok(());
        }
        let resolver = if servers.is_empty() { None } else { Some(Arc::new(resolver(&servers)?)) };
        tracing::info!(?servers, "names that are not the cluster's are asked of these");
        *upstream = Upstream { servers, resolver };
        Ok(())
    }

    /// What the upstream says; `None` when nobody is upstream.
    pub async fn ask(&self, name: &Name, kind: RecordType) -> Option<Answer> {
        let resolver = {
            let upstream = self.upstream.read().unwrap_or_else(PoisonError::into_inner);
            upstream.resolver.clone()?
        };
        let Ok(_slot) = self.under_way.try_acquire() else {
            return Some(Answer::without_records(ResponseCode::ServFail));
        };
        Some(match resolver.lookup(name.clone(), kind).await {
            Ok(found) => {
                let answers = believed(name, kind, found.answers(), &self.domain);
                Answer { answers, ..Answer::without_records(ResponseCode::NoError) }
            }
            Err(NetError::Dns(DnsError::NoRecordsFound(none))) => nothing(name, &none),
            Err(NetError::Dns(DnsError::ResponseCode(ResponseCode::Refused))) => {
                Answer::without_records(ResponseCode::Refused)
            }
            Err(error) => {
                tracing::debug!(%name, %kind, %error, "the upstream does not answer");
                Answer::without_records(ResponseCode::ServFail)
            }
        })
    }
}

fn resolver(servers: &[SocketAddr]) -> Result<TokioResolver, NetError> {
    let servers = servers.iter().map(|server| {
        let connections = [ConnectionConfig::udp(), ConnectionConfig::tcp()].map(|mut connection| {
            connection.port = server.port();
            connection
        });
        NameServerConfig::new(server.ip(), true, connections.into())
    });
    let config = ResolverConfig::from_parts(None, Vec::new(), servers.collect());
    let mut options = ResolverOpts::default();
    options.ndots = 0;
    options.cache_size = MOST_REMEMBERED;
    options.positive_max_ttl = Some(LONGEST);
    options.negative_max_ttl = Some(LONGEST);
    options.use_hosts_file = ResolveHosts::Never;
    options.timeout = Duration::from_secs(2);
    options.attempts = 1;
    options.max_active_requests = MOST_UNDER_WAY;
    TokioResolver::builder_with_config(config, TokioRuntimeProvider::default()).with_options(options).build()
}

/// The records that answer the question: from its name along the aliases, and none that says something of the cluster's
/// own names.
fn believed(name: &Name, kind: RecordType, records: &[Record], domain: &Name) -> Vec<Record> {
    let mut believed = Vec::new();
    let mut at = name.clone();
    for _ in 0..=records.len() {
        if question::below(&at.to_lowercase(), domain).is_some() {
            break;
        }
        let own = records.iter().filter(|record| record.name == at);
        believed.extend(own.clone().filter(|record| record.record_type() == kind).cloned());
        let alias = own.clone().find(|record| record.record_type() == RecordType::CNAME);
        let Some((record, RData::CNAME(target))) = alias.map(|record| (record, &record.data)) else { break };
        if kind == RecordType::CNAME || believed.contains(record) {
            break;
        }
        believed.push(record.clone());
        at = target.0.clone();
    }
    believed
}

fn nothing(name: &Name, none: &NoRecords) -> Answer {
    let soa = none.soa.as_ref().filter(|soa| soa.name.zone_of(name));
    let soa = soa.map(|soa| Record::from_rdata(soa.name.clone(), soa.ttl, RData::SOA(soa.data.clone())));
    Answer { authorities: soa.into_iter().collect(), ..Answer::without_records(none.response_code) }
}
