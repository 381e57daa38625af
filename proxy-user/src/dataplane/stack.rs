//! Two planes for one plan: sockets in front, packets behind.
//!
//! In: [`Delta`]s. Out: the same delta, first to the packets' plane, then to the sockets' plane; a complete one, which
//! takes each its time, to both at once where that is asked for.
//!
//! The packets' plane has every frontend for every source. The sockets' plane has those a socket can decide about: TCP
//! and UDP, for pods and this host, without source ranges. What a socket does not translate becomes packets to the
//! Service's address, so whatever the sockets' plane lacks, refuses to take or does not know yet is served all the same:
//! traffic from outside, SCTP, pings, pods that opted out. So the packets come first, and a sockets' plane that fails
//! altogether is no outage. Nor does the sockets' plane need the other for what it has.
//!
//! Therefore only what becomes of the packets' plane is told as a failure. A service port that the sockets' plane refuses
//! is told as left to the packets. A sockets' plane that fails as a whole is read back and given everything again after
//! ever longer waits; after [`PATIENCE`] failures in a row it steps aside, because until it works again its sockets would
//! go to backends that the packets no longer have. It is tried again now and then.

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

/// So many failures in a row take the sockets' plane out.
const PATIENCE: u32 = 5;

/// The wait after its first failure; it doubles with each.
const FIRST_RETRY: Duration = Duration::from_millis(100);

/// A sockets' plane in front of a packets' plane.
pub struct Stack<P, S> {
    packets: P,
    front: Front<S>,
}

/// The sockets' plane, and how it stands.
struct Front<S> {
    plane: S,
    /// Its name where it is meant to serve. One that only retires has none.
    name: Option<&'static str>,
    /// Since when it is to be given everything; nothing while it has every change.
    behind: Option<Instant>,
    /// Whether it has to be read back before that.
    unknown: bool,
    /// How often it failed in a row, and altogether.
    failures: (u32, u64),
    /// Whether it has stepped aside.
    aside: bool,
    /// The wait between two tries of one that has stepped aside.
    longest_retry: Duration,
    /// What it has of each port where that is not what the caller takes it for: because it refused the port, or because
    /// the packets' plane did.
    apart: BTreeMap<PortId, Option<Arc<PortPlan>>>,
}

impl<P: Dataplane, S: Dataplane> Stack<P, S> {
    /// Puts `sockets` in front of `packets`.
    pub fn new(packets: P, sockets: S) -> Self {
        let front = Front {
            plane: sockets,
            name: None,
            behind: Some(Instant::now()),
            unknown: false,
            failures: (0, 0),
            aside: false,
            longest_retry: Duration::from_secs(30),
            apart: BTreeMap::new(),
        };
        Self { packets, front }
    }

    /// Has the sockets' plane serve under this name: both planes take in a complete delta at once then. One that retires,
    /// for the packets' plane to serve alone, has no name.
    pub fn serving_as(mut self, name: &'static str) -> Self {
        self.front.name = Some(name);
        self
    }

    /// Tries a sockets' plane that has stepped aside again after this long.
    pub fn with_retry(mut self, longest: Duration) -> Self {
        self.front.longest_retry = longest.max(FIRST_RETRY);
        self
    }

    /// The packets' plane.
    pub fn packets(&mut self) -> &mut P {
        &mut self.packets
    }

    /// The sockets' plane.
    pub fn sockets(&mut self) -> &mut S {
        &mut self.front.plane
    }
}

impl<S: Dataplane> Front<S> {
    /// Whether this delta is for the sockets' plane: changes for one that has all before, everything for one that wants it.
    fn takes(&self, delta: &Delta) -> bool {
        match self.behind {
            None => !delta.complete,
            Some(since) => delta.complete && since <= Instant::now(),
        }
    }

    /// Applies a delta that is for it; answers with the ports that it leaves to the packets.
    fn apply(&mut self, delta: &Delta) -> Vec<(PortId, String)> {
        let result = if std::mem::take(&mut self.unknown) { self.plane.reread() } else { Ok(()) };
        let (mut refused, left) = match result.and_then(|()| self.plane.apply(&self.as_it_knows(delta))) {
            Ok(()) => (Vec::new(), Vec::new()),
            Err(Error::Partly(Shortfall { refused, left, failed })) if failed.is_empty() => (refused, left),
            Err(error) => {
                self.failed(&error);
                return Vec::new();
            }
        };
        self.settle(delta, &refused, &left);
        refused.extend(left);
        refused
    }

    /// The delta with each port as this plane has it.
    fn as_it_knows<'a>(&self, delta: &'a Delta) -> Cow<'a, Delta> {
        let is_apart = |port: &PortDelta| port.id().is_some_and(|id| self.apart.contains_key(id));
        if delta.complete || !delta.ports.iter().any(|port| is_apart(port) || is_repeated(port)) {
            return Cow::Borrowed(delta);
        }
        let mut delta = delta.clone();
        for port in &mut delta.ports {
            if let Some(has) = port.id().and_then(|id| self.apart.get(id)) {
                port.before.clone_from(has);
            }
        }
        delta.ports.retain(|port| port.before != port.after);
        Cow::Owned(delta)
    }

    /// Remembers what it has apart from what the caller takes it for, after it took a delta in.
    fn settle(&mut self, delta: &Delta, refused: &[(PortId, String)], left: &[(PortId, String)]) {
        let had = if delta.complete {
            self.apart.clear();
            BTreeMap::new()
        } else {
            let ids = delta.ports.iter().filter_map(PortDelta::id);
            ids.filter_map(|id| self.apart.remove_entry(id)).collect()
        };
        for port in named(delta, refused) {
            let Some(id) = port.id() else { continue };
            let before = had.get(id).cloned().unwrap_or_else(|| port.before.clone());
            self.apart.insert(id.clone(), before);
        }
        self.apart.extend(left.iter().map(|(id, _)| (id.clone(), None)));
        if !delta.complete {
            return;
        }
        self.behind = None;
        self.failures.0 = 0;
        if std::mem::take(&mut self.aside) {
            tracing::info!(plane = self.name, "the plane that had stepped aside serves again");
        }
    }

    /// Remembers that it has what the packets' plane refused.
    fn is_ahead(&mut self, delta: &Delta, refused: &[(PortId, String)]) {
        for port in named(delta, refused) {
            let Some(id) = port.id().filter(|id| !self.apart.contains_key(*id)) else { continue };
            self.apart.insert(id.clone(), port.after.clone());
        }
    }

    /// Takes out what it has of ports that are gone, and that the caller takes it not to have.
    fn forget_gone(&mut self, everything: &Delta) {
        if self.apart.is_empty() {
            return;
        }
        let named: BTreeSet<&PortId> = everything.ports.iter().filter_map(PortDelta::id).collect();
        let gone: Vec<PortId> = self.apart.keys().filter(|id| !named.contains(id)).cloned().collect();
        let has = gone.iter().filter_map(|id| self.apart.get(id).cloned().flatten());
        let ports: Vec<_> = has.map(|plan| PortDelta { before: Some(plan), after: None }).collect();
        if !ports.is_empty() {
            self.apply(&Delta { ports, ..Delta::default() });
        }
        gone.iter().for_each(|id| drop(self.apart.remove(id)));
    }

    fn failed(&mut self, error: &Error) {
        let (in_a_row, altogether) = (self.failures.0.saturating_add(1), self.failures.1 + 1);
        self.failures = (in_a_row, altogether);
        self.unknown = true;
        let cause = std::error::Error::source(error).map(ToString::to_string);
        let plane = self.name.unwrap_or("sockets");
        let mut wait = FIRST_RETRY.saturating_mul(1 << (in_a_row - 1).min(16)).min(self.longest_retry);
        if in_a_row < PATIENCE && !self.aside {
            tracing::warn!(plane, %error, cause, ?wait, "a plane fails, packets serve what it lacks");
        } else {
            wait = self.longest_retry;
            self.step_aside(plane, error, cause.as_deref(), wait);
        }
        self.behind = Some(Instant::now() + wait);
    }

    /// Takes it out of the way, once; a try that fails may have put some of it back.
    fn step_aside(&mut self, plane: &'static str, error: &Error, cause: Option<&str>, wait: Duration) {
        self.apart.clear();
        if let Err(stays) = self.plane.step_aside() {
            tracing::error!(plane, error = %stays, "a plane that fails cannot be taken out of the way");
        }
        if std::mem::replace(&mut self.aside, true) {
            tracing::debug!(plane, %error, cause, "still fails");
        } else {
            tracing::error!(plane, %error, cause, every = ?wait, "a plane keeps failing and steps aside: packets serve alone; it is tried again");
        }
    }
}

/// The ports of a delta that are among `ids`.
fn named<'a>(delta: &'a Delta, ids: &[(PortId, String)]) -> Vec<&'a PortDelta> {
    if ids.is_empty() {
        return Vec::new();
    }
    let ids: BTreeSet<&PortId> = ids.iter().map(|(id, _)| id).collect();
    delta.ports.iter().filter(|port| port.id().is_some_and(|id| ids.contains(id))).collect()
}

/// Whether nothing is asked for but another try.
fn is_repeated(port: &PortDelta) -> bool {
    port.before.is_some() && port.before == port.after
}

/// The delta as the packets' plane has to know it.
fn for_packets(delta: &Delta) -> Cow<'_, Delta> {
    if !delta.ports.iter().any(is_repeated) {
        return Cow::Borrowed(delta);
    }
    let mut delta = delta.clone();
    delta.ports.retain(|port| !is_repeated(port));
    Cow::Owned(delta)
}

impl<P: Dataplane, S: Dataplane + Send> Dataplane for Stack<P, S> {
    fn apply(&mut self, delta: &Delta) -> Result<(), Error> {
        let Self { packets, front } = self;
        let for_packets = for_packets(delta);
        let takes = front.takes(delta);
        let (packets, left) = if !takes {
            if delta.complete && front.behind.is_none() {
                front.forget_gone(delta);
            }
            (packets.apply(&for_packets), Vec::new())
        } else if front.name.is_some() && delta.complete {
            std::thread::scope(|scope| {
                let sockets = scope.spawn(|| front.apply(delta));
                let packets = packets.apply(&for_packets);
                (packets, sockets.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            })
        } else {
            (packets.apply(&for_packets), front.apply(delta))
        };
        let mut short = match packets {
            Ok(()) => Shortfall::default(),
            Err(Error::Partly(short)) => short,
            Err(error) => return Err(error),
        };
        if takes && front.behind.is_none() {
            front.is_ahead(delta, &short.refused);
        }
        short.left.extend(left);
        short.into_result()
    }

    /// Reads both planes back.
    fn reread(&mut self) -> Result<(), Error> {
        (self.front.behind, self.front.unknown) = (Some(Instant::now()), true);
        self.packets.reread()
    }

    /// Reads the packets' plane back. Maps know no families, and what others do to tables does not concern them.
    fn reread_family(&mut self, family: Family) -> Result<(), Error> {
        self.packets.reread_family(family)
    }

    fn has_read(&self, family: Family, generation: u32) -> bool {
        self.packets.has_read(family, generation)
    }

    fn looks_intact(&mut self, family: Family) -> bool {
        self.packets.looks_intact(family)
    }

    fn take_left_over(&mut self) -> Vec<Frontend> {
        self.packets.take_left_over()
    }

    fn wants_everything(&self) -> Option<Instant> {
        self.front.behind
    }

    fn standing(&self) -> Vec<Standing> {
        let Front { name, aside, failures, .. } = &self.front;
        let front = name.map(|plane| Standing {
            plane,
            active: !aside,
            failures: failures.1,
            failed_removals: PerFamily::default(),
        });
        front.into_iter().chain(self.packets.standing()).collect()
    }

    /// The packets' plane, which has everything.
    fn dump(&mut self) -> Result<State, Error> {
        self.packets.dump()
    }

    fn remove(&mut self) -> Result<(), Error> {
        self.front.plane.remove()?;
        self.packets.remove()
    }

    fn fill(&self) -> Vec<Fill> {
        [self.packets.fill(), self.front.plane.fill()].concat()
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

    /// Services that are planned and told to a stack whose front plane has faults.
    struct Rig {
        planner: Planner,
        stack: Stack<Memory, Faulty<Memory>>,
        faults: Faults,
    }

    impl Rig {
        fn new() -> Self {
            let faults = Faults::default();
            let front = Faulty::with(Memory::default(), faults.clone());
            let stack = Stack::new(Memory::default(), front).serving_as(SERVES).with_retry(FIRST_RETRY);
            let mut rig = Self { planner: Planner::default(), stack, faults };
            rig.plan([at("web", "10.0.0.1"), at("api", "10.0.0.2")]);
            rig.planner.update_node(model(settings(), []).node_plan());
            let everything = rig.planner.complete();
            rig.stack.apply(&everything).unwrap();
            rig
        }

        fn plan(&mut self, changes: impl IntoIterator<Item = Change>) {
            let mut model = model(settings(), changes);
            for name in model.take_dirty() {
                self.planner.update(&name, model.plan(&name));
            }
        }

        /// Tells what changed, and everything once that is wanted, as the engine does.
        fn tell(&mut self) -> Result<(), Error> {
            let delta = self.planner.take_delta();
            let told = self.stack.apply(&delta);
            if let Some(at) = self.stack.wants_everything() {
                std::thread::sleep(at.saturating_duration_since(Instant::now()));
                let everything = self.planner.complete();
                self.stack.apply(&everything)?;
            }
            told
        }

        fn standing(&self) -> (bool, u64) {
            self.stack.standing().first().map(|front| (front.active, front.failures)).unwrap()
        }

        fn fronts(&mut self) -> usize {
            self.stack.sockets().dump().unwrap().frontends.len()
        }

        fn packets(&mut self) -> usize {
            self.stack.packets().dump().unwrap().frontends.len()
        }
    }

    fn at(name: &str, ip: &str) -> Change {
        service(name, json!({ "clusterIP": ip, "ports": [{ "port": 80 }] }))
    }

    #[test]
    fn a_front_plane_that_keeps_failing_steps_aside_until_it_works_again() {
        let mut rig = Rig::new();
        assert_eq!((rig.standing(), rig.fronts()), ((true, 0), 2));
        rig.faults.fail_calls(true);
        for number in 3..10_u64 {
            rig.plan([at(&format!("web{number}"), &format!("10.0.0.{number}"))]);
            rig.tell().unwrap();
            assert_eq!(rig.packets() as u64, number, "packets have every change at once");
        }
        assert!(!rig.standing().0 && rig.standing().1 >= u64::from(PATIENCE));
        assert_eq!(rig.fronts(), 0, "nothing of it is in the way");
        rig.faults.fail_calls(false);
        rig.tell().unwrap();
        assert_eq!((rig.standing().0, rig.fronts()), (true, 9));
        assert_eq!(rig.stack.wants_everything(), None);
    }

    #[test]
    fn a_port_that_only_the_front_plane_refuses_is_left_to_the_packets_and_tried_again() {
        let mut rig = Rig::new();
        rig.faults.refuse(named("web"), true);
        rig.plan([at("web", "10.0.0.3")]);
        let Err(Error::Partly(short)) = rig.tell() else { panic!("it is not told") };
        assert!(short.refused.is_empty() && short.failed.is_empty());
        let left: Vec<PortId> = short.left.into_iter().map(|(id, _)| id).collect();
        assert_eq!((left.len(), rig.packets(), rig.standing()), (1, 2, (true, 0)));
        rig.faults.refuse(named("web"), false);
        rig.planner.left(left);
        rig.planner.retry();
        rig.tell().unwrap();
        assert_eq!(rig.stack.sockets().dump().unwrap(), rig.stack.packets().dump().unwrap());
        rig.planner.update(&named("web"), crate::plan::ServicePlan::default());
        rig.tell().unwrap();
        assert_eq!((rig.fronts(), rig.packets()), (1, 1));
    }

    #[test]
    fn what_only_the_front_plane_took_goes_with_the_service() {
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
        let Err(Error::Partly(short)) = stack.apply(&everything) else { panic!("it is not told") };
        assert_eq!(short.refused.len(), 1);
        assert_eq!(stack.sockets().dump().unwrap().frontends.len(), 2);
        planner.settled(&everything, &[short.refused[0].0.clone()]);
        planner.update(&named("web"), crate::plan::ServicePlan::default());
        stack.apply(&planner.take_delta()).unwrap();
        assert!(planner.take_stray().v4, "only a comparison finds what is left of it");
        stack.reread_family(Family::V4).unwrap();
        stack.apply(&planner.complete()).unwrap();
        assert_eq!(stack.sockets().dump().unwrap().frontends.len(), 1);
    }
}
