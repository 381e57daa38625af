//! Reads a table as the [`State`] that all data planes share.
//!
//! In: the elements in the kernel. Out: frontends with the treatment of each class of sources.

use std::{collections::HashMap, io, net::IpAddr};

use super::{
    drop_reasons::NO_LOCAL_ENDPOINTS,
    kernel_state::KernelState,
    schema::{Map, backend_of, first_slot, frontend_key, frontend_of, hairpin_key, slot_key, split_address},
    shared_chains::{Branch, Masquerade, SharedObject},
    socket::Netlink,
    sources::range_of,
    sticky::Sticky,
    table::Table,
};
use crate::sys::libnftnl::{Bytes, Value};
use crate::{
    dataplane::{Installed, InstalledFrontend, Outcome, State},
    model::{Family, Protocol},
    plan::{Backend, BackendSet, Destination, Frontend},
};

/// Adds the content of `table` in the kernel to `state`. Without `detects_pods` pods are treated as outside sources.
pub(super) fn read(
    netlink: &mut Netlink,
    table: &Table,
    detects_pods: bool,
    state: &mut State,
) -> io::Result<()> {
    let mut kernel = KernelState::read(netlink, &table.raw, table.family)?;
    kernel.read_the_rest(netlink, &table.raw)?;
    let numbers = numbers(netlink, table, &kernel)?;
    let sources = sources(netlink, table, &kernel)?;
    let reader =
        Reader { family: table.family, detects_pods, buckets: buckets(&kernel), numbers, sources, kernel };
    let cluster_ips = reader.keys(Map::ClusterIps);
    state.cluster_ips.extend(cluster_ips.filter_map(|key| Some(split_address(reader.family, key)?.0)));
    for (map, refused) in [(Map::Services, Map::Refused), (Map::NodePorts, Map::RefusedNodePorts)] {
        for key in [map, refused].into_iter().flat_map(|map| reader.keys(map)) {
            let Some(frontend) = frontend_of(reader.family, key) else { continue };
            state.frontends.entry(frontend).or_insert_with(|| reader.frontend(&frontend, map));
        }
    }
    Ok(())
}

struct Reader {
    family: Family,
    detects_pods: bool,
    kernel: KernelState,
    /// Where each bucket leads: for pods and this host, and for outside sources.
    buckets: HashMap<Bytes, [Branch; 2]>,
    /// The numbers in the slots of sticky ports.
    numbers: HashMap<(Sticky, BackendSet), Vec<Bytes>>,
    /// The ranges that each guard allows.
    sources: HashMap<SharedObject, Vec<ipnet::IpNet>>,
}

fn sources(
    netlink: &mut Netlink,
    table: &Table,
    kernel: &KernelState,
) -> io::Result<HashMap<SharedObject, Vec<ipnet::IpNet>>> {
    let mut sources = HashMap::new();
    for name in &kernel.sets {
        if let Some(set @ SharedObject::Sources(_)) = SharedObject::parse(name) {
            let elements = netlink.elements(&table.raw, name)?;
            let ranges = elements.iter().filter_map(|element| range_of(table.family, element));
            sources.insert(SharedObject::Guard { sources: Box::new(set) }, ranges.collect());
        }
    }
    Ok(sources)
}

fn numbers(
    netlink: &mut Netlink,
    table: &Table,
    kernel: &KernelState,
) -> io::Result<HashMap<(Sticky, BackendSet), Vec<Bytes>>> {
    let mut numbers = HashMap::new();
    for name in &kernel.sets {
        if let Some(SharedObject::Slots { sticky, set }) = SharedObject::parse(name) {
            let elements = netlink.elements(&table.raw, name)?.into_iter();
            let values = elements.filter_map(|element| match element.value {
                Value::Data(number) => Some(number),
                _ => None,
            });
            numbers.insert((sticky, set), values.collect());
        }
    }
    Ok(numbers)
}

fn buckets(kernel: &KernelState) -> HashMap<Bytes, [Branch; 2]> {
    let elements = kernel.elements.get(&Map::Buckets).into_iter().flatten();
    let branches = elements.filter_map(|(key, value)| {
        let branches = match value {
            Value::Goto(name) if name == NO_LOCAL_ENDPOINTS => [Branch::Drop, Branch::Drop],
            Value::Goto(name) => match SharedObject::parse(name)? {
                SharedObject::Fork { inside, outside } => [inside, outside],
                picker => [(); 2].map(|()| Branch::Chain(Box::new(picker.clone()))),
            },
            Value::Accept(false) => [Branch::Drop, Branch::Drop],
            _ => [Branch::Pass, Branch::Pass],
        };
        Some((key.clone(), branches))
    });
    branches.collect()
}

impl Reader {
    fn keys(&self, map: Map) -> impl Iterator<Item = &Bytes> {
        self.kernel.elements.get(&map).into_iter().flatten().map(|(key, _)| key)
    }

    fn branches(&self, map: Map, key: &Bytes) -> Option<&[Branch; 2]> {
        match self.kernel.get(map, key)? {
            Value::Data(bucket) => self.buckets.get(bucket),
            _ => None,
        }
    }

    fn frontend(&self, frontend: &Frontend, map: Map) -> InstalledFrontend {
        let key = frontend_key(frontend);
        let [inside, outside] = self.branches(map, &key).unwrap_or(&[Branch::Pass, Branch::Pass]);
        let treated = |branch: &Branch, masquerades: fn(Masquerade) -> bool| {
            let picker = match branch {
                Branch::Chain(object) => Some(&**object),
                Branch::Drop | Branch::Pass => None,
            };
            match (picker, branch) {
                (Some(SharedObject::Picker { set, count, masquerade, .. }), _) => Installed {
                    outcome: self.backends(frontend, &key, *set, *count),
                    masquerade: masquerades(*masquerade),
                },
                (Some(SharedObject::StickyPicker { sticky, set, masquerade, .. }), _) => Installed {
                    outcome: self.numbered(frontend, sticky, *set),
                    masquerade: masquerades(*masquerade),
                },
                (_, Branch::Drop) => Installed { outcome: Outcome::Drop, masquerade: false },
                _ => Installed { outcome: Outcome::Reject, masquerade: false },
            }
        };
        let outside =
            treated(outside, |masquerade| matches!(masquerade, Masquerade::Always | Masquerade::Foreign));
        InstalledFrontend {
            pod: if self.detects_pods {
                treated(inside, |masquerade| masquerade == Masquerade::Always)
            } else {
                outside.clone()
            },
            host: treated(inside, |masquerade| masquerade != Masquerade::Never),
            outside,
            affinity: self.affinity(map, &key),
            allowed_sources: self.allowed_sources(&key),
            answered_here: self.kernel.get(Map::AnsweredHere, &key).is_some(),
        }
    }

    fn backends(&self, frontend: &Frontend, key: &Bytes, set: BackendSet, count: u32) -> Outcome {
        let map = match frontend.destination {
            Destination::Address(_) => Map::Backends,
            Destination::NodePort(_) => Map::NodePortBackends,
        };
        let slots = first_slot(set)..first_slot(set) + count;
        let slots = slots.map(|slot| slot_key(key, slot));
        self.outcome(frontend, slots.filter_map(|key| self.kernel.get(map, &key)))
    }

    /// The backends in the slots of a sticky port.
    fn numbered(&self, frontend: &Frontend, sticky: &Sticky, set: BackendSet) -> Outcome {
        let numbers = self.numbers.get(&(sticky.clone(), set)).into_iter().flatten();
        self.outcome(frontend, numbers.filter_map(|number| self.kernel.get(Map::Numbered, number)))
    }

    fn outcome<'a>(&self, frontend: &Frontend, backends: impl Iterator<Item = &'a Value>) -> Outcome {
        let backends = backends.filter_map(|value| {
            let Value::Data(value) = value else { return None };
            let (address, port) = backend_of(self.family, value)?;
            Some(Backend { address, port, local: self.is_local(address, frontend.protocol, port) })
        });
        let mut backends: Vec<_> = backends.collect();
        backends.sort_unstable();
        Outcome::Backends(backends)
    }

    fn is_local(&self, address: IpAddr, protocol: Protocol, port: u16) -> bool {
        self.kernel.get(Map::Hairpin, &hairpin_key(address, protocol, port)).is_some()
    }

    /// The timeout of session affinity, which is in the names of chains.
    fn affinity(&self, map: Map, key: &Bytes) -> Option<u32> {
        self.branches(map, key)?.iter().find_map(|branch| match branch {
            Branch::Chain(object) => match **object {
                SharedObject::StickyPicker { seconds, .. } => Some(seconds),
                _ => None,
            },
            Branch::Drop | Branch::Pass => None,
        })
    }

    fn allowed_sources(&self, key: &Bytes) -> Option<Vec<ipnet::IpNet>> {
        let Value::Data(bucket) = self.kernel.get(Map::SourceRanges, key)? else { return None };
        let Value::Goto(guard) = self.kernel.get(Map::Guards, bucket)? else { return None };
        let mut networks = self.sources.get(&SharedObject::parse(guard)?)?.clone();
        networks.sort_unstable();
        Some(networks)
    }
}
