//! Model, planner and data plane on one thread: takes changes in, brings the kernel up to date, takes the next in.
//!
//! In: changes, host addresses, news of foreign rule set changes. Out: a kernel that holds what was planned, health
//! and metrics, and suspects for conntrack. There is no pacing: what arrives while the kernel is being written is the
//! next delta. After a failure everything is compared with the kernel again, first soon and then ever less often.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    pin::pin,
    sync::PoisonError,
    time::{Duration, Instant},
};

use k8s_openapi::jiff::Timestamp;
use proxy_ebpf::system;
use tokio::sync::{mpsc, oneshot, watch};

use super::{Addresses, census::Census, served};
use crate::{
    dataplane::{Dataplane, Error, Fill, conntrack::Suspects, nftables::Seen, sockets},
    dns::SharedNames,
    model::{Family, Model, ObjectName, Settings},
    observe::{Events, Health, HealthCheckState, HealthChecks, Metrics, Trouble},
    plan::{Conflict, Delta, NodePortAddresses, Planner, PortId},
    source::{Change, Object},
};

/// What the engine listens to.
pub(super) struct Inputs {
    pub(super) changes: mpsc::Receiver<Change>,
    pub(super) addresses: Addresses,
    /// Comes once the data plane is open. What the kernel holds is read while changes are taken in and planned.
    pub(super) opened: oneshot::Receiver<Opened>,
    pub(super) stopping: watch::Receiver<bool>,
}

/// An open data plane, and what goes with it.
pub(super) struct Opened {
    pub(super) plane: Box<dyn Dataplane>,
    /// Tells of foreign changes to our tables.
    pub(super) foreign: mpsc::Receiver<Seen>,
    /// Is told which backends serve no longer, once that is in force.
    pub(super) sockets: Option<std::sync::mpsc::Sender<sockets::Suspects>>,
}

/// The first wait after a failure; it doubles up to the configured syncPeriod.
const FIRST_RETRY: Duration = Duration::from_millis(100);

/// A foreign change this long after the one before is a new story.
const CALM: Duration = Duration::from_secs(10);

/// Most changes of names while queries wait.
const CHANGES_OF_NAMES: usize = 256;

/// Most changes taken in before the kernel is brought up to date.
const MOST_CHANGES: usize = 65_536;

pub(super) struct Engine {
    model: Model,
    planner: Planner,
    plane: Option<Box<dyn Dataplane>>,
    conntrack: Option<mpsc::UnboundedSender<Suspects>>,
    sockets: Option<std::sync::mpsc::Sender<sockets::Suspects>>,
    health_checks: Option<HealthChecks>,
    names: Option<(SharedNames, watch::Sender<u32>)>,
    events: Events,
    metrics: Metrics,
    health: Health,
    families: Vec<Family>,
    census: Census,
    started: Timestamp,
    /// Why everything has to be compared with the kernel, if it has to.
    reconcile: Option<&'static str>,
    know_addresses: bool,
    node_is_optional: bool,
    longest_retry: Duration,
    failures: u32,
    retry_at: Option<tokio::time::Instant>,
    repaired_at: Option<tokio::time::Instant>,
    repairs_in_a_row: u32,
    /// Services planned anew and not yet in force: their health checks are told when they are.
    replanned: Vec<ObjectName>,
    /// The Services that have a health check now.
    checked: HashMap<ObjectName, HealthCheckState>,
    /// How many changes of Services and of slices are taken in and not yet in force.
    pending: (usize, usize),
    /// Who waits for everything to be in force.
    first: Option<oneshot::Sender<()>>,
    /// Whether everything that can be has been in force since the start.
    served: bool,
    /// Slices taken in and not yet in force: their family and when the endpoints changed.
    triggers: Vec<(Family, Timestamp)>,
}

impl Engine {
    pub(super) fn new(settings: Settings, metrics: Metrics, health: Health) -> Self {
        Self {
            families: served(settings.families).collect(),
            model: Model::new(settings),
            planner: Planner::default(),
            plane: None,
            conntrack: None,
            sockets: None,
            health_checks: None,
            names: None,
            events: Events::logged(),
            metrics,
            health,
            census: Census::default(),
            started: Timestamp::now(),
            reconcile: Some("start"),
            know_addresses: false,
            node_is_optional: false,
            longest_retry: Duration::from_secs(30),
            failures: 0,
            retry_at: None,
            repaired_at: None,
            repairs_in_a_row: 0,
            replanned: Vec::new(),
            checked: HashMap::new(),
            pending: (0, 0),
            first: None,
            served: false,
            triggers: Vec::new(),
        }
    }

    /// Tells these servers how many local endpoints are in force.
    pub(super) fn with_health_checks(self, health_checks: HealthChecks) -> Self {
        Self { health_checks: Some(health_checks), ..self }
    }

    /// Keeps these names, and tells there how many changes they have seen.
    pub(super) fn with_names(self, names: Option<(SharedNames, watch::Sender<u32>)>) -> Self {
        Self { names, ..self }
    }

    /// Tells there of service ports that cannot be programmed.
    pub(super) fn with_events(self, events: Events) -> Self {
        Self { events, ..self }
    }

    /// Tells there once everything is in force.
    pub(super) fn with_first(self, first: Option<oneshot::Sender<()>>) -> Self {
        Self { first, ..self }
    }

    /// Whether a source without this node's Node is no reason to keep load balancers away.
    pub(super) fn with_optional_node(self, optional: bool) -> Self {
        Self { node_is_optional: optional, ..self }
    }

    /// Waits no longer than `longest` after a failure.
    pub(super) fn with_retry(self, longest: Duration) -> Self {
        Self { longest_retry: longest.max(FIRST_RETRY), ..self }
    }

    /// Sends suspects there once what they follow from is in force.
    pub(super) fn with_conntrack(self, conntrack: mpsc::UnboundedSender<Suspects>) -> Self {
        Self { conntrack: Some(conntrack), ..self }
    }

    /// Works until the source ends or stopping is asked for.
    pub(super) async fn run(mut self, inputs: Inputs) {
        let Inputs { mut changes, mut addresses, mut opened, mut stopping } = inputs;
        let mut foreign = None;
        self.families.iter().for_each(|family| self.health.updated(*family));
        let mut taken = Vec::new();
        loop {
            let retry = self.retry_at;
            let retry = pin!(async move {
                match retry {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            });
            tokio::select! {
                count = changes.recv_many(&mut taken, MOST_CHANGES) => if count == 0 { return },
                Ok(()) = addresses.changed() => {
                    self.model.set_host_addresses(addresses.borrow_and_update().clone());
                    self.know_addresses = true;
                }
                opened = &mut opened, if self.plane.is_none() => {
                    // Without one the agent ends, and says why.
                    let Ok(Opened { plane, foreign: news, sockets }) = opened else { return };
                    (self.plane, self.sockets, foreign) = (Some(plane), sockets, Some(news));
                }
                Some(seen) = next(&mut foreign) => self.notice(seen),
                () = retry => {}
                _ = stopping.wait_for(|stop| *stop) => return,
            }
            while taken.len() < MOST_CHANGES {
                let Ok(change) = changes.try_recv() else { break };
                taken.push(change);
            }
            self.take_in_names(&taken);
            for change in taken.drain(..) {
                self.take_in(change);
            }
            self.bring_up_to_date();
            self.metrics.set_pending(self.pending.0, self.pending.1);
            // A node whose Services are not programmed yet is none to send traffic to (P3), whatever its Node says.
            let unknown = self.node_is_optional && !self.model.knows_node();
            self.health.set_eligible(self.served && (unknown || self.model.node_eligible()));
        }
    }

    /// Has the tables repaired: at once, but if it happens again and again, as when two agents run on one node, ever
    /// later, so that they do not keep each other busy.
    fn notice(&mut self, seen: Seen) {
        let now = tokio::time::Instant::now();
        let again = self.repaired_at.replace(now).is_some_and(|last| now - last < CALM);
        self.repairs_in_a_row = if again { self.repairs_in_a_row.saturating_add(1) } else { 0 };
        let wait = match self.repairs_in_a_row {
            0 => Duration::ZERO,
            repairs => FIRST_RETRY.saturating_mul(1 << repairs.min(6)).min(CALM / 2),
        };
        tracing::warn!(?seen, ?wait, "somebody else changed our tables, repairing them");
        self.reconcile = Some("foreign");
        self.retry_at = Some(now + wait);
    }

    /// Names first: they are there at once, and the kernel takes longer.
    fn take_in_names(&self, changes: &[Change]) {
        let Some((names, seen)) = &self.names else { return };
        for some in changes.chunks(CHANGES_OF_NAMES) {
            let mut names = names.write().unwrap_or_else(PoisonError::into_inner);
            some.iter().for_each(|change| names.apply(change));
            seen.send_replace(names.changes());
        }
    }

    fn take_in(&mut self, change: Change) {
        match &change {
            Change::Apply(Object::Service(_)) => {
                self.metrics.service_changed();
                self.pending.0 += 1;
            }
            Change::Apply(Object::EndpointSlice(slice)) => {
                self.metrics.endpoints_changed();
                self.pending.1 += 1;
                self.triggers.extend(trigger(slice).filter(|(_, at)| *at > self.started));
            }
            Change::Apply(_) | Change::Delete(..) | Change::Synced(_) => {}
        }
        self.model.apply(change);
    }

    fn bring_up_to_date(&mut self) {
        if !self.model.is_synced() || !self.know_addresses {
            return;
        }
        let started = Instant::now();
        for name in self.model.take_dirty() {
            self.planner.update(&name, self.model.plan(&name));
            self.replanned.push(name);
        }
        self.tell_of_conflicts();
        self.planner.update_node(self.model.node_plan());
        if let Some(mut plane) = self.plane.take() {
            self.program(&mut *plane, started);
            self.plane = Some(plane);
        }
    }

    fn program(&mut self, plane: &mut dyn Dataplane, started: Instant) {
        // A failure that is not due again yet must not be made worse by every new change.
        let waiting = self.retry_at.is_some_and(|at| at > tokio::time::Instant::now());
        if self.reconcile.is_some() && waiting {
            self.families.iter().for_each(|family| self.health.queued(*family));
            return;
        }
        self.retry_at = None;
        let delta = match self.next_delta(plane) {
            Ok(delta) => delta,
            Err(error) => return self.failed(&error),
        };
        if delta.is_empty() {
            self.metrics.set_unprogrammed(0);
            self.pending = (0, 0);
            return self.tell_health_checks();
        }
        for family in &self.families {
            self.health.queued(*family);
            self.metrics.queued(*family);
        }
        let result = plane.apply(&delta);
        for Fill { map, elements, room } in plane.fill() {
            self.metrics.set_fill(map, elements, room);
        }
        self.settle(&delta, result, started);
        if delta.complete {
            drop(delta);
            system::trim_heap();
        }
    }

    fn next_delta(&mut self, plane: &mut dyn Dataplane) -> Result<Delta, Error> {
        let Some(reason) = self.reconcile else { return Ok(self.planner.take_delta()) };
        if reason != "start" {
            plane.reread()?;
        }
        self.metrics.reconciled(reason);
        Ok(self.planner.complete())
    }

    /// Draws the consequences of what became of a delta.
    fn settle(&mut self, delta: &Delta, result: Result<(), Error>, started: Instant) {
        let refused: Vec<PortId> = match &result {
            Ok(()) => Vec::new(),
            Err(Error::Ports(ports)) => {
                self.tell_of_unprogrammed(ports);
                ports.iter().map(|(port, _)| port.clone()).collect()
            }
            Err(error) => {
                self.reconcile = Some("failure");
                return self.failed(error);
            }
        };
        self.metrics.set_unprogrammed(refused.len());
        self.served = true;
        let in_force = || delta.ports.iter().filter(|port| port.id().is_some_and(|id| !refused.contains(id)));
        if delta.complete {
            self.census = Census::default();
        }
        in_force().for_each(|port| self.census.count(port));
        self.census.publish(&self.metrics, self.planner.services().len());
        self.metrics.changes_applied(in_force().count());
        if let Some(conntrack) = &self.conntrack {
            let suspects = Suspects::of(in_force());
            if !suspects.is_empty() && conntrack.send(suspects).is_err() {
                tracing::error!("the conntrack thread is gone, stale UDP flows stay");
                self.conntrack = None;
            }
        }
        if let Some(sockets) = &self.sockets {
            let suspects = sockets::Suspects::of(delta);
            if !suspects.is_empty() && sockets.send(suspects).is_err() {
                tracing::error!("the thread that closes sockets is gone, sockets stay with dead backends");
                self.sockets = None;
            }
        }
        let was = self.reconcile.take();
        if !refused.is_empty() {
            if !self.planner.failed(delta, &refused) {
                self.reconcile = Some("failure");
            }
            return self.schedule_retry();
        }
        self.failures = 0;
        self.tell_health_checks();
        self.in_force(delta, was, started);
    }

    /// Logs each frontend that two Services claim, and makes an event for the one that does not get it (R12).
    fn tell_of_conflicts(&mut self) {
        for Conflict { frontend, owner, service } in self.planner.take_conflicts() {
            tracing::warn!(%frontend, %owner, %service, "two Services claim one frontend: the older one has it");
            let note = format!("{frontend} belongs to the older Service {owner}");
            self.events.tell(Trouble::of_service(service, "FrontendTaken", "Program", note));
        }
    }

    /// Logs each port that could not be programmed, and makes one event for each Service.
    fn tell_of_unprogrammed(&self, ports: &[(PortId, String)]) {
        let mut notes: BTreeMap<&ObjectName, Vec<String>> = BTreeMap::new();
        for (port, problem) in ports {
            tracing::error!(%port, problem, "cannot program this service port");
            notes.entry(&port.service).or_default().push(format!("{port}: {problem}"));
        }
        for (service, notes) in notes {
            let note = notes.join("; ");
            self.events.tell(Trouble::of_service(service.clone(), "FailedToProgram", "Program", note));
        }
    }

    /// Tells the health check servers of the Services that were planned anew, now that their plans are in force.
    fn tell_health_checks(&mut self) {
        let Some(servers) = &self.health_checks else { return self.replanned.clear() };
        for name in self.replanned.drain(..) {
            let check = self.planner.service(&name).and_then(|plan| plan.health_check);
            let addresses = || health_check_addresses(&self.planner, &self.families);
            let state = check.map(|check| HealthCheckState {
                port: check.port,
                local_endpoints: check.local_endpoints,
                addresses: addresses(),
            });
            if self.checked.get(&name) == state.as_ref() {
                continue;
            }
            match &state {
                Some(state) => self.checked.insert(name.clone(), state.clone()),
                None => self.checked.remove(&name),
            };
            servers.set(name, state);
        }
    }

    /// Says that everything taken in so far is in force.
    fn in_force(&mut self, delta: &Delta, reconciled: Option<&'static str>, started: Instant) {
        for family in &self.families {
            self.health.updated(*family);
            self.metrics.synced(*family, delta.complete, started.elapsed());
        }
        self.pending = (0, 0);
        if let Some(first) = self.first.take() {
            // Whoever waited may have given up.
            let _ = first.send(());
        }
        let now = Timestamp::now();
        for (family, at) in self.triggers.drain(..) {
            self.metrics.network_programmed(family, now.duration_since(at).unsigned_abs());
        }
        if let Some(reason) = reconciled {
            let services = self.planner.services().len();
            tracing::info!(reason, services, ports = delta.ports.len(), took = ?started.elapsed(), "in force");
        } else {
            tracing::debug!(ports = delta.ports.len(), took = ?started.elapsed(), "in force");
        }
    }

    fn failed(&mut self, error: &Error) {
        for family in &self.families {
            self.metrics.sync_failed(*family);
        }
        let cause = std::error::Error::source(error).map(ToString::to_string);
        tracing::error!(%error, cause, "cannot program the kernel; what is programmed stays");
        self.schedule_retry();
    }

    fn schedule_retry(&mut self) {
        let wait = FIRST_RETRY.saturating_mul(1 << self.failures.min(16)).min(self.longest_retry);
        self.failures = self.failures.saturating_add(1);
        self.retry_at = Some(tokio::time::Instant::now() + wait);
    }
}

/// The next foreign change; none before there is a data plane.
async fn next(foreign: &mut Option<mpsc::Receiver<Seen>>) -> Option<Seen> {
    match foreign {
        Some(foreign) => foreign.recv().await,
        None => std::future::pending().await,
    }
}

/// Where health check servers listen (H3): on all addresses, or on those that serve NodePorts.
fn health_check_addresses(planner: &Planner, families: &[Family]) -> Vec<IpAddr> {
    let Some(node) = planner.node() else { return Vec::new() };
    let of = |family: &Family| match node.node_port_addresses.get(*family) {
        NodePortAddresses::AnyLocal => vec![HealthChecks::anywhere(*family)],
        NodePortAddresses::Only(addresses) => addresses.clone(),
    };
    families.iter().flat_map(of).collect()
}

/// The family of a slice, and when its endpoints last changed, if it says so (W10).
fn trigger(
    slice: &k8s_openapi::api::discovery::v1::EndpointSlice,
) -> impl Iterator<Item = (Family, Timestamp)> {
    let annotation = slice.metadata.annotations.as_ref().and_then(|annotations| {
        annotations.get("endpoints.kubernetes.io/last-change-trigger-time")?.parse().ok()
    });
    let family = match slice.address_type.as_str() {
        "IPv4" => Some(Family::V4),
        "IPv6" => Some(Family::V6),
        _ => None,
    };
    family.zip(annotation).into_iter()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{
        dataplane::{Faulty, Memory},
        model::fixture::{named, service, settings},
        source::Kind,
    };

    /// The number that this metric has.
    fn metric(metrics: &Metrics, name: &str) -> Option<String> {
        let text = metrics.render();
        text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ').map(str::to_owned))
    }

    async fn until(wanted: impl Fn() -> bool) {
        let waiting = async {
            while !wanted() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), waiting).await.expect("it does not come");
    }

    /// Runs an engine on a host with one address until nobody sends changes any more.
    fn running(
        engine: Engine,
        plane: impl Dataplane + 'static,
    ) -> (mpsc::Sender<Change>, tokio::task::JoinHandle<()>) {
        let (change, changes) = mpsc::channel(16);
        let engine = tokio::spawn(async move {
            let (_foreign, foreign) = mpsc::channel(1);
            let (open, opened) = oneshot::channel();
            let sent = open.send(Opened { plane: Box::new(plane), foreign, sockets: None });
            assert!(sent.is_ok(), "nobody waits for the plane");
            let (_stop, stopping) = watch::channel(false);
            let (addresses_in, addresses) = watch::channel(Vec::new());
            addresses_in.send_replace(vec!["192.0.2.1".parse().unwrap()]);
            engine.run(Inputs { changes, addresses, opened, stopping }).await;
        });
        (change, engine)
    }

    #[tokio::test]
    async fn r12_who_does_not_get_a_frontend_hears_of_it() {
        let (events, mut troubles) = Events::channel();
        let engine =
            Engine::new(settings(), Metrics::new(), Health::new(Duration::from_secs(30))).with_events(events);
        let (change, engine) = running(engine, Memory::default());
        for (name, ip) in [("api", "10.0.0.1"), ("web", "10.0.0.2")] {
            let spec = json!({ "clusterIP": ip, "ports": [{ "port": 80 }], "externalIPs": ["198.51.100.1"] });
            change.send(service(name, spec)).await.unwrap();
        }
        for kind in Kind::ALL {
            change.send(Change::Synced(kind)).await.unwrap();
        }
        let trouble = tokio::time::timeout(Duration::from_secs(20), troubles.recv()).await.unwrap().unwrap();
        let note = "198.51.100.1:80/TCP belongs to the older Service ns/api".to_owned();
        assert_eq!(trouble, Trouble::of_service(named("web"), "FrontendTaken", "Program", note));
        drop(change);
        engine.await.unwrap();
    }

    #[tokio::test]
    async fn ports_that_cannot_be_programmed_are_told_of_by_service_and_counted() {
        let (metrics, (events, mut troubles)) = (Metrics::new(), Events::channel());
        let plane = Faulty::new(Memory::default(), 1, 100, 0);
        let engine = Engine::new(settings(), metrics.clone(), Health::new(Duration::from_secs(30)))
            .with_events(events);
        let (change, engine) = running(engine, plane);
        let ports = json!([{ "name": "a", "port": 1 }, { "name": "b", "port": 2 }]);
        change.send(service("web", json!({ "clusterIP": "10.0.0.1", "ports": ports }))).await.unwrap();
        for kind in Kind::ALL {
            change.send(Change::Synced(kind)).await.unwrap();
        }

        let trouble = tokio::time::timeout(Duration::from_secs(20), troubles.recv()).await.unwrap().unwrap();
        let why = "a fault on purpose";
        assert_eq!(
            trouble,
            Trouble::of_service(
                named("web"),
                "FailedToProgram",
                "Program",
                format!("ns/web:a/TCP (IPv4): {why}; ns/web:b/TCP (IPv4): {why}"),
            )
        );
        until(|| metric(&metrics, "weir_unprogrammed_ports").as_deref() == Some("2")).await;
        change.send(Change::Delete(Kind::Service, named("web"))).await.unwrap();
        until(|| metric(&metrics, "weir_unprogrammed_ports").as_deref() == Some("0")).await;
        drop(change);
        engine.await.unwrap();
    }
}
