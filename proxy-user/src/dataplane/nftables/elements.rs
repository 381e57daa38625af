//! The elements of maps and sets that one service port asks for.
//!
//! In: a [`PortPlan`]. Out: [`PlannedElement`]s, in which chains have names and no bucket numbers yet.

use super::{
    schema::{Map, backend_value, first_slot, frontend_key, hairpin_key, slot_key},
    shared_chains::{Branch, FrontendKind, Masquerade, SharedObject},
    sources::Sources,
    sticky::Sticky,
};
use crate::plan::{BackendSet, Destination, FrontendPlan, PortPlan, Route, Target, Treatment};
use crate::sys::libnftnl::Bytes;

/// The value of a planned element.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum PlannedValue {
    /// None, in a set.
    None,
    Backend(Bytes),
    /// The bucket of a chain.
    Chain(SharedObject),
    /// The bucket of a verdict.
    Verdict(Verdict),
}

/// Buckets without a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Drops (F2, F3).
    Drop,
    /// Does not translate, and ends all look-ups.
    Pass,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PlannedElement {
    pub(super) map: Map,
    pub(super) key: Bytes,
    pub(super) value: PlannedValue,
}

/// Why no elements express a plan.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unsupported {
    #[error("no chain treats pods, this host and outside sources as {0:?}")]
    Route(Route),
    #[error("the {0:?} set is empty")]
    EmptySet(BackendSet),
    #[error("{count} endpoints are more than the {most} that one service port can have")]
    TooManyEndpoints { count: usize, most: u32 },
}

impl PlannedElement {
    fn new(map: Map, key: Bytes, value: PlannedValue) -> Self {
        Self { map, key, value }
    }

    fn member(map: Map, key: Bytes) -> Self {
        Self::new(map, key, PlannedValue::None)
    }
}

/// The treatment of the sources on one side of a fork.
struct Side {
    target: Target,
    masquerade: Masquerade,
}

/// Splits a route into the treatment of pods and this host, and that of outside sources if it differs. A plan that was
/// made while the node had no way to detect pods treats them as outside sources, and so do the chains then. The inside
/// of a fork gets only packets of pods and this host, so no rule there has to look this host's addresses up again.
fn sides(route: &Route) -> Result<(Side, Option<Side>), Unsupported> {
    use Masquerade::{Always, Foreign, Host, Never};
    let Route { pod, host, outside } = *route;
    let pod = if pod.target != host.target && pod == outside { host } else { pod };
    let unsupported = || Unsupported::Route(*route);
    if pod.target != host.target {
        return Err(unsupported());
    }
    let all = |treatment: Treatment| if treatment.masquerade { Always } else { Never };
    if outside.target != host.target {
        let masquerade = match (pod.masquerade, host.masquerade) {
            (false, true) => Foreign,
            (true, false) => return Err(unsupported()),
            _ => all(host),
        };
        let split = Side { target: outside.target, masquerade: all(outside) };
        return Ok((Side { target: host.target, masquerade }, Some(split)));
    }
    let masquerade = match (pod.masquerade, host.masquerade, outside.masquerade) {
        (true, true, true) => Always,
        (false, false, false) => Never,
        (false, true, true) => Foreign,
        (false, true, false) => Host,
        _ => return Err(unsupported()),
    };
    Ok((Side { target: host.target, masquerade }, None))
}

/// Every element that `port` asks for.
///
/// # Errors
///
/// When the maps cannot express the plan.
pub(super) fn elements(port: &PortPlan) -> Result<Vec<PlannedElement>, Unsupported> {
    let mut elements = Vec::new();
    for plan in &port.frontends {
        frontend_elements(port, plan, &mut elements)?;
    }
    // A backend may be in both sets, and gets one element.
    let mut local: Vec<_> = port.cluster.iter().chain(&port.local).filter(|backend| backend.local).collect();
    local.sort_unstable();
    local.dedup();
    elements.extend(local.into_iter().map(|backend| {
        PlannedElement::member(Map::Hairpin, hairpin_key(backend.address, port.id.protocol, backend.port))
    }));
    Ok(elements)
}

fn frontend_elements(
    port: &PortPlan,
    plan: &FrontendPlan,
    elements: &mut Vec<PlannedElement>,
) -> Result<(), Unsupported> {
    let kind = match plan.frontend.destination {
        Destination::Address(_) => FrontendKind::Service,
        Destination::NodePort(_) => FrontendKind::NodePort,
    };
    let key = frontend_key(&plan.frontend);
    let (main, outside) = sides(&plan.route)?;
    let (map, refused) = match kind {
        FrontendKind::Service => (Map::Services, Map::Refused),
        FrontendKind::NodePort => (Map::NodePorts, Map::RefusedNodePorts),
    };
    let refuses = |side: &Side| side.target == Target::Reject;
    if refuses(&main) || outside.as_ref().is_some_and(refuses) {
        elements.push(PlannedElement::member(refused, key.clone()));
    }
    // A frontend that refuses all sources needs no look-up, because the filter chains refuse what is not translated.
    if !refuses(&main) || outside.is_some() {
        elements.push(PlannedElement::new(map, key.clone(), value(port, kind, &main, outside.as_ref())?));
    }
    // All frontends of a sticky port share its slots.
    if port.affinity.is_none() {
        slot_elements(port, plan, kind, &key, elements);
    }
    guard_elements(plan, &key, elements);
    answered_elements(plan, &key, elements);
    Ok(())
}

/// The bucket of a frontend: of a fork if the two sides differ.
fn value(
    port: &PortPlan,
    kind: FrontendKind,
    main: &Side,
    outside: Option<&Side>,
) -> Result<PlannedValue, Unsupported> {
    let branch = |side: &Side| {
        Ok::<_, Unsupported>(match (side.target.backends(), side.target) {
            (Some(set), _) => Branch::Chain(Box::new(picker(port, kind, set, side.masquerade)?)),
            (None, Target::Reject) => Branch::Pass,
            (None, _) => Branch::Drop,
        })
    };
    Ok(match (branch(main)?, outside.map(branch).transpose()?) {
        (inside, Some(outside)) => PlannedValue::Chain(SharedObject::Fork { inside, outside }),
        (Branch::Chain(picker), None) => PlannedValue::Chain(*picker),
        (Branch::Drop, None) => PlannedValue::Verdict(Verdict::Drop),
        (Branch::Pass, None) => PlannedValue::Verdict(Verdict::Pass),
    })
}

fn picker(
    port: &PortPlan,
    kind: FrontendKind,
    set: BackendSet,
    masquerade: Masquerade,
) -> Result<SharedObject, Unsupported> {
    let count = port.backends(set).len();
    if count == 0 {
        return Err(Unsupported::EmptySet(set));
    }
    let most = first_slot(BackendSet::Local);
    let fits = u32::try_from(count).ok().filter(|count| *count < most);
    let count = fits.ok_or(Unsupported::TooManyEndpoints { count, most })?;
    Ok(match port.affinity {
        Some(seconds) => {
            SharedObject::StickyPicker { sticky: Sticky::of(&port.id), set, seconds, masquerade }
        }
        None => SharedObject::Picker { kind, set, count, masquerade },
    })
}

/// The backend sets of a sticky port for which the kernel remembers clients. An empty set is among them, because its
/// map has no number that leads to a backend then.
pub(super) fn remembered_sets(port: &PortPlan) -> impl Iterator<Item = BackendSet> {
    let is_local = |treatment: Treatment| matches!(treatment.target, Target::Local | Target::Drop);
    let routes = || port.frontends.iter().map(|plan| plan.route);
    let local = routes().any(|Route { pod, host, outside }| [pod, host, outside].into_iter().any(is_local));
    [Some(BackendSet::Cluster), local.then_some(BackendSet::Local)].into_iter().flatten()
}

/// The objects with which the kernel remembers the clients of a sticky port.
pub(super) fn affinity_objects(port: &PortPlan) -> Vec<SharedObject> {
    if port.affinity.is_none() {
        return Vec::new();
    }
    let sticky = Sticky::of(&port.id);
    remembered_sets(port).flat_map(|set| SharedObject::affinity(&sticky, set)).collect()
}

fn slot_elements(
    port: &PortPlan,
    plan: &FrontendPlan,
    kind: FrontendKind,
    key: &[u8],
    elements: &mut Vec<PlannedElement>,
) {
    let map = if kind == FrontendKind::Service { Map::Backends } else { Map::NodePortBackends };
    let Route { pod, host, outside } = plan.route;
    for set in BackendSet::ALL {
        if ![pod, host, outside].iter().any(|treatment| treatment.target.backends() == Some(set)) {
            continue;
        }
        elements.extend(port.backends(set).iter().zip(first_slot(set)..).map(|(backend, slot)| {
            PlannedElement::new(map, slot_key(key, slot), PlannedValue::Backend(backend_value(backend)))
        }));
    }
}

fn answered_elements(plan: &FrontendPlan, key: &Bytes, elements: &mut Vec<PlannedElement>) {
    if plan.answered_here {
        elements.push(PlannedElement::member(Map::AnsweredHere, key.clone()));
    }
}

fn guard_elements(plan: &FrontendPlan, key: &Bytes, elements: &mut Vec<PlannedElement>) {
    if let Some(sources) = &plan.allowed_sources {
        let sources = SharedObject::Sources(Sources::of(sources));
        let guard = SharedObject::Guard { sources: Box::new(sources) };
        elements.push(PlannedElement::new(Map::SourceRanges, key.clone(), PlannedValue::Chain(guard)));
    }
}
