//! Names that are not the cluster's: asked of the upstream, and remembered for as long as it says.
//!
//! In: a question as a client asked it, and which servers are upstream now. Out: an [`Answer`], with everything that the
//! upstream says to that question. What is remembered and what is under way are bounded. The upstream is believed about
//! the name it was asked for and about nothing else.

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
    believed::believed,
    remembered::Remembered,
    upstream::{Outside, Server, exchange},
};

/// Where the addresses of the upstream come from. What the servers of one origin say holds for all of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Origin {
    /// The endpoints of the cluster's DNS Service.
    #[default]
    Service,
    /// The command line.
    Given,
    /// The configuration of the node's own resolver.
    Node,
}

/// Asks the upstream.
#[derive(Debug)]
pub struct Forwarder {
    domain: Name,
    upstream: RwLock<Upstream>,
    under_way: UnderWay,
    /// Questions that wait for an answer, so that of several clients with the same question only the first has it asked.
    asked: Mutex<HashMap<Outside, Shared<BoxFuture<'static, Arc<Answer>>>>>,
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

#[derive(Clone, Debug, Default)]
struct Upstream {
    origin: Origin,
    servers: Vec<Arc<Server>>,
    remembered: Remembered,
}

impl Forwarder {
    /// There is no upstream yet; what the upstream says of names of `domain` is never believed.
    #[must_use]
    pub fn new(domain: Name, under_way: UnderWay) -> Self {
        Self { domain, upstream: RwLock::default(), under_way, asked: Mutex::default() }
    }

    /// Says which servers are upstream from now on. What was remembered is forgotten only when servers of another origin
    /// take over, because the endpoints of a Service come and go and all say the same.
    pub fn set_servers(&self, origin: Origin, servers: &[SocketAddr]) {
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
        let remembered =
            if upstream.origin == origin { upstream.remembered.clone() } else { Remembered::default() };
        *upstream = Upstream { origin, servers, remembered };
    }

    /// What the upstream says to a question of `client`; `None` when there is no upstream.
    pub async fn ask(&self, question: &Outside, client: IpAddr) -> Option<Answer> {
        let upstream = self.upstream.read().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(answer) = upstream.remembered.get(question) {
            return Some(answer);
        }
        if upstream.servers.is_empty() {
            return None;
        }
        let Some(_question) = self.under_way.begin(client) else {
            return Some(Answer::without_records(ResponseCode::ServFail));
        };
        let (answer, _asking) = self.join(question, upstream);
        Some(Answer::clone(&*answer.await))
    }

    /// The answer that other clients wait for already, or a new one.
    fn join(
        &self,
        question: &Outside,
        upstream: Upstream,
    ) -> (Shared<BoxFuture<'static, Arc<Answer>>>, Option<Asking<'_>>) {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(answer) = asked.get(question) {
            return (answer.clone(), None);
        }
        let answer = ask(question.clone(), upstream, self.domain.clone()).boxed().shared();
        asked.insert(question.clone(), answer.clone());
        (answer, Some(Asking { forwarder: self, question: question.clone() }))
    }
}

/// A question that later clients can wait for.
struct Asking<'a> {
    forwarder: &'a Forwarder,
    question: Outside,
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        self.forwarder.asked.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.question);
    }
}

async fn ask(question: Outside, upstream: Upstream, domain: Name) -> Arc<Answer> {
    let Some(said) = exchange(&upstream.servers, &question).await else {
        tracing::debug!(name = %question.name, kind = %question.kind, "no upstream server answered");
        return Arc::new(Answer::without_records(ResponseCode::ServFail));
    };
    let answer = believed(&question, said, &domain);
    upstream.remembered.insert(question, &answer);
    Arc::new(answer)
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
