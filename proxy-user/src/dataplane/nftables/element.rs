//! What one service port is in elements of maps and sets, and back.
//!
//! In: a [`PortPlan`]. Out: [`Item`]s: an element with its value still by name of the object it leads to. Keys and
//! values are laid out as the kernel holds them: every part of a key fills whole 4-byte words.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{
    netlink::Bytes,
    object::{End, Masquerade, Object, Scope, Space},
    ruleset::{Map, address_bytes},
    sources::Sources,
    sticky::Sticky,
};
use crate::{
    model::{Family, Protocol},
    plan::{Backend, Destination, Frontend, FrontendPlan, PortPlan, Route, Target, Treatment},
};

/// What an element's key leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Leads {
    /// The element is a member of a set.
    Nowhere,
    /// To an endpoint.
    To(Bytes),
    /// By its bucket to a picker.
    Bucket(Object),
    /// By its bucket to the end: dropped, or passed on untranslated.
    Verdict(Verdict),
}

/// Buckets without a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Dropped (F2, F3).
    Drop,
    /// Not translated, and not looked up any further.
    Pass,
}

/// One element that a service port asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Item {
    pub(super) map: Map,
    pub(super) key: Bytes,
    pub(super) key_end: Option<Bytes>,
    pub(super) leads: Leads,
}

impl Item {
    fn new(map: Map, key: Bytes, leads: Leads) -> Self {
        Self { map, key, key_end: None, leads }
    }

    fn member(map: Map, key: Bytes) -> Self {
        Self::new(map, key, Leads::Nowhere)
    }
}

fn push_word(key: &mut Bytes, bytes: &[u8]) {
    key.extend_from_slice(bytes);
    while !key.len().is_multiple_of(4) {
        key.push(0);
    }
}

fn push_service(key: &mut Bytes, protocol: Protocol, port: u16) {
    push_word(key, &[protocol.number()]);
    push_word(key, &port.to_be_bytes());
}

/// The key of a frontend in the maps of its space.
pub(super) fn frontend_key(frontend: &Frontend) -> Bytes {
    let mut key = Bytes::new();
    if let Destination::Address(address) = frontend.destination {
        push_word(&mut key, &address_bytes(address));
    }
    push_service(&mut key, frontend.protocol, frontend.port);
    key
}

/// The frontend of a key: one with an address where the key is long enough to hold it.
pub(super) fn frontend_of(family: Family, key: &[u8]) -> Option<Frontend> {
    let (destination, rest) = if key.len() > 8 {
        let (address, rest) = split_address(family, key)?;
        (Destination::Address(address), rest)
    } else {
        (Destination::NodePort(family), key)
    };
    let [protocol, _, _, _, high, low, ..] = *rest else { return None };
    Some(Frontend {
        destination,
        protocol: Protocol::from_number(protocol)?,
        port: u16::from_be_bytes([high, low]),
    })
}

/// The address at the start of some bytes, and what follows.
pub(super) fn split_address(family: Family, bytes: &[u8]) -> Option<(IpAddr, &[u8])> {
    match family {
        Family::V4 => {
            let (address, rest) = bytes.split_first_chunk::<4>()?;
            Some((Ipv4Addr::from(*address).into(), rest))
        }
        Family::V6 => {
            let (address, rest) = bytes.split_first_chunk::<16>()?;
            Some((Ipv6Addr::from(*address).into(), rest))
        }
    }
}

/// The value of a backend.
pub(super) fn backend_value(backend: &Backend) -> Bytes {
    let mut value = Bytes::new();
    push_word(&mut value, &address_bytes(backend.address));
    push_word(&mut value, &backend.port.to_be_bytes());
    value
}

/// Address and port of a backend's value.
pub(super) fn backend_of(family: Family, value: &[u8]) -> Option<(IpAddr, u16)> {
    let (address, rest) = split_address(family, value)?;
    let [high, low, ..] = *rest else { return None };
    Some((address, u16::from_be_bytes([high, low])))
}

/// The key of a backend that is or may be on this node, seen from itself (R9).
pub(super) fn hairpin_key(address: IpAddr, protocol: Protocol, port: u16) -> Bytes {
    let mut key = Bytes::new();
    push_word(&mut key, &address_bytes(address));
    push_word(&mut key, &address_bytes(address));
    push_service(&mut key, protocol, port);
    key
}

/// The key of a slot.
pub(super) fn slot_key(frontend: &[u8], slot: u32) -> Bytes {
    let mut key = Bytes::from_slice(frontend);
    push_word(&mut key, &slot.to_ne_bytes());
    key
}

/// How one class of sources is treated, in terms of this room.
struct Column {
    target: Target,
    masquerade: Masquerade,
}

/// Splits a route into what pods and this host get, and what everybody else gets where it differs. A plan made while
/// pods could not be told treats them as everybody else, and so do the chains then. Where sources are told apart, only
/// this host is left that is no pod, and nobody has to ask for its addresses once more.
fn columns(route: &Route) -> Result<(Column, Option<Column>), String> {
    use Masquerade::{Everybody, Foreign, Host, Nobody};
    let Route { pod, host, outside } = *route;
    let pod = if pod.target != host.target && pod == outside { host } else { pod };
    let unsupported = || format!("no chain treats pods, host and others as {route:?}");
    if pod.target != host.target {
        return Err(unsupported());
    }
    let all = |treatment: Treatment| if treatment.masquerade { Everybody } else { Nobody };
    if outside.target != host.target {
        let masquerade = match (pod.masquerade, host.masquerade) {
            (false, true) => Foreign,
            (true, false) => return Err(unsupported()),
            _ => all(host),
        };
        let split = Column { target: outside.target, masquerade: all(outside) };
        return Ok((Column { target: host.target, masquerade }, Some(split)));
    }
    let masquerade = match (pod.masquerade, host.masquerade, outside.masquerade) {
        (true, true, true) => Everybody,
        (false, false, false) => Nobody,
        (false, true, true) => Foreign,
        (false, true, false) => Host,
        _ => return Err(unsupported()),
    };
    Ok((Column { target: host.target, masquerade }, None))
}

fn scope_of(target: Target) -> Option<Scope> {
    match target {
        Target::Cluster => Some(Scope::Cluster),
        Target::Local => Some(Scope::Local),
        Target::Reject | Target::Drop => None,
    }
}

/// The set of backends that a scope means.
pub(super) fn backends(port: &PortPlan, scope: Scope) -> &[Backend] {
    match scope {
        Scope::Cluster => &port.cluster,
        Scope::Local => &port.local,
    }
}

/// Every element that `port` asks for.
///
/// # Errors
///
/// When the plan asks for something these maps cannot say; the text says what.
pub(super) fn items(port: &PortPlan) -> Result<Vec<Item>, String> {
    let mut items = Vec::new();
    for plan in &port.frontends {
        frontend_items(port, plan, &mut items)?;
    }
    // A backend may be in both sets.
    let mut local: Vec<_> = port.cluster.iter().chain(&port.local).filter(|backend| backend.local).collect();
    local.sort_unstable();
    local.dedup();
    items.extend(local.into_iter().map(|backend| {
        Item::member(Map::Hairpin, hairpin_key(backend.address, port.id.protocol, backend.port))
    }));
    Ok(items)
}

fn frontend_items(port: &PortPlan, plan: &FrontendPlan, items: &mut Vec<Item>) -> Result<(), String> {
    let space = match plan.frontend.destination {
        Destination::Address(_) => Space::Service,
        Destination::NodePort(_) => Space::NodePort,
    };
    let key = frontend_key(&plan.frontend);
    let (main, outside) = columns(&plan.route)?;
    let (map, refused) = match space {
        Space::Service => (Map::Services, Map::Refused),
        Space::NodePort => (Map::NodePorts, Map::RefusedNodePorts),
    };
    let refuses = |column: &Column| column.target == Target::Reject;
    if refuses(&main) || outside.as_ref().is_some_and(refuses) {
        items.push(Item::member(refused, key.clone()));
    }
    // What is refused for everybody needs no look-up at all: it is refused where it is not translated.
    if !refuses(&main) || outside.is_some() {
        items.push(Item::new(map, key.clone(), leads(port, space, &main, outside.as_ref())?));
    }
    // The slots of a sticky port are its own, not each frontend's.
    if port.affinity.is_none() {
        slot_items(port, plan, space, &key, items);
    }
    guard_items(plan, &key, items);
    answered_items(plan, &key, items);
    Ok(())
}

/// Where a frontend leads: for both sides the same, or to a fork.
fn leads(port: &PortPlan, space: Space, main: &Column, outside: Option<&Column>) -> Result<Leads, String> {
    let end = |column: &Column| {
        Ok::<_, String>(match (scope_of(column.target), column.target) {
            (Some(scope), _) => End::Chain(Box::new(picker(port, space, scope, column.masquerade)?)),
            (None, Target::Reject) => End::Pass,
            (None, _) => End::Drop,
        })
    };
    Ok(match (end(main)?, outside.map(end).transpose()?) {
        (inside, Some(outside)) => Leads::Bucket(Object::Fork { inside, outside }),
        (End::Chain(picker), None) => Leads::Bucket(*picker),
        (End::Drop, None) => Leads::Verdict(Verdict::Drop),
        (End::Pass, None) => Leads::Verdict(Verdict::Pass),
    })
}

fn picker(port: &PortPlan, space: Space, scope: Scope, masquerade: Masquerade) -> Result<Object, String> {
    let count = backends(port, scope).len();
    if count == 0 {
        return Err(format!("the {scope:?} set is empty"));
    }
    let most = Scope::Local.first_slot();
    let count = u32::try_from(count).ok().filter(|count| *count < most).ok_or_else(|| {
        format!("{count} endpoints are more than the {most} that one service port can have")
    })?;
    Ok(match port.affinity {
        Some(seconds) => Object::StickyPicker { sticky: Sticky::of(&port.id), scope, seconds, masquerade },
        None => Object::Picker { space, scope, count, masquerade },
    })
}

/// The backend sets for which a sticky port remembers clients: also one that is empty for now, since its memory holds
/// nothing then that is believed.
pub(super) fn remembered_sets(port: &PortPlan) -> impl Iterator<Item = Scope> {
    let is_local = |treatment: Treatment| matches!(treatment.target, Target::Local | Target::Drop);
    let routes = || port.frontends.iter().map(|plan| plan.route);
    let local = routes().any(|Route { pod, host, outside }| [pod, host, outside].into_iter().any(is_local));
    [Some(Scope::Cluster), local.then_some(Scope::Local)].into_iter().flatten()
}

fn slot_items(port: &PortPlan, plan: &FrontendPlan, space: Space, key: &[u8], items: &mut Vec<Item>) {
    let map = if space == Space::Service { Map::Backends } else { Map::NodePortBackends };
    let Route { pod, host, outside } = plan.route;
    for scope in [Scope::Cluster, Scope::Local] {
        if ![pod, host, outside].iter().any(|treatment| scope_of(treatment.target) == Some(scope)) {
            continue;
        }
        items.extend(
            backends(port, scope).iter().zip(scope.first_slot()..).map(|(backend, slot)| {
                Item::new(map, slot_key(key, slot), Leads::To(backend_value(backend)))
            }),
        );
    }
}

/// What is answered here, is left alone while its address is this host's own.
fn answered_items(plan: &FrontendPlan, key: &Bytes, items: &mut Vec<Item>) {
    if plan.answered_here {
        items.push(Item::member(Map::Answered, key.clone()));
    }
}

fn guard_items(plan: &FrontendPlan, key: &Bytes, items: &mut Vec<Item>) {
    if let Some(sources) = &plan.allowed_sources {
        let guard = Object::Guard { sources: Box::new(Object::Sources(Sources::of(sources))) };
        items.push(Item::new(Map::Guarded, key.clone(), Leads::Bucket(guard)));
    }
}
