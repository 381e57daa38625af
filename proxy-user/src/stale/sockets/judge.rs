//! Which sockets have to go, and when to look: the pure half.
//!
//! In: [`Suspects`] in the order they came into force, and for each socket what it was told. Out: when which sockets
//! have to be looked at, and for each of them the verdict.
//!
//! The judge keeps what serves now, not what changed, so a socket that one look missed is found by the next. Times are
//! nanoseconds of CLOCK_MONOTONIC, the clock the kernel programs write down when they lead a socket to a backend. A
//! socket that was led there after the backend was lost is never closed: it saw newer plans than the judge has.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use rustc_hash::{FxHashMap, FxHashSet};

use super::suspect::{Change, Now, Suspects, serves};
use crate::{
    model::{Family, Protocol},
    plan::{Backend, Destination, Frontend, FrontendPlan, NodePlan, PortId, PortPlan, Removal},
};

/// When to look again, because a connect may have been under way while the backends changed.
pub(super) const AGAIN: u64 = 1_000_000_000;

/// What a socket was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Led {
    /// When.
    pub(super) since: u64,
    pub(super) protocol: Protocol,
    /// What it asked for.
    pub(super) service: SocketAddr,
    /// What it got.
    pub(super) backend: SocketAddr,
}

/// A service port whose clients' sockets are closed.
#[derive(Debug)]
struct Watched {
    plan: Arc<PortPlan>,
    /// By when everything was lost that does not serve and is not in `lost`.
    since: u64,
    /// What was lost later, and when. Once its sockets were looked at, `since` says as much.
    lost: FxHashMap<SocketAddr, u64>,
    /// When the port itself went. It stays until its sockets were looked at.
    gone: Option<u64>,
}

impl Watched {
    fn after(&self) -> u64 {
        match self.plan.on_removal {
            Removal::Reset { after } => nanoseconds(after),
            Removal::Keep => u64::MAX,
        }
    }
}

/// Everything that is watched.
#[derive(Debug, Default)]
pub(super) struct Judge {
    ports: FxHashMap<PortId, Watched>,
    /// Which port has each frontend. One that a TCP port gave up is still the port's, so its clients stay with what serves.
    frontends: FxHashMap<Frontend, PortId>,
    node: Option<Arc<NodePlan>>,
    /// Up to when everything that came into force is known here; 0 before everything was told once.
    known: u64,
    due: BTreeMap<u64, BTreeSet<Protocol>>,
    /// Whether a backend of a UDP port serves that did not before: what was moved away from it stays there no more.
    pub(super) came_back: bool,
}

impl Judge {
    /// Takes in what came into force.
    pub(super) fn take_in(&mut self, suspects: Suspects) {
        let Suspects { at, complete, node, ports, .. } = suspects;
        if complete || self.known != 0 {
            self.known = at;
        }
        if node.is_some() {
            self.node = node;
        }
        if complete {
            self.reset(&ports, at);
        }
        for change in ports {
            self.take_in_port(change, at);
        }
    }

    /// Starts anew with `ports`, keeping what is known of since when things are lost. Every socket is looked at.
    fn reset(&mut self, ports: &[Change], at: u64) {
        self.frontends.clear();
        let named: FxHashSet<&PortId> = ports.iter().map(|change| &change.id).collect();
        self.ports.retain(|id, _| named.contains(id));
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            self.look(at, protocol);
        }
    }

    fn take_in_port(&mut self, change: Change, at: u64) {
        let Change { id, lost, now } = change;
        match now {
            Now::Watched(plan) => self.watch(id, plan, &lost, at),
            Now::Kept => self.forget(&id),
            Now::Gone => {
                let Some(port) = self.ports.get_mut(&id) else { return };
                port.lost.extend(port.plan.serving.iter().chain(&lost).map(|backend| (end(backend), at)));
                let plan = Arc::make_mut(&mut port.plan);
                (plan.serving, plan.cluster, plan.local) = Default::default();
                port.gone = Some(at);
                let due = at.saturating_add(port.after());
                self.look(due, id.protocol);
            }
        }
    }

    fn watch(&mut self, id: PortId, plan: Arc<PortPlan>, lost: &[Backend], at: u64) {
        let mut handed_over = false;
        for planned in &plan.frontends {
            let before = self.frontends.insert(planned.frontend, id.clone());
            handed_over |= before.is_some_and(|before| before != id);
        }
        let released = self.release(&id, &plan);
        let new = self.ports.get(&id).is_none_or(|port| port.gone.is_some());
        let port = self.ports.entry(id.clone()).or_insert_with(|| Watched {
            plan: Arc::clone(&plan),
            since: at,
            lost: FxHashMap::default(),
            gone: None,
        });
        let served = port.plan.serving.iter().chain(lost);
        let lost: Vec<_> = served.filter(|backend| !serves(&plan, backend)).map(end).collect();
        let stricter = port.plan.on_removal != plan.on_removal;
        let shuts_out = id.protocol == Protocol::Udp && is_for_others(&port.plan, &plan);
        self.came_back |=
            id.protocol == Protocol::Udp && plan.serving.iter().any(|backend| !serves(&port.plan, backend));
        let look = new || handed_over || released || stricter || shuts_out || !lost.is_empty();
        port.lost.extend(lost.into_iter().map(|backend| (backend, at)));
        plan.serving.iter().chain(&plan.cluster).chain(&plan.local).for_each(|backend| {
            port.lost.remove(&end(backend));
        });
        (port.plan, port.gone) = (plan, None);
        if look {
            let due = at.saturating_add(port.after());
            self.look(due, id.protocol);
        }
    }

    /// Takes from a UDP port what it gave up, and says whether that was anything.
    fn release(&mut self, id: &PortId, plan: &PortPlan) -> bool {
        let Some(port) = self.ports.get(id).filter(|_| id.protocol == Protocol::Udp) else { return false };
        let frontends = port.plan.frontends.iter().map(|planned| planned.frontend);
        let mut released = false;
        for frontend in frontends.filter(|frontend| plan.frontend(*frontend).is_none()) {
            if self.frontends.get(&frontend) == Some(id) {
                self.frontends.remove(&frontend);
                released = true;
            }
        }
        released
    }

    fn forget(&mut self, id: &PortId) {
        self.ports.remove(id);
        self.frontends.retain(|_, owner| owner != id);
    }

    fn look(&mut self, due: u64, protocol: Protocol) {
        for at in [due, due.saturating_add(AGAIN)] {
            self.due.entry(at).or_default().insert(protocol);
        }
    }

    /// When to look next.
    pub(super) fn next(&self) -> Option<u64> {
        self.due.keys().next().copied()
    }

    /// Of which protocols sockets are to be looked at now; the same is not told again.
    pub(super) fn take_due(&mut self, now: u64) -> BTreeSet<Protocol> {
        let later = self.due.split_off(&now.saturating_add(1));
        std::mem::replace(&mut self.due, later).into_values().flatten().collect()
    }

    /// Forgets what all sockets have been judged by at `now`.
    pub(super) fn tidy(&mut self, now: u64) {
        let mut done = FxHashSet::default();
        for (id, port) in &mut self.ports {
            let wait = port.after().saturating_add(AGAIN);
            if port.gone.is_some_and(|gone| gone.saturating_add(wait) <= now) {
                done.insert(id.clone());
            }
            let since = &mut port.since;
            port.lost.retain(|_, lost| {
                let done = lost.saturating_add(wait) <= now;
                if done {
                    *since = (*since).max(*lost);
                }
                !done
            });
        }
        if !done.is_empty() {
            self.ports.retain(|id, _| !done.contains(id));
            self.frontends.retain(|_, owner| !done.contains(owner));
        }
    }

    /// Whether the socket has to go now, if it still leads there.
    pub(super) fn condemns(&self, socket: &Led, now: u64) -> bool {
        if !self.knows(socket) {
            return false;
        }
        let Some(port) = self.port_of(socket) else {
            // Nothing is kept of ports that keep their sockets, and every UDP port closes them: this one is gone.
            return socket.protocol == Protocol::Udp;
        };
        let (address, number) = (socket.backend.ip(), socket.backend.port());
        if serves(&port.plan, &Backend { address, port: number, local: false }) {
            return false;
        }
        let lost = port.lost.get(&socket.backend).copied().unwrap_or(port.since);
        socket.since <= lost && lost.saturating_add(port.after()) <= now
    }

    /// Whether the Service at this address leads UDP clients to this backend, or lets them stay there.
    pub(super) fn leads(&self, service: SocketAddr, backend: SocketAddr) -> bool {
        let led = Led { since: 0, protocol: Protocol::Udp, service, backend };
        let backend = Backend { address: backend.ip(), port: backend.port(), local: false };
        self.port_of(&led).is_some_and(|port| serves(&port.plan, &backend))
    }

    /// Whether a UDP port is at this address.
    pub(super) fn is_service(&self, service: SocketAddr) -> bool {
        let led = Led { since: 0, protocol: Protocol::Udp, service, backend: service };
        self.port_of(&led).is_some_and(|port| port.gone.is_none())
    }

    /// Whether everything is known here that the programs knew when they led the socket.
    const fn knows(&self, socket: &Led) -> bool {
        socket.since != 0 && socket.since <= self.known
    }

    /// Which clients a UDP socket's frontend is for, where it is not for all (F7): others have to go too. The programs lead no
    /// socket by such a frontend, so this one was led before.
    pub(super) fn guard_of(&self, socket: &Led, now: u64) -> Option<Guard> {
        if socket.protocol != Protocol::Udp || !self.knows(socket) || self.condemns(socket, now) {
            return None;
        }
        self.guard_at(socket.service)
    }

    /// Which clients a UDP Service is for now, where it is not for all.
    pub(super) fn guard_at(&self, service: SocketAddr) -> Option<Guard> {
        let destination = Destination::Address(service.ip());
        let asked = Frontend { destination, protocol: Protocol::Udp, port: service.port() };
        let port = self.ports.get(self.frontends.get(&asked)?)?;
        let planned = port.plan.frontend(asked)?;
        planned
            .allowed_sources
            .is_some()
            .then(|| Guard { frontend: planned.clone(), node: self.node.clone() })
    }

    /// The port that the socket asked for. A NodePort is told by its number alone (K3), unless the address and port are
    /// a frontend themselves: those come first (R1). Not all TCP frontends are here, so the address has to be this
    /// node's.
    fn port_of(&self, socket: &Led) -> Option<&Watched> {
        let Led { protocol, service, .. } = *socket;
        let find = |destination| {
            let frontend = Frontend { destination, protocol, port: service.port() };
            self.ports.get(self.frontends.get(&frontend)?)
        };
        find(Destination::Address(service.ip())).or_else(|| {
            let here = protocol == Protocol::Udp || self.is_this_node(service.ip());
            here.then(|| find(Destination::NodePort(Family::of(service.ip()))))?
        })
    }

    fn is_this_node(&self, address: IpAddr) -> bool {
        let known = |node: &NodePlan| node.host_addresses.binary_search(&address).is_ok();
        address.is_loopback() || self.node.as_deref().is_some_and(known)
    }
}

/// Lets in the clients that a frontend is for.
#[derive(Debug)]
pub(super) struct Guard {
    frontend: FrontendPlan,
    node: Option<Arc<NodePlan>>,
}

impl Guard {
    /// Whether a socket with this address of its own may stay. Which address a process of this host comes from depends on
    /// where its packets go, so it may come from any of the host's.
    pub(super) fn lets_in(&self, client: IpAddr) -> bool {
        let host = self.node.as_deref().map(|node| &node.host_addresses[..]).unwrap_or_default();
        self.frontend.lets_in(client)
            || (host.binary_search(&client).is_ok() && host.iter().any(|own| self.frontend.lets_in(*own)))
    }
}

/// Whether a frontend is for other clients than before.
fn is_for_others(before: &PortPlan, after: &PortPlan) -> bool {
    let allowed = |plan: &PortPlan| -> Vec<_> {
        let guarded = plan.frontends.iter().filter(|planned| planned.allowed_sources.is_some());
        guarded.map(|planned| (planned.frontend, planned.allowed_sources.clone())).collect()
    };
    allowed(before) != allowed(after)
}

fn end(backend: &Backend) -> SocketAddr {
    SocketAddr::new(backend.address, backend.port)
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
