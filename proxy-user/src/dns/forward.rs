//! Names that are not the cluster's: asked of the upstream, and remembered for as long as it says.
//!
//! In: a name and a type, and who is upstream now. Out: an [`Answer`]. What is remembered and what is under way are
//! bounded. The upstream is believed about the name it was asked for and about nothing else.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError, RwLock},
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
use prometheus_client::metrics::counter::Counter;

use super::{answer::Answer, question};

/// Answers remembered, at most.
const MOST_REMEMBERED: u64 = 10_000;
/// What is remembered longer than this may have changed.
const LONGEST: Duration = Duration::from_secs(300);

/// Asks the upstream.
#[derive(Debug)]
pub struct Forwarder {
    domain: Name,
    upstream: RwLock<Upstream>,
    under_way: UnderWay,
}

/// Questions that the upstream has not answered yet.
#[derive(Debug)]
pub struct UnderWay {
    most: usize,
    each: usize,
    refused: Counter,
    clients: Mutex<HashMap<IpAddr, usize>>,
}

impl UnderWay {
    /// Room for `most` questions, of which one client has `each` at most, because a client that asks for names which no
    /// server answers would keep the others waiting. `refused` counts those beyond; they are answered with SERVFAIL at once.
    #[must_use]
    pub fn new(most: usize, each: usize, refused: Counter) -> Self {
        Self { most, each, refused, clients: Mutex::default() }
    }

    fn begin(&self, client: IpAddr) -> Option<Question<'_>> {
        let client = client.to_canonical();
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        let all: usize = clients.values().sum();
        let own = clients.get(&client).copied().unwrap_or_default();
        if all >= self.most || own >= self.each {
            self.refused.inc();
            return None;
        }
        clients.insert(client, own + 1);
        Some(Question { under_way: self, client })
    }
}

/// One question under way.
struct Question<'a> {
    under_way: &'a UnderWay,
    client: IpAddr,
}

impl Drop for Question<'_> {
    fn drop(&mut self) {
        let mut clients = self.under_way.clients.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(own) = clients.get_mut(&self.client) else { return };
        *own -= 1;
        if *own == 0 {
            clients.remove(&self.client);
        }
    }
}

#[derive(Debug, Default)]
struct Upstream {
    servers: Vec<SocketAddr>,
    resolver: Option<Arc<TokioResolver>>,
}

impl Forwarder {
    /// There is no upstream yet; what the upstream says of names of `domain` is never believed.
    #[must_use]
    pub fn new(domain: Name, under_way: UnderWay) -> Self {
        Self { domain, upstream: RwLock::default(), under_way }
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
        let resolver =
            if servers.is_empty() { None } else { Some(Arc::new(resolver(&servers, self.under_way.most)?)) };
        tracing::info!(?servers, "names that are not the cluster's are asked of these");
        *upstream = Upstream { servers, resolver };
        Ok(())
    }

    /// What the upstream says to a question of `client`; `None` when there is no upstream.
    pub async fn ask(&self, name: &Name, kind: RecordType, client: IpAddr) -> Option<Answer> {
        let resolver = {
            let upstream = self.upstream.read().unwrap_or_else(PoisonError::into_inner);
            upstream.resolver.clone()?
        };
        let Some(_question) = self.under_way.begin(client) else {
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

fn resolver(servers: &[SocketAddr], most_under_way: usize) -> Result<TokioResolver, NetError> {
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
    options.max_active_requests = most_under_way;
    // A second server is asked when the first one fails, because both would have to do the work of each question.
    options.num_concurrent_reqs = 1;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_whose_names_no_server_knows_leaves_room_for_the_others() {
        let refused = Counter::default();
        let under_way = UnderWay::new(10, 4, refused.clone());
        let client = |last: u8| IpAddr::from([10, 244, 0, last]);
        let greedy: Vec<_> = (0..20).filter_map(|_| under_way.begin(client(1))).collect();
        assert_eq!((greedy.len(), refused.get()), (4, 16));
        assert!(under_way.begin("::ffff:10.244.0.1".parse().unwrap()).is_none(), "the same client");
        let others: Vec<_> = (2..=7).filter_map(|last| under_way.begin(client(last))).collect();
        assert_eq!(others.len(), 6);
        assert!(under_way.begin(client(8)).is_none(), "there is no room at all");
        drop((greedy, others));
        assert!(under_way.begin(client(1)).is_some());
        assert!(under_way.clients.lock().unwrap().is_empty());
    }
}
