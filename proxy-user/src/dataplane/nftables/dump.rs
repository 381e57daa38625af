//! Reads a table back as the [`State`] that all data planes share.
//!
//! In: the elements the kernel holds. Out: frontends with what each class of sources gets.

use std::{collections::HashMap, io, net::IpAddr};

use super::{
    adopt::Found,
    element,
    netlink::{Bytes, Value},
    object::{Masquerade, Object, Scope},
    ruleset::Map,
    socket::Netlink,
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
    let found = Found::read(netlink, &table.raw, table.family)?;
    let reader = Reader { family: table.family, pods_are_told, buckets: buckets(&found), found };
    let cluster_ips = reader.keys(Map::ClusterIps);
    state
        .cluster_ips
        .extend(cluster_ips.filter_map(|key| Some(element::split_address(reader.family, key)?.0)));
    for (main, outside, refused) in [
        (Map::Services, Map::OutsideServices, Map::Refused),
        (Map::NodePorts, Map::OutsideNodePorts, Map::RefusedNodePorts),
    ] {
        for key in [main, outside, refused].into_iter().flat_map(|map| reader.keys(map)) {
            let Some(frontend) = element::frontend_of(reader.family, key) else { continue };
            state.frontends.entry(frontend).or_insert_with(|| reader.frontend(&frontend, main, outside));
        }
    }
    Ok(())
}

/// What a bucket leads to.
enum End {
    Picker(Object),
    Drop,
    Pass,
}

struct Reader {
    family: Family,
    pods_are_told: bool,
    found: Found,
    buckets: HashMap<Bytes, End>,
}

fn buckets(found: &Found) -> HashMap<Bytes, End> {
    let elements = found.elements.get(&Map::Buckets).into_iter().flatten();
    let ends = elements.filter_map(|((key, _), value)| {
        let end = match value {
            Value::Goto(name) => End::Picker(Object::parse(name)?),
            Value::Accept(true) => End::Pass,
            _ => End::Drop,
        };
        Some((key.clone(), end))
    });
    ends.collect()
}

impl Reader {
    fn keys(&self, map: Map) -> impl Iterator<Item = &Bytes> {
        self.found.elements.get(&map).into_iter().flatten().map(|((key, _), _)| key)
    }

    fn end(&self, map: Map, key: &Bytes) -> Option<&End> {
        match self.found.get(map, key, None)? {
            Value::Data(bucket) => self.buckets.get(bucket),
            _ => None,
        }
    }

    fn frontend(&self, frontend: &Frontend, main: Map, outside: Map) -> InstalledFrontend {
        let key = element::frontend_key(frontend);
        let main = self.end(main, &key);
        let treated = |end: Option<&End>, told: fn(Masquerade) -> bool| match end {
            Some(End::Picker(Object::Picker { scope, count, masquerade, .. })) => Installed {
                outcome: self.backends(frontend, &key, *scope, *count),
                masquerade: told(*masquerade),
            },
            Some(End::Drop) => Installed { outcome: Outcome::Drop, masquerade: false },
            _ => Installed { outcome: Outcome::Reject, masquerade: false },
        };
        let outside = treated(self.end(outside, &key).or(main), |masquerade| {
            matches!(masquerade, Masquerade::Everybody | Masquerade::Foreign)
        });
        InstalledFrontend {
            pod: if self.pods_are_told {
                treated(main, |masquerade| masquerade == Masquerade::Everybody)
            } else {
                outside.clone()
            },
            host: treated(main, |masquerade| masquerade != Masquerade::Nobody),
            outside,
            affinity: self.affinity(frontend, &key),
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
        let backends = slots.filter_map(|slot| {
            let Value::Data(value) = self.found.get(map, &element::slot_key(key, slot), None)? else {
                return None;
            };
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

    fn affinity(&self, frontend: &Frontend, key: &Bytes) -> Option<u32> {
        let maps = match frontend.destination {
            Destination::Address(_) => [Map::Affinity, Map::OutsideAffinity],
            Destination::NodePort(_) => [Map::NodePortAffinity, Map::OutsideNodePortAffinity],
        };
        maps.into_iter().find_map(|map| match self.found.get(map, key, None)? {
            Value::Goto(name) => match Object::parse(name)? {
                Object::Recorder { seconds, .. } => Some(seconds),
                _ => None,
            },
            _ => None,
        })
    }

    fn allowed_sources(&self, key: &Bytes) -> Option<Vec<ipnet::IpNet>> {
        self.found.get(Map::Guarded, key, None)?;
        let ranges = self.found.elements.get(&Map::AllowedSources).into_iter().flatten();
        let networks = ranges.filter_map(|((first, last), _)| {
            let first = first.strip_prefix(key.as_slice())?;
            let last = last.as_ref()?.strip_prefix(key.as_slice())?;
            let address = |bytes| Some(element::split_address(self.family, bytes)?.0);
            element::network_of(address(first)?, address(last)?)
        });
        let mut networks: Vec<_> = networks.collect();
        networks.sort_unstable();
        Some(networks)
    }
}
