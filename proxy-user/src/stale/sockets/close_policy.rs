//! Which sockets weir closes, and when it checks them: the pure half.
//!
//! In: [`Suspects`] in the order in which they came into force, and each socket's entry in the maps. Out: when to
//! check which sockets, and for each socket whether to close it.
//!
//! The policy keeps which backends serve now, not which changed, so the next sweep finds a socket that one sweep
//! missed. Times are nanoseconds of CLOCK_MONOTONIC, which the kernel programs store when they connect a socket to a
//! backend. A socket that connected after the backend was lost is never closed, because it saw a newer state than the
//! policy.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use rustc_hash::{FxHashMap, FxHashSet};

use super::suspect::{Change, Now, Suspects};
use crate::{
    model::{Family, Protocol},
    plan::{Backend, Destination, Frontend, FrontendPlan, NodePlan, PortId, PortPlan, Removal},
};

/// The delay of a second check, because a connect may have been in progress while the backends changed.
pub(super) const AGAIN: u64 = 1_000_000_000;

/// A socket that a kernel program connected to a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ConnectedSocket {
    /// The time of the connect.
    pub(super) since: u64,
    pub(super) protocol: Protocol,
    /// The frontend that the process connected to.
    pub(super) service: SocketAddr,
    /// The backend that the program picked.
    pub(super) backend: SocketAddr,
}

/// A service port whose clients' sockets weir closes.
#[derive(Debug)]
struct WatchedPort {
    plan: Arc<PortPlan>,
    /// The time by which all backends were lost that neither serve nor are in `lost`.
    since: u64,
    /// Backends that were lost later, and when. Once their sockets are checked, `since` covers them.
    lost: FxHashMap<SocketAddr, u64>,
    /// When the port was deleted. It stays here until its sockets are checked.
    gone: Option<u64>,
}

impl WatchedPort {
    fn after(&self) -> u64 {
        match self.plan.on_removal {
            Removal::Reset { after } => nanoseconds(after),
            Removal::Keep => u64::MAX,
        }
    }
}

/// The watched service ports.
#[derive(Debug, Default)]
pub(super) struct ClosePolicy {
    ports: FxHashMap<PortId, WatchedPort>,
    /// The port of each frontend. A frontend that a TCP port lost still has its entry, so clients stay with serving
    /// backends.
    frontends: FxHashMap<Frontend, PortId>,
    node: Option<Arc<NodePlan>>,
    /// The policy knows all changes up to this time; 0 before the first complete delta.
    known: u64,
    due: BTreeMap<u64, BTreeSet<Protocol>>,
    /// Whether a backend of a UDP port serves again. Sockets that were moved away from it then return to it.
    pub(super) came_back: bool,
}

impl ClosePolicy {
    /// Takes in the changes of a delta that came into force.
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

    /// Keeps only `ports`, with the times at which backends were lost, and checks every socket.
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
        let port = self.ports.entry(id.clone()).or_insert_with(|| WatchedPort {
            plan: Arc::clone(&plan),
            since: at,
            lost: FxHashMap::default(),
            gone: None,
        });
        let served = port.plan.serving.iter().chain(lost);
        let lost: Vec<_> =
            served.filter(|backend| !plan.serves(backend.address, backend.port)).map(end).collect();
        let stricter = port.plan.on_removal != plan.on_removal;
        let shuts_out = id.protocol == Protocol::Udp && is_for_others(&port.plan, &plan);
        self.came_back |= id.protocol == Protocol::Udp
            && plan.serving.iter().any(|backend| !port.plan.serves(backend.address, backend.port));
        let look = new || handed_over || released || stricter || shuts_out || !lost.is_empty();
        port.lost.extend(lost.into_iter().map(|backend| (backend, at)));
        plan.serving.iter().for_each(|backend| {
            port.lost.remove(&end(backend));
        });
        (port.plan, port.gone) = (plan, None);
        if look {
            let due = at.saturating_add(port.after());
            self.look(due, id.protocol);
        }
    }

    /// Removes frontends that a UDP port lost. Returns whether there were any.
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

    /// The time of the next check.
    pub(super) fn next(&self) -> Option<u64> {
        self.due.keys().next().copied()
    }

    /// The protocols whose sockets are due now. Removes them from the schedule.
    pub(super) fn take_due(&mut self, now: u64) -> BTreeSet<Protocol> {
        let later = self.due.split_off(&now.saturating_add(1));
        std::mem::replace(&mut self.due, later).into_values().flatten().collect()
    }

    /// Drops lost backends and deleted ports whose sockets have been checked by `now`.
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

    /// Whether the socket must be closed now, if it is still connected to the backend.
    pub(super) fn must_close(&self, socket: &ConnectedSocket, now: u64) -> bool {
        if !self.knows(socket) {
            return false;
        }
        let Some(port) = self.port_of(socket) else {
            // The policy has no ports that keep their sockets. No UDP port keeps them, so a missing UDP port was
            // deleted.
            return socket.protocol == Protocol::Udp;
        };
        if port.plan.serves(socket.backend.ip(), socket.backend.port()) {
            return false;
        }
        let lost = port.lost.get(&socket.backend).copied().unwrap_or(port.since);
        socket.since <= lost && lost.saturating_add(port.after()) <= now
    }

    /// Whether UDP flows from this Service address may go to this backend.
    pub(super) fn serves(&self, service: SocketAddr, backend: SocketAddr) -> bool {
        let socket = ConnectedSocket { since: 0, protocol: Protocol::Udp, service, backend };
        self.port_of(&socket).is_some_and(|port| port.plan.serves(backend.ip(), backend.port()))
    }

    /// Whether a UDP port has this address.
    pub(super) fn is_service(&self, service: SocketAddr) -> bool {
        let socket = ConnectedSocket { since: 0, protocol: Protocol::Udp, service, backend: service };
        self.port_of(&socket).is_some_and(|port| port.gone.is_none())
    }

    /// Whether the policy has the state that the programs used when they connected the socket.
    const fn knows(&self, socket: &ConnectedSocket) -> bool {
        socket.since != 0 && socket.since <= self.known
    }

    /// The allowed clients of a UDP socket's frontend, if it has source ranges (F7); sockets of other clients are
    /// closed too. The programs do not translate such frontends, so the socket connected before the ranges came.
    pub(super) fn allowed_clients_of(&self, socket: &ConnectedSocket, now: u64) -> Option<AllowedClients> {
        if socket.protocol != Protocol::Udp || !self.knows(socket) || self.must_close(socket, now) {
            return None;
        }
        self.allowed_clients(socket.service)
    }

    /// The allowed clients of a UDP frontend, if it has source ranges.
    pub(super) fn allowed_clients(&self, service: SocketAddr) -> Option<AllowedClients> {
        let destination = Destination::Address(service.ip());
        let asked = Frontend { destination, protocol: Protocol::Udp, port: service.port() };
        let port = self.ports.get(self.frontends.get(&asked)?)?;
        let planned = port.plan.frontend(asked)?;
        planned
            .allowed_sources
            .is_some()
            .then(|| AllowedClients { frontend: planned.clone(), node: self.node.clone() })
    }

    /// The service port that the socket used. A NodePort is found by its number (K3), unless the address and port are
    /// a frontend of their own, which wins (R1). The policy does not have all TCP frontends, so with TCP the address
    /// must be this node's.
    fn port_of(&self, socket: &ConnectedSocket) -> Option<&WatchedPort> {
        let ConnectedSocket { protocol, service, .. } = *socket;
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

/// The clients that a frontend with source ranges allows.
#[derive(Debug)]
pub(super) struct AllowedClients {
    frontend: FrontendPlan,
    node: Option<Arc<NodePlan>>,
}

impl AllowedClients {
    /// Whether a socket with this own address may stay. A process of this host may use any of the host's addresses,
    /// because its source address depends on its destination.
    pub(super) fn lets_in(&self, client: IpAddr) -> bool {
        let host = self.node.as_deref().map(|node| &node.host_addresses[..]).unwrap_or_default();
        self.frontend.lets_in(client)
            || (host.binary_search(&client).is_ok() && host.iter().any(|own| self.frontend.lets_in(*own)))
    }
}

/// Whether any frontend allows other clients than before.
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
