//! Forwards names outside the cluster to the upstream, and caches the answers.
//!
//! In: a client's question, and the servers that are the upstream now. Out: an [`Answer`] with all records that
//! belong to the question. The cache and the questions in flight have limits. weir drops records that do not belong
//! to the question.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError, RwLock},
};

use futures::{
    FutureExt as _,
    future::{BoxFuture, Shared},
};
use hickory_proto::{op::ResponseCode, rr::Name};
use prometheus_client::metrics::counter::Counter;

use super::{
    answer::Answer,
    cache::AnswerCache,
    relevant::relevant,
    upstream::{Server, UpstreamQuestion, exchange},
};

/// Where the addresses of the upstream come from. Servers of one origin give the same answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Origin {
    /// Endpoints of the cluster's DNS Service.
    #[default]
    Service,
    /// `--dns-upstream`.
    Given,
    /// The node's resolv.conf.
    Node,
}

/// Forwards questions to the upstream.
#[derive(Debug)]
pub(crate) struct Forwarder {
    domain: Name,
    upstream: RwLock<Upstream>,
    in_flight: InFlight,
    /// Questions that wait for an answer, so that weir forwards the same question of several clients once.
    waiting: Mutex<HashMap<UpstreamQuestion, Shared<BoxFuture<'static, Arc<Answer>>>>>,
}

/// Counts the questions that the upstream has not answered yet.
#[derive(Debug)]
pub(crate) struct InFlight {
    most: usize,
    each: usize,
    refused: Counter,
    clients: Mutex<HashMap<IpAddr, usize>>,
}

impl InFlight {
    /// Room for `most` questions, and for `each` of one client, because names that no server answers would otherwise
    /// fill the room of other clients. Further questions get SERVFAIL at once, and `refused` counts them.
    #[must_use]
    pub(crate) fn new(most: usize, each: usize, refused: Counter) -> Self {
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
        Some(Question { in_flight: self, client })
    }
}

struct Question<'a> {
    in_flight: &'a InFlight,
    client: IpAddr,
}

impl Drop for Question<'_> {
    fn drop(&mut self) {
        let mut clients = self.in_flight.clients.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(own) = clients.get_mut(&self.client) else { return };
        *own -= 1;
        if *own == 0 {
            clients.remove(&self.client);
        }
    }
}

#[derive(Clone, Debug, Default)]
struct Upstream {
    origin: Origin,
    servers: Vec<Arc<Server>>,
    cache: AnswerCache,
}

impl Forwarder {
    /// A forwarder without servers. It drops what the upstream sends about names of `domain`.
    #[must_use]
    pub(crate) fn new(domain: Name, in_flight: InFlight) -> Self {
        Self { domain, upstream: RwLock::default(), in_flight, waiting: Mutex::default() }
    }

    /// Replaces the servers. The cache stays unless the origin changes, because a Service's endpoints come and go and
    /// all give the same answers.
    pub(crate) fn set_servers(&self, origin: Origin, servers: &[SocketAddr]) {
        let mut upstream = self.upstream.write().unwrap_or_else(PoisonError::into_inner);
        if upstream.origin == origin
            && upstream.servers.iter().map(|server| server.address).eq(servers.iter().copied())
        {
            return;
        }
        tracing::info!(?servers, "forwarding other names to these servers");
        let known = |address| upstream.servers.iter().find(|server| server.address == address).cloned();
        let servers =
            servers.iter().map(|server| known(*server).unwrap_or_else(|| Arc::new(Server::new(*server))));
        let servers = servers.collect();
        let cache = if upstream.origin == origin { upstream.cache.clone() } else { AnswerCache::default() };
        *upstream = Upstream { origin, servers, cache };
    }

    /// The upstream's answer to a question of `client`; `None` when there is no server.
    pub(crate) async fn ask(&self, question: &UpstreamQuestion, client: IpAddr) -> Option<Answer> {
        let upstream = self.upstream.read().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(answer) = upstream.cache.get(question) {
            return Some(answer);
        }
        if upstream.servers.is_empty() {
            return None;
        }
        let Some(_question) = self.in_flight.begin(client) else {
            return Some(Answer::without_records(ResponseCode::ServFail));
        };
        let (answer, _asking) = self.join(question, upstream);
        Some(Answer::clone(&*answer.await))
    }

    /// Joins an equal question in flight, or asks the upstream.
    fn join(
        &self,
        question: &UpstreamQuestion,
        upstream: Upstream,
    ) -> (Shared<BoxFuture<'static, Arc<Answer>>>, Option<Asking<'_>>) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(answer) = waiting.get(question) {
            return (answer.clone(), None);
        }
        let answer = ask(question.clone(), upstream, self.domain.clone()).boxed().shared();
        waiting.insert(question.clone(), answer.clone());
        (answer, Some(Asking { forwarder: self, question: question.clone() }))
    }
}

/// Removes a question from [`Forwarder::waiting`] when it is dropped.
struct Asking<'a> {
    forwarder: &'a Forwarder,
    question: UpstreamQuestion,
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        self.forwarder.waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.question);
    }
}

async fn ask(question: UpstreamQuestion, upstream: Upstream, domain: Name) -> Arc<Answer> {
    let Some(response) = exchange(&upstream.servers, &question).await else {
        tracing::debug!(name = %question.name, kind = %question.kind, "no upstream server answered");
        return Arc::new(Answer::without_records(ResponseCode::ServFail));
    };
    let answer = relevant(&question, response, &domain);
    upstream.cache.insert(question, &answer);
    Arc::new(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_that_asks_too_much_leaves_room_for_the_others() {
        let refused = Counter::default();
        let in_flight = InFlight::new(10, 4, refused.clone());
        let client = |last: u8| IpAddr::from([10, 244, 0, last]);
        let greedy: Vec<_> = (0..20).filter_map(|_| in_flight.begin(client(1))).collect();
        assert_eq!((greedy.len(), refused.get()), (4, 16));
        assert!(in_flight.begin("::ffff:10.244.0.1".parse().unwrap()).is_none(), "the same client");
        let others: Vec<_> = (2..=7).filter_map(|last| in_flight.begin(client(last))).collect();
        assert_eq!(others.len(), 6);
        assert!(in_flight.begin(client(8)).is_none(), "there is no room at all");
        drop((greedy, others));
        assert!(in_flight.begin(client(1)).is_some());
        assert!(in_flight.clients.lock().unwrap().is_empty());
    }
}
