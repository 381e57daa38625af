//! Reads a table back as the [`State`] that all data planes share.
//!
//! In: the elements the kernel holds. Out: frontends with what each class of sources gets.

use std::{collections::HashMap, io, net::IpAddr};

use super::{
    adopt::Found,
    drops::NO_LOCAL_ENDPOINTS,
    element,
    netlink::{Bytes, Value},
    object::{End, Masquerade, Object, Scope},
    ruleset::Map,
    socket::Netlink,
    sources::range_of,
    sticky::Sticky,
    table::Table,
};
use crate::{
    dataplane::{Installed, InstalledFrontend, Outcome, State},
    model::{Family, Protocol},
    plan::{Backend, Destination, Frontend},
};

/// The family as `nft` calls it.
pub(super) const fn nft_family(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    }
}

/// Adds what `table` holds in the kernel to `state`. Pods that cannot be told get what everybody gets.
pub(super) fn read(
    netlink: &mut Netlink,
    table: &Table,
    pods_are_told: bool,
    state: &mut State,
) -> io::Result<()> {
    let mut found = Found::read(netlink, &table.raw, table.family)?;
    found.read_slots(netlink, &table.raw)?;
    let numbers = numbers(netlink, table, &found)?;
    let sources = sources(netlink, table, &found)?;
    let reader =
        Reader { family: table.family, pods_are_told, buckets: buckets(&found), numbers, sources, found };
    let cluster_ips = reader.keys(Map::ClusterIps);
    state
        .cluster_ips
        .extend(cluster_ips.filter_map(|key| Some(element::split_address(reader.family, key)?.0)));
    for (map, refused) in [(Map::Services, Map::Refused), (Map::NodePorts, Map::RefusedNodePorts)] {
        for key in [map, refused].into_iter().flat_map(|map| reader.keys(map)) {
            let Some(frontend) = element::frontend_of(reader.family, key) else { continue };
            state.frontends.entry(frontend).or_insert_with(|| reader.frontend(&frontend, map));
        }
    }
    Ok(())
}

struct Reader {
    family: Family,
    pods_are_told: bool,
    found: Found,
    /// What each bucket leads to, for pods and this host, and for everybody else.
    buckets: HashMap<Bytes, [End; 2]>,
    /// The numbers in the slots of sticky ports.
    numbers: HashMap<(Sticky, Scope), Vec<Bytes>>,
    /// What each guard lets in.
    sources: HashMap<Object, Vec<ipnet::IpNet>>,
}

fn sources(
    netlink: &mut Netlink,
    table: &Table,
    found: &Found,
) -> io::Result<HashMap<Object, Vec<ipnet::IpNet>>> {
    let mut sources = HashMap::new();
    for name in &found.sets {
        if let Some(set @ Object::Sources(_)) = Object::parse(name) {
            let elements = Found::elements(netlink, &table.raw, name)?;
            let ranges = elements.iter().filter_map(|element| range_of(table.family, element));
            sources.insert(Object::Guard { sources: Box::new(set) }, ranges.collect());
        }
    }
    Ok(sources)
}

fn numbers(
    netlink: &mut Netlink,
    table: &Table,
    found: &Found,
) -> io::Result<HashMap<(Sticky, Scope), Vec<Bytes>>> {
    let mut numbers = HashMap::new();
    for name in &found.sets {
        if let Some(Object::Slots { sticky, scope }) = Object::parse(name) {
            let elements = Found::elements(netlink, &table.raw, name)?.into_iter();
            let values = elements.filter_map(|element| match element.value {
                Value::Data(number) => Some(number),
                _ => None,
            });
            numbers.insert((sticky, scope), values.collect());
        }
    }
    Ok(numbers)
}

fn buckets(found: &Found) -> HashMap<Bytes, [End; 2]> {
    let elements = found.elements.get(&Map::Buckets).into_iter().flatten();
    let ends = elements.filter_map(|((key, _), value)| {
        let ends = match value {
            Value::Goto(name) if name == NO_LOCAL_ENDPOINTS => [End::Drop, End::Drop],
            Value::Goto(name) => match Object::parse(name)? {
                Object::Fork { inside, outside } => [inside, outside],
                picker => [(); 2].map(|()| End::Chain(Box::new(picker.clone()))),
            },
            Value::Accept(false) => [End::Drop, End::Drop],
            _ => [End::Pass, End::Pass],
        };
        Some((key.clone(), ends))
    });
    ends.collect()
}

impl Reader {
    fn keys(&self, map: Map) -> impl Iterator<Item = &Bytes> {
        self.found.elements.get(&map).into_iter().flatten().map(|((key, _), _)| key)
    }

    fn ends(&self, map: Map, key: &Bytes) -> Option<&[End; 2]> {
        match self.found.get(map, key, None)? {
            Value::Data(bucket) => self.buckets.get(bucket),
            _ => None,
        }
    }

    fn frontend(&self, frontend: &Frontend, map: Map) -> InstalledFrontend {
        let key = element::frontend_key(frontend);
        let [inside, outside] = self.ends(map, &key).unwrap_or(&[End::Pass, End::Pass]);
        let treated = |end: &End, told: fn(Masquerade) -> bool| {
            let picker = match end {
                End::Chain(object) => Some(&**object),
                End::Drop | End::Pass => None,
            };
            match (picker, end) {
                (Some(Object::Picker { scope, count, masquerade, .. }), _) => Installed {
                    outcome: self.backends(frontend, &key, *scope, *count),
                    masquerade: told(*masquerade),
                },
                (Some(Object::StickyPicker { sticky, scope, masquerade, .. }), _) => Installed {
                    outcome: self.numbered(frontend, sticky, *scope),
                    masquerade: told(*masquerade),
                },
                (_, End::Drop) => Installed { outcome: Outcome::Drop, masquerade: false },
                _ => Installed { outcome: Outcome::Reject, masquerade: false },
            }
        };
        let outside =
            treated(outside, |masquerade| matches!(masquerade, Masquerade::Everybody | Masquerade::Foreign));
        InstalledFrontend {
            pod: if self.pods_are_told {
                treated(inside, |masquerade| masquerade == Masquerade::Everybody)
            } else {
                outside.clone()
            },
            host: treated(inside, |masquerade| masquerade != Masquerade::Nobody),
            outside,
            affinity: self.affinity(map, &key),
            allowed_sources: self.allowed_sources(&key),
            answered_here: self.found.get(Map::Answered, &key, None).is_some(),
        }
    }

    fn backends(&self, frontend: &Frontend, key: &Bytes, scope: Scope, count: u32) -> Outcome {
        let map = match frontend.destination {
            Destination::Address(_) => Map::Backends,
            Destination::NodePort(_) => Map::NodePortBackends,
        };
        let slots = scope.first_slot()..scope.first_slot() + count;
        let slots = slots.map(|slot| element::slot_key(key, slot));
        self.outcome(frontend, slots.filter_map(|key| self.found.get(map, &key, None)))
    }

    /// The backends in the slots of a sticky port.
    fn numbered(&self, frontend: &Frontend, sticky: &Sticky, scope: Scope) -> Outcome {
        let numbers = self.numbers.get(&(sticky.clone(), scope)).into_iter().flatten();
        self.outcome(frontend, numbers.filter_map(|number| self.found.get(Map::Numbered, number, None)))
    }

    fn outcome<'a>(&self, frontend: &Frontend, backends: impl Iterator<Item = &'a Value>) -> Outcome {
        let backends = backends.filter_map(|value| {
            let Value::Data(value) = value else { return None };
            let (address, port) = element::backend_of(self.family, value)?;
            Some(Backend { address, port, local: self.is_local(address, frontend.protocol, port) })
        });
        let mut backends: Vec<_> = backends.collect();
        backends.sort_unstable();
        Outcome::Backends(backends)
    }

    fn is_local(&self, address: IpAddr, protocol: Protocol, port: u16) -> bool {
        self.found.get(Map::Hairpin, &element::hairpin_key(address, protocol, port), None).is_some()
    }

    /// For how long clients are remembered: the names of the chains say it.
    fn affinity(&self, map: Map, key: &Bytes) -> Option<u32> {
        self.ends(map, key)?.iter().find_map(|end| match end {
            End::Chain(object) => match **object {
                Object::StickyPicker { seconds, .. } => Some(seconds),
                _ => None,
            },
            End::Drop | End::Pass => None,
        })
    }

    fn allowed_sources(&self, key: &Bytes) -> Option<Vec<ipnet::IpNet>> {
        let Value::Data(bucket) = self.found.get(Map::Guarded, key, None)? else { return None };
        let Value::Goto(guard) = self.found.get(Map::Guards, bucket, None)? else { return None };
        let mut networks = self.sources.get(&Object::parse(guard)?)?.clone();
        networks.sort_unstable();
        Some(networks)
    }
}
