//! Two planes for one plan: the socket plane in front, the nftables plane behind.
//!
//! In: [`Delta`]s. Out: the same delta, first to the nftables plane, then to the socket plane. Each plane
//! needs a while for a complete delta, so both get it at once if the socket plane serves.
//!
//! The nftables plane has every frontend for every source. The socket plane has the frontends that a program
//! can translate at a socket: TCP and UDP, for pods and this host, without source ranges. A socket that it
//! leaves untranslated sends packets to the Service's address, and nftables translates them. So nftables
//! serves everything that the socket plane lacks, refuses or does not have yet: traffic from outside, SCTP,
//! pings, pods that opted out. Therefore nftables gets each delta first, and a failure of the whole socket
//! plane is no outage. The socket plane does not depend on nftables for what it has.
//!
//! So only failures of the nftables plane are errors to the caller. A service port that the socket plane
//! refuses is reported as left to nftables. After a failure of the whole socket plane, the stack reads it
//! back and gives it everything again, with growing waits. After [`MAX_FAILURES`] failures in a row the
//! socket plane steps aside, because its entries would translate sockets to backends that no longer exist.
//! The stack tries it again now and then.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use super::{Dataplane, Error, Fill, Shortfall, Standing, State};
use crate::{
    model::{Family, PerFamily},
    plan::{Delta, Frontend, PortDelta, PortId, PortPlan},
};

/// After this many failures in a row the socket plane steps aside.
const MAX_FAILURES: u32 = 5;

/// The wait after its first failure; each failure doubles it.
const FIRST_RETRY: Duration = Duration::from_millis(100);

/// A socket plane in front of an nftables plane.
pub struct Stack<N, S> {
    nftables: N,
    front: Front<S>,
}

/// The socket plane and its state.
struct Front<S> {
    plane: S,
    /// The name under which it serves. `None` for a plane that only removes what an earlier agent left.
    name: Option<&'static str>,
    /// When it is to get a complete delta; `None` as long as it has every change.
    resync_at: Option<Instant>,
    /// Whether it must be read back before that.
    must_reread: bool,
    /// The numbers of failures in a row, and in total.
    failures: (u32, u64),
    aside: bool,
    /// The wait between two attempts after it has stepped aside.
    longest_retry: Duration,
    /// The plans of ports where the plane differs from the state that the caller assumes: because the socket
    /// plane refused the port, or because the nftables plane did.
    differing: BTreeMap<PortId, Option<Arc<PortPlan>>>,
}

impl<N: Dataplane, S: Dataplane> Stack<N, S> {
    /// Combines two planes. `sockets` has no name yet: see [`Stack::serving_as`].
    pub fn new(nftables: N, sockets: S) -> Self {
        let front = Front {
            plane: sockets,
            name: None,
            resync_at: Some(Instant::now()),
            must_reread: false,
            failures: (0, 0),
            aside: false,
            longest_retry: Duration::from_secs(30),
            differing: BTreeMap::new(),
        };
        Self { nftables, front }
    }

    /// Names the socket plane as one that serves. Then both planes apply a complete delta at once.
    pub fn serving_as(mut self, name: &'static str) -> Self {
        self.front.name = Some(name);
        self
    }

    /// Sets the wait between two attempts after the socket plane has stepped aside.
    pub fn with_retry(mut self, longest: Duration) -> Self {
        self.front.longest_retry = longest.max(FIRST_RETRY);
        self
    }

    /// For tests and metrics that address one plane.
    pub fn nftables(&mut self) -> &mut N {
        &mut self.nftables
    }

    /// For tests that address one plane.
    pub fn socket_plane(&mut self) -> &mut S {
        &mut self.front.plane
    }
}

impl<S: Dataplane> Front<S> {
    /// Whether the socket plane gets this delta: changes if it has all earlier ones, a complete delta if it
    /// is due.
    fn accepts(&self, delta: &Delta) -> bool {
        match self.resync_at {
            None => !delta.complete,
            Some(since) => delta.complete && since <= Instant::now(),
        }
    }

    /// Applies a delta. Returns the ports that are left to nftables.
    fn apply(&mut self, delta: &Delta) -> Vec<(PortId, String)> {
        let result = if std::mem::take(&mut self.must_reread) { self.plane.reread() } else { Ok(()) };
        let (mut refused, left) = match result.and_then(|()| self.plane.apply(&self.adjusted(delta))) {
            Ok(()) => (Vec::new(), Vec::new()),
            Err(Error::Partly(Shortfall { refused, left, failed })) if failed.is_empty() => (refused, left),
            Err(error) => {
                self.after_failure(&error);
                return Vec::new();
            }
        };
        self.after_apply(delta, &refused, &left);
        refused.extend(left);
        refused
    }

    /// The delta with `before` of each port as this plane has it.
    fn adjusted<'a>(&self, delta: &'a Delta) -> Cow<'a, Delta> {
        let differs = |port: &PortDelta| port.id().is_some_and(|id| self.differing.contains_key(id));
        if delta.complete || !delta.ports.iter().any(|port| differs(port) || is_repeat(port)) {
            return Cow::Borrowed(delta);
        }
        let mut delta = delta.clone();
        for port in &mut delta.ports {
            if let Some(has) = port.id().and_then(|id| self.differing.get(id)) {
                port.before.clone_from(has);
            }
        }
        delta.ports.retain(|port| port.before != port.after);
        Cow::Owned(delta)
    }

    /// Records where the plane differs from the caller's state after an applied delta.
    fn after_apply(&mut self, delta: &Delta, refused: &[(PortId, String)], left: &[(PortId, String)]) {
        let had = if delta.complete {
            self.differing.clear();
            BTreeMap::new()
        } else {
            let ids = delta.ports.iter().filter_map(PortDelta::id);
            ids.filter_map(|id| self.differing.remove_entry(id)).collect()
        };
        for port in named(delta, refused) {
            let Some(id) = port.id() else { continue };
            let before = had.get(id).cloned().unwrap_or_else(|| port.before.clone());
            self.differing.insert(id.clone(), before);
        }
        self.differing.extend(left.iter().map(|(id, _)| (id.clone(), None)));
        if !delta.complete {
            return;
        }
        self.resync_at = None;
        self.failures.0 = 0;
        if std::mem::take(&mut self.aside) {
            tracing::info!(plane = self.name, "the plane that had stepped aside serves again");
        }
    }

    /// Records that the plane has ports that the nftables plane refused.
    fn record_ahead(&mut self, delta: &Delta, refused: &[(PortId, String)]) {
        for port in named(delta, refused) {
            let Some(id) = port.id().filter(|id| !self.differing.contains_key(*id)) else { continue };
            self.differing.insert(id.clone(), port.after.clone());
        }
    }

    /// Removes deleted ports that the plane has although the caller assumes that it does not.
    fn remove_deleted(&mut self, everything: &Delta) {
        if self.differing.is_empty() {
            return;
        }
        let named: BTreeSet<&PortId> = everything.ports.iter().filter_map(PortDelta::id).collect();
        let gone: Vec<PortId> = self.differing.keys().filter(|id| !named.contains(id)).cloned().collect();
        let has = gone.iter().filter_map(|id| self.differing.get(id).cloned().flatten());
        let ports: Vec<_> = has.map(|plan| PortDelta { before: Some(plan), after: None }).collect();
        if !ports.is_empty() {
            self.apply(&Delta { ports, ..Delta::default() });
        }
        gone.iter().for_each(|id| drop(self.differing.remove(id)));
    }

    fn after_failure(&mut self, error: &Error) {
        let (in_a_row, total) = (self.failures.0.saturating_add(1), self.failures.1 + 1);
        self.failures = (in_a_row, total);
        self.must_reread = true;
        let cause = std::error::Error::source(error).map(ToString::to_string);
        let plane = self.name.unwrap_or("sockets");
        let mut wait = FIRST_RETRY.saturating_mul(1 << (in_a_row - 1).min(16)).min(self.longest_retry);
        if in_a_row < MAX_FAILURES && !self.aside {
            tracing::warn!(plane, %error, cause, ?wait, "a plane failed; nftables serves what it lacks");
        } else {
            wait = self.longest_retry;
            self.step_aside(plane, error, cause.as_deref(), wait);
        }
        self.resync_at = Some(Instant::now() + wait);
    }

    /// Takes the plane out of service. Each failed attempt may have put a part of it back.
    fn step_aside(&mut self, plane: &'static str, error: &Error, cause: Option<&str>, wait: Duration) {
        self.differing.clear();
        if let Err(stays) = self.plane.step_aside() {
            tracing::error!(plane, error = %stays, "cannot take a failing plane out of service");
        }
        if std::mem::replace(&mut self.aside, true) {
            tracing::debug!(plane, %error, cause, "the plane that stepped aside still fails");
        } else {
            tracing::error!(plane, %error, cause, every = ?wait, "a plane keeps failing and steps aside; nftables serves alone until an attempt succeeds");
        }
    }
}

/// The ports of a delta with these ids.
fn named<'a>(delta: &'a Delta, ids: &[(PortId, String)]) -> Vec<&'a PortDelta> {
    if ids.is_empty() {
        return Vec::new();
    }
    let ids: BTreeSet<&PortId> = ids.iter().map(|(id, _)| id).collect();
    delta.ports.iter().filter(|port| port.id().is_some_and(|id| ids.contains(id))).collect()
}

/// Whether the delta only repeats a port, for another attempt.
fn is_repeat(port: &PortDelta) -> bool {
    port.before.is_some() && port.before == port.after
}

/// The delta without repeated ports, which the nftables plane has already.
fn for_nftables(delta: &Delta) -> Cow<'_, Delta> {
    if !delta.ports.iter().any(is_repeat) {
        return Cow::Borrowed(delta);
    }
    let mut delta = delta.clone();
    delta.ports.retain(|port| !is_repeat(port));
    Cow::Owned(delta)
}

impl<N: Dataplane, S: Dataplane + Send> Dataplane for Stack<N, S> {
    fn apply(&mut self, delta: &Delta) -> Result<(), Error> {
        let Self { nftables, front } = self;
        let for_nftables = for_nftables(delta);
        let accepted = front.accepts(delta);
        let (result, left) = if !accepted {
            if delta.complete && front.resync_at.is_none() {
                front.remove_deleted(delta);
            }
            (nftables.apply(&for_nftables), Vec::new())
        } else if front.name.is_some() && delta.complete {
            std::thread::scope(|scope| {
                let sockets = scope.spawn(|| front.apply(delta));
                let result = nftables.apply(&for_nftables);
                (result, sockets.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            })
        } else {
            (nftables.apply(&for_nftables), front.apply(delta))
        };
        let mut short = match result {
            Ok(()) => Shortfall::default(),
            Err(Error::Partly(short)) => short,
            Err(error) => return Err(error),
        };
        if accepted && front.resync_at.is_none() {
            front.record_ahead(delta, &short.refused);
        }
        short.left.extend(left);
        short.into_result()
    }

    fn reread(&mut self) -> Result<(), Error> {
        (self.front.resync_at, self.front.must_reread) = (Some(Instant::now()), true);
        self.nftables.reread()
    }

    /// Reads the nftables plane back. The maps of the socket plane have both families, and changes of other
    /// programs to tables do not concern them.
    fn reread_family(&mut self, family: Family) -> Result<(), Error> {
        self.nftables.reread_family(family)
    }

    fn has_read(&self, family: Family, generation: u32) -> bool {
        self.nftables.has_read(family, generation)
    }

    fn looks_intact(&mut self, family: Family) -> bool {
        self.nftables.looks_intact(family)
    }

    fn take_left_over(&mut self) -> Vec<Frontend> {
        self.nftables.take_left_over()
    }

    fn wants_everything(&self) -> Option<Instant> {
        self.front.resync_at
    }

    fn standing(&self) -> Vec<Standing> {
        let Front { name, aside, failures, .. } = &self.front;
        let front = name.map(|plane| Standing {
            plane,
            active: !aside,
            failures: failures.1,
            failed_removals: PerFamily::default(),
        });
        front.into_iter().chain(self.nftables.standing()).collect()
    }

    /// The nftables plane, which has everything.
    fn dump(&mut self) -> Result<State, Error> {
        self.nftables.dump()
    }

    fn remove(&mut self) -> Result<(), Error> {
        self.front.plane.remove()?;
        self.nftables.remove()
    }

    fn fill(&self) -> Vec<Fill> {
        [self.nftables.fill(), self.front.plane.fill()].concat()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{
        dataplane::{Faults, Faulty, Memory},
        fixture::{model, named, service, settings},
        model::Change,
        plan::Planner,
    };

    const SERVES: &str = "front";

    /// A planner, and a stack whose socket plane has faults.
    struct Fixture {
        planner: Planner,
        stack: Stack<Memory, Faulty<Memory>>,
        faults: Faults,
    }

    impl Fixture {
        fn new() -> Self {
            let faults = Faults::default();
            let front = Faulty::with(Memory::default(), faults.clone());
            let stack = Stack::new(Memory::default(), front).serving_as(SERVES).with_retry(FIRST_RETRY);
            let mut fixture = Self { planner: Planner::default(), stack, faults };
            fixture.plan([at("web", "10.0.0.1"), at("api", "10.0.0.2")]);
            fixture.planner.update_node(model(settings(), []).node_plan());
            let everything = fixture.planner.complete();
            fixture.stack.apply(&everything).unwrap();
            fixture
        }

        fn plan(&mut self, changes: impl IntoIterator<Item = Change>) {
            let mut model = model(settings(), changes);
            for name in model.take_dirty() {
                self.planner.update(&name, model.plan(&name));
            }
        }

        /// Applies the changes, and everything when it is due, as the engine does.
        fn apply(&mut self) -> Result<(), Error> {
            let delta = self.planner.take_delta();
            let applied = self.stack.apply(&delta);
            if let Some(at) = self.stack.wants_everything() {
                std::thread::sleep(at.saturating_duration_since(Instant::now()));
                let everything = self.planner.complete();
                self.stack.apply(&everything)?;
            }
            applied
        }

        fn standing(&self) -> (bool, u64) {
            self.stack.standing().first().map(|front| (front.active, front.failures)).unwrap()
        }

        fn sockets(&mut self) -> usize {
            self.stack.socket_plane().dump().unwrap().frontends.len()
        }

        fn nftables(&mut self) -> usize {
            self.stack.nftables().dump().unwrap().frontends.len()
        }
    }

    fn at(name: &str, ip: &str) -> Change {
        service(name, json!({ "clusterIP": ip, "ports": [{ "port": 80 }] }))
    }

    #[test]
    fn a_socket_plane_that_keeps_failing_steps_aside_until_it_works_again() {
        let mut fixture = Fixture::new();
        assert_eq!((fixture.standing(), fixture.sockets()), ((true, 0), 2));
        fixture.faults.fail_calls(true);
        for number in 3..10_u64 {
            fixture.plan([at(&format!("web{number}"), &format!("10.0.0.{number}"))]);
            fixture.apply().unwrap();
            assert_eq!(fixture.nftables() as u64, number, "nftables has every change at once");
        }
        assert!(!fixture.standing().0 && fixture.standing().1 >= u64::from(MAX_FAILURES));
        assert_eq!(fixture.sockets(), 0, "nothing of it serves");
        fixture.faults.fail_calls(false);
        fixture.apply().unwrap();
        assert_eq!((fixture.standing().0, fixture.sockets()), (true, 9));
        assert_eq!(fixture.stack.wants_everything(), None);
    }

    #[test]
    fn a_port_that_only_the_socket_plane_refuses_is_left_to_nftables_and_tried_again() {
        let mut fixture = Fixture::new();
        fixture.faults.refuse(named("web"), true);
        fixture.plan([at("web", "10.0.0.3")]);
        let Err(Error::Partly(short)) = fixture.apply() else { panic!("it is not reported") };
        assert!(short.refused.is_empty() && short.failed.is_empty());
        let left: Vec<PortId> = short.left.into_iter().map(|(id, _)| id).collect();
        assert_eq!((left.len(), fixture.nftables(), fixture.standing()), (1, 2, (true, 0)));
        fixture.faults.refuse(named("web"), false);
        fixture.planner.record_left(left);
        fixture.planner.retry();
        fixture.apply().unwrap();
        assert_eq!(fixture.stack.socket_plane().dump().unwrap(), fixture.stack.nftables().dump().unwrap());
        fixture.planner.update(&named("web"), crate::plan::ServicePlan::default());
        fixture.apply().unwrap();
        assert_eq!((fixture.sockets(), fixture.nftables()), (1, 1));
    }

    #[test]
    fn a_port_that_only_the_socket_plane_has_is_removed_with_the_service() {
        let faults = Faults::default();
        let packets = Faulty::with(Memory::default(), faults.clone());
        let mut stack = Stack::new(packets, Memory::default()).serving_as(SERVES);
        let mut planner = Planner::default();
        let mut known = model(settings(), [at("web", "10.0.0.1"), at("api", "10.0.0.2")]);
        for name in known.take_dirty() {
            planner.update(&name, known.plan(&name));
        }
        planner.update_node(known.node_plan());
        faults.refuse(named("web"), true);
        let everything = planner.complete();
        let Err(Error::Partly(short)) = stack.apply(&everything) else { panic!("it is not reported") };
        assert_eq!(short.refused.len(), 1);
        assert_eq!(stack.socket_plane().dump().unwrap().frontends.len(), 2);
        planner.record_applied(&everything, &[short.refused[0].0.clone()]);
        planner.update(&named("web"), crate::plan::ServicePlan::default());
        stack.apply(&planner.take_delta()).unwrap();
        assert!(planner.take_orphaned().v4, "only a comparison finds the remains");
        stack.reread_family(Family::V4).unwrap();
        stack.apply(&planner.complete()).unwrap();
        assert_eq!(stack.socket_plane().dump().unwrap().frontends.len(), 1);
    }
}
